"""QLoRA: the base rounded to 4 bits is one model, in memory, in every command after training, and in transformers with PEFT."""

import json

import pytest
import tiny
import torch
from oracles import plain_logps
from peft import PeftModel
from test_cli import GOOD, recipe, write
from test_kept import TREES, policy_of, said, trained
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from favor.data.batches import build
from favor.errors import CheckpointError
from favor.model import four_bits, load
from favor.model.layout import settle
from favor.model.load import ModelConfig, load_policy, weights_hash
from favor.model.logprobs import response_logps
from favor.model.size import architecture_of, sizes
from favor.run import read_jsonl

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt_neox"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4")
    tiny.model().bfloat16().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    write(folder / "good.jsonl", GOOD)
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_is_the_rounded_model(family, dtype, checkpointing):
    """Log-probs, gradients and the name of the reference are those of a float32 model that holds the rounded numbers."""
    found = []
    for packed in (True, False):
        model = tiny.model(family)
        if not packed:
            four_bits.round_(model)
        weights = "nf4" if packed else "float32"
        policy = policy_of(model, weights, dtype, gradient_checkpointing=checkpointing)
        policy, _ = settle(policy, "auto", TREES, train=True)
        found.append((*said(policy), weights_hash(policy), policy.layout))
    (logp_R, gradient, name, layout), (other_R, other_gradient, other_name, other_layout) = found
    assert torch.allclose(logp_R, other_R, rtol=0, atol=1e-6)
    assert torch.allclose(gradient, other_gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))
    assert (name, layout) == (other_name, other_layout)
    # and that is another model than the one it was rounded from
    plain, _ = settle(policy_of(tiny.model(family), "float32", dtype), "auto", TREES, train=True)
    assert (said(plain)[0] - logp_R).abs().max() > 1e-2
    assert weights_hash(plain) != name


def test_rounding_twice_is_rounding_once():
    model = tiny.model()
    four_bits.round_(model)
    once = [module.weight.clone() for module in four_bits.layers(model)]
    four_bits.round_(model)
    assert all(torch.equal(a, module.weight) for a, module in zip(once, four_bits.layers(model), strict=True))
    # 16 values a block of 64
    assert all(len(row.unique()) <= 16 for weight in once for row in weight.flatten().split(64))
    assert model.lm_head not in list(four_bits.layers(model))


def test_bytes():
    """Half a byte a number and a float32 for every 64; the dry run counts the same."""
    policy = policy_of(tiny.model("qwen2"), "nf4")
    modules = [m for m in policy.causal_lm.modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.uint8]
    numbers = sum(m.in_features * m.out_features for m in modules)
    held = sum(m.weight.nbytes + m.absmax.nbytes for m in modules)
    assert len(modules) == 2 * 7
    assert held == pytest.approx(0.5625 * numbers, rel=0.02)
    # tiny's embedding and head hold numbers that bfloat16 lacks, so they stay as they are
    assert policy.kept_bytes == held


def test_no_wide_copy_outlives_a_product():
    policy, saved = policy_of(tiny.model("qwen2"), "nf4"), []
    shapes = {torch.Size(s) for m in four_bits.layers(tiny.model("qwen2")) for s in (m.weight.shape, m.weight.T.shape)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        response_logps(policy, build(TREES, "rows")).sum()
    assert any(t.dtype == torch.uint8 for t in saved)
    assert [t for t in saved if t.shape in shapes and t.is_floating_point()] == []


def test_the_estimate_counts_it(inputs):
    given = {"path": str(inputs / "model"), "lora": {"rank": 4}}
    architecture = architecture_of(ModelConfig(path=given["path"]))
    states = {
        weights: sizes(architecture, ModelConfig.model_validate(given | {"weights": weights}), 10).state
        for weights in ("bfloat16", "nf4")
    }
    numbers = sum(m.weight.numel() for m in four_bits.layers(tiny.model()))
    assert states["bfloat16"] - states["nf4"] == pytest.approx((2 - 0.5625) * numbers, abs=1)


@pytest.mark.filterwarnings("ignore")
def test_a_run_and_what_comes_after_it(inputs, favor, tmp_path):
    """ln 2 at first; the adapter on the base as transformers rounds it, `favor eval` and the merged model say what was trained."""
    out = trained(favor, inputs, "run", "model.weights=nf4", "train.epochs=4")
    assert "GiB of weights kept in nf4" in out
    steps = [record for record in read_jsonl(tmp_path / "run/metrics.jsonl") if record["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert abs(steps[-1]["margin"]) > 1e-2
    assert json.loads((tmp_path / "run/model/favor.json").read_text()) == {"base_weights": "nf4"}
    *_, held_out = (r for r in read_jsonl(tmp_path / "run/metrics.jsonl") if r["kind"] == "eval")
    policy = load_policy(ModelConfig(path=str(tmp_path / "run/model")))
    logp_R = response_logps(policy, build(TREES, "rows"))
    # as everyone loads a QLoRA adapter
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(
        inputs / "model", dtype=torch.float32, quantization_config=how, device_map="cpu"
    )
    # not in eval(): on CPUs that multiply bfloat16, bitsandbytes would then answer in bfloat16, and not for layers this narrow
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run/model")).train()
    with torch.no_grad():
        assert torch.allclose(logp_R, plain_logps(adapted, TREES), atol=1e-4)
    for words in (["eval", "run=run", "sample_prompts=0"], ["export", "run=run", "out=merged"]):
        code, _, err = favor(*words)
        assert code == 0, err
    assert json.loads((tmp_path / "run/eval.json").read_text())["margin"] == pytest.approx(held_out["margin"], abs=2e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(logp_R, plain_logps(merged, TREES), atol=0.3)
    # without the mark it would be an adapter on the base as it was before
    (tmp_path / "run/model/favor.json").unlink()
    other = load_policy(ModelConfig(path=str(tmp_path / "run/model")))
    assert (response_logps(other, build(TREES, "rows")) - logp_R).abs().max() > 1e-2


def test_a_run_that_was_stopped_ends_the_same(inputs, favor, tmp_path):
    import shutil

    more = ("model.weights=nf4", "save.every=1", "save.keep=9")
    trained(favor, inputs, "whole", *more)
    there = tmp_path / "whole/model/adapter_model.safetensors"
    whole = there.read_bytes()
    for later in sorted((tmp_path / "whole/checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    shutil.rmtree(tmp_path / "whole/model")
    trained(favor, inputs, "whole", *more, "resume=true")
    assert there.read_bytes() == whole


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "without [model.lora] all of them train"),
        (("model.lora.dora=true",), "model.lora.dora measures weights, and those in 4 bits cannot be"),
    ],
)
def test_what_does_not_go_with_it(inputs, favor, more, said):
    code, _, err = favor(*recipe(inputs, "model.weights=nf4", *more))
    assert code == 2
    assert said in err


def test_a_library_that_is_not_there(inputs, favor, monkeypatch):
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    code, _, err = favor(*recipe(inputs, "model.weights=nf4", "model.lora.rank=4"))
    assert code == 2
    assert "pip install 'favor[bitsandbytes]'" in err


@pytest.mark.parametrize("text", ["{", '{"base_weights": "int3"}', "[]"])
def test_a_mark_that_cannot_be_read(inputs, favor, tmp_path, text):
    trained(favor, inputs, "run", "model.weights=nf4", "train.max_steps=1")
    (tmp_path / "run/model/favor.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"favor\.json"):
        load_policy(ModelConfig(path=str(tmp_path / "run/model")))
