"""One client for every server that speaks the OpenAI protocol: patient, and clear when patience ends.

In: section [server] and messages or a prompt. Out: the text of one reply; `parallel` runs many such requests.
Next: eval/engines.py.
"""

import contextlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

import httpx2
from pydantic import BaseModel, Field, field_validator

from favor.config import STRICT
from favor.errors import ConfigError, FavorError, ServerError, clipped
from favor.hide import without_secrets

T = TypeVar("T")
# Longest wait between two attempts, seconds: our own back-off, and what a server may ask for.
_LONGEST_WAIT, _LONGEST_RETRY_AFTER = 30.0, 120.0


class ServerConfig(BaseModel):
    """Section [server]. url: the base url, ending in /v1. api_key_env: the environment variable that holds the key.

    A request is tried 1 + `retries` times, with waits that double from `backoff_s`; `concurrency` run at a time.
    """

    model_config = STRICT
    url: str
    model: str
    api_key_env: str | None = None
    timeout_s: float = Field(default=60, gt=0)
    retries: int = Field(default=5, ge=0)
    concurrency: int = Field(default=4, ge=1)
    backoff_s: float = Field(default=0.5, ge=0)

    @field_validator("url")
    @classmethod
    def _is_a_base_url(cls, url: str) -> str:
        """Nor does it hold anything secret: it goes into files and messages, so what is refused here is not repeated."""
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL:
            raise ValueError("what was given is no url; give one like http://localhost:8000/v1") from None
        if parsed.userinfo or parsed.query or parsed.fragment or "@" in url:
            raise ValueError(
                "holds a user name, a password or a query, which would get into files and logs; give http(s)://HOST/v1 "
                "alone, put the key into an environment variable and name that in server.api_key_env"
            )
        if parsed.port is not None and not 0 < parsed.port < 1 << 16:
            raise ValueError(f"port {parsed.port} cannot be; give one from 1 to 65535")
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
    """What a server said, and whether it came to its end rather than to max_tokens."""

    text: str
    ended: bool


class _RefusedError(Exception):
    """An attempt that may be repeated: what happened, and how long the server asks us to wait."""

    def __init__(self, what: str, wait_s: float = 0.0, *, by_caller: bool = False) -> None:
        super().__init__(what)
        self.wait_s = wait_s
        self.by_caller = by_caller


def chat(
    config: ServerConfig,
    messages: list[dict[str, str]],
    *,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    accept: Callable[[str], bool] = lambda text: True,
) -> Reply:
    """The reply to a conversation. A reply that `accept` refuses is asked for again, with the next seed.

    Raises ServerError when the server refuses the request or no attempt succeeds, ConfigError without the key.
    """
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature}
    return _ask(config, "/chat/completions", body, seed, accept)


def complete(config: ServerConfig, prompt: str, *, max_tokens: int, temperature: float, seed: int | None) -> Reply:
    """The continuation of a plain text. Raises what `chat` raises."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature}
    return _ask(config, "/completions", body, seed, lambda text: True)


def parallel(config: ServerConfig, jobs: Sequence[Callable[[], T]], done: Callable[[int, T], None]) -> None:
    """Run jobs on `concurrency` threads; `done(index, result)` is called here, as each finishes.

    After the first FavorError no job starts; those under way are waited for and handed over, then it is raised.
    """
    failure: FavorError | None = None
    index_of: dict[Future[T], int] = {}
    following = iter(range(len(jobs)))
    with _threads(config.concurrency) as pool:

        def start_some() -> None:
            while len(index_of) < config.concurrency and (index := next(following, None)) is not None:
                index_of[pool.submit(jobs[index])] = index

        start_some()
        while index_of:
            finished, _ = wait(index_of, return_when=FIRST_COMPLETED)
            for future in sorted(finished, key=lambda f: index_of[f]):
                index = index_of.pop(future)
                try:
                    result = future.result()
                except FavorError as error:
                    failure = failure or error
                else:
                    done(index, result)
            if failure is None:
                start_some()
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _threads(count: int) -> Generator[ThreadPoolExecutor]:
    """A pool that is not waited for when the block fails: a request under way may take minutes, and a signal must not."""
    pool = ThreadPoolExecutor(count)
    finished = False
    try:
        yield pool
        finished = True
    finally:
        pool.shutdown(wait=finished, cancel_futures=True)


def _ask(
    config: ServerConfig, path: str, body: Mapping[str, Any], seed: int | None, accept: Callable[[str], bool]
) -> Reply:
    """Attempts until one succeeds."""
    url, key, refused = config.url + path, _key(config), 0
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # plain http needs no certificates, and loading them costs more than a request
    with httpx2.Client(headers=headers, timeout=config.timeout_s, verify=config.url.startswith("https:")) as client:
        last = "nothing was tried"
        for attempt in range(config.retries + 1):
            asked = {"model": config.model, **body} | ({} if seed is None else {"seed": seed + refused})
            try:
                return _attempt(client, url, asked, accept, key)
            except _RefusedError as reason:
                last, refused = str(reason), refused + reason.by_caller
                if attempt < config.retries:
                    time.sleep(max(reason.wait_s, _backoff(config, attempt, body)))
    raise ServerError(
        f"{url}: no usable reply after {config.retries + 1} attempts, the last: {last}; see that the server is up, "
        "then run the same command again: what is done is kept"
    )


def _attempt(
    client: httpx2.Client, url: str, body: Mapping[str, Any], accept: Callable[[str], bool], key: str
) -> Reply:
    """One request. Raises _RefusedError when it is worth repeating, ServerError when it is not.

    A server may repeat the key in what it says: it is taken out of everything that is kept or shown, before it is cut.
    """
    try:
        response = client.post(url, json=body)
    except httpx2.RequestError as error:
        raise _RefusedError(f"{type(error).__name__}: {without_secrets(str(error), key)}") from None
    status, excerpt = response.status_code, without_secrets(response.text, key)[:200].strip()
    if status == 429 or status >= 500:
        raise _RefusedError(f"status {status}: {excerpt}", _retry_after(response))
    if status != 200:
        raise ServerError(
            f"{url}: status {status} after 1 attempt: {excerpt}; fix [server] (url, model, api_key_env) or the request, "
            "then run the same command again: what is done is kept"
        )
    reply = _reply(response.content, excerpt, key)
    if not accept(reply.text):
        raise _RefusedError(f"a reply that cannot be used: {reply.text[:200]!r}", by_caller=True)
    return reply


def _reply(content: bytes, excerpt: str, key: str) -> Reply:
    """The text of the first choice, of either kind of request. A server that does not say why it stopped came to an end."""
    ended = True
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        ended = choice.get("finish_reason") != "length"
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise _RefusedError(f"a body without choices[0] text: {excerpt!r}")
    if len(key) >= 8:
        text = text.replace(key, "***")
    # half a surrogate pair is JSON but no text that a file can hold
    return Reply(text.encode("utf-8", "replace").decode("utf-8"), ended)


def _key(config: ServerConfig) -> str:
    """The key, or nothing where none is asked for."""
    if config.api_key_env is None:
        return ""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"server.api_key_env = '{config.api_key_env}': no such environment variable; set it, or remove the option"
        )
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"server.api_key_env = '{config.api_key_env}': what this variable holds cannot be sent in a header (a line "
            "break, or letters beyond ASCII); set it to the key alone"
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
