"""Checkpoints are written while training goes on: a true copy, whole or absent, and no error of the writing is lost."""

import concurrent.futures
import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_stored import inputs, training, words  # noqa: F401 (a fixture)
from test_training import StopAt, curve

from favor.config import load
from favor.errors import NumericsError, StorageError
from favor.model.room import Room
from favor.parts import collected
from favor.ranks import World
from favor.run import RunFolder, read_jsonl
from favor.stop import StoppedError, StopRequest
from favor.train import checkpoint, loop, preference
from favor.train.checkpoint import checkpoints
from favor.train.optim import AdamW, Rmsprop, make_optimizer
from favor.train.preference import TrainConfig, train
from favor.train.session import Background, Session, TrainingState
from favor.train.step import Learner

PROGRAM = Path(__file__).with_name("saving_program.py")
SAVE_FILE = checkpoint.save_file


def learner(optim):
    """A matrix seen across its storage, a vector, a reference that follows; all of them move with every `moved`."""
    parameters = {"a": torch.nn.Parameter(torch.randn(7, 5).t()), "b": torch.nn.Parameter(torch.randn(3))}
    made = Learner(
        parameters, make_optimizer(optim, parameters), 1.0, torch.device("cpu"), World(), {"r": torch.randn(4)}
    )
    moved(made)
    return made


def moved(made):
    for parameter in made.parameters.values():
        parameter.grad = torch.randn_like(parameter)
    made.optimizer.step()
    made.moving["r"].add_(1)


def held(made):
    """Copies of everything that a checkpoint keeps, by file and name."""
    return {
        "policy": {name: p.detach().clone() for name, p in made.parameters.items()},
        "moments": {
            f"{key}.{name}": value.clone()
            for name, p in made.parameters.items()
            for key, value in made.optimizer.state[p].items()
        },
        "reference": {name: tensor.clone() for name, tensor in made.moving.items()},
    }


def session_in(folder, stop=None, console=None):
    (folder / "metrics.jsonl").touch()
    return Session(RunFolder(folder), World(), console or Console(quiet=True), stop or StopRequest())


def differing(folder, optim):
    """A checkpoint whose writing is held until two further steps are taken: what of it is not as it was when it was asked for."""
    made, session, go = learner(optim), session_in(folder), threading.Event()

    def late(*given):
        assert go.wait(60)
        SAVE_FILE(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_file", late)
        expected = held(made)
        checkpoint.save(session, made, TrainingState(step=1), 2)
        moved(made)
        moved(made)
        assert not checkpoints(session.folder.checkpoints)
        go.set()
        session.background.wait()
    stored = checkpoint.read(session.folder.checkpoints / "step-000001")
    after = held(made)
    assert all(not torch.equal(after[part][name], t) for part in expected for name, t in expected[part].items())
    found = {"policy": stored.policy, "moments": stored.moments, "reference": stored.reference}
    assert {part: found[part].keys() for part in found} == {part: expected[part].keys() for part in expected}
    return sorted(name for part in found for name, t in expected[part].items() if not torch.equal(found[part][name], t))


@pytest.mark.parametrize("optim", [AdamW(lr=0.1), Rmsprop(lr=0.1)], ids=lambda o: o.kind)
def test_what_is_written_is_what_was_there_when_the_step_ended(tmp_path, optim):
    assert differing(tmp_path, optim) == []


def test_a_copy_that_is_none_would_be_seen(tmp_path, monkeypatch):
    """The fault planted: what lies in one piece is then written as the steps after left it."""
    monkeypatch.setattr(checkpoint, "collected", lambda tensors, *, keep, copy: collected(tensors, keep=keep))
    moments = ["exp_avg.b", "exp_avg_sq.b", "step.a", "step.b"]
    assert set(differing(tmp_path, AdamW(lr=0.1))) >= {"b", "r", *moments}


def test_training_goes_on_meanwhile_and_is_the_same(inputs, monkeypatch):  # noqa: F811
    """The first checkpoint is not finished before the step after it is recorded."""
    training(inputs, f"run={inputs / 'plain'}", "save.every=2")
    waited = []

    def late(*given):
        begun = time.monotonic()
        while not waited and 3 not in curve(inputs / "run"):
            assert time.monotonic() - begun < 60, "training waits"
            time.sleep(0.01)
        waited.append(1)
        SAVE_FILE(*given)

    monkeypatch.setattr(checkpoint, "save_file", late)
    training(inputs, "save.every=2")
    assert waited
    assert curve(inputs / "run") == curve(inputs / "plain")
    names = [path.name for path in checkpoints(inputs / "run/checkpoints")]
    assert names == [path.name for path in checkpoints(inputs / "plain/checkpoints")] == ["step-000002", "step-000004"]
    for name in names:
        for file in ("policy.safetensors", "optimizer.safetensors"):
            mine, theirs = (load_file(inputs / run / "checkpoints" / name / file) for run in ("run", "plain"))
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert [thread.name for thread in threading.enumerate() if "ThreadPool" in thread.name] == []


def test_where_memory_is_scarce_training_waits(inputs, monkeypatch):  # noqa: F811
    """Nothing is copied then, and what is written is the same."""
    training(inputs, f"run={inputs / 'plain'}", "save.every=2")
    monkeypatch.setattr(checkpoint, "memory", lambda: Room(1 << 30, 0, "memory"))
    copied, threads = set(), set()

    def looked_at(tensors, *, keep, copy):
        copied.add(copy)
        return collected(tensors, keep=keep, copy=copy)

    monkeypatch.setattr(checkpoint, "collected", looked_at)

    def counted(*given):
        threads.add(threading.current_thread().name)
        SAVE_FILE(*given)

    monkeypatch.setattr(checkpoint, "save_file", counted)
    training(inputs, "save.every=2")
    assert (copied, threads) == ({False}, {"MainThread"})
    for place in (inputs / "plain/checkpoints").rglob("*.safetensors"):
        mine, theirs = load_file(inputs / "run" / place.relative_to(inputs / "plain")), load_file(place)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_copy_takes_at_most_half_of_what_training_leaves_free(monkeypatch):
    made = learner(AdamW())
    # weights, two means, a step for each tensor, the reference
    size = 4 * (38 * 3 + 2 + 4)
    held_now = checkpoint.psutil.Process().memory_info().rss
    monkeypatch.setattr(
        checkpoint.psutil, "Process", lambda: type("P", (), {"memory_info": lambda _: Held(held_now)})()
    )
    for grows, free, expected in (
        (0, 2 * size, size),
        (0, 2 * size - 1, 0),
        (100, 2 * size + 199, 0),
        (100, 2 * size + 200, size),
    ):
        monkeypatch.setattr(checkpoint, "peak", lambda grows=grows: held_now + grows)
        monkeypatch.setattr(checkpoint, "memory", lambda free=free: Room(free, free, "memory"))
        assert checkpoint.copy_bytes(made, 0) == expected


@pytest.mark.parametrize("keeps", [False, True])
def test_the_memory_is_looked_at_before_every_copy(monkeypatch, keeps):
    """Whether the process kept the first copy's memory or gave it back (as with split weights), it is counted once."""
    made, base, grows = learner(AdamW()), 1 << 30, 100
    size = checkpoint.copy_bytes(made, 0)
    holds = base + size * keeps
    monkeypatch.setattr(checkpoint.psutil, "Process", lambda: type("P", (), {"memory_info": lambda _: Held(holds)})())
    # the first copy was there while training took the most
    monkeypatch.setattr(checkpoint, "peak", lambda: base + grows + size)
    to_come = grows + size * (not keeps)
    for free, expected in ((2 * to_come, size), (2 * to_come - 1, 0)):
        monkeypatch.setattr(checkpoint, "memory", lambda free=free: Room(free, free, "memory"))
        assert checkpoint.copy_bytes(made, base + grows) == expected


def test_a_run_whose_memory_grows_scarce_waits_from_then_on(inputs, monkeypatch):  # noqa: F811
    asked, names = [], []

    def first(made, before):
        asked.append(before)
        return len(asked) == 1

    def counted(*given):
        names.append(threading.current_thread().name == "MainThread")
        SAVE_FILE(*given)

    monkeypatch.setattr(checkpoint, "copy_bytes", first)
    monkeypatch.setattr(checkpoint, "save_file", counted)
    training(inputs, "save.every=1")
    assert names == [False, False, *[True] * 8]
    # what training held before the first copy goes with every question after it
    assert asked[0] == 0
    assert set(asked[1:]) == {asked[1]}
    assert asked[1] > 0


class Held:
    """What psutil says of a process."""

    def __init__(self, rss):
        self.rss = rss


def full(*unused):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("more", "after", "reached"),
    [
        ((), 2, 3),
        ((), 4, 4),
        (("train.max_steps=3",), 3, 3),
        ((), None, 2),
    ],
    ids=["after the step in which it is known", "at the next", "at the end", "at once where training waits"],
)
def test_a_full_disk_is_said(inputs, monkeypatch, more, after, reached):  # noqa: F811
    """after: the step whose record the writing waits for before it fails."""
    begin, record, go = Background.begin, loop.Turn.record, threading.Event()

    def late(*_):
        assert go.wait(60)
        if after != 2:
            # until training waits for it
            time.sleep(0.3)
        full()

    def begun(background, work):
        begin(background, work)
        if after == 2:
            go.set()
            concurrent.futures.wait([background._work])

    def recorded(turn, *given):
        record(turn, *given)
        if turn.state.step == after:
            go.set()

    monkeypatch.setattr(Background, "begin", begun)
    monkeypatch.setattr(loop.Turn, "record", recorded)
    monkeypatch.setattr(checkpoint, "save_file", late if after else full)
    if not after:
        monkeypatch.setattr(checkpoint, "memory", lambda: Room(1 << 30, 0, "memory"))
    with pytest.raises(StorageError, match=r"step-000002: cannot be written .*free some space"):
        training(inputs, "save.every=2", *more)
    assert max(curve(inputs / "run")) == reached
    assert not (inputs / "run/model").exists()
    assert list((inputs / "run/checkpoints").iterdir()) == []


def test_a_stop_on_a_full_disk_is_no_clean_stop(inputs, monkeypatch):  # noqa: F811
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="step-000001: cannot be written"):
        training(inputs, "save.every=0", stop=StopAt(1))


def test_a_stop_waits_for_its_checkpoint(inputs, monkeypatch):  # noqa: F811
    def late(*given):
        time.sleep(0.3)
        SAVE_FILE(*given)

    monkeypatch.setattr(checkpoint, "save_file", late)
    with pytest.raises(StoppedError):
        training(inputs, "save.every=0", stop=StopAt(3))
    assert [path.name for path in checkpoints(inputs / "run/checkpoints")] == ["step-000003"]


@pytest.mark.parametrize("breaks", [False, True])
def test_a_run_that_fails_ends_its_checkpoint_first(inputs, monkeypatch, breaks):  # noqa: F811
    """The run's own error is the one that is raised; that the checkpoint is not there is said."""
    said = inputs / "said"

    def late(*given):
        time.sleep(0.3)
        if breaks:
            full()
        SAVE_FILE(*given)

    def step(*given):
        if 2 in curve(inputs / "run"):
            raise NumericsError("not finite")
        return real(*given)

    real = preference.step
    monkeypatch.setattr(checkpoint, "save_file", late)
    monkeypatch.setattr(preference, "step", step)
    config = load(TrainConfig, None, words(inputs, "save.every=2", "train.epochs=2"))
    with said.open("w") as out, pytest.raises(NumericsError, match="^not finite$"):
        train(config, lambda root: session_in(root, console=Console(file=out)))
    found = [path.name for path in (inputs / "run/checkpoints").iterdir()]
    assert found == ([] if breaks else ["step-000002"])
    assert ("warning: " in said.read_text()) is breaks


def test_killed_in_the_middle_of_writing(inputs):  # noqa: F811
    """Steps go on, the files are there in part, and the process is killed: the checkpoint before is the newest."""
    given = words(inputs, "train.epochs=2")
    # as many threads as here, or the last bits differ
    more = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = os.environ | more
    program = [sys.executable, "-W", "ignore", PROGRAM, "train", *given]
    died = subprocess.run([*program, "save.every=2"], env=environment, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert max(curve(inputs / "run")) == 5
    (left,) = (inputs / "run/checkpoints").glob(".*.tmp")
    assert {path.name for path in left.iterdir()} == {"policy.safetensors"}
    training(inputs, "save.every=2", "resume=true")
    events = [r["message"] for r in read_jsonl(inputs / "run/metrics.jsonl") if r["kind"] == "event"]
    assert any(e.startswith("resumed after step 2 ") for e in events)
    training(inputs, f"run={inputs / 'plain'}", "save.every=2")
    assert curve(inputs / "run") == curve(inputs / "plain")
    mine, theirs = (load_file(inputs / run / "model/model.safetensors") for run in ("run", "plain"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not list(inputs.rglob("*.tmp"))


def test_a_signal_while_waiting_does_not_lose_the_work(tmp_path):
    """Who waits may be broken off; what is under way is still waited for at the end."""
    background, done, go = session_in(tmp_path).background, [], threading.Event()

    def work():
        go.wait(60)
        done.append(1)

    def breaks(*_):
        go.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, breaks)
    try:
        with contextlib.suppress(KeyboardInterrupt), background.ended(print):
            background.begin(work)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            background.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert done
