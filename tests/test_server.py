"""The client against real HTTP: what is retried, what is not, and that nothing is lost when a server dies."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest
import tiny
from transformers.utils.import_utils import is_serve_available

from favor.config import load
from favor.errors import ConfigError, ServerError
from favor.generate.samples import SamplesConfig, write_samples
from favor.server import ServerConfig, answer, parallel


def reply(text):
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def die(handler):
    handler.close_connection = True
    handler.connection.close()


class Server:
    """Answers by `script(number, path, body)` -> (status, headers, body) or None to die; keeps every request."""

    def __init__(self, script):
        self.requests, self.headers, self.script = [], [], script
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append((self.path, body))
                    outer.headers.append(dict(self.headers))
                answer = outer.script(number, self.path, body)
                if answer is None:
                    die(self)
                    return
                status, headers, text = answer
                data = text if isinstance(text, bytes) else text.encode()
                self.send_response(status)
                for name, value in ({"Content-Length": len(data)} | headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *unused):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *unused: None
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = []

    def start(*answers, script=None):
        """The answers in turn, the last one for ever."""
        started.append(Server(script or (lambda number, path, body: answers[min(number, len(answers) - 1)])))
        return started[-1]

    yield start
    for server in started:
        server.close()


def settings(server, **more):
    return ServerConfig(**({"url": server.url, "model": "m", "backoff_s": 0.001, "timeout_s": 5, "retries": 3} | more))


def ask(config, **more):
    return answer(config, [{"role": "user", "content": "hello"}], max_tokens=9, temperature=0.5, seed=4, **more).text


def test_a_good_answer_and_what_was_asked(serve, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret\n")
    server = serve(reply("hi"))
    assert ask(settings(server, url=server.url + "/", api_key_env="A_KEY")) == "hi"
    expected = {"model": "m", "max_tokens": 9, "temperature": 0.5, "seed": 4}
    assert server.requests == [
        ("/v1/chat/completions", expected | {"messages": [{"role": "user", "content": "hello"}]})
    ]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    plain = serve((200, {}, json.dumps({"choices": [{"text": " on"}]})))
    assert answer(settings(plain), "go", max_tokens=9, temperature=0.5, seed=None).text == " on"
    assert plain.requests == [("/v1/completions", {"model": "m", "max_tokens": 9, "temperature": 0.5, "prompt": "go"})]
    assert "Authorization" not in plain.headers[0]


BROKEN = {
    "500 twice": [(500, {}, "oops"), (503, {}, "")],
    "not JSON": [(200, {}, "<html>")],
    "not UTF-8": [(200, {}, b'{"choices": "\xff"}')],
    "no choices": [(200, {}, '{"choices": []}')],
    "no text": [(200, {}, '{"choices": [{"message": {"content": null}}]}')],
    "a list": [(200, {}, "[1]")],
    "dies": [None],
    "short body": [(200, {"Content-Length": 999, "Connection": "close"}, "{}")],
    "damaged gzip": [(200, {"Content-Encoding": "gzip"}, "nonsense")],
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_may_pass_is_tried_again(name, serve):
    server = serve(*BROKEN[name], reply("well"))
    if name == "short body":
        # the server keeps the promised bytes to itself: it must hang up, or time out
        assert ask(settings(server, timeout_s=0.3)) == "well"
    else:
        assert ask(settings(server)) == "well"
    assert len(server.requests) == len(BROKEN[name]) + 1


def test_retry_after_is_honoured(serve):
    server = serve((429, {"Retry-After": "0.4"}, "slow down"), reply("well"))
    began = time.monotonic()
    assert ask(settings(server)) == "well"
    assert 0.4 <= time.monotonic() - began < 3
    for nonsense in ("soon", "nan", "-5", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert ask(settings(serve((429, {"Retry-After": nonsense}, ""), reply("well")))) == "well"


def test_a_hanging_server_times_out_and_is_asked_again(serve):
    def script(number, path, body):
        if number == 0:
            time.sleep(0.5)
        return reply("well")

    server = serve(script=script)
    assert ask(settings(server, timeout_s=0.1)) == "well"


def test_patience_ends_with_a_clear_message(serve):
    server = serve((500, {}, "out of memory"))
    with pytest.raises(
        ServerError, match=r"/v1/chat/completions: no usable reply after 4 attempts, .*status 500: out of memory.*kept"
    ):
        ask(settings(server))
    assert len(server.requests) == 4
    server.close()
    with pytest.raises(ServerError, match=r"after 2 attempts, the last: Connect"):
        ask(settings(server, retries=1))
    server.close = lambda: None


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_a_refusal_fails_at_once(status, serve):
    server = serve((status, {"Location": "/elsewhere"}, "no such key"), reply("well"))
    with pytest.raises(ServerError, match=rf"status {status} after 1 attempt: no such key; fix \[server\]"):
        ask(settings(server))
    assert len(server.requests) == 1


def test_settings_that_cannot_work(serve, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"NO_SUCH_KEY.*no such environment variable"):
        ask(settings(serve(reply("")), api_key_env="NO_SUCH_KEY"))
    for url in ("localhost:8000/v1", "http://localhost:8000", "ftp://x/v1", "http://x:port/v1"):
        with pytest.raises(ConfigError, match="url"):
            load(ServerConfig, None, [f"url={url}", "model=m"])


def test_parallel_hands_over_here_and_stops_at_the_first_failure():
    config = ServerConfig(url="http://x/v1", model="m", concurrency=3)
    here, got, running = threading.get_ident(), {}, []

    def job(i):
        running.append(i)
        time.sleep(0.02)
        if i == 4:
            raise ServerError("down")
        return i * i

    def done(i, result):
        assert threading.get_ident() == here
        got[i] = result

    jobs = [partial(job, i) for i in range(30)]
    with pytest.raises(ServerError, match="down"):
        parallel(config, jobs, done)
    assert sorted([*got, 4]) == sorted(running)
    assert len(running) < 10
    got.clear()
    parallel(config, [partial(job, i) for i in (0, 1, 2, 3)], done)
    assert got == {0: 0, 1: 1, 2: 4, 3: 9}
    parallel(config, [], done)


def sample_words(here, server, *more):
    return [
        f"out={here / 'out.jsonl'}",
        f"prompts={here / 'prompts.jsonl'}",
        "engine.kind=openai",
        f"engine.server.url={server.url}",
        "engine.server.model=m",
        "engine.server.backoff_s=0.001",
        "engine.server.retries=1",
        "engine.server.concurrency=2",
        *more,
    ]


def echo(number, path, body):
    prompt = body["messages"][-1]["content"]
    return reply(f"{prompt}\u2028{body['seed']} \ud800")


def run_sample(words):
    return write_samples(load(SamplesConfig, None, words), lambda label, done, total: None)


def write_prompts(here, rows):
    (here / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_server_that_dies_costs_nothing(serve, tmp_path):
    """A dead server: a clear error, the partial file stays; back again: one line per prompt, nothing asked twice."""
    prompts = [f"film {i}" for i in range(12)] + [[{"role": "user", "content": "in turns"}]]
    write_prompts(tmp_path, [{"prompt": prompt} for prompt in prompts])
    up = serve(script=echo)
    unbroken = tmp_path / "unbroken.jsonl"
    assert run_sample([*sample_words(tmp_path, up, "samples_per_prompt=2"), f"out={unbroken}"]) == 26
    state = {"down": True}
    server = serve(
        script=lambda number, path, body: echo(number, path, body) if number < 9 or not state["down"] else None
    )
    words = sample_words(tmp_path, server, "samples_per_prompt=2")
    with pytest.raises(ServerError, match=r"after 2 attempts.*run the same command again"):
        run_sample(words)
    assert not (tmp_path / "out.jsonl").exists()
    partial_file = tmp_path / "out.jsonl.partial"
    kept = [json.loads(line) for line in partial_file.read_bytes().splitlines()[1:]]
    assert len(kept) == 9
    answered = server.requests[:9]
    with partial_file.open("a") as file:
        file.write('[25, "torn by a ki')
    server.requests.clear()
    state["down"] = False
    assert run_sample([*words, "engine.server.concurrency=4", "engine.server.timeout_s=9"]) == 26
    assert len(server.requests) == 26 - 9
    assert not [request for request in server.requests if request in answered]
    assert (tmp_path / "out.jsonl").read_bytes() == unbroken.read_bytes()
    assert not partial_file.exists()
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert all(len(set(row["responses"])) == 2 for row in rows)
    assert len({body["seed"] for _, body in up.requests}) == 26
    assert max(body["seed"] for _, body in up.requests) < 2**31


def test_other_settings_do_not_continue_a_partial_file(serve, tmp_path):
    write_prompts(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    # one answer is kept, then the server refuses
    server = serve(reply("kept"), (401, {}, "no"))
    with pytest.raises(ServerError):
        run_sample(sample_words(tmp_path, server))
    for other in ("seed=1", "sample.temperature=0.5", "engine.server.model=n", "samples_per_prompt=2", "max_prompts=1"):
        with pytest.raises(ConfigError, match=r"out.jsonl.partial: was started with other settings.*delete it"):
            run_sample(sample_words(tmp_path, server, other))
    (tmp_path / "out.jsonl.partial").write_text("{}\nx\n")
    with pytest.raises(ConfigError, match=r"out.jsonl.partial: damaged.*delete it"):
        run_sample(sample_words(tmp_path, server))


def test_plain_text_goes_to_completions(serve, tmp_path):
    write_prompts(tmp_path, [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}])
    server = serve((200, {}, json.dumps({"choices": [{"text": "on"}]})))
    words = sample_words(tmp_path, server, "engine.template=plain", "sample.max_new_tokens=7")
    assert run_sample(words) == 2
    assert {path for path, _ in server.requests} == {"/v1/completions"}
    assert {body["prompt"] for _, body in server.requests} == {"a", "\n\nHuman: b\n\nAssistant:"}
    assert {body["max_tokens"] for _, body in server.requests} == {7}


def test_options_that_the_engine_does_not_read(serve, tmp_path):
    server = serve(reply(""))
    for word, message in {
        "engine.model.path=x": "engine.model.path'.*not read by kind 'openai'",
        "engine.batch=3": "engine.batch'.*not read by kind 'openai'",
        "engine.special_text=allow": "engine.special_text'.*not read by kind 'openai'",
        "engine.kind=transformers": "'engine.model' is not set",
        "best_of=3": "go together",
    }.items():
        with pytest.raises(ConfigError, match=message):
            run_sample(sample_words(tmp_path, server, word))
    with pytest.raises(ConfigError, match="'engine.server' is not set"):
        run_sample(["out=o", "prompts=p", "engine.kind=openai"])
    with pytest.raises(ConfigError, match="engine.server.url'.*not read by kind 'vllm'"):
        run_sample(sample_words(tmp_path, server, "engine.kind=vllm", "engine.model.path=x"))


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="transformers serve needs the extra favor[serving]")
def test_a_real_server(tmp_path, monkeypatch):
    """The protocol as somebody else understands it: chat and plain text against `transformers serve`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tiny.save(tmp_path / "model")
    write_prompts(tmp_path, [{"prompt": "a film"}, {"prompt": "another"}])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    words = ["serve", str(tmp_path / "model"), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(
        [sys.executable, "-c", program, *words],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            _wait_until_up(f"http://127.0.0.1:{port}/health", process)
            for template in ("chat", "plain"):
                again = [
                    f"out={tmp_path / template}.jsonl",
                    f"prompts={tmp_path / 'prompts.jsonl'}",
                    "engine.kind=openai",
                    f"engine.server.url=http://127.0.0.1:{port}/v1",
                    f"engine.server.model={tmp_path / 'model'}",
                    f"engine.template={template}",
                    "sample.max_new_tokens=4",
                ]
                assert run_sample(again) == 2
                assert len((tmp_path / f"{template}.jsonl").read_bytes().splitlines()) == 2
        finally:
            process.terminate()


def _wait_until_up(url, process):
    for _ in range(600):
        assert process.poll() is None, "transformers serve ended by itself"
        try:
            if httpx2.get(url).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    raise AssertionError("transformers serve did not come up")
