"""How many tokens are computed at once, where the recipe leaves it open: what saves tokens, what fits, what a run keeps."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from favor.config import load
from favor.data.batches import build, plan, planned_tokens
from favor.data.types import Comparison, TokenTree
from favor.errors import ConfigError
from favor.model.room import Room
from favor.ranks import World
from favor.run import RunFolder, read_json
from favor.stop import StopRequest
from favor.train import packs
from favor.train.preference import TrainConfig, train
from favor.train.session import Session


def tree(prompt, *responses):
    return TokenTree(tuple(prompt), tuple(map(tuple, responses)), (True,) * len(responses), (Comparison((0, 1)),), 0, 1)


def trees(count, opening, own=40, response=30):
    """Prompts that begin with the same `opening` tokens; nothing else is alike."""
    found = []
    for i in range(count):
        first = 10_000 * (i + 1)
        prompt = [*range(opening), *range(first, first + own)]
        answers = (range(first + 1000 * k, first + 1000 * k + response) for k in (1, 2))
        found.append(tree(prompt, *answers))
    return found


def test_nothing_shared_keeps_the_least():
    """100 tokens a tree: 64 of them cost as much in any packs."""
    assert packs.chosen("tree", [trees(64, 0)]) == 1024
    assert packs.chosen("rows", [trees(64, 600)]) == 1024


@pytest.mark.parametrize(("opening", "count"), [(600, 8), (600, 64), (2000, 16)])
def test_a_shared_opening_is_worth_a_larger_pack(opening, count):
    """The smallest power of two whose packs cost at most 3 % more than one pack of all does: opening + 100 a tree."""
    least = opening + 100 * count
    costs = {size: planned_tokens(trees(count, opening), "tree", size) for size in (1024 << k for k in range(7))}
    assert costs[65_536] == least
    found = packs.chosen("tree", [trees(count, opening)])
    assert costs[found] * 0.97 <= least
    assert found == 1024 or costs[found // 2] * 0.97 > least
    # what is planned is what is built
    bins = [[trees(count, opening)[i] for i in members] for members in plan(trees(count, opening), "tree", found)]
    assert sum(build(members, "tree").num_tokens for members in bins if members) <= costs[found]


@pytest.fixture
def inputs(tmp_path):
    tiny.save(tmp_path / "model")
    opening = "good film " * 300
    rows = [{"prompt": f"{opening}{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe(inputs, run, *more):
    return load(
        TrainConfig,
        None,
        [
            f"run={inputs / run}",
            f"model.path={inputs / 'model'}",
            f"data.train={inputs / 'p.jsonl'}",
            "tokens.max_tokens=4096",
            "train.batch_prompts=4",
            *more,
        ],
    )


def start(config):
    train(config, lambda root: Session(RunFolder(root), World(), Console(quiet=True), StopRequest()))
    return [json.loads(line) for line in RunFolder(root_of(config)).metrics.read_text().splitlines()]


def root_of(config):
    return Path(config.run)


def test_a_run_keeps_what_it_chose(inputs, monkeypatch):
    """It is in the run folder, and a run that is continued computes as it began, whatever is free by then."""
    steps = [record for record in start(recipe(inputs, "auto", "save.every=1")) if record["kind"] == "step"]
    kept = read_json(RunFolder(inputs / "auto").packs)["max_tokens_per_pack"]
    assert kept > 1024
    given = start(recipe(inputs, "given", f"train.max_tokens_per_pack={kept}"))
    assert [record["loss"] for record in steps] == [r["loss"] for r in given if r["kind"] == "step"]
    monkeypatch.setattr(packs, "memory", lambda: Room(1 << 20, 1 << 20, "memory"))
    start(recipe(inputs, "little"))
    assert read_json(RunFolder(inputs / "little").packs)["max_tokens_per_pack"] == 1024
    # as if it had been stopped after its first step
    shutil.rmtree(inputs / "auto/model")
    again = start(recipe(inputs, "auto", "save.every=1", "resume=true"))
    assert read_json(RunFolder(inputs / "auto").packs)["max_tokens_per_pack"] == kept
    *_, last = (record for record in again if record["kind"] == "step")
    assert (last["step"], last["loss"], last["grad_norm"]) == (2, steps[-1]["loss"], steps[-1]["grad_norm"])


def test_what_is_no_number_is_refused(inputs):
    with pytest.raises(ConfigError, match=r"train\.max_tokens_per_pack"):
        recipe(inputs, "run", "train.max_tokens_per_pack=most")
