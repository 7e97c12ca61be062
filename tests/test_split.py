"""Weights that are split over ranks (ranks.shard) give what one process gives. The cases stand in split_cases.py."""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import split_cases
import tiny
from safetensors.torch import load_file

from favor.config import load
from favor.errors import ConfigError
from favor.model.heads import load_scalar_model
from favor.model.load import ModelConfig, load_policy
from favor.model.split import mesh
from favor.ranks import World

PROGRAM = Path(__file__).with_name("split_cases.py")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_ranks(count, folder, *cases):
    """Run cases on so many gloo processes."""
    port = free_port()
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", f"--master-port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, *launch, str(PROGRAM), str(folder), *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done ") == count * len(cases)


@pytest.mark.dist
def test_two_ranks_hold_half_each_and_give_what_one_gives(tmp_path):
    on_ranks(2, tmp_path, "bytes", "copy", "pieces", "quick", "saved", "tiles")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("count", "cases"),
    [
        (2, ["train", "evaluation"]),
        (2, ["bfloat16", "rounded", "updates"]),
        (2, ["kept"]),
        (2, ["four_bits"]),
        (2, ["options"]),
        (2, ["commands"]),
        (4, ["bytes", "updates"]),
        (4, ["hybrid"]),
        (4, ["train", "evaluation", "commands"]),
    ],
    ids=str,
)
def test_any_number_of_ranks_gives_what_one_gives(tmp_path, count, cases):
    on_ranks(count, tmp_path, *cases)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_resumes_on_another_number_of_ranks(tmp_path):
    """Begun on two ranks; from its checkpoint after step 2 on to the end on four, and in one process."""
    on_ranks(2, tmp_path, "left")
    run = tmp_path / "resumed"
    expected = load_file(run / "model/model.safetensors")
    for count in (4, 1):
        shutil.rmtree(run / "model")
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002"]
        if count > 1:
            on_ranks(count, tmp_path, "resumed")
        else:
            split_cases.case_resumed(tmp_path, World())
        found = load_file(run / "model/model.safetensors")
        assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 2e-5


def test_a_model_that_is_large_is_written_in_several_files(tmp_path, monkeypatch):
    """A budget of a few KiB a file, on the one process that holds all: names, index and weights as transformers reads them."""
    from transformers import AutoModelForCausalLM

    from favor import parts
    from favor.model import split
    from favor.model.load import ModelConfig, make_policy

    monkeypatch.setattr(parts, "_FILE_BYTES", 9000)
    policy = make_policy(tiny.model("llama"), tiny.tokenizer(), ModelConfig(path="tiny"))
    split.save(policy, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in policy.model.state_dict().items():
        assert (loaded[name] == tensor).all()


@pytest.mark.parametrize("kind", [load_policy, partial(load_scalar_model, fresh=True)], ids=["policy", "scores"])
def test_what_is_read_whole_is_split_before_it_is_on_a_gpu(tmp_path, monkeypatch, kind):
    """A GPU never holds it all: fully_shard moves a layer, then keeps its part. Here nobody may move the model."""
    tiny.save(tmp_path)
    config, moved = ModelConfig(path=str(tmp_path)), list[str]()
    monkeypatch.setattr("transformers.PreTrainedModel.to", lambda model, device: moved.append(str(device)))
    monkeypatch.setattr("favor.model.split.split", lambda policy, how, members: (policy, how, members))
    monkeypatch.setattr("favor.model.pieces.load", lambda *given, **named: None)
    kind(config, 0, "full")
    assert moved == ["cpu"], "one process holds all"
    monkeypatch.setattr("favor.model.load.current", lambda: World(1, 2))
    _, *how = kind(config, 0, "full")
    assert how == ["full", World(1, 2)]
    assert moved == ["cpu"]


def test_machines_must_hold_equally_many_ranks(monkeypatch):
    import torch

    for said in ("", "3", "x"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
        with pytest.raises(ConfigError, match="start equally many on every machine"):
            mesh("hybrid", torch.device("cpu"), World(0, 4))


def test_ppo_splits_one_model_only(tmp_path):
    (tmp_path / "recipe.toml").write_text("")
    words = ["run=r", "model.path=m", "data.train=d", "reward.kind=callable", "reward.path=f:g"]
    from favor.train.ppo import PpoConfig

    with pytest.raises(ConfigError, match="which ranks.shard does not split"):
        load(PpoConfig, None, [*words, "ranks.shard=full", "ppo.advantage.value=separate"])


@pytest.mark.parametrize("command", ["train", "sft", "reward", "ppo"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.kind=adamw8bit"], "which ranks.shard cuts"),
    ],
)
def test_what_split_weights_do_not_go_with_is_refused(command, words, said):
    schema, _ = split_cases.COMMANDS[command]
    plain = ["run=r", "model.path=m", "data.train=d"]
    plain += ["reward.kind=callable", "reward.path=f:g"] if command == "ppo" else []
    load(schema, None, [*plain, *words])
    with pytest.raises(ConfigError, match=said):
        load(schema, None, [*plain, *words, "ranks.shard=full"])


# float32 weights, gradients and AdamW's two means
STATE_BYTES = 16
# what every rank holds beside its share: a layer or two put together, activations, buffers of the network
BESIDE = 160 << 20


def large(folder):
    """A model of 77 million numbers in 24 layers, so that they and not the process are what memory goes to; its size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny.tokenizer().save_pretrained(folder)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tiny.model("llama").config.vocab_size, **sizes))
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def peaks(folder, shard, count):
    """What each rank held: over its steps; with a checkpoint after them."""
    on_ranks(count, folder, {"full": "memory", "none": "whole"}[shard])
    found = [json.loads((folder / f"memory-{shard}-{count}/rank-{rank}.json").read_text()) for rank in range(count)]
    return [one["steps"] for one in found], [one["saved"] for one in found]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_peak_of_a_rank_falls_with_their_number(tmp_path):
    """a / N + b: a is known from the model's size, and b is the same for every N."""
    numbers = large(tmp_path / "large")
    assert STATE_BYTES * numbers > 7 * BESIDE

    def falls(count, held):
        share = STATE_BYTES * numbers / count
        return all(0.95 * share <= each <= share + BESIDE for each in held)

    for count in (1, 2, 4):
        steps, saved = peaks(tmp_path, "full", count)
        print(f"{count}: {[each >> 20 for each in steps]} MiB, with a checkpoint {[each >> 20 for each in saved]} MiB")
        assert falls(count, steps), (count, steps)
        # only the main rank keeps what all of them put together
        assert falls(count, saved[1:]), (count, saved)
    steps, _ = peaks(tmp_path, "none", 2)
    print(f"2, not split: {[each >> 20 for each in steps]} MiB")
    assert not falls(2, steps), "what does not fall must be seen"
