"""Kinds of adapters: a run begins at its reference, and what it saves says in PEFT, merged and exported what was trained."""

import json
import math

import pytest
import tiny
import torch
from oracles import plain_logps, tree
from peft import PeftModel
from pydantic import ValidationError
from test_cli import GOOD, recipe, write
from transformers import AutoModelForCausalLM

from favor.data.batches import build
from favor.model.adapters import LoraSettings
from favor.model.layout import settle
from favor.model.load import ModelConfig, load_policy, make_policy
from favor.model.logprobs import response_logps
from favor.run import read_jsonl
from favor.train.reference import frozen

TREES = [
    tree((5, 6, 7), [(8, 9, 10, 11, 12, 2), (8, 30, 31, 32, 33, 2)], [(0, 1)]),
    tree((5, 6, 70, 71), [(8, 9, 2), (80, 31, 2)], [(0, 1)], first=2),
]
KINDS = {"lora": [], "rslora": ["model.lora.rslora=true"], "dora": ["model.lora.dora=true"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    tiny.model().bfloat16().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    write(folder / "good.jsonl", GOOD)
    return folder


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_its_reference_and_is_saved_as_trained(inputs, favor, tmp_path, kind, weights):
    words = recipe(inputs, "model.lora.rank=4", "optim.lr=1e-2", f"data.eval={inputs / 'good.jsonl'}", *KINDS[kind])
    code, out, err = favor(*words, f"model.weights={weights}")
    assert code == 0, err
    assert "prompt trees" in out
    steps = [record for record in read_jsonl(tmp_path / "run/metrics.jsonl") if record["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    described = json.loads((tmp_path / "run/model/adapter_config.json").read_text())
    assert (described["use_dora"], described["use_rslora"]) == (kind == "dora", kind == "rslora")
    base = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run/model")).eval()
    with torch.no_grad():
        expected = plain_logps(adapted, TREES)
    merged = load_policy(ModelConfig(path=str(tmp_path / "run/model")))
    assert torch.allclose(response_logps(merged, build(TREES, "rows")), expected, atol=2e-4)
    # what training last measured, from the saved files
    *_, held_out = (r for r in read_jsonl(tmp_path / "run/metrics.jsonl") if r["kind"] == "eval")
    assert favor("eval", "run=run", "sample_prompts=0")[0] == 0
    figures = json.loads((tmp_path / "run/eval.json").read_text())
    assert figures["margin"] == pytest.approx(held_out["margin"], abs=2e-5)
    assert abs(figures["margin"]) > 1e-3
    code, _, err = favor("export", "run=run", "out=merged", "dtype=float32")
    assert code == 0, err
    exported = load_policy(ModelConfig(path=str(tmp_path / "merged")))
    assert torch.allclose(response_logps(exported, build(TREES, "rows")), expected, atol=2e-4)


def policy_of(**more):
    config = ModelConfig(path="tiny", lora=LoraSettings(rank=4, alpha=8, **more))
    return make_policy(tiny.model("qwen2"), tiny.tokenizer(), config)


def test_rslora_is_lora_times_the_root_of_the_rank():
    """alpha / sqrt(4) is twice alpha / 4: log-probs are those of LoRA with alpha doubled."""
    found = []
    for more in ({"rslora": True}, {"alpha": 16}):
        config = ModelConfig(path="tiny", lora=LoraSettings(**({"rank": 4, "alpha": 8} | more)))
        policy = make_policy(tiny.model("qwen2"), tiny.tokenizer(), config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        found.append(response_logps(policy, build(TREES, "rows")).detach())
    assert torch.equal(*found)


def test_dora_trains_the_length_of_every_column():
    """Twice the length of a layer's columns is twice its weight: held against the weight itself."""
    policy = policy_of(dora=True)
    policy, _ = settle(policy, "auto", TREES, train=True)
    lengths = {name: p for name, p in policy.trainable().items() if "magnitude" in name}
    assert len(lengths) == 14
    with torch.no_grad(), frozen(policy) as reference:
        before = response_logps(reference, build(TREES, policy.layout))
    assert torch.equal(response_logps(policy, build(TREES, policy.layout)).detach(), before)
    plain = tiny.model("qwen2")
    with torch.no_grad():
        for name, length in lengths.items():
            if "down_proj" in name:
                length.mul_(2)
        for layer in plain.model.layers:
            layer.mlp.down_proj.weight.mul_(2)
        expected = plain_logps(plain, TREES)
        assert torch.allclose(response_logps(policy, build(TREES, policy.layout)), expected, atol=1e-4)
    assert (expected - before).abs().max() > 0.1


def test_dora_in_bfloat16_products_is_refused():
    with pytest.raises(ValidationError, match="the policy would not start as its reference; set model.dtype=float32"):
        ModelConfig(path="tiny", dtype="bfloat16", lora=LoraSettings(dora=True))
