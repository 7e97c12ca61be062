"""What is the user's is never written over, and a resumed run goes on with what it began with."""

import json

import pytest
import tiny
import tomli_w
from test_training import StopAt, curve, open_session

from favor.config import load
from favor.errors import CheckpointError, ConfigError
from favor.guard import MARK
from favor.loop import LoopRunConfig, loop
from favor.run import RunFolder, opened, start
from favor.train.ppo import PpoConfig, train_ppo
from favor.train.preference import TrainConfig, train
from favor.train.reward import RewardTrainConfig, train_reward
from favor.train.session import StoppedError
from favor.train.sft import SftConfig, sft

ROWS = [{"prompt": f"Film {i}?", "chosen": f"good {i} film", "rejected": f"bad {i}"} for i in range(6)]


def quiet(label, done, total):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whose") / "model"
    tiny.save(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "length.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    return tmp_path


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("broken", [False, True])
def test_a_recipe_in_our_style_makes_no_run_folder(here, model, broken):
    """Whose folder it is does not depend on how the user writes his recipe, or on what his files are called."""
    for name in ("data.json", "prompts.jsonl", "metrics.jsonl"):
        (here / name).write_text(json.dumps(ROWS) if name == "data.json" else '{"prompt": "a"}\n')
    recipe = {"run": ".", "model": {"path": "gone" if broken else str(model)}, "data": {"train": "data.json"}}
    recipe["train"] = {"max_steps": 1}
    (here / "config.toml").write_text(tomli_w.dumps(recipe))
    before = content(here)
    with pytest.raises(ConfigError, match="holds files, but no run of favor"):
        train(load(TrainConfig, here / "config.toml"), open_session)
    rounds = {"run": ".", "prompts": "prompts.jsonl", "model": recipe["model"]}
    rounds["reward"] = {"kind": "callable", "path": "length.py:score"}
    (here / "config.toml").write_text(tomli_w.dumps(rounds))
    with pytest.raises(ConfigError, match="holds files, but no run of favor"):
        loop(load(LoopRunConfig, here / "config.toml"), open_session, quiet)
    (here / "config.toml").write_text(tomli_w.dumps(recipe))
    assert content(here) == before


def test_a_mark_without_its_recipe_makes_no_run_folder(here):
    """`rm run/*` leaves the mark, and what the user puts there then is his."""
    with opened(RunFolder(here / "run")):
        pass
    with start(here / "old", 'run = "old"\n', resume=False):
        (here / "old/model").write_text("made")
    assert not (here / "run").exists()
    assert (here / "old" / MARK).exists()
    (here / "old/model").unlink()
    # a start that was killed may be repeated, also with another recipe, and a kill in the middle of that too
    with start(here / "old", 'run = "x"\n', resume=False):
        (here / "old/model").write_text("made")
    (here / "old/config.toml").write_text('run = "old"\n')
    (here / "old/model").unlink()
    with start(here / "old", 'run = "y"\n', resume=False):
        (here / "old/model").write_text("made")
    (here / "old/model").unlink()
    for text, message in (('run = "mine"\n', "not the one that favor wrote"), (None, "holds files, but no run")):
        (here / "old/data.json").write_text("mine")
        (here / "old/config.toml").unlink() if text is None else (here / "old/config.toml").write_text(text)
        before = content(here)
        with pytest.raises(ConfigError, match=message), start(here / "old", 'run = "old"\n', resume=False):
            pass
        assert content(here) == before


def test_a_run_without_a_mark_is_known_by_what_it_made(here):
    with start(here / "run", 'run = "run"\n', resume=False) as folder:
        folder.metrics.write_text('{"kind": "step", "step": 1, "loss": 0.6}\n')
    (here / "run" / MARK).unlink()
    with start(here / "run", 'run = "run"\n', resume=True):
        pass
    with pytest.raises(ConfigError, match="already holds a run"), start(here / "run", "", resume=False):
        pass


COMMANDS = {
    "train": (TrainConfig, train, ["data.train=data.jsonl", "loss.beta=0.2"]),
    "sft": (SftConfig, sft, ["data.train=data.jsonl"]),
    "reward": (RewardTrainConfig, train_reward, ["data.train=data.jsonl"]),
    "ppo": (
        PpoConfig,
        train_ppo,
        ["data.train=data.jsonl", "reward.kind=callable", "reward.path=length.py:score", "sample.max_new_tokens=3"],
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_resume_with_an_edited_recipe_is_refused(here, model, name):
    """The run folder's own config.toml is no witness of what the run began with; the checkpoint is."""
    schema, run, words = COMMANDS[name]
    words = [
        *words,
        "run=run",
        f"model.path={model}",
        "model.dtype=float32",
        "train.batch_prompts=3",
        "model.layout=tree",
    ]
    with pytest.raises(StoppedError):
        run(load(schema, None, words), lambda root: open_session(root, StopAt(1)))
    recipe = here / "run/config.toml"
    sound = recipe.read_text()
    recipe.write_text(sound.replace("clip = 1.0", "clip = 0.5"))
    assert recipe.read_text() != sound
    before = {path: raw for path, raw in content(here).items() if path.name != "metrics.jsonl"}
    with pytest.raises(CheckpointError, match=r"step-000001: began with another recipe; resume with"):
        run(load(schema, recipe, ["resume=true"]), open_session)
    assert {path: raw for path, raw in content(here).items() if path.name != "metrics.jsonl"} == before
    if name in ("sft", "ppo"):
        return
    # a folder that was moved is the same run
    recipe.write_text(sound.replace('run = "run"', 'run = "moved"'))
    (here / "run").rename(here / "moved")
    run(load(schema, here / "moved/config.toml", ["resume=true"]), open_session)
    assert max(curve(here / "moved")) == 2
