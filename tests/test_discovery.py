"""What favor says by itself: held-out figures at both ends of a run, notes on what a curve hides, the last lines of a command."""

import io
import json
import os
import random
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from favor.cli import COMMANDS
from favor.config import load
from favor.errors import ConfigError
from favor.help import short_names
from favor.ranks import World
from favor.run import RunFolder, read_jsonl
from favor.settings import settings
from favor.stop import StopRequest
from favor.train import notes
from favor.train.preference import TrainConfig, train
from favor.train.reward import RewardTrainConfig, train_reward
from favor.train.session import Bar, Session
from favor.train.sft import SftConfig, sft
from favor.words import expanded, whole

ROOT = Path(__file__).parent.parent
LN2 = 0.6931471805599453


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discovery")
    tiny.save(folder / "model")
    rng, words = random.Random(0), ["good", "bad", "warm", "funny", "film", "never"]

    def say():
        return " ".join(rng.choices(words, k=rng.randint(2, 6)))

    for name, count in (("train", 12), ("eval", 8)):
        rows = [{"prompt": f"Write about {name} {i}.", "chosen": say(), "rejected": say()} for i in range(count)]
        write(folder / f"{name}.jsonl", rows)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def words(inputs, run, *more):
    data = [f"data.train={inputs / 'train.jsonl'}", f"data.eval={inputs / 'eval.jsonl'}"]
    sizes = ["train.batch_prompts=4", "optim.lr=1e-3"]
    return [f"run={run}", f"model.path={inputs / 'model'}", "model.dtype=float32", *data, *sizes, *more]


def trained(schema, work, words):
    """Run a training; the records of metrics.jsonl."""
    config = load(schema, None, words)
    work(config, lambda root: Session(RunFolder(root), World(), Console(quiet=True), StopRequest()))
    return read_jsonl(RunFolder(Path(config.run)).metrics)


def evals(records):
    return [record for record in records if record["kind"] == "eval"]


def events(records):
    return {record["name"]: record["message"] for record in records if record["kind"] == "event"}


def test_held_out_figures_stand_at_both_ends(inputs, tmp_path):
    """At the start policy and reference are equal: ln 2 and half of the pairs, exactly; the interval is over prompts."""
    records = trained(TrainConfig, train, words(inputs, tmp_path / "run"))
    first, last = evals(records)
    assert (first["step"], last["step"]) == (0, 3)
    assert first["loss"] == pytest.approx(LN2, abs=1e-6)
    assert (first["accuracy"], first["margin"], first["pairs"], first["prompts"]) == (0.5, pytest.approx(0), 8, 8)
    assert first["accuracy_interval"][0] < 0.5 < first["accuracy_interval"][1]
    low, high = last["accuracy_interval"]
    assert 0 <= low < last["accuracy"] < high <= 1
    assert last["loss"] != first["loss"]


def test_held_out_figures_change_nothing_that_is_trained(inputs, tmp_path):
    """The same losses and weights with held-out data and without."""
    plain = [word for word in words(inputs, tmp_path / "plain") if not word.startswith("data.eval")]
    without, with_ = (
        trained(TrainConfig, train, each) for each in (plain, words(inputs, tmp_path / "run", "watch.eval.every=1"))
    )
    assert evals(without) == []
    assert [record["step"] for record in evals(with_)] == [0, 1, 2, 3]
    losses = [[r["loss"] for r in found if r["kind"] == "step"] for found in (without, with_)]
    assert losses[0] == losses[1]
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("plain", "run")]
    assert weights[0] == weights[1]


def test_the_interval_is_that_of_favor_eval(inputs, tmp_path):
    from favor.eval.evaluate import EvalConfig, evaluate

    last = evals(trained(TrainConfig, train, words(inputs, tmp_path / "run", "train.epochs=3")))[-1]
    told = evaluate(EvalConfig(run=str(tmp_path / "run"), sample_prompts=0), lambda text: None, lambda *args: None)
    for name in ("accuracy", "margin", "loss"):
        assert last[name] == pytest.approx(told[name], abs=1e-5)
    assert last["accuracy_interval"] == pytest.approx(list(told["accuracy_interval"]))


def test_held_out_rows_that_the_loss_cannot_take_are_said_and_passed_over(inputs, tmp_path):
    """They were held out for favor eval; only who asks for [watch.eval] is refused."""
    thumbs = write(tmp_path / "thumbs.jsonl", [{"prompt": "p", "completion": "good", "label": True}])
    asked = words(inputs, tmp_path / "run", f"data.eval={thumbs}")
    records = trained(TrainConfig, train, asked)
    assert evals(records) == []
    assert "finds nothing to learn from" in events(records)["held_out"]
    with pytest.raises(ConfigError, match="held-out part: loss 'dpo' finds nothing"):
        trained(TrainConfig, train, [*asked, f"run={tmp_path / 'asked'}", "watch.eval.every=1"])


def test_sft_and_reward_measure_both_ends(inputs, tmp_path):
    tuned = evals(trained(SftConfig, sft, words(inputs, tmp_path / "sft", "train.epochs=4")))
    assert [record["step"] for record in tuned] == [0, 12]
    assert tuned[1]["loss"] < tuned[0]["loss"]
    assert tuned[0]["tokens"] == tuned[1]["tokens"] > 8
    rewarded = evals(trained(RewardTrainConfig, train_reward, words(inputs, tmp_path / "reward")))
    assert [record["step"] for record in rewarded] == [0, 3]
    kept = json.loads((tmp_path / "reward/eval.json").read_text())["calibration"]
    assert (rewarded[1]["accuracy"], rewarded[1]["loss"]) == (kept["accuracy"], kept["loss"])


def test_a_warm_up_longer_than_the_run_is_said(inputs, tmp_path):
    records = trained(TrainConfig, train, words(inputs, tmp_path / "run", "optim.warmup=10"))
    assert "never exceeds 3/11 of optim.lr" in events(records)["warmup"]
    rates = [record["lr"] for record in records if record["kind"] == "step"]
    assert max(rates) == pytest.approx(1e-3 * 3 / 11)
    share = trained(TrainConfig, train, words(inputs, tmp_path / "share", "optim.warmup=0.1"))
    assert "warmup" not in events(share)
    assert max(record["lr"] for record in share if record["kind"] == "step") == 1e-3


def test_steps_that_the_epochs_do_not_have_are_said(inputs, tmp_path):
    records = trained(TrainConfig, train, words(inputs, tmp_path / "run", "train.max_steps=60"))
    assert "train.max_steps=60 is not reached: train.epochs=1 over this data is 3 steps" in events(records)["max_steps"]
    fewer = trained(TrainConfig, train, words(inputs, tmp_path / "fewer", "train.max_steps=3"))
    assert "max_steps" not in events(fewer)


def test_misnamed_columns_are_told_once_with_what_to_try(inputs, favor, tmp_path):
    """The setting that lint proposes reads the file; a clean copy of nothing is not proposed."""
    rows = [{"question": f"Film {i}?", "good": f"good {i} film", "bad": f"bad {i}"} for i in range(12)]
    (tmp_path / "mis.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = favor("lint", "data.train=mis.jsonl")
    assert code == 1
    assert out.count("are of no known format") == 1
    assert "--fix" not in out
    said = "".join(line.split("│")[3].strip() + " " for line in out.splitlines() if line.count("│") == 4)
    proposed = re.search(r"'(columns=\{.*?\})'", said)[1]
    assert favor("lint", "data.train=mis.jsonl", proposed)[0] == 0


def test_a_run_that_went_nowhere_says_so(inputs, tmp_path):
    still = words(inputs, tmp_path / "still", "optim.lr=1e-12", "train.epochs=2")
    found = events(trained(TrainConfig, train, still))
    assert "the loss has not moved (0.6931 -> 0.6931 in 6 steps" in found["unmoved"]
    moved = events(trained(TrainConfig, train, words(inputs, tmp_path / "moved", "optim.lr=1e-2", "train.epochs=30")))
    assert "unmoved" not in moved
    assert "every pair is right" in moved["saturated"]


def test_samples_that_are_cut_are_said(inputs, tmp_path):
    probed = ("watch.kl.every=1", "watch.kl.prompts=4", "watch.kl.tokens=1")
    records = trained(TrainConfig, train, words(inputs, tmp_path / "run", *probed))
    assert "cut at the token limit" in events(records)["cut"]
    assert "watch.kl.tokens" in events(records)["cut"]


def steps(losses, **more):
    return [{"step": i, "loss": loss, "lr": 1e-5, **more} for i, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("found", "names"),
    [
        ([], []),
        (steps([0.6931] * 4), []),
        (steps([0.6931] * 5), ["unmoved"]),
        (steps([0.70, 0.68, 0.71, 0.69, 0.66]), []),
        (steps([0.5, 0.01, 0.01, 0.01], accuracy=1.0), ["saturated"]),
        (steps([0.5, 0.01, 0.01, 0.01], accuracy=0.9), []),
        (steps([0.5, 0.01, 0.01], accuracy=1.0), []),
        # the loss of an update on one's own samples has no height to speak of
        (steps([0.0] * 9, objective=0.1, ended=1.0), []),
        (steps([0.0] * 9, objective=0.1, ended=0.5), ["cut"]),
        (steps([0.7, 0.6, 0.5], ended=0.75), []),
    ],
)
def test_what_a_curve_says(found, names):
    assert [name for name, _ in notes.at_the_end(found, moving=False)] == names


def test_a_following_reference_brings_the_loss_back():
    assert list(notes.at_the_end(steps([0.6931] * 9), moving=True)) == []


def test_a_warm_up_may_end_with_the_run():
    assert notes.warmup(3, 4) is None
    assert notes.warmup(4, 4) is not None


def test_a_command_ends_with_what_changed_and_what_to_type_next(inputs, favor):
    """The next commands run as they are printed."""
    code, out, err = favor("train", *words(inputs, "runs/a b"))
    assert (code, err) == (0, "")
    done, *following = out.splitlines()[-4:]
    assert re.search(
        r"^done in \S+ s; loss 0\.6931 -> \S+; held-out loss 0\.6931 -> \S+; held-out accuracy 0\.50 -> ", done
    )
    assert "] of 8 pairs" in done
    report, chat = "      favor report 'runs/a b'", "      favor chat 'run=runs/a b'"
    assert following == ["next: favor eval 'run=runs/a b'", report, chat]
    code, out, err = favor("eval", "run=runs/a b", "sample_prompts=2", "sample.max_new_tokens=1")
    assert (code, err) == (0, "")
    done, following = out.splitlines()[-2:]
    assert "implicit reward accuracy" in done
    assert re.search("of the samples were cut at the token limit, .*; raise sample.max_new_tokens", done)
    assert following == "next: favor report 'runs/a b'"
    assert favor("report", "runs/a b")[0] == 0


def test_one_json_object_and_nothing_else(inputs, favor, tmp_path):
    code, out, err = favor("train", *words(inputs, "run", "optim.warmup=9"), "--json")
    assert code == 0
    told = json.loads(out)
    assert "trained 3 steps" in err
    assert told["command"] == "train"
    assert told["seconds"] > 0
    assert told["figures"]["steps"] == 3
    assert told["figures"]["warnings"] == ["warmup"]
    records = read_jsonl(tmp_path / "run/metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    assert told["figures"]["loss"] == [losses[0], losses[-1]]
    assert told["figures"]["held_out_accuracy"] == [record["accuracy"] for record in evals(records)]
    assert all((tmp_path / path).exists() for path in told["paths"].values())
    assert told["next"] == ["favor eval run=run", "favor report run", "favor chat run=run"]
    code, out, _ = favor("eval", "run=run", "sample_prompts=0", "--json")
    assert json.loads(out)["figures"] == json.loads((tmp_path / "run/eval.json").read_text())
    good = {"prompt": "q", "chosen": "x", "rejected": "y"}
    write(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "x"}, good])
    code, out, _ = favor("lint", "data.train=bad.jsonl", "--json")
    assert code == 1
    told = json.loads(out)
    assert told["figures"]["counts"]["error"] == 1
    assert told["next"] == ["favor lint data.train=bad.jsonl --fix clean.jsonl"]


def test_quiet_says_nothing_but_errors(inputs, favor):
    assert favor("sft", *words(inputs, "run"), "--quiet") == (0, "", "")
    code, out, err = favor("sft", *words(inputs, "run"), "--quiet")
    assert (code, out) == (2, "")
    assert "already holds a run" in err


def test_of_several_processes_one_speaks(favor, monkeypatch, tmp_path):
    write(tmp_path / "d.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "y"}])
    monkeypatch.setenv("RANK", "1")
    assert "done in" not in favor("lint", "data.train=d.jsonl")[1]
    monkeypatch.setenv("RANK", "0")
    assert "done in" in favor("lint", "data.train=d.jsonl")[1]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (312, "5 min 12 s"), (7384, "2 h 3 min")],
)
def test_durations(seconds, said):
    assert notes.duration(seconds) == said


def test_the_time_left_is_whole_at_80_columns():
    """However long the figures are: they have a line of their own, and they alone are cut."""
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, legacy_windows=False, color_system=None)
    figures = "loss 0.6409  acc 0.83  margin +0.107  KL 12.31  reward 0.123  pairs/s 0.75  tokens/s 487 and more"
    with Bar(Session(RunFolder(Path("r")), World(), console, StopRequest()), "reference", 123456) as bar:
        bar.advance(100000, figures)
        bar.advance(23456, figures)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", screen.getvalue())]
    bars = [line.rstrip() for line in lines if "reference" in line]
    assert bars
    assert all(re.search(r" \d+/123456 \d:\d\d:\d\d ETA [-:\d]+$", line) for line in bars)
    assert bars[-1].endswith("ETA 0:00:00")
    assert "123456/123456" in bars[-1]
    assert any(line.strip().startswith("loss 0.6409  acc 0.83") and line.rstrip().endswith("…") for line in lines)
    assert max(map(len, lines)) <= 80


def test_errors_of_several_settings_stand_on_a_line_each(favor):
    code, _, err = favor("train", "run=r", "model.path=m", "data.train=d", "loss.beta=-1", "optim.speed=2")
    assert code == 2
    lines = err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("favor: settings: ") for line in lines)
    assert {"loss.beta" in line for line in lines} == {"optim.speed" in line for line in lines} == {True, False}


def test_plain_names_are_those_of_python():
    """One setting has it, or the kind that is chosen reads it; several are refused by name, none is left to the recipe's check."""
    assert whole(TrainConfig, {}, ["lr=1e-6", "run=r", "loss.kind=cdpo", "label_smoothing=0.1", "lora={rank=8}"]) == [
        "optim.lr=1e-6",
        "run=r",
        "loss.kind=cdpo",
        "loss.label_smoothing=0.1",
        "model.lora={rank=8}",
    ]
    assert whole(TrainConfig, {"loss": {"kind": "cdpo"}}, ["label_smoothing=0.1"]) == ["loss.label_smoothing=0.1"]
    assert whole(TrainConfig, {}, ["nothing=1"]) == ["nothing=1"]
    with pytest.raises(ConfigError, match=r"'every' could be .*watch\.eval\.every.*; say which, as in \S+\.every=5$"):
        whole(TrainConfig, {}, ["every=5"])


def test_plain_names_on_the_command_line(inputs, favor, tmp_path):
    code, out, _ = favor("train", *words(inputs, tmp_path / "r")[1:], "run=r", "max_steps=2", "--dry-run")
    assert code == 0
    assert "steps: 2, each of" in out
    code, _, err = favor("train", *words(inputs, tmp_path / "r"), "alpha=2")
    assert code == 2
    assert "favor: settings: 'alpha' could be" in err
    # a next line keeps what says how the rows are read, by whatever name it was typed
    (tmp_path / "q.csv").write_text("q,good,bad\n" + "".join(f"Film {i}?,good {i} film,bad {i}\n" for i in range(12)))
    code, out, _ = favor("lint", "data=q.csv", 'columns={prompt="q", chosen="good", rejected="bad"}')
    assert code == 0
    assert "next: favor train data.train=q.csv 'data.columns={prompt=" in out
    # of a cleaned copy too, which has the same columns
    given = ("data=q.csv", 'columns={prompt="q", chosen="good", rejected="bad"}', "--fix", "clean.jsonl")
    code, out, _ = favor("lint", *given)
    (following,) = re.findall(r"^next: favor (lint .*)$", out, re.MULTILINE)
    assert following.endswith("data.train=clean.jsonl")
    assert favor(*shlex.split(following))[0] == 0


def test_a_data_file_is_no_recipe(favor, tmp_path):
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    code, _, err = favor("lint", "mine.csv")
    assert (code, err) == (2, err)
    assert err.startswith(
        "favor: mine.csv: is a data file by its name, not a recipe; give it as data=mine.csv, or make"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_setting_of_a_plain_run_and_a_command_that_loads(command, favor):
    """By section; with an example whose keys are the command's, and the next steps."""
    code, out, _ = favor(command, "--help")
    assert code == 0
    assert f"favor {command} [" in out.partition("Usage:")[2]
    config = COMMANDS[command]().config
    listed = re.findall(r"^  ([a-z_]+(?:\.[a-z_*]+)*)  ", out, re.MULTILINE)
    assert sorted(listed) == sorted(setting.key for setting in settings(config))
    sections = re.findall(r"^\[(.+)\]$", out, re.MULTILINE)
    assert len(sections) == len(set(sections))
    for example in re.findall(r"^(?:Example:|Next:    |         ) ?(favor .+)$", out, re.MULTILINE):
        _, name, *given = shlex.split(example)
        keys = [word.partition("=")[0] for word in given if "=" in word]
        if name in COMMANDS:
            known = {s.key for s in settings(COMMANDS[name]().config, every=True)}
            own = {
                word.partition("=")[0] for word in expanded(name, [w for w in given if "=" in w and "run=" not in w])
            }
            assert own <= known, (example, own - known)
        else:
            assert keys == []
    assert "Example: favor" in out
    short = re.search(r"^Short: .*(?:\n\S.*)*", out, re.MULTILINE)
    told = set(re.findall(r"(\w+)= for|(run)=FOLDER", short.group()) if short else ())
    assert {first or second for first, second in told} == set(short_names(command))


def test_help_is_made_from_the_code_of_today():
    made = runpy.run_path(str(ROOT / "docs/settings.py"))["help_text"]()
    assert (ROOT / "src/favor/help.json").read_text("utf-8") == made, "run `make settings-doc`"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        # bash breaks words at the equals sign
        (["train", "optim.sch"], ["optim.schedule="]),
        (["train", "optim.schedule", "="], ["constant", "linear", "cosine"]),
        (["train", "optim.schedule", "=", "l"], ["linear"]),
        # other shells do not
        (["train", "optim.schedule=c"], ["optim.schedule=constant", "optim.schedule=cosine"]),
        (["train", "loss.kind=ip"], ["loss.kind=ipo"]),
        (["train", "rec"], ["recipe.toml"]),
        (["sample", "ru"], ["run="]),
        (["sample", "resu"], []),
        (["sch"], ["schema"]),
    ],
)
def test_the_shell_completes_commands_keys_and_values(typed, offered, tmp_path):
    """By the script's own protocol, in a process of its own; torch is not imported for it."""
    (tmp_path / "recipe.toml").write_text("")
    asked = {
        "_FAVOR_COMPLETE": "complete_bash",
        "COMP_WORDS": shlex.join(["favor", *typed]),
        "COMP_CWORD": str(len(typed)),
    }
    code = "import sys; sys.argv = ['favor']; from favor.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == offered, done.stderr


def test_one_vocabulary(inputs, favor, tmp_path):
    """run=, model=, data=, out= stand for a command's own keys."""
    code, _, err = favor(
        "train",
        *[word for word in words(inputs, "x")[1:] if "model.path" not in word and "data.train" not in word],
        f"model={inputs / 'model'}",
        f"data={inputs / 'train.jsonl'}",
        "out=run",
    )
    assert (code, err) == (0, "")
    code, _, err = favor("sample", "run=run", f"data={inputs / 'eval.jsonl'}", "out=s.jsonl", "sample.max_new_tokens=3")
    assert (code, err) == (0, "")
    assert len(read_jsonl(tmp_path / "s.jsonl")) == 8
    code, out, err = favor("score", "run=run", f"data={inputs / 'eval.jsonl'}", "out=scores.jsonl", "--json")
    assert code == 0, err
    assert json.loads(out)["figures"]["calibration"]["pairs"] == 8
    code, _, err = favor("reward", *words(inputs, "reward", "train.max_steps=1"))
    assert (code, err) == (0, "")
    assert favor("score", "run=reward", "data=s.jsonl", "out=rewards.jsonl")[0] == 0
    assert favor("score", "model=reward/model", "data=s.jsonl", "out=same.jsonl")[0] == 0
    assert (tmp_path / "same.jsonl").read_text() == (tmp_path / "rewards.jsonl").read_text()
    for command in ("sample", "score"):
        code, _, err = favor(command, "run=nowhere", "data=s.jsonl", "out=o.jsonl")
        assert (code, err.strip()) == (
            2,
            "favor: run=nowhere: no finished run here (config.toml and model/); train first, or name another",
        )
    # how rows are read is said in the same words everywhere
    reading = ["columns.prompt=q", 'columns={prompt="q"}', 'verdict={first="a"}']
    assert expanded("lint", reading) == [f"data.{word}" for word in reading]
    assert expanded("sample", reading) == reading
    # a section stays one
    assert expanded("train", ['model={path="x"}', "data=1", "r.toml", "out=y"]) == [
        'model={path="x"}',
        "data=1",
        "r.toml",
        "run=y",
    ]
