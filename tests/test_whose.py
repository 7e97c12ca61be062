"""What is the user's is never written over, and a resumed run goes on with what it began with."""

import json
import re

import pytest
import tiny
import tomli_w
from test_training import StopAt, curve, open_session

from favor.config import load
from favor.errors import CheckpointError, ConfigError, DataError, without_secrets
from favor.eval.score import ScoreConfig, score
from favor.generate.samples import SamplesConfig, write_samples
from favor.lint.run import lint
from favor.lint.settings import LintConfig
from favor.online import OnlineConfig, loop
from favor.rewards.source import CallableReward, make_scorer
from favor.run import RunFolder, opened, read_json, start
from favor.stop import StoppedError
from favor.train.ppo import PpoConfig, train_ppo
from favor.train.preference import TrainConfig, train
from favor.train.reward import RewardTrainConfig, train_reward
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
        loop(load(OnlineConfig, here / "config.toml"), open_session, quiet)
    (here / "config.toml").write_text(tomli_w.dumps(recipe))
    assert content(here) == before


def test_another_recipe_is_named_by_its_settings(here):
    """Two sections have lines that read alike: which of them has which counts, and so does one that is gone."""
    before = '[model]\npath = "a"\n[reference]\npath = "b"\n[ranks]\nshard = "full"\n'
    with start(here / "run", before, resume=False):
        (here / "run/model").mkdir()
    with start(here / "run", f"resume = true\n{before}", resume=True):
        pass
    now = '[model]\npath = "b"\n[reference]\npath = "a"\n'
    said = "(model.path 'a' then, 'b' now; ranks.shard 'full' then, not set now; reference.path 'b' then, 'a' now)"
    with pytest.raises(ConfigError, match=re.escape(said)), start(here / "run", now, resume=True):
        pass


def test_a_mark_without_its_recipe_makes_no_run_folder(here):
    """`rm run/*` leaves the mark, and what the user puts there then is his."""
    with opened(RunFolder(here / "run")):
        pass
    with start(here / "old", 'run = "old"\n', resume=False):
        (here / "old/model").write_text("made")
    assert not (here / "run").exists()
    assert (here / "old" / ".favor.json").exists()
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
    (here / "run" / ".favor.json").unlink()
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
    with pytest.raises(CheckpointError, match=r"(step-00000\d|run): began with another recipe; resume with"):
        run(load(schema, recipe, ["resume=true"]), open_session)
    assert {path: raw for path, raw in content(here).items() if path.name != "metrics.jsonl"} == before
    if name in ("sft", "ppo"):
        return
    # a folder that was moved is the same run
    recipe.write_text(sound.replace('run = "run"', 'run = "moved"'))
    (here / "run").rename(here / "moved")
    run(load(schema, here / "moved/config.toml", ["resume=true"]), open_session)
    assert max(curve(here / "moved")) == 2


def test_out_is_not_the_recipe_nor_a_file_that_is_read(here, model):
    recipe = here / "s.toml"
    recipe.write_text(
        tomli_w.dumps({"out": "s.toml", "prompts": "data.jsonl", "overwrite": True, "engine": {"model": str(model)}})
    )
    before = content(here)
    with pytest.raises(ConfigError, match=r"out=s\.toml: is the file it reads"):
        write_samples(load(SamplesConfig, recipe), quiet, recipe)
    scored = ["out=s.toml", "overwrite=true", "data=data.jsonl", "reward.kind=callable", "reward.path=length.py:score"]
    with pytest.raises(ConfigError, match="is the file it reads"):
        score(load(ScoreConfig, None, scored), quiet, recipe)
    with pytest.raises(ConfigError, match="is the file it reads"):
        lint(load(LintConfig, None, ["data.train=data.jsonl", "lint.out=s.toml", "lint.overwrite=true"]), recipe)
    assert content(here) == before
    (here / "o.partial").write_bytes((here / "data.jsonl").read_bytes())
    (here / "b[1].jsonl").write_bytes((here / "data.jsonl").read_bytes())
    for words in (["out=o", "prompts=o.partial"], ["out=b[1].jsonl", "prompts=b[1].jsonl"]):
        with pytest.raises(ConfigError, match="is the file it reads"):
            write_samples(load(SamplesConfig, None, [*words, f"engine.model.path={model}", "overwrite=true"]), quiet)
    assert (here / "o.partial").read_bytes() == (here / "data.jsonl").read_bytes()


def test_a_failed_lint_claims_no_file(here):
    (here / "bad.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "same", "rejected": "same"}) + "\n")
    before = content(here)
    with pytest.raises(DataError, match="no row is left"):
        lint(load(LintConfig, None, ["data.train=bad.jsonl", "lint.fix=clean.jsonl"]))
    assert content(here) == before
    (here / "clean.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="not known to have made"):
        lint(load(LintConfig, None, ["data.train=data.jsonl", "lint.fix=clean.jsonl"]))
    assert (here / "clean.jsonl").read_text() == "mine"
    for pair in (["lint.fix=c.jsonl", "lint.out=c.actions.jsonl"], ["lint.out=c", "lint.page=c"]):
        with pytest.raises(ConfigError, match="is written for lint"):
            lint(load(LintConfig, None, ["data.train=data.jsonl", *pair]))


def test_what_lies_beside_a_result_is_known_by_its_content(here):
    words = ["out=s", "data=data.jsonl", "reward.kind=callable", "reward.path=length.py:score"]
    first = score(load(ScoreConfig, None, words), quiet)
    beside, sound = here / "s.figures.json", (here / "s.figures.json").read_bytes()
    beside.unlink()
    assert score(load(ScoreConfig, None, words), quiet) == first
    assert beside.read_bytes() == sound
    for gone in (False, True):
        beside.write_text("mine")
        if gone:
            (here / "s").unlink()
        with pytest.raises(ConfigError, match=r"s\.figures\.json: was changed since"):
            score(load(ScoreConfig, None, words), quiet)
        assert beside.read_text() == "mine"
    beside.write_bytes(sound)
    score(load(ScoreConfig, None, words), quiet)
    record = here / ".s.favor.json"
    for damage in ({"a": 1}, [], 5, read_json(record) | {"result": {"figures": 999}}):
        record.write_text(json.dumps(damage))
        with pytest.raises(ConfigError, match="not known to have made"):
            score(load(ScoreConfig, None, words), quiet)


BODIES = {
    "an iterator that fails": "class C:\n def __iter__(self): raise KeyError(1)\ndef r(p, a): return C()",
    "a number that fails": "class C:\n def __float__(self): raise ZeroDivisionError\ndef r(p, a): return [C() for _ in a]",
    "an error without words": "class E(Exception):\n def __str__(self): raise KeyError\ndef r(p, a): raise E",
    "an error of the base": "class E(BaseException): pass\ndef r(p, a): raise E('x')",
    "the end of a generator": "def r(p, a): raise GeneratorExit",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_whatever_a_function_of_the_user_does_is_one_error(here, body):
    (here / "u.py").write_text(body)
    with pytest.raises(ConfigError, match=r"u\.py:r: failed"):
        make_scorer(CallableReward(path="u.py:r"))(["p"], ["a"])


def test_a_function_may_not_move_our_files(here):
    (here / "u.py").write_text("import os\ndef r(p, a):\n os.chdir('/')\n return [1 for _ in a]")
    score(load(ScoreConfig, None, ["out=s", "data=data.jsonl", "reward.kind=callable", "reward.path=u.py:r"]), quiet)
    assert (here / "s").exists()


def test_a_password_may_hold_any_sign():
    assert without_secrets("https://user:p@ss@h.invalid/d.jsonl: no") == "https://***@h.invalid/d.jsonl: no"


def test_a_damaged_round_is_not_trained_on(here, model, monkeypatch):
    (here / "p.jsonl").write_text("".join(json.dumps({"prompt": f"Film {i}?"}) + "\n" for i in range(4)))
    (here / "u.py").write_text("def r(p, a):\n return [*range(len(a))]")
    words = [
        "run=l",
        "prompts=p.jsonl",
        f"model.path={model}",
        "model.dtype=float32",
        "rounds=1",
        "sample.max_new_tokens=4",
    ]
    words += ["reward.kind=callable", "reward.path=u.py:r", "train.batch_prompts=2", "save.every=1"]
    with monkeypatch.context() as patched:
        patched.setattr("favor.online.train", lambda *given: (_ for _ in ()).throw(StoppedError("x", 15)))
        with pytest.raises(StoppedError):
            loop(load(OnlineConfig, None, words), open_session, quiet)
    words += ["resume=true"]
    place = here / "l/round-1"
    for name in ("preferences.jsonl", "figures.json", "made.json"):
        sound = (place / name).read_bytes()
        (place / name).write_bytes(b"{}" if name == "made.json" else sound + b"{}\n")
        with pytest.raises(CheckpointError, match="round-1: its .* not what was written"):
            loop(load(OnlineConfig, None, words), open_session, quiet)
        (place / name).write_bytes(sound)
    for text in ("[]", "null"):
        (here / "l/inputs.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"inputs\.json: damaged"):
            loop(load(OnlineConfig, None, words), open_session, quiet)
