"""One client for every server that speaks the OpenAI protocol: patient, and clear when patience ends.

In: section [server] and messages or a prompt. Out: the text of one reply; `parallel` runs many such requests.
Why not the `openai` package: docs/log.md. Next: generate/engines.py.
"""

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

import httpx2
from pydantic import BaseModel, Field, field_validator

from favor.config import STRICT
from favor.errors import ConfigError, FavorError, ServerError, clipped, without_secrets

T = TypeVar("T")
# Longest wait between two attempts, seconds: our own back-off, and what a server may ask for.
_LONGEST_WAIT, _LONGEST_RETRY_AFTER = 30.0, 120.0
_KEPT = "then run the same command again: what is done is kept"


class ServerConfig(BaseModel):
    """Section [server]: any server that speaks the OpenAI protocol."""

    model_config = STRICT
    url: str
    """The base url, which ends in /v1."""
    model: str
    """The model's name at the server."""
    api_key_env: str | None = None
    """The environment variable that holds the key, if the server asks for one."""
    timeout_s: float = Field(default=60, gt=0)
    """Seconds without an answer after which an attempt has failed."""
    retries: int = Field(default=5, ge=0)
    """A failed request is tried again this many times before the command gives up."""
    concurrency: int = Field(default=4, ge=1)
    """Requests under way at a time."""
    backoff_s: float = Field(default=0.5, ge=0)
    """Seconds before the second attempt; the wait doubles with every further one."""

    @field_validator("url")
    @classmethod
    def _is_a_base_url(cls, url: str) -> str:
        """Nor does it hold anything secret: it goes into files and messages, so what is refused here is not repeated."""
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL:
            raise ValueError("what was given is not a url; give one like http://localhost:8000/v1") from None
        if parsed.userinfo or parsed.query or parsed.fragment or "@" in url:
            raise ValueError(
                "holds a user name, a password or a query, which would get into files and logs; give http(s)://HOST/v1 "
                "alone, put the key into an environment variable and name that in server.api_key_env"
            )
        if parsed.port is not None and not 0 < parsed.port < 1 << 16:
            raise ValueError(f"port {parsed.port} is not possible; give one from 1 to 65535")
        if parsed.scheme not in ("http", "https") or not parsed.host or not parsed.path.rstrip("/").endswith("/v1"):
            raise ValueError(f"{clipped(url)!r}: expected http(s)://HOST/v1, the base url that ends in /v1")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        """Not the key itself, which would get into config.toml: what does not look like a name is not repeated."""
        if name is not None and name not in os.environ and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError(
                "what was given is neither an environment variable that is set nor a name in capitals like "
                "OPENAI_API_KEY; it may be the key itself and is not shown: put the key into a variable and name that"
            )
        return name


class Reply(NamedTuple):
    """A response of a model: its text, and whether it came to its end rather than to the length limit."""

    text: str
    ended: bool


class _FailedError(Exception):
    """An attempt that may be repeated: what happened, and how long the server asks us to wait."""

    def __init__(self, what: str, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.wait_s = wait_s


def answer(
    config: ServerConfig,
    asked: str | Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    temperature: float,
    seed: int | None,
) -> Reply:
    """The continuation of a plain text, or the reply to a conversation: attempts until one succeeds.

    Raises ServerError when the server refuses the request or no attempt succeeds, ConfigError without the key.
    """
    path, name = ("/completions", "prompt") if isinstance(asked, str) else ("/chat/completions", "messages")
    body = {name: asked, "max_tokens": max_tokens, "temperature": temperature}
    url, key = config.url + path, _key(config)
    request = {"model": config.model, **body} | ({} if seed is None else {"seed": seed})
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    last = "nothing was tried"
    # plain http needs no certificates, and loading them costs more than a request
    with httpx2.Client(headers=headers, timeout=config.timeout_s, verify=config.url.startswith("https:")) as client:
        for attempt in range(config.retries + 1):
            try:
                return _attempt(client, url, request, key)
            except _FailedError as reason:
                last = str(reason)
                if attempt < config.retries:
                    time.sleep(max(reason.wait_s, _backoff(config, attempt, body)))
    raise ServerError(
        f"{url}: no usable reply after {config.retries + 1} attempts, the last: {last}; check that the server is up, {_KEPT}"
    )


def parallel(config: ServerConfig, jobs: Sequence[Callable[[], T]], done: Callable[[int, T], None]) -> None:
    """Run jobs on `concurrency` threads; `done(index, result)` is called here, as each finishes.

    After the first FavorError no job starts; those under way are waited for and handed over, then it is raised.
    """
    failed = threading.Event()
    failure: FavorError | None = None

    def run(job: Callable[[], T]) -> tuple[T] | None:
        if failed.is_set():
            return None
        try:
            return (job(),)
        except FavorError:
            failed.set()
            raise

    pool = ThreadPoolExecutor(config.concurrency)
    try:
        index_of = {pool.submit(run, job): index for index, job in enumerate(jobs)}
        for future in as_completed(index_of):
            try:
                result = future.result()
            except FavorError as error:
                failure = failure or error
            else:
                if result is not None:
                    done(index_of[future], *result)
    finally:
        # not waited for when something else ends the block: a request under way may take minutes, a signal must not
        pool.shutdown(wait=False, cancel_futures=True)
    if failure is not None:
        raise failure


def _attempt(client: httpx2.Client, url: str, body: Mapping[str, Any], key: str) -> Reply:
    """One request. Raises _FailedError when it is worth repeating, ServerError when it is not.

    A server may repeat the key in what it says: it is taken out of everything that is kept or shown, before it is cut.
    """
    try:
        response = client.post(url, json=body)
    except httpx2.RequestError as error:
        raise _FailedError(f"{type(error).__name__}: {without_secrets(str(error), key)}") from None
    status, excerpt = response.status_code, without_secrets(response.text, key)[:200].strip()
    if status == 429 or status >= 500:
        raise _FailedError(f"status {status}: {excerpt}", _retry_after(response))
    if status != 200:
        raise ServerError(
            f"{url}: status {status} after 1 attempt: {excerpt}; fix [server] (url, model, api_key_env) or the request, {_KEPT}"
        )
    try:
        choice = json.loads(response.content)["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        # a server that does not say why it stopped came to an end
        ended = choice.get("finish_reason") != "length"
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        text, ended = None, True
    if not isinstance(text, str):
        raise _FailedError(f"a body without choices[0] text: {excerpt!r}")
    if len(key) >= 8:
        text = text.replace(key, "***")
    # half a surrogate pair is JSON but not text that a file can hold
    return Reply(text.encode("utf-8", "replace").decode("utf-8"), ended)


def _key(config: ServerConfig) -> str:
    """The key, or nothing where none is asked for."""
    if config.api_key_env is None:
        return ""
    key, where = os.environ.get(config.api_key_env, "").strip(), f"server.api_key_env = '{config.api_key_env}'"
    if not key:
        raise ConfigError(f"{where}: no such environment variable; set it, or remove the option")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"{where}: what this variable holds cannot be sent in a header (a line break, or letters beyond ASCII); set it "
            "to the key alone"
        )
    return key


def _backoff(config: ServerConfig, attempt: int, body: Mapping[str, Any]) -> float:
    """Doubling waits; half of each is jitter, so that requests which failed together do not come back together."""
    whole = min(_LONGEST_WAIT, config.backoff_s * 2.0**attempt)
    return whole * random.Random(f"{attempt} {json.dumps(body)}").uniform(0.5, 1.0)


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks for (a number or a date), bounded; 0 when it says nothing we can read."""
    said = response.headers.get("Retry-After", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(0.0, seconds), _LONGEST_RETRY_AFTER)
