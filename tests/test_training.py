"""Whole runs on a tiny model: resume bit for bit, stale references refused, saved models load and agree."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import tiny
import torch
from oracles import plain_logps, tree
from rich.console import Console
from safetensors import safe_open

from favor.config import load
from favor.data.read import read_splits
from favor.errors import CheckpointError, ConfigError, NumericsError
from favor.eval.evaluate import EvalConfig, evaluate
from favor.model.load import ModelConfig, load_policy
from favor.model.sample import SampleConfig
from favor.ranks import World
from favor.run import RunFolder, read_jsonl
from favor.stop import StoppedError, StopRequest
from favor.train.checkpoint import checkpoints
from favor.train.preference import TrainConfig, train
from favor.train.session import Session
from favor.train.sft import SftConfig, sft


@pytest.fixture(scope="module")
def world_of_films(tmp_path_factory):
    """A model folder and a preference file: prompts with several pairs, one ranking."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save(folder / "model")
    rng, words = random.Random(0), ["good", "bad", "warm", "funny", "film", "never", "stops", "maybe", "help"]

    def say():
        return " ".join(rng.choices(words, k=rng.randint(2, 9)))

    rows = [{"prompt": f"Write about film {i % 9}.", "chosen": say(), "rejected": say()} for i in range(24)]
    rows.append({"prompt": "Write about film 3.", "chosen": say(), "rejected": say(), "weight": 2.0})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def settings(inputs, run, *more):
    return [
        f"run={run}",
        f"model.path={inputs / 'model'}",
        "model.dtype=float32",
        f"data.train={inputs / 'train.jsonl'}",
        "train.batch_prompts=3",
        "train.epochs=4",
        "save.every=2",
        "optim.lr=1e-3",
        "optim.warmup=2",
        *more,
    ]


def open_session(root, stop=None):
    return Session(RunFolder(root), World(), Console(quiet=True), stop or StopRequest())


def run_train(words, stop=None):
    train(load(TrainConfig, None, words), lambda root: open_session(root, stop))


def curve(run):
    """The last record of each step, without what depends on the clock."""
    clock = {"seconds", "pairs_per_s", "tokens_per_s"}
    steps = {r["step"]: r for r in read_jsonl(RunFolder(Path(run)).metrics) if r["kind"] == "step"}
    return {step: {k: v for k, v in record.items() if k not in clock} for step, record in steps.items()}


class StopAt(StopRequest):
    """A stop signal that arrives while a given step is running."""

    def __init__(self, step):
        self._left = step

    @property
    def signal_number(self):
        self._left -= 1
        return signal.SIGTERM if self._left == 0 else None

    @signal_number.setter
    def signal_number(self, value):
        pass


def test_training_learns_the_training_pairs(world_of_films, tmp_path):
    run_train(settings(world_of_films, tmp_path / "run", "optim.lr=5e-3", "train.epochs=8"))
    steps = curve(tmp_path / "run")
    assert len(steps) == 24
    assert steps[1]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert abs(steps[1]["margin"]) < 1e-6
    assert steps[24]["loss"] < 0.4
    assert steps[24]["accuracy"] > 0.9
    assert sum(s["pairs"] for s in steps.values()) == 8 * 25
    resolved = tomllib.loads((tmp_path / "run/config.toml").read_text())["loss"]
    assert (resolved["kind"], resolved["beta"], resolved["length_normalized"]) == ("dpo", 0.1, False)
    report = json.loads((tmp_path / "run/data.json").read_text())
    assert report["train"]["read"]["num_trees"] == 9


def test_golden_trajectory(world_of_films, tmp_path):
    """Twelve losses and gradient norms of a fixed run; a change that moves them must say why and record them anew."""
    run_train(settings(world_of_films, tmp_path / "run"))
    found = [[s["loss"], s["grad_norm"]] for s in curve(tmp_path / "run").values()]
    golden = Path(__file__).parent / "golden/dpo_tiny.json"
    expected = json.loads(golden.read_text())
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3)


def test_training_from_the_cache_is_training_from_memory(world_of_films, tmp_path, monkeypatch):
    monkeypatch.setenv("FAVOR_CACHE", str(tmp_path / "cache"))
    more = [
        "train.max_steps=2",
        f"data.eval={world_of_films / 'train.jsonl'}",
        "watch.eval.every=2",
        "watch.kl.every=1",
    ]
    for name, on in (("memory", "false"), ("files", "true"), ("reused", "true")):
        run_train(settings(world_of_films, tmp_path / name, *more, f"data.cache={on}"))
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 2
    memory = tmp_path / "memory"
    for other in (tmp_path / "files", tmp_path / "reused"):
        assert curve(other) == curve(memory)
        for name in ("model/model.safetensors", "data.json"):
            assert (other / name).read_bytes() == (memory / name).read_bytes()
        with (
            safe_open(other / "reference.safetensors", "pt") as mine,
            safe_open(memory / "reference.safetensors", "pt") as theirs,
        ):
            assert mine.metadata() == theirs.metadata()
            assert all(torch.equal(mine.get_tensor(part), theirs.get_tensor(part)) for part in ("train", "eval"))


def test_bfloat16_compute_keeps_float32_weights(world_of_films, tmp_path):
    from safetensors.torch import load_file

    run_train([*settings(world_of_films, tmp_path / "run", "optim.lr=5e-3"), "model.dtype=bfloat16"])
    steps = curve(tmp_path / "run")
    assert steps[1]["loss"] == pytest.approx(0.6931, abs=2e-2)
    assert steps[12]["loss"] < 0.55
    assert load_file(tmp_path / "run/model/model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_saved_model_loads_in_transformers_with_the_same_log_probs(world_of_films, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_train(settings(world_of_films, tmp_path / "run"))
    folder = tmp_path / "run/model"
    trees = [tree([5, 6, 7], [[8, 9, 2], [10, 2]])]
    ours = plain_logps(load_policy(ModelConfig(path=str(folder), dtype="float32")).causal_lm, trees)
    theirs = plain_logps(AutoModelForCausalLM.from_pretrained(folder), trees)
    start = plain_logps(tiny.model(), trees)
    assert torch.equal(ours, theirs)
    assert (ours - start).abs().max() > 0.01
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny.CHATML


def test_lora_saves_an_adapter_that_peft_loads(world_of_films, tmp_path):
    from peft import AutoPeftModelForCausalLM

    run_train(settings(world_of_films, tmp_path / "run", "model.lora.rank=4", "optim.lr=1e-2", "reference.mode=live"))
    steps = curve(tmp_path / "run")
    assert steps[1]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert steps[12]["loss"] < 0.6
    folder = tmp_path / "run/model"
    assert (folder / "adapter_model.safetensors").exists()
    trees = [tree([5, 6, 7], [[8, 9, 2], [10, 2]])]
    theirs = plain_logps(AutoPeftModelForCausalLM.from_pretrained(folder).get_base_model(), trees)
    merged = plain_logps(load_policy(ModelConfig(path=str(folder), dtype="float32")).causal_lm, trees)
    assert torch.allclose(theirs, merged, atol=1e-4)
    assert (theirs - plain_logps(tiny.model(), trees)).abs().max() > 0.01


def test_live_and_stored_reference_give_the_same_curve(world_of_films, tmp_path):
    run_train(settings(world_of_films, tmp_path / "stored"))
    run_train(settings(world_of_films, tmp_path / "live", "reference.mode=live"))
    stored, live = curve(tmp_path / "stored"), curve(tmp_path / "live")
    for step in stored:
        assert stored[step]["loss"] == pytest.approx(live[step]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    "more", [(), ("model.lora.rank=4",), ("optim.kind=rmsprop",)], ids=["adamw", "lora", "rmsprop"]
)
def test_stopped_run_resumes_bit_for_bit(world_of_films, tmp_path, more):
    words = settings(world_of_films, tmp_path / "broken", *more)
    with pytest.raises(StoppedError, match="stopped after step 5 of 12; continue with resume=true") as stopped:
        run_train(words, StopAt(5))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert [p.name for p in checkpoints(tmp_path / "broken/checkpoints")] == ["step-000004", "step-000005"]
    run_train([*words, "resume=true"])
    run_train(settings(world_of_films, tmp_path / "whole", *more))
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.tmp"))


def test_kill_9_at_a_random_step_and_resume(world_of_films, tmp_path):
    """The process is killed without warning; the rest of the loss curve is equal bit for bit."""
    words = settings(world_of_films, tmp_path / "killed", "train.epochs=80")
    program = [sys.executable, "-c", "from favor.cli import main; main()", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    metrics = tmp_path / "killed/metrics.jsonl"
    wanted = random.randrange(15, 60)
    with subprocess.Popen([*program, *words], env=environment, stdout=subprocess.DEVNULL) as process:
        while not metrics.exists() or metrics.read_text().count('"step"') < wanted:
            assert process.poll() is None, "finished before it was killed"
            time.sleep(0.001)
        process.kill()
    reached = max(curve(tmp_path / "killed"))
    assert 5 <= reached < 240
    done = subprocess.run(
        [*program, *words, "resume=true"], env=environment, capture_output=True, text=True, check=True
    )
    resumed = int(re.search(r"resumed after step (\d+)", done.stdout)[1])
    # the checkpoint that was being written is lost
    assert reached - 4 <= resumed <= reached
    whole = settings(world_of_films, tmp_path / "whole", "train.epochs=80")
    subprocess.run([*program, *whole], env=environment, check=True, capture_output=True)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


def test_reference_store_is_reused_over_losses_and_refused_when_stale(world_of_films, tmp_path):
    store = f"reference.store={tmp_path / 'ref.safetensors'}"
    run_train(settings(world_of_films, tmp_path / "a", store))
    written = (tmp_path / "ref.safetensors").stat().st_mtime_ns
    run_train(settings(world_of_films, tmp_path / "b", store, "loss.kind=ipo", "loss.beta=0.5"))
    assert (tmp_path / "ref.safetensors").stat().st_mtime_ns == written
    assert curve(tmp_path / "b")[1]["loss"] == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(CheckpointError, match=r"ref\.safetensors: .* another token ids; delete it"):
        run_train(settings(world_of_films, tmp_path / "c", store, "data.max_rows=20"))
    with pytest.raises(CheckpointError, match="another weights"):
        run_train(settings(world_of_films, tmp_path / "d", store, f"model.path={tmp_path / 'a/model'}"))
    (tmp_path / "ref.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="not a readable reference store"):
        run_train(settings(world_of_films, tmp_path / "e", store))


def test_wrong_reference_is_caught_at_step_0(world_of_films, tmp_path, monkeypatch):
    from favor.train import preference as module

    honest = module.measured
    monkeypatch.setattr(
        module,
        "measured",
        lambda *args: (
            honest(*args) + torch.randn(1, dtype=torch.float64).abs() * torch.arange(50)[: honest(*args).shape[0]]
        ),
    )
    with pytest.raises(NumericsError, match="step 0: the loss is .* but must be 0.69314718"):
        run_train(settings(world_of_films, tmp_path / "run"))


def test_resume_needs_the_same_recipe(world_of_films, tmp_path):
    words = settings(world_of_films, tmp_path / "run")
    with pytest.raises(StoppedError):
        run_train(words, StopAt(3))
    with pytest.raises(ConfigError, match="already holds a run"):
        run_train(words)
    with pytest.raises(ConfigError, match=r"another recipe \(optim.lr 0.\d+ then, 0.01 now\); resume"):
        run_train([*words, "resume=true", "optim.lr=0.01"])
    for damaged in checkpoints(tmp_path / "run/checkpoints"):
        (damaged / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"step-000002: damaged checkpoint .*no sound checkpoint is left"):
        run_train([*words, "resume=true"])


@pytest.mark.parametrize("name", ["cdpo", "ipo", "hinge", "plackett_luce", "kto", "bco", "aot", "exo"])
def test_every_loss_trains(world_of_films, tmp_path, name):
    run_train(settings(world_of_films, tmp_path / "run", f"loss.kind={name}", "loss.beta=0.3"))
    steps = curve(tmp_path / "run")
    assert steps[12]["margin"] > 0.3
    assert steps[12]["loss"] < steps[1]["loss"]


def test_two_passes_take_the_steps_of_one(world_of_films, tmp_path):
    """A linear surrogate with known coefficients has the loss's own gradient; branches fit a smaller budget."""
    mixed = "loss.kind=sum", 'loss.terms=[{kind="dpo"}, {kind="sft", weight=0.2}, {kind="plackett_luce", weight=0.5}]'
    for passes in ("one", "two"):
        run_train(settings(world_of_films, tmp_path / passes, f"loss.passes={passes}", *mixed, "train.epochs=2"))
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two) == 6
    for step, record in one.items():
        for key in ("loss", "grad_norm", "margin", "accuracy", "pairs", "logp_chosen_per_token"):
            assert two[step][key] == pytest.approx(record[key], rel=1e-4, abs=1e-6)


def test_moving_reference(world_of_films, tmp_path):
    """TR-DPO: after a hard update policy and reference are equal, after a soft one the margin has shrunk; resume is exact."""
    live = ("reference.mode=live", "reference.sync.every=2")
    run_train(settings(world_of_films, tmp_path / "hard", *live))
    steps = curve(tmp_path / "hard")
    assert all(steps[s]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6) for s in (1, 3, 5, 7))
    assert all(abs(steps[s]["loss"] - 0.6931471805599453) > 1e-4 for s in (4, 6, 8))
    soft = [*live, "reference.sync.weight=0.5"]
    run_train(settings(world_of_films, tmp_path / "soft", *soft))
    assert all(abs(curve(tmp_path / "soft")[s]["loss"] - 0.6931471805599453) > 1e-5 for s in (3, 5, 7))
    with pytest.raises(StoppedError):
        run_train(settings(world_of_films, tmp_path / "again", *soft), StopAt(5))
    run_train(settings(world_of_films, tmp_path / "again", *soft, "resume=true"))
    assert curve(tmp_path / "again") == curve(tmp_path / "soft")
    with pytest.raises(ConfigError, match=r"\[reference\.sync\] moves a copy of the weights"):
        run_train(settings(world_of_films, tmp_path / "lora", *live, "model.lora.rank=2"))
    with pytest.raises(ConfigError, match=r"set reference\.mode=live"):
        run_train(settings(world_of_films, tmp_path / "stored", "reference.sync.every=2"))


def test_data_that_cannot_feed_the_loss(world_of_films, tmp_path):
    for words, message in (
        (["loss.kind=odpo"], "needs a margin above 0"),
        (["loss.kind=aot", "loss.passes=one"], "set loss.passes=two"),
        (["loss.kind=simpo", "reference.mode=live"], "reads no reference"),
        (["loss.ld_alpha=0.5"], "set reference.mode=live"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_train(settings(world_of_films, tmp_path / words[0], *words))


def test_reference_free_losses_build_no_reference(world_of_films, tmp_path):
    run_train(settings(world_of_films, tmp_path / "run", "loss.kind=simpo", "loss.beta=2.0"))
    assert not (tmp_path / "run/reference.safetensors").exists()
    steps = curve(tmp_path / "run")
    assert steps[12]["loss"] < steps[1]["loss"]
    assert steps[12]["accuracy"] > steps[1]["accuracy"]
    assert "chosen_below_reference" not in steps[1]


def test_displacement_is_warned_of(world_of_films, tmp_path):
    more = ("optim.lr=1e-2", "reference.displacement_threshold=0.05", "train.epochs=12")
    run_train(settings(world_of_films, tmp_path / "run", *more))
    events = [r for r in read_jsonl(tmp_path / "run/metrics.jsonl") if r.get("name") == "displacement"]
    assert events
    assert "less likely than under the reference" in events[0]["message"]


def test_held_out_figures_and_kl_probe_while_training(world_of_films, tmp_path):
    more = (
        f"data.eval={world_of_films / 'train.jsonl'}",
        "watch.eval.every=6",
        "watch.kl.every=4",
        "watch.kl.tokens=6",
    )
    run_train(settings(world_of_films, tmp_path / "run", *more))
    records = read_jsonl(tmp_path / "run/metrics.jsonl")
    evals = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [0, 6, 12]
    assert evals[2]["accuracy"] > 0.75
    assert evals[2]["loss"] < evals[1]["loss"] < 0.69
    probed = [r["kl"] for r in records if r["kind"] == "step" and "kl" in r]
    assert len(probed) == 9
    assert probed[-1] > 0.1
    assert any(r.get("name") == "reference" for r in records)
    assert "leak" in (tmp_path / "run/data.json").read_text()


def test_held_out_share_is_never_trained_on_and_evaluated(world_of_films, tmp_path):
    """hold_out over two sources: training and `favor eval` agree on the prompts, which data.json counts."""
    words = [word for word in settings(world_of_films, tmp_path / "a") if not word.startswith("data.")]
    paths = [world_of_films / "train.jsonl", tmp_path / "more.jsonl"]
    rows = [{"prompt": f"More {i}.", "chosen": "good film", "rejected": "bad film"} for i in range(12)]
    paths[1].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    tables = ", ".join(f'{{path="{path}"}}' for path in paths)
    run_train([*words, f"data.sources=[{tables}]", "data.hold_out.share=0.4", "train.epochs=1"])
    told = json.loads(RunFolder(tmp_path / "a").data_report.read_text())
    assert told["train"]["read"]["num_trees"] + told["eval"]["read"]["num_trees"] == 21
    assert not [finding for finding in told["lint"] if finding["kind"] == "leak"]
    config = EvalConfig(
        run=str(tmp_path / "a"), sample_prompts=30, samples_per_prompt=1, sample=SampleConfig(max_new_tokens=2)
    )
    evaluate(config, lambda text: None, lambda *args: None)
    sampled = {record["prompt"] for record in read_jsonl(RunFolder(tmp_path / "a").samples)}
    data = load(TrainConfig, RunFolder(tmp_path / "a").config).data
    assert sampled == {tree.prompt for tree in read_splits(data)["eval"][0]}
    # a run of an earlier version
    recipe = RunFolder(tmp_path / "a").config
    recipe.write_text(recipe.read_text().replace("[data]\n", "[data]\neval_share = 0.4\n"))
    with pytest.raises(
        ConfigError, match=r"config.toml: unknown key 'data.eval_share'; it is called 'data.hold_out.share' now"
    ):
        evaluate(config, lambda text: None, lambda *args: None)


def test_sft_raises_the_preferred_responses_only(world_of_films, tmp_path):
    words = settings(world_of_films, tmp_path / "run", "optim.lr=5e-3")
    sft(load(SftConfig, None, words), open_session)
    steps = curve(tmp_path / "run")
    assert steps[12]["loss"] < 0.7 * steps[1]["loss"]
    assert sorted(p.name for p in (tmp_path / "run/model").iterdir())[-1] == "tokenizer_config.json"


def test_a_dry_run_counts_what_training_takes(world_of_films, tmp_path):
    """A prompt whose answers only tie holds nothing for DPO: training passes over it, and so does the plan."""
    from favor.train.dryrun import describe

    ties = [{"prompt": f"Tie {i}?", "chosen": "one", "rejected": "two", "tie": True} for i in range(3)]
    pairs = [{"prompt": f"Pair {i}?", "chosen": "one", "rejected": "two"} for i in range(2)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ties + pairs))
    words = ["run=r", f"model.path={world_of_films / 'model'}", f"data.train={tmp_path / 't.jsonl'}"]
    plan = describe(load(TrainConfig, None, [*words, "train.batch_prompts=1"]))
    assert "steps: 2, each of up to 1 prompts" in plan
