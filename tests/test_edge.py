"""Where favor meets the machine: signals, full disks, gone readers, secrets, and what pages give away."""

import errno
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import bad_settings
import pytest
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file
from test_server import Server

from favor import errors, run
from favor.cli import main
from favor.errors import StorageError, without_known_places, without_places, without_secrets
from favor.lint.settings import ELSEWHERE, LintConfig
from favor.run import writing
from favor.train.preference import TrainConfig

KEY = "sk-very-secret-0123456789"
SLOW = "import time\ndef score(prompts, responses):\n    open('started', 'w').close()\n    time.sleep(60)\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return bad_settings.prepare(tmp_path_factory.mktemp("edge"))


@pytest.fixture(scope="module")
def results(inputs, tmp_path_factory):
    """A sample of the corpus: every eleventh case, and all that is cheap to refuse."""
    chosen = bad_settings.CASES[::13]
    found = {}
    for case in chosen:
        if not case.slow:
            found[case.name] = bad_settings.outcome(case, inputs, tmp_path_factory.mktemp("case"))
    return found


def test_bad_settings_are_refused_in_one_line_or_honoured(results):
    """`python tests/bad_settings.py` goes through all of them."""
    assert len(bad_settings.CASES) > 350
    wrong = {name: found for name, found in results.items() if found.kind not in ("refused", "accepted")}
    assert not wrong
    assert len(results) > 25


@pytest.mark.slow
def test_every_bad_setting(inputs, tmp_path):
    wrong = {}
    for number, case in enumerate(bad_settings.CASES):
        (tmp_path / str(number)).mkdir()
        found = bad_settings.outcome(case, inputs, tmp_path / str(number))
        if found.kind not in ("refused", "accepted"):
            wrong[case.name] = found
    assert not wrong


def start(here, words, **options):
    program = [sys.executable, "-W", "ignore", "-c", "from favor.cli import main; main()", *map(str, words)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(program, cwd=here, **streams)


@pytest.fixture
def favor(monkeypatch, capsys, tmp_path):
    """Run the command line in this process: everything it says."""

    def run(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["favor", *map(str, words)])
        with pytest.raises(SystemExit):
            main()
        return "".join(capsys.readouterr())

    return run


def wait_for(path, process):
    for _ in range(6000):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize(
    ("command", "number", "kept"),
    [
        ("score", signal.SIGTERM, "nothing unfinished was kept; run the same command again"),
        pytest.param(
            "score", signal.SIGHUP, "nothing unfinished was kept; run the same command again", marks=pytest.mark.slow
        ),
        ("prefer", signal.SIGINT, "what was made so far is kept; run the same command again to continue"),
        pytest.param(
            "ppo",
            signal.SIGTERM,
            "no step was under way, so there was nothing to save; run the same command again",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_signal_ends_any_command_with_one_line(inputs, tmp_path, command, number, kept):
    """While a function of the user's sleeps, which even catches every Exception."""
    slow = SLOW.replace(
        "    time.sleep(60)", "    try:\n        time.sleep(60)\n    except Exception:\n        time.sleep(60)"
    )
    if command == "ppo":
        slow = "open('started', 'w').close()\nimport time; time.sleep(60)\n" + slow
    (tmp_path / "slow.py").write_text(slow)
    with start(tmp_path, [*bad_settings.base(command, inputs), "reward.path=slow.py:score"]) as process:
        wait_for(tmp_path / "started", process)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err == f"favor: stopped by {signal.Signals(number).name}; {kept}\n"
    assert not list(tmp_path.rglob("*.tmp"))
    left = {path.name for path in tmp_path.iterdir()} - {"slow.py", "started", "__pycache__"}
    assert left <= {"out.jsonl.partial"} if command == "prefer" else not left


@pytest.mark.slow
def test_a_signal_while_a_server_is_waited_for(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    asked = threading.Event()

    def never(number, path, body):
        asked.set()
        time.sleep(3)

    server = Server(never)
    words = ["sample", "out=o.jsonl", f"prompts={inputs / 'good.jsonl'}", "engine.kind=openai", "engine.server.model=m"]
    with start(tmp_path, [*words, f"engine.server.url={server.url}"]) as process:
        assert asked.wait(60)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
        assert time.monotonic() - began < 2
    server.close()
    assert (process.returncode, len(err.splitlines())) == (143, 1), err


@pytest.mark.slow
def test_a_signal_that_is_ignored_stays_ignored(inputs, tmp_path):
    """As under nohup."""
    (tmp_path / "slow.py").write_text(SLOW)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(tmp_path, [*bad_settings.base("score", inputs), "reward.path=slow.py:score"])
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        wait_for(tmp_path / "started", process)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143


@pytest.mark.slow
def test_a_terminal_that_hangs_up_costs_no_step(inputs, tmp_path):
    """The window is closed: the kernel sends SIGHUP and refuses every further line."""
    words = [*bad_settings.base("train", inputs), "train.max_steps=100000", "train.epochs=100000"]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, "-W", "ignore", "-m", "favor.cli", *words])
    metrics = tmp_path / "run/metrics.jsonl"
    reader = threading.Thread(target=_read_all, args=(terminal,), daemon=True)
    reader.start()
    for _ in range(6000):
        if metrics.exists() and '"kind": "step"' in metrics.read_text():
            break
        time.sleep(0.01)
    os.kill(child, signal.SIGHUP)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1


def _read_all(terminal):
    try:
        while os.read(terminal, 4096):
            pass
    except OSError:
        pass


@pytest.mark.slow
def test_a_full_disk_is_one_line_that_names_the_file(inputs, tmp_path):
    """A limit on the size of files is refused by the kernel as a full disk is, inside safetensors."""
    words = [*bad_settings.base("train", inputs), "train.max_steps=2", "save.every=1"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    with start(tmp_path, words, preexec_fn=limit) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1, err
    assert "run/checkpoints/step-000001: cannot be written" in err
    assert "free some space" in err
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["reference.safetensors"]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_whatever_a_write_meets_names_the_file(number, tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run, "fsync", refuse)
    for write in (lambda: run.write_text(tmp_path / "a.txt", "x"), lambda: fill(tmp_path / "folder")):
        with pytest.raises(StorageError, match=rf"{tmp_path}/(a.txt|folder): cannot be .*{os.strerror(number)}.*; "):
            write()
    assert not list(tmp_path.iterdir())


def fill(folder):
    with run.atomic_folder(folder) as aside:
        (aside / "x").write_text("x")


def test_errors_without_a_file_get_one(tmp_path):
    with pytest.raises(StorageError, match="here/it: cannot be written .No space left"), writing(Path("here/it")):
        raise OSError(errno.ENOSPC, "No space left on device")
    limit = "other: cannot be used .Too many open files.; raise the limit"
    with pytest.raises(StorageError, match=limit), writing(Path("here/it")):
        raise OSError(errno.EMFILE, "Too many open files", "other")


class Sized(BaseModel):
    size: int


def test_what_the_edge_explains_and_what_it_does_not(capsys):
    assert "train.max_tokens_per_pack" in errors.explained(torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"))
    assert "sample.batch" in errors.explained(MemoryError())
    with pytest.raises(RuntimeError) as full:
        torch.empty(1 << 50)
    assert errors.explained(full.value).startswith(
        "out of memory (can't allocate memory: you tried to allocate 45035996"
    )
    assert "nested too deeply" in errors.explained(RecursionError("maximum recursion depth"))
    assert "UTF-8" in errors.explained(UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"))
    assert "f.txt: cannot be used (Permission denied)" in errors.explained(
        PermissionError(13, "Permission denied", "f.txt")
    )
    with pytest.raises(ValidationError) as refused:
        Sized(size="x")
    assert "settings of Sized: 'size'" in errors.explained(refused.value)
    for mistake in (ValueError("x"), RuntimeError("x")):
        assert errors.explained(mistake) is None
    errors.our_mistake(RuntimeError, RuntimeError("an odd shape"), None)
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "favor: internal error, not caused by your input (RuntimeError: an odd shape); please report"
    )
    assert rest == ["RuntimeError: an odd shape"]


@pytest.mark.parametrize("words", [["--help"], pytest.param(["lint", "DATA"], marks=pytest.mark.slow)])
def test_a_reader_that_has_gone_is_no_error(inputs, tmp_path, words):
    words = [w.replace("DATA", f"data.train={inputs / 'good.jsonl'}") for w in words]
    reader, writer = os.pipe()
    os.close(reader)
    with start(tmp_path, words, stdout=writer) as process:
        os.close(writer)
        _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode in (0, 1)


@pytest.mark.slow
def test_a_terminal_without_the_letters_shows_their_numbers(inputs, tmp_path):
    rows = [{"prompt": "été 日本", "chosen": "", "rejected": "ю"}, *bad_settings.ROWS]
    bad_settings.lines(tmp_path / "ä.jsonl", rows)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    with start(tmp_path, ["lint", "data.train=ä.jsonl"], env=environment, stdout=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")
    assert "\\xe4.jsonl" in out


def test_a_key_reaches_no_file_and_no_line(inputs, tmp_path, monkeypatch, favor):
    """From a server that repeats the key in its errors and in its answers, across the cut of an excerpt too."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MY_KEY", KEY)
    spelled = KEY.replace("s", "\\u0073")

    closed = []

    def leak(number, path, body):
        if closed and number >= closed[0]:
            return 401, {}, f"not you, {KEY}"
        if number % 3 == 0:
            return 500, {}, "x" * 190 + f" you sent {KEY}"
        if number % 3 == 1:
            return 200, {}, '{"choices": "' + KEY + '"}'
        text = f'"answer {spelled} [[A]]"'
        return 200, {}, '{"choices": [{"message": {"role": "assistant", "content": ' + text + "}}]}"

    server = Server(leak)
    there = [
        f"{{0}}server.url={server.url}",
        "{0}server.model=m",
        "{0}server.api_key_env=MY_KEY",
        "{0}server.backoff_s=0",
    ]
    said = ""
    sample = ["sample", "out=o.jsonl", f"prompts={inputs / 'good.jsonl'}", "engine.kind=openai"]
    judge = [w for w in bad_settings.base("winrate", inputs) if not w.startswith("judge")]
    said += favor(*sample, *(w.format("engine.") for w in there), "engine.server.retries=30")
    # one answer is kept, then the server refuses
    closed.append(len(server.requests) + 3)
    said += favor(*sample, *(w.format("engine.") for w in there), "out=p.jsonl", "engine.server.concurrency=1")
    closed.clear()
    said += favor(*judge, "judge.kind=openai", *(w.format("judge.") for w in there), "judge.server.retries=30")
    said += favor("report", "run")
    server.close()
    assert any(KEY in headers["Authorization"] for headers in server.headers)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"o.jsonl", "p.jsonl.partial", "config.toml", "winrate.json", "report.html"} <= {path.name for path in files}
    assert "answer ***" in (tmp_path / "o.jsonl").read_text()
    for text in (said, *(path.read_text("utf-8") for path in files)):
        assert KEY[:8] not in text
        assert spelled not in text


def test_secrets_are_taken_out_of_any_message(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("SHORT_KEY", "abc")
    assert without_secrets("token hf_0123456789 at https://ann:pw@host/x?api_key=1&b=2") == (
        "token *** at https://***@host/x?api_key=***&b=2"
    )
    assert without_secrets("abc is short", "") == "abc is short"
    assert without_secrets("see https://host/a@b and ann@host") == "see https://host/a@b and ann@host"


def test_paths_are_cut_to_their_last_name():
    assert without_places('model = "/home/ann/models/tiny"') == 'model = "tiny"'
    assert without_places("stored in /home/ann/my runs/a/ref.safetensors", ["/home/ann/my runs/a/x"]) == (
        "stored in ref.safetensors"
    )
    assert without_places("judge http://localhost:8000/v1, runs/a/b, 3/4, ~/x/y.py:score") == (
        "judge http://localhost:8000/v1, runs/a/b, 3/4, y.py:score"
    )
    assert without_known_places("/usr/bin/ls and /data/a/x.jsonl", ["/data/**/x.jsonl"]) == "/usr/bin/ls and a/x.jsonl"


def test_pages_and_cards_name_no_place_of_this_machine(inputs, tmp_path, favor):
    home = tmp_path / "home of ann"
    home.mkdir()
    rows = [*bad_settings.ROWS, {"prompt": "run /usr/local/bin/tool", "chosen": "", "rejected": "x"}]
    bad_settings.lines(home / "d.jsonl", rows)
    words = [*bad_settings.base("train", inputs), f"run={home / 'run'}", f"data.train={home / 'd.jsonl'}"]
    words += ["data.bad_rows=drop", "model.lora.rank=2", f"reference.store={home / 'ref.safetensors'}"]
    lint = ["lint", f"data.train={home / '*.jsonl'}", f"lint.page={home / 'lint.html'}", f"lint.fix={home / 'f.jsonl'}"]
    for command in (words, ["report", home / "run"], lint):
        assert "favor: " not in favor(*command)
    pages = [home / "run/report.html", home / "lint.html", home / "run/model/README.md"]
    for page in pages:
        text = re.sub(r"<script.*?</script>", "", page.read_text("utf-8"), flags=re.DOTALL)
        for place in (str(tmp_path), str(inputs), "home of ann", str(Path.home()) + "/"):
            assert place not in text, page
    assert "d.jsonl" in pages[0].read_text("utf-8")
    # what loads must still find its base, and nothing else that is handed on names it
    naming = {p.name for p in (home / "run/model").iterdir() if str(inputs).encode() in p.read_bytes()}
    assert naming == {"adapter_config.json"}
    assert json.loads((home / "run/model/adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pkl", "adapter_model.bin"])
def test_weights_other_than_safetensors_are_refused_and_never_unpickled(name, inputs, tmp_path, favor):
    """A file that runs a command when it is unpickled, and one that torch would load, in place of the weights."""
    kind = "adapter" if "adapter" in name else "model"
    words = [*bad_settings.base("train", inputs), "model.path=broken"]
    if kind == "adapter":
        assert "favor: " not in favor(*bad_settings.base("train", inputs), "run=lora", "model.lora.rank=2")
        (tmp_path / "lora/model").rename(tmp_path / "broken")
        favor(*words, "run=a")
        assert (tmp_path / "a/model").exists(), "as safetensors it must load"
    else:
        shutil.copytree(inputs / "model", tmp_path / "broken")
    weights = tmp_path / f"broken/{kind}{'_model' if kind == 'adapter' else ''}.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    for number, content in enumerate((tensors, Bomb(tmp_path / "run by a pickle"))):
        torch.save(content, tmp_path / "broken" / name)
        said = favor(*words, f"run=r{number}")
        assert said.startswith("favor: broken: "), said
        assert not (tmp_path / f"r{number}").exists()
        assert not (tmp_path / "run by a pickle").exists()


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_lint_knows_every_section_of_a_training_recipe():
    assert TrainConfig.model_fields.keys() <= LintConfig.model_fields.keys() | ELSEWHERE
