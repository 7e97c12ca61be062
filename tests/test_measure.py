"""`--dry-run --measure`: what it says is what the run takes, and settings that it names make a recipe fit."""

import json
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from favor.config import load
from favor.data.types import Comparison, TokenTree
from favor.model.load import ModelConfig, load_policy
from favor.model.room import Room
from favor.model.size import GIB, architecture_of
from favor.train import dryrun, fit, measure
from favor.train.dryrun import estimated
from favor.train.preference import Begun, TrainConfig

ROWS = [{"prompt": f"Film {i}?", "chosen": f"good {i} " * (1 + i % 5), "rejected": f"bad {i}"} for i in range(24)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure")
    tiny.save(folder / "model")
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return folder


def words(inputs, *more):
    given = [f"model.path={inputs / 'model'}", f"data.train={inputs / 'd.jsonl'}", "run=run", "train.batch_prompts=4"]
    return [*given, "data.hold_out.share=0.25", "model.dtype=float32", *more]


def test_it_measures_and_leaves_nothing(inputs, favor, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, out, err = favor("train", *words(inputs, "watch.kl.every=2", "watch.kl.tokens=4"), "--dry-run", "--measure")
    assert (code, err) == (0, "")
    assert re.search(r"^memory \(measured\): \d+\.\d\d GiB at its peak \(weights, .* a pack of \d+ tokens ", out, re.M)
    assert re.search(
        r"^time \(measured\): .*start .*reference .*held-out figures .*KL probes .*steps .*saving ", out, re.M
    )
    assert re.search(r"^fits: yes, ", out, re.M)
    assert list(tmp_path.iterdir()) == []


def test_figures_for_programs(inputs, favor):
    told = json.loads(favor("train", *words(inputs, "reference.mode=live"), "--dry-run", "--measure", "--json")[1])[
        "figures"
    ]
    assert told["fits"] is True
    assert told["peak_bytes"] > 100e6
    assert set(told["seconds"]) == {"start", "held-out figures", "steps", "saving"}
    assert min(told["seconds"].values()) > 0


def test_a_reference_that_is_stored_takes_no_time(inputs, favor, tmp_path):
    named = words(inputs, f"reference.store={tmp_path / 'stored'}")

    def seconds():
        return json.loads(favor("train", *named, "--dry-run", "--measure", "--json")[1])["figures"]["seconds"]

    assert "reference" in seconds()
    assert favor("train", *named, f"run={tmp_path / 'run'}", "train.max_steps=1")[0] == 0
    assert "reference" not in seconds()


def test_a_card_too_small_is_told_what_would_fit(inputs, favor):
    """Beside CUDA's own half GiB nothing is left, so nothing helps; the machine's memory is not asked."""
    code, out, _ = favor("train", *words(inputs), "--dry-run", "--card", "0.5")
    assert code == 0
    assert re.search(
        r"^fits: no, .* of 0\.50 GiB \(the card\); no setting changes that; take a smaller model", out, re.M
    )


def test_the_estimate_counts_adapters(inputs):
    """Their weights, gradients and two moments, to the byte; beside the base's weights."""
    base = load(TrainConfig, None, words(inputs))
    adapted = load(TrainConfig, None, words(inputs, "model.lora.rank=64", "reference.mode=live"))
    architecture = architecture_of(base.model)
    numbers = sum(parameter.numel() for parameter in load_policy(adapted.model).trainable().values())
    plain = sum(parameter.numel() for parameter in load_policy(base.model).trainable().values())
    assert numbers > plain, "a rank so large that forgetting them would be seen"
    assert estimated(adapted, architecture, 10).state == 4 * plain + 16 * numbers
    assert estimated(base, architecture, 10).state == 16 * plain


@pytest.mark.parametrize("more", [["reference.mode=live"], ["watch.kl.every=2"], ["loss.kind=kto"]])
def test_the_estimate_counts_a_reference_beside_the_policy(inputs, more):
    """Whatever reads it: 4 bytes a number; under adapters it is the policy without them."""
    for words_of, copied in (([], 4), (["model.lora.rank=2"], 0)):
        config, alone = (load(TrainConfig, None, words(inputs, *words_of, *extra)) for extra in (more, []))
        architecture = architecture_of(config.model)
        numbers = sum(parameter.numel() for parameter in tiny.model().parameters())
        more_bytes = estimated(config, architecture, 10).state - estimated(alone, architecture, 10).state
        assert more_bytes == copied * numbers


def test_on_a_gpu_packs_begin_where_training_begins(inputs, favor, monkeypatch):
    monkeypatch.setattr(ModelConfig, "on_gpu", True)
    monkeypatch.setattr(dryrun, "has", lambda config: (1 << 40, "this GPU"))
    out = favor("train", *words(inputs), "--dry-run")[1]
    assert "device: GPU" in out
    assert "in packs of up to 16,384 tokens" in out


def test_a_dry_run_says_that_it_will_not_fit(inputs, favor, monkeypatch):
    for room, warned in ((1 << 20, True), (1 << 40, False)):
        monkeypatch.setattr(dryrun, "memory", lambda room=room: Room(room, room, "memory"))
        code, out, _ = favor("train", *words(inputs), "--dry-run")
        assert code == 0
        assert ("warning: this machine has 0.00 GiB. Less takes: model.lora.rank=16" in out) == warned
    monkeypatch.setattr(dryrun.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    assert "warning: 0.00 GiB are needed; save.keep=1" in favor("train", *words(inputs), "--dry-run")[1]


def test_where_it_does_not_fit_the_next_step_is_not_to_train(inputs, favor, monkeypatch):
    _, out, _ = favor("train", *words(inputs), "--dry-run", "--card", "0.5")
    assert "next:" not in out
    monkeypatch.setattr(fit, "fitting", lambda *given: (["model.lora.rank=16"], 1))
    _, out, _ = favor("train", *words(inputs), "--dry-run", "--card", "0.5")
    assert re.search(r"next: favor train .* model.lora.rank=16$", out, re.M)


def test_commands_of_one_process_refuse_several(favor, monkeypatch):
    """Started twice they would write the same file."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = favor("sample", "out=o.jsonl", "prompts=p.jsonl", "engine.kind=local", "engine.model.path=m")
    assert code == 2
    assert "favor sample runs in one process; start it without torchrun" in err


@pytest.mark.parametrize("option", [["--measure"], ["--card", "24"]])
def test_measuring_is_part_of_a_dry_run(inputs, favor, option, tmp_path):
    code, _, err = favor("train", *words(inputs), *option)
    assert code == 2
    assert "add --dry-run" in err
    assert not (tmp_path / "run").exists()


def test_one_process_cannot_say_what_several_hold(inputs, favor):
    code, _, err = favor("train", *words(inputs, "ranks.shard=full"), "--dry-run", "--measure")
    assert code == 2
    assert "docs/scale.md computes what each holds" in err


def begun(sizes, budget, batch, inputs):
    config = load(
        TrainConfig, None, words(inputs, f"train.max_tokens_per_pack={budget}", f"train.batch_prompts={batch}")
    )
    trees = [
        TokenTree((10 + i,) * (n - 4), ((8, 2), (9, 2)), (True, True), (Comparison((0, 1)),), 2 * i, i)
        for i, n in enumerate(sizes)
    ]
    policy = type("P", (), {"layout": "tree"})()
    splits = type("S", (), {"train": trees})()
    return Begun(config, policy, splits, range(len(trees)))  # pyright: ignore[reportArgumentType]


def test_the_largest_pack_behind_another_is_computed(inputs):
    """Gradients are there only from the second micro-batch of a step on."""
    made = begun([90, 80, 100, 10, 20, 30], 100, 6, inputs)
    counted = measure._counted(made)
    assert sum(sum(batch.tokens) for batch in counted) == 330
    _, worst, _ = measure._chosen(counted, made.splits.train[2], 104, 100)
    lengths = sorted(len(t.prompt_ids) + 4 for t in worst)
    packs = counted[0].tokens
    assert sum(lengths) == packs[0] + max(packs[1:])
    # a tree beyond the budget is a pack of its own, wherever it stands
    made = begun([90, 80, 500, 10, 20, 30], 100, 6, inputs)
    _, worst, _ = measure._chosen(measure._counted(made), made.splits.train[2], 504, 100)
    assert max(len(t.prompt_ids) + 4 for t in worst) == 500


def test_many_steps_are_counted_from_some(inputs, monkeypatch):
    monkeypatch.setattr(measure, "_COUNTED", 5)
    counted = measure._counted(begun([30] * 100, 60, 4, inputs))
    assert 5 <= len(counted) <= 7
    assert {sum(batch.tokens) for batch in counted} == {4 * 30}


def big(tmp_path, **more):
    """The configuration of a model of half a billion parameters, without weights."""
    tiny.save(tmp_path / "big")
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        **more,
    )
    config.save_pretrained(tmp_path / "big")
    return tmp_path


def asked(inputs, tmp_path, room_gib, *more, dtype="float32"):
    given = [*words(inputs, *more)[1:], f"model.path={big(tmp_path, dtype=dtype) / 'big'}"]
    config = load(TrainConfig, None, given)
    architecture = architecture_of(config.model)
    size = estimated(config, architecture, 1024)
    found = measure.Measured(0, size.state, size.activations + size.logits, 0, 1024, 200, 10, 10_000, {"steps": 1.0})
    said, needed = fit.fitting(config, found, round(room_gib * GIB), None, given)
    return said, needed / GIB, sum(size) / GIB, given, architecture


@pytest.mark.parametrize("room", [9.5, 8, 6.5, 5, 3.5, 2.5])
def test_what_is_named_fits_and_nothing_of_it_is_needless(inputs, tmp_path, room):
    said, needed, before, given, architecture = asked(inputs, tmp_path, room, "reference.mode=live")
    assert said
    assert needed <= room < before

    def size(chosen):
        tokens = next((int(w.partition("=")[2]) for w in chosen if "pack" in w), 1024)
        return sum(estimated(load(TrainConfig, None, [*given, *chosen]), architecture, tokens)) / GIB

    assert size(said) == pytest.approx(needed, rel=1e-6)
    for word in said:
        if "pack" not in word:
            assert size([other for other in said if other != word]) > room, word


def test_smaller_packs_come_first_and_adapters_last(inputs, tmp_path):
    assert asked(inputs, tmp_path, 9.5)[0] == ["train.max_tokens_per_pack=512"]
    said, *_ = asked(inputs, tmp_path, 1.2, dtype="bfloat16")
    assert {"model.lora.rank=16", "model.weights=bfloat16"} <= set(said)
    # whose files hold float32, cannot be kept in bfloat16; what has adapters is not offered some
    said, *_ = asked(inputs, tmp_path, 1.2)
    assert "model.weights=nf4" in said
    assert "model.weights=bfloat16" not in said
    assert asked(inputs, tmp_path, 0.1)[0] == []
    assert not any("lora" in word for word in asked(inputs, tmp_path, 1.9, "model.lora.rank=8", dtype="bfloat16")[0])


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["reference.mode=live"], ["model.lora.rank=8"]], ids=["stored", "live", "lora"])
def test_the_peak_is_that_of_the_run(tmp_path, more):
    """Whole processes; 20 M parameters, so that packs, not Python, fill the memory."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
            eos_token_id=2, bos_token_id=1, pad_token_id=0, max_position_embeddings=4096,
        )
    )  # fmt: skip
    tiny.save(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"Film {i}? " * 30, "chosen": f"good {i} " * (40 + i % 9), "rejected": f"bad {i} " * 30}
        for i in range(48)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    given = [
        *words(tmp_path, *more, f"run={tmp_path / 'run'}", "train.max_tokens_per_pack=2048", "train.batch_prompts=8")
    ]
    program = (
        "import sys\nfrom favor.cli import main\ntry: main()\nexcept SystemExit as end: code = end.code\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )

    def run(*options):
        return subprocess.run(
            [sys.executable, "-c", program, "train", *given, *options], capture_output=True, text=True, check=True
        ).stdout

    told = float(re.search(r"memory \(measured\): ([\d.]+) GiB", run("--dry-run", "--measure"))[1])
    assert told == pytest.approx(int(run().split()[-1]) / 2**20, rel=0.1)
