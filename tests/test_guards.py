"""Guards that act: signs in closed form, a planted collapse that is caught, consequences that are seen and survive a resume."""

import json
import math
import os
import random
import subprocess
import sys

import pytest
import tiny
import torch
from oracles import tree
from rich.console import Console
from safetensors.torch import load_file
from test_training import StopAt

from favor.config import load
from favor.data.batches import build
from favor.errors import ConfigError
from favor.losses.table import make_loss, term_sums
from favor.losses.view import Scored
from favor.ranks import World
from favor.report.curves import curves
from favor.report.records import collect
from favor.report.verdict import verdict
from favor.run import RunFolder, read_jsonl
from favor.stop import StoppedError, StopRequest
from favor.train.checkpoint import checkpoints
from favor.train.health import (
    HealthConfig,
    after,
    distinct,
    is_better,
    of_samples,
    out_of_bounds,
    repeated,
    with_likelihood,
)
from favor.train.preference import TrainConfig, train
from favor.train.session import Health, Kept, Session
from favor.train.sft import SftConfig, sft

START = {
    "ended": 0.75,
    "length": 20.0,
    "repetition": 0.0,
    "distinct": 0.9,
    "displacement": 0.0,
    "kl": 0.0,
    "accuracy": 0.5,
}
CLOCK = {"seconds", "pairs_per_s", "tokens_per_s"}


# closed forms


def test_repetition_and_distinct_in_closed_form():
    # 1 2 1 2 1 2: the 4-grams 1212, 2121, 1212 are two of three distinct
    assert repeated([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)
    assert repeated([7] * 10) == pytest.approx(6 / 7)
    assert repeated(range(50)) == repeated([1, 1, 1]) == 0.0
    # 2-grams: 12 23, 12, and none of a single token
    assert distinct([[1, 2, 3], [1, 2], [9]]) == pytest.approx(2 / 3)
    assert distinct([[1], []]) == 0.0


def test_figures_of_samples():
    found = of_samples([(5, 6, 2), (5, 5, 5, 5, 5), (2,)], {2})
    assert found == {
        "ended": pytest.approx(2 / 3),
        "length": 3.0,
        # the end token is no part of what is said: 5 5 5 5 5 has two equal 4-grams
        "repetition": pytest.approx(0.5 / 3),
        # 56, 55, 55, 55, 55
        "distinct": pytest.approx(2 / 5),
    }


@pytest.mark.parametrize(
    ("sign", "fine", "bad"),
    [
        ("ended", 0.25, 0.24),
        ("length", 40.0, 40.1),
        ("length", 10.0, 9.9),
        ("repetition", 0.25, 0.26),
        ("distinct", 0.45, 0.44),
        ("displacement", -1.0, -1.01),
        ("kl", 30.0, 30.1),
        ("kl", -5.0, math.nan),
        # of 0.6 to a best of 0.65 the allowed 0.05
        ("accuracy_high", 0.46, 0.44),
    ],
)
def test_a_sign_is_out_of_bounds_behind_its_limit(sign, fine, bad):
    config = HealthConfig(every=1)
    name = sign.removesuffix("_high")
    assert out_of_bounds(config, START | {sign: fine}, START) == ()
    assert out_of_bounds(config, START | {sign: bad}, START) == (name,)
    off = HealthConfig.model_validate({"every": 1, "on": {name: "off"}})
    assert out_of_bounds(off, START | {sign: bad}, START) == ()


def test_what_a_look_leads_to():
    config = HealthConfig.model_validate(
        {"every": 1, "kl_budget": 9.0, "on": {"kl": "lower_lr", "length": "likelihood", "ended": "stop"}}
    )
    begun, now = Health(start=START), START | {"accuracy": 0.7, "loss": 0.6, "kl": 3.0}
    assert is_better(config, now, (), None)
    assert not is_better(config, now | {"kl": 9.1}, (), None)
    assert not is_better(config, now, ("distinct",), None)
    best = Kept(step=4, accuracy=0.7, loss=0.6, kl=3.0)
    assert not is_better(config, now, (), best)
    assert is_better(config, now | {"loss": 0.59}, (), best)
    assert is_better(config, now | {"loss": 9.0, "accuracy": 0.71}, (), best)
    once = after(config, begun, 4, now, ((), True))
    assert (once.best, once.start["accuracy"], once.rate) == (best, 0.7, 1.0)
    twice = after(config, after(config, once, 5, now, (("kl",), False)), 6, now, (("kl", "length"), False))
    assert twice.rate == pytest.approx(0.01)
    assert (twice.likelihood, twice.stopped, twice.out) == (True, False, ("kl", "length"))
    assert after(config, twice, 7, now, (("ended",), False)).stopped
    # it stays on, and no sign changes nothing more
    healed = after(config, twice, 7, now, ((), False))
    assert (healed.likelihood, healed.rate, healed.best) == (True, twice.rate, best)


@pytest.mark.parametrize("kind", ["dpo", "simpo", "sum"])
def test_the_likelihood_term_is_rpos(kind):
    """[loss] as it was, and beside it weight x the sum over pairs of -log pi(chosen)/length."""
    terms = {"terms": [{"kind": "dpo", "beta": 0.3}, {"kind": "ipo", "weight": 2.0}]} if kind == "sum" else {}
    base = make_loss(kind, **terms)
    trees = tree([5, 6], [[8, 9, 2], [10, 2]], [(0, 1)]), tree([7], [[4, 2], [9, 9, 9, 2]], [(0, 1)], first=2)
    batch = build(trees, "tree")
    pi, ref = torch.tensor([-3.0, -5.0, -2.0, -8.0]).double(), torch.full((4,), -4.0).double()
    scored = Scored(pi[batch.index_R], ref)
    *before, term = term_sums(with_likelihood(base, 0.5), scored, batch).tolist()
    assert before == term_sums(base, scored, batch).tolist()
    assert term == pytest.approx(0.5 * (3 / 3 + 2 / 2))


# refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.hold_out.share=0"], "greater than 0"),
        (["-held out"], r"\[health\] looks at held-out data; name data.eval"),
        (["reference.mode=live", "reference.sync.every=2"], r"which \[reference.sync\] moves"),
        (
            ["loss.kind=kto", "health.on.ended=likelihood"],
            "loss 'kto' has no chosen answer for health's likelihood term",
        ),
        (["loss.kind=orpo", "health.consequence=likelihood"], "loss 'orpo' has a likelihood term already"),
        (["loss.kind=cpo", "health.consequence=likelihood"], "loss 'cpo' has a likelihood term already"),
        (["loss.kind=simpo", "health.displacement=2"], "health.displacement is against a reference"),
        (["health.lr_factor=0.5"], "health.lr_factor is set, but no sign of health.on reads it"),
        (["health.likelihood_weight=0.5"], "health.likelihood_weight is set, but no sign"),
        (["health.on.kl=off", "health.kl=3"], "health.kl is set, but no sign"),
        (["health.kl_budget=31"], "health.kl_budget is above health.kl"),
        (["health.on.ended=explode"], "health.on.ended"),
        (
            [
                f"health.on.{name}=off"
                for name in ("ended", "length", "repetition", "distinct", "displacement", "kl", "accuracy")
            ],
            "switches every sign off",
        ),
    ],
)
def test_what_cannot_work_is_refused(words, said):
    given = [f"run={os.devnull}x", "model.path=m", "data.train=t.jsonl", "health.every=2"]
    given += [] if "-held out" in words else ["data.hold_out.share=0.2"]
    with pytest.raises(ConfigError, match=said):
        load(TrainConfig, None, [*given, *(word for word in words if word != "-held out")])


def test_other_commands_have_no_such_section(favor):
    for command in ("ppo", "sft"):
        code, _, err = favor(command, "run=r", "model.path=m", "health.every=2")
        assert code
        assert "unknown key 'health" in err


def test_the_resolved_recipe_is_accepted_again(tmp_path):
    from favor.config import dump

    config = load(TrainConfig, None, ["run=r", "model.path=m", "data.train=t", "data.eval=e", "health.every=2"])
    (tmp_path / "c.toml").write_text(dump(config), "utf-8")
    assert load(TrainConfig, tmp_path / "c.toml") == config


# whole runs on a tiny model whose answers end


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A model that was fine-tuned to give short answers, and preferences for those that say "good"."""
    folder = tmp_path_factory.mktemp("guards")
    torch.manual_seed(0)
    tiny.save(folder / "base")
    rng, words = random.Random(0), ["warm", "funny", "film", "never", "stops", "maybe", "help"]

    def say(first):
        return " ".join([first, *rng.choices(words, k=rng.randint(1, 3))])

    rows = [{"prompt": f"Film {i % 12}?", "chosen": say("good"), "rejected": say("bad")} for i in range(36)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:24]), "utf-8")
    held = [row | {"prompt": row["prompt"].replace("Film", "The film")} for row in rows[24:]]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held), "utf-8")
    given = {"run": str(folder / "sft"), "model": {"path": str(folder / "base"), "dtype": "float32"}}
    given |= {"data": {"train": str(folder / "train.jsonl")}, "optim": {"lr": 1e-2}}
    given |= {"train": {"epochs": 12, "batch_prompts": 4}, "save": {"every": 0}}
    sft(SftConfig.model_validate(given), open_session)
    return folder


def open_session(root, stop=None):
    return Session(RunFolder(root), World(), Console(quiet=True), stop or StopRequest())


def words(films, run, *more):
    return [
        f"run={run}",
        f"model.path={films / 'sft/model'}",
        "model.dtype=float32",
        f"data.train={films / 'train.jsonl'}",
        f"data.eval={films / 'eval.jsonl'}",
        "train.batch_prompts=4",
        "train.epochs=4",
        "save.every=5",
        *more,
    ]


LOOKS = ("health.every=2", "health.tokens=24")
SOUND, PLANTED = "optim.lr=1e-4", "optim.lr=5e-2"
# a limit that any change of the answers' lengths passes, so that what follows can be seen on a small run
TOUCHY = (
    SOUND,
    *LOOKS,
    "health.length=1.0001",
    *(f"health.on.{n}=off" for n in ("displacement", "accuracy")),
)


def run_train(given, stop=None):
    train(load(TrainConfig, None, given), lambda root: open_session(root, stop))


def records(run, kind):
    """The last record of each step, without what depends on the clock."""
    found = {r["step"]: r for r in read_jsonl(RunFolder(run).metrics) if r["kind"] == kind}
    return {step: {k: v for k, v in record.items() if k not in CLOCK} for step, record in found.items()}


def events(run, name):
    return [r for r in read_jsonl(RunFolder(run).metrics) if r["kind"] == "event" and r["name"] == name]


def weights(run):
    return load_file(RunFolder(run).model / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def planted(films, tmp_path_factory):
    """A run whose rate is 500 times too high, with guards that only warn."""
    root = tmp_path_factory.mktemp("planted") / "warned"
    run_train(words(films, root, PLANTED, *LOOKS))
    return root


def test_a_guard_that_warns_changes_no_bit(films, planted, tmp_path):
    run_train(words(films, tmp_path / "bare", PLANTED))
    assert equal(weights(tmp_path / "bare"), weights(planted))
    assert records(tmp_path / "bare", "step") == records(planted, "step")
    assert records(tmp_path / "bare", "health") == {}
    assert sorted(records(planted, "health")) == [0, 2, 4, 6, 8, 10, 12]


def test_a_planted_collapse_is_caught_and_a_sound_run_is_not(films, planted, tmp_path):
    run_train(words(films, tmp_path / "sound", SOUND, *LOOKS))
    looks = records(tmp_path / "sound", "health")
    assert looks[0]["ended"] >= 0.75
    assert looks[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert looks[0]["accuracy"] == 0.5
    assert events(tmp_path / "sound", "health") == []
    first = events(planted, "health")[0]
    # within two looks
    assert first["step"] <= 4
    assert first["done"] == []
    assert first["message"].startswith(f"warning: health at step {first['step']}: ")
    assert {"displacement", "kl"} & first["signs"].keys()
    # and it was one: soon no sample ends, and the end is as far away
    looks = records(planted, "health")
    assert looks[4]["ended"] == 0
    assert looks[12]["kl"] > 30


def test_a_stop_keeps_the_best_look(films, planted, tmp_path):
    """It ends at the look that warned without it; where none was sound before, that is said."""
    caught = events(planted, "health")[0]["step"]
    run_train(words(films, tmp_path / "broken", PLANTED, *LOOKS, "health.consequence=stop"))
    assert max(records(tmp_path / "broken", "step")) == caught
    (kept,) = events(tmp_path / "broken", "kept")
    assert kept["message"].startswith("warning: no later look was without a sign, so the model is that of step")
    run_train(words(films, tmp_path / "stopped", *TOUCHY, "health.consequence=stop"))
    (told,) = events(tmp_path / "stopped", "health")
    assert told["message"].endswith(": training stops")
    assert max(records(tmp_path / "stopped", "step")) == told["step"] == 4
    (kept,) = events(tmp_path / "stopped", "kept")
    assert kept["kept"] == 2
    assert_holds(tmp_path / "stopped", 2)


def assert_holds(run, step):
    """The model of a run, and its last held-out figures, are those after a step."""
    stored, found = load_file(run / f"checkpoints/step-{step:06d}/policy.safetensors"), weights(run)
    assert all(torch.equal(found[name], stored[name]) for name in found)
    last = list(records(run, "eval").values())[-1]
    assert last["of_step"] == step
    # 12 held-out prompts, all of which a look measures
    assert last["loss"] == pytest.approx(records(run, "health")[step]["loss"], abs=1e-6)


def test_a_budget_on_kl_chooses_the_result(films, tmp_path):
    """Of the looks within it the most accurate one, then the one of the lowest loss; where none is within, that is said."""
    run_train(words(films, tmp_path / "free", SOUND, *LOOKS))
    looks = {step: look for step, look in records(tmp_path / "free", "health").items() if step}
    budget = sorted(look["kl"] for look in looks.values())[2]
    within = {step: look for step, look in looks.items() if look["kl"] <= budget}
    best = max(within, key=lambda step: (within[step]["accuracy"], -within[step]["loss"]))
    run_train(words(films, tmp_path / "within", SOUND, *LOOKS, f"health.kl_budget={budget}"))
    (kept,) = events(tmp_path / "within", "kept")
    assert kept["kept"] == best < 12
    assert len(records(tmp_path / "within", "step")) == 12
    assert_holds(tmp_path / "within", best)
    run_train(words(films, tmp_path / "none", "optim.lr=2e-3", *LOOKS, "health.kl_budget=1e-9", "train.epochs=1"))
    (kept,) = events(tmp_path / "none", "kept")
    assert kept["message"].startswith(
        "warning: no later look was without a sign within a KL of 1e-09, so the model is that of step 3"
    )


def test_each_consequence_acts(films, tmp_path):
    """lower_lr is seen in the rate, likelihood in the loss: by exactly its term, on the same weights."""
    for name in ("warn", "lower_lr", "likelihood"):
        more = (
            ("health.lr_factor=0.25",)
            if name == "lower_lr"
            else ("health.likelihood_weight=0.5",)
            if name == "likelihood"
            else ()
        )
        run_train(words(films, tmp_path / name, *TOUCHY, f"health.consequence={name}", *more))
    warned, lowered, likely = (records(tmp_path / name, "step") for name in ("warn", "lower_lr", "likelihood"))
    at = events(tmp_path / "warn", "health")[0]["step"]
    assert at < 12
    for step in range(1, at + 1):
        assert warned[step] == lowered[step] == likely[step]
    # the first step behind the look has the same weights before it
    then = warned[at + 1]
    assert lowered[at + 1]["lr"] == 0.25 * then["lr"]
    assert lowered[at + 1]["loss"] == then["loss"]
    assert likely[at + 1]["loss"] == pytest.approx(then["loss"] - 0.5 * then["logp_chosen_per_token"], abs=1e-6)
    assert likely[12]["logp_chosen_per_token"] > warned[12]["logp_chosen_per_token"]
    for name in ("lower_lr", "likelihood"):
        assert not equal(weights(tmp_path / name), weights(tmp_path / "warn"))
        assert events(tmp_path / name, "health")[0]["done"] != []


def test_what_was_decided_survives_a_stop_and_a_kill(films, tmp_path):
    """Rate, likelihood, the best look and the end of the run are those of the run that was never stopped, bit for bit."""
    kinds = ("health.on.length=lower_lr", "health.on.ended=likelihood", "health.ended=0.95", "health.kl_budget=20")
    given = (*TOUCHY, *kinds)
    run_train(words(films, tmp_path / "whole", *given))
    acted = [event["step"] for event in events(tmp_path / "whole", "health") if event["done"]]
    assert acted[0] == 4
    assert len(events(tmp_path / "whole", "health")[0]["done"]) == 2
    # a stop behind the first consequence, then a kill that costs the newest checkpoint
    with pytest.raises(StoppedError):
        run_train(words(films, tmp_path / "broken", *given), StopAt(acted[0] + 1))
    with pytest.raises(StoppedError):
        run_train(words(films, tmp_path / "broken", *given, "resume=true"), StopAt(2))
    best = {event["kept"] for event in events(tmp_path / "whole", "kept")}
    for newest in checkpoints(tmp_path / "broken/checkpoints")[-1:]:
        if int(newest.name[5:]) not in best:
            (newest / "state.json").write_text("{}")
    run_train(words(films, tmp_path / "broken", *given, "resume=true"))
    for kind in ("step", "health"):
        assert records(tmp_path / "broken", kind) == records(tmp_path / "whole", kind)
    assert equal(weights(tmp_path / "broken"), weights(tmp_path / "whole"))
    assert events(tmp_path / "broken", "kept")[-1]["kept"] in best


def test_the_page_and_the_terminal_tell(films, planted, favor):
    drawn = {plot.title: plot.svg for plot in curves([collect(planted)], "step", inner=False)}
    assert "health" in drawn["Repeated 4-grams within a sample"]
    assert "health" in drawn["Sampled KL (how far the model moved)"]
    wrong = dict(verdict(collect(planted)).facts)["Is anything wrong"]
    assert any(said.startswith("Health at step") for said in wrong)
    run = planted.parent / "told"
    code, out, err = favor("train", *words(films, run, PLANTED, *LOOKS, "health.consequence=stop"))
    assert (code, err) == (0, "")
    assert "health: 7 looks, one every 2 steps, at 16 samples of up to 24 tokens and 32 held-out prompts, about" in out
    assert "health: the looks took" in out
    assert "training stops" in out
    assert "look at the lines above on: health" in out


@pytest.mark.dist
def test_two_ranks_decide_as_one(films, tmp_path):
    program = tmp_path / "favor_main.py"
    program.write_text("from favor.cli import main\nmain()\n")
    given = ["train", *words(films, "{}", *TOUCHY, "health.consequence=lower_lr", "train.max_tokens_per_pack=60")]
    two = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29641"]
    for name, launcher in (("one", []), ("two", two)):
        line = [sys.executable, *launcher, str(program), *(word.format(tmp_path / name) for word in given)]
        subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=200)
    one, two = (events(tmp_path / name, "health") for name in ("one", "two"))
    assert [(e["step"], e["done"], list(e["signs"])) for e in one] == [
        (e["step"], e["done"], list(e["signs"])) for e in two
    ]
    assert one
    for step, record in records(tmp_path / "one", "step").items():
        assert records(tmp_path / "two", "step")[step]["lr"] == record["lr"]
        assert records(tmp_path / "two", "step")[step]["loss"] == pytest.approx(record["loss"], abs=1e-4)
