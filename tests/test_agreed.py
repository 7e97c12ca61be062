"""What a rank sees of shared folders may be older, or absent, on another machine: all go by what the main rank sees."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_saving import learner, session_in
from threads import Threads

from favor.data.types import Comparison, TokenTree
from favor.errors import CheckpointError
from favor.ranks import World, from_main
from favor.run import RunFolder, read_jsonl, write_json
from favor.train import checkpoint, packs, reference, session, watch
from favor.train.loop import LoopConfig
from favor.train.optim import AdamW
from favor.train.session import TrainingState, resumes
from favor.train.watch import HeldOut


@pytest.fixture
def ranks(monkeypatch):
    made = Threads()
    monkeypatch.setattr("favor.ranks.dist", made)
    return made


@pytest.fixture
def saved(tmp_path):
    """A session with sound checkpoints of steps 2 and 4."""
    made, one = learner(AdamW()), session_in(tmp_path)
    for step in (2, 4):
        checkpoint.save(one, made, TrainingState(step=step), 2)
        one.background.wait()
    return one


def test_the_main_rank_tells(ranks):
    assert ranks.run(lambda world: from_main(7 - world.rank, world)) == [7, 7]
    assert ranks.run(lambda world: from_main(-1 - world.rank, world)) == [-1, -1]


def chosen(ranks, saved):
    """The step of the checkpoint that each rank continues from."""

    def step(world):
        found = checkpoint.newest_sound(replace(saved, world=world))
        return found and found.state.step

    return ranks.run(step)


@pytest.mark.parametrize(("stale", "expected"), [(0, 2), (1, 4)])
def test_a_listing_that_is_older_on_one_rank(ranks, saved, monkeypatch, stale, expected):
    real = checkpoint.checkpoints
    monkeypatch.setattr(
        checkpoint, "checkpoints", lambda folder: real(folder)[: -1 if ranks.get_rank() == stale else None]
    )
    assert chosen(ranks, saved) == [expected, expected]


def test_a_checkpoint_that_appears_late_on_another_machine(saved, monkeypatch):
    state = saved.folder.checkpoints / "step-000004/state.json"
    text = state.read_text()
    state.unlink()
    late = threading.Timer(0.5, state.write_text, [text])
    late.start()
    checkpoint._appeared(state.parent, World(1, 2))
    assert state.read_text() == text
    late.join()
    state.unlink()
    # the main rank knows what there is, and no rank waits for ever
    checkpoint._appeared(state.parent, World(0, 2))
    monkeypatch.setattr(checkpoint, "_STALE_S", 0.5)
    checkpoint._appeared(state.parent, World(1, 2))


def unreadable(monkeypatch, ranks, rank, steps):
    real = checkpoint.read

    def read(path):
        if ranks.get_rank() == rank and path.name in steps:
            raise CheckpointError(f"{path}: damaged checkpoint ([Errno 5] Input/output error)")
        return real(path)

    monkeypatch.setattr(checkpoint, "read", read)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_cannot_read_none_continues_from(ranks, saved, monkeypatch, rank):
    unreadable(monkeypatch, ranks, rank, ["step-000004"])
    assert chosen(ranks, saved) == [2, 2]
    (event,) = read_jsonl(saved.folder.metrics)
    why = "Input/output error" if rank == 0 else "another process of this run cannot read it"
    assert why in event["message"]
    assert event["message"].endswith("going back to the checkpoint before")


@pytest.mark.parametrize("rank", [0, 1])
def test_no_checkpoint_that_all_can_read(ranks, saved, monkeypatch, rank):
    unreadable(monkeypatch, ranks, rank, ["step-000004", "step-000002"])
    found = chosen(ranks, saved)
    assert [type(error) for error in found] == [CheckpointError] * 2
    assert all(
        "no sound checkpoint is left: see that every machine has this folder, or delete" in str(e) for e in found
    )


def test_no_checkpoint_at_all(ranks, tmp_path):
    assert chosen(ranks, session_in(tmp_path)) == [None, None]


@pytest.mark.parametrize("sees", [0, 1])
def test_held_out_figures_before_the_first_step(ranks, saved, monkeypatch, sees):
    """The measuring is of all ranks together."""
    real, measured = checkpoint.checkpoints, []
    monkeypatch.setattr(watch, "checkpoints", lambda folder: real(folder) if ranks.get_rank() == sees else [])

    def first(world):
        def measure():
            measured.append(world.rank)
            return {"loss": 0.5}

        HeldOut(measure, replace(saved, world=world)).first(resume=True)

    assert ranks.run(first) == [None, None]
    assert sorted(measured) == ([] if sees == 0 else [0, 1])


def test_the_packs_of_a_run_that_continues(ranks, saved, tmp_path):
    """The file that says them is there for the main rank alone."""
    write_json(saved.folder.packs, {"max_tokens_per_pack": 4096})

    def settled(world):
        folder = saved.folder if world.is_main else RunFolder(tmp_path / "not there yet")
        one = replace(saved, world=world, folder=folder)
        return packs.settled(LoopConfig(), None, None, [], one, resume=True).max_tokens_per_pack

    assert ranks.run(settled) == [4096, 4096]


@pytest.mark.parametrize("sees", [0, 1])
def test_a_reference_store(ranks, tmp_path, sees):
    """Building it is of all ranks together."""
    parts = {"train": [TokenTree((1, 2), ((3,), (4,)), (True, True), (Comparison((0, 1)),), 0, 1)]}
    policy, built = SimpleNamespace(device=torch.device("cpu")), []
    places = [tmp_path / "main.safetensors", tmp_path / "other.safetensors"]

    def stored(world):
        def build(trees):
            built.append(world.rank)
            return torch.zeros(2, dtype=torch.float64)

        return reference.stored(policy, parts, {"weights": "w"}, places[world.rank], build, world)

    ranks.run(stored)
    assert sorted(built) == [0, 1]
    built.clear()
    places[0].replace(places[sees]) if sees else None
    found = ranks.run(stored)
    assert sorted(built) == ([] if sees == 0 else [0, 1])
    # the other one sees no store where there is one: it says so, and nobody waits for it
    assert sees or (not isinstance(found[0], Exception) and "not a readable reference store" in str(found[1]))


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_restart_that_torchrun_counts_on_one_machine_alone(ranks, tmp_path, monkeypatch, begun, counts):
    """Over several machines (c10d) the others' workers start anew too, and their count stays."""
    monkeypatch.setattr(session, "started_again", lambda: bool(counts[ranks.get_rank()]))
    if begun:
        RunFolder(tmp_path).config.write_text("")
    assert ranks.run(lambda _: resumes(str(tmp_path), False)) == [begun and any(counts)] * 2
    assert ranks.run(lambda _: resumes(str(tmp_path), True)) == [True, True]
