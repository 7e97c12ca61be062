"""Weights kept in bfloat16 say, bit for bit, what they say in float32, in half the memory; what would be rounded is refused."""

import json
import shutil
from functools import partial

import pytest
import tiny
import torch
from oracles import plain_logps, tree
from peft import PeftModel
from pydantic import TypeAdapter
from test_cli import GOOD, recipe, write
from test_winrate import judged
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from favor.config import load
from favor.data.batches import build
from favor.errors import CheckpointError, ConfigError, FavorError
from favor.generate.samples import SamplesConfig, write_samples
from favor.model import kept
from favor.model.adapters import LoraSettings
from favor.model.heads import load_scalar_model
from favor.model.layout import settle
from favor.model.load import ModelConfig, load_policy, make_policy, weights_hash
from favor.model.logprobs import response_logps, scored_logps
from favor.model.weights import load_weights
from favor.rewards.model import ScoredTokens, model_scorer
from favor.run import read_jsonl
from favor.winrate import judges
from favor.winrate.judges import Duel, JudgeConfig

TREES = [
    tree((5, 6, 7), [(8, 9, 10, 11, 12, 2), (8, 30, 31, 32, 33, 2)], [(0, 1)]),
    tree((5, 6, 70, 71), [(8, 9, 2), (80, 31, 2)], [(0, 1)], first=2),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """One model in both number formats, of numbers that bfloat16 has, and one of others; preferences."""
    folder = tmp_path_factory.mktemp("kept")
    for name, model in (
        ("model", tiny.model().bfloat16()),
        ("same", tiny.model().bfloat16().float()),
        ("finer", tiny.model()),
    ):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    write(folder / "good.jsonl", GOOD)
    return folder


def policy_of(model, weights, dtype="float32", **more):
    """Adapters that say something, the same ones whatever the weights."""
    config = ModelConfig(path="tiny", weights=weights, dtype=dtype, lora=LoraSettings(rank=4), **more)
    policy = make_policy(model, tiny.tokenizer(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def said(policy):
    """Log-probs of the trees and the gradient of a mixture of them."""
    value_R = response_logps(policy, build(TREES, policy.layout))
    (value_R * torch.arange(1, 5)).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.trainable().values()])
    return value_R.detach(), gradient


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_log_probs_and_gradients_are_those_of_float32_weights(family, dtype, checkpointing):
    for asked in ("auto", "rows"):
        found = []
        for weights in ("float32", "bfloat16"):
            policy = policy_of(
                tiny.model(family).bfloat16().float(), weights, dtype, gradient_checkpointing=checkpointing
            )
            policy, _ = settle(policy, asked, TREES, train=True)
            found.append((*said(policy), weights_hash(policy)))
        (logp_R, gradient, name), (other_R, other_gradient, other_name) = found
        assert torch.equal(logp_R, other_R)
        assert torch.equal(gradient, other_gradient)
        # so a stored reference of one serves the other
        assert name == other_name


def noted(saved, tensor):
    saved.append(tensor)
    return tensor


def test_half_the_bytes_and_no_wide_copy_outlives_a_product():
    """Counted: the tensors of the model, and those that the forward keeps for the backward."""
    sizes = {}
    for weights in ("float32", "bfloat16"):
        policy = policy_of(tiny.model("qwen2").bfloat16().float(), weights)
        base = {id(p): p for p in policy.model.parameters() if not p.requires_grad and p.dim() > 1}
        shapes, saved = {p.shape for p in base.values()} | {p.T.shape for p in base.values()}, []
        with torch.autograd.graph.saved_tensors_hooks(partial(noted, saved), lambda t: t):
            response_logps(policy, build(TREES, "rows")).sum()
        sizes[weights] = sum(p.nbytes for p in base.values())
        held = {p.untyped_storage().data_ptr() for p in base.values()}
        wide = [t for t in saved if t.shape in shapes and t.untyped_storage().data_ptr() not in held]
        assert wide == []
        # all but the embedding and what reads it, which needs no gradient
        assert sum(t.untyped_storage().data_ptr() in held for t in saved) == len(base) - 4
    assert policy.kept_bytes == sizes["bfloat16"] == sizes["float32"] / 2


def test_the_test_above_sees_a_wide_copy(monkeypatch):
    monkeypatch.setattr(kept, "_linear", lambda module, x: functional.linear(x, module.weight.float(), module.bias))
    monkeypatch.setitem(kept._READ, nn.Linear, kept._linear)
    with pytest.raises(AssertionError):
        test_half_the_bytes_and_no_wide_copy_outlives_a_product()


def in_format(asked, load, *words, dtype, **more):
    asked.append(dtype)
    return load(*words, dtype=dtype, **more)


def test_files_in_bfloat16_are_never_held_in_float32(inputs, monkeypatch):
    """And others are: a number that the files hold finer than bfloat16 must be seen before it is rounded."""
    for name, dtypes in (("model", [torch.bfloat16]), ("same", [torch.bfloat16, torch.float32])):
        asked = []

        load = AutoModelForCausalLM.from_pretrained
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", partial(in_format, asked, load))
        load_weights(AutoModelForCausalLM, str(inputs / name), None, False, kept=True)
        monkeypatch.undo()
        assert asked == dtypes


def test_buffers_that_loading_would_round_come_from_float32(tmp_path):
    """Gemma 3 scales its embedding by a buffer that takes the format of the weights."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    # its square root is no number of bfloat16
    sizes = tiny._GQA | {"head_dim": 8, "hidden_size": 40, "num_attention_heads": 4}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).bfloat16()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    found = []
    for weights in ("float32", "bfloat16"):
        policy = load_policy(ModelConfig(path=str(tmp_path / "model"), weights=weights), frozen=True)
        found.append(response_logps(policy, build(TREES, "rows")).detach())
    assert policy.kept_bytes > 0
    assert torch.equal(*found)


def test_other_numbers_are_refused_with_the_remedy(inputs):
    lora = LoraSettings(rank=4)
    with pytest.raises(
        CheckpointError, match=r"finer: .* hold numbers that bfloat16 does not have.*favor export run=RUN"
    ):
        load_policy(ModelConfig(path=str(inputs / "finer"), weights="bfloat16", lora=lora))
    # the same numbers in a wider format are none
    assert load_policy(ModelConfig(path=str(inputs / "same"), weights="bfloat16", lora=lora)).kept_bytes > 0


def test_a_layer_that_computes_in_its_weights_format_is_refused():
    class Rounds(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = tiny.model("qwen2").bfloat16().float()
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda mlp, words: (words[0].to(mlp.gate_proj.weight.dtype),))
    policy = make_policy(model, tiny.tokenizer(), ModelConfig(path="tiny", weights="bfloat16"), frozen=True)
    with pytest.raises(FavorError, match="compute in the format of their weights.*set weights=float32"):
        settle(policy, "auto", TREES)
    # what is made from a linear layer is left alone
    model = tiny.model("qwen2").bfloat16().float()
    model.model.layers[0].mlp.gate_proj = other = Rounds(32, 48, bias=False)
    kept.keep(model, "tiny", "bfloat16")
    assert other.weight.dtype == torch.float32
    assert model.model.layers[1].mlp.gate_proj.weight.dtype == torch.bfloat16


def trained(favor, inputs, run, *more, model="model"):
    words = recipe(inputs, "model.lora.rank=4", "optim.lr=1e-2", f"data.eval={inputs / 'good.jsonl'}", *more)
    words = [f"model.path={inputs / model}" if word.startswith("model.path=") else word for word in words]
    code, out, err = favor(*(f"run={run}" if word == "run=run" else word for word in words))
    assert code == 0, err
    return out


def test_a_run_begins_at_ln_2_and_its_adapter_is_what_was_trained(inputs, favor, tmp_path):
    """As with float32 weights: the store, the figures and the saved adapter are the same, in every command after it."""
    out = trained(favor, inputs, "run", "model.weights=bfloat16", "reference.store=store.safetensors")
    assert "GiB of weights kept in bfloat16" in out
    steps = [record for record in read_jsonl(tmp_path / "run/metrics.jsonl") if record["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    # its reference is that of the float32 weights, so the store is taken as it is
    assert "reference: reused" in trained(favor, inputs, "wide", "reference.store=store.safetensors")
    # the adapter, in PEFT on the base as transformers loads it
    base = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run/model")).eval()
    assert all(p.dtype == torch.float32 for name, p in adapted.named_parameters() if "lora_" in name)
    with torch.no_grad():
        expected = plain_logps(adapted, TREES)
    policy = load_policy(ModelConfig(path=str(tmp_path / "run/model")))
    assert torch.allclose(response_logps(policy, build(TREES, "rows")), expected, atol=1e-4)
    *_, held_out = (r for r in read_jsonl(tmp_path / "run/metrics.jsonl") if r["kind"] == "eval")
    for words in (["eval", "run=run", "sample_prompts=0"], ["export", "run=run", "out=merged"]):
        assert favor(*words)[0] == 0
    figures = json.loads((tmp_path / "run/eval.json").read_text())
    assert figures["margin"] == pytest.approx(held_out["margin"], abs=2e-5)
    merged = load_policy(ModelConfig(path=str(tmp_path / "merged"), weights="bfloat16"), frozen=True)
    assert merged.kept_bytes > 0


def test_training_is_the_same_to_the_bit(inputs, favor, tmp_path):
    """Adapters that start from the same numbers end at the same ones; a run that was stopped, too."""
    from safetensors.torch import load_file

    policy = load_policy(ModelConfig(path=str(inputs / "model"), weights="bfloat16", lora=LoraSettings(rank=4)))
    assert all(p.dtype == torch.float32 for p in policy.trainable().values())
    more = ("model.weights=bfloat16", "save.every=1", "save.keep=9", "train.epochs=3")
    trained(favor, inputs, "whole", *more)
    adapter = load_file(tmp_path / "whole/model/adapter_model.safetensors")
    for later in sorted((tmp_path / "whole/checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    shutil.rmtree(tmp_path / "whole/model")
    trained(favor, inputs, "whole", *more, "resume=true")
    again = load_file(tmp_path / "whole/model/adapter_model.safetensors")
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)


def test_an_adapter_is_folded_in_float32(inputs, favor, tmp_path):
    trained(favor, inputs, "run")
    with pytest.raises(ConfigError, match="holds an adapter, which is folded into its base in float32"):
        load_policy(ModelConfig(path=str(tmp_path / "run/model"), weights="bfloat16"), frozen=True)


def test_reward_models_score_the_same(inputs, tmp_path):
    torch.manual_seed(0)
    policy = load_scalar_model(ModelConfig(path=str(inputs / "model")), fresh=True)
    with torch.no_grad():
        nn.init.normal_(policy.causal_lm.score.weight)
    policy.causal_lm.bfloat16().save_pretrained(tmp_path / "reward")
    policy.tokenizer.save_pretrained(tmp_path / "reward")
    prompts, responses = ["a film"] * 3, ["good", "bad and long", "maybe"]
    found = [
        model_scorer(str(tmp_path / "reward"), ScoredTokens(), weights)(prompts, responses)
        for weights in ("float32", "bfloat16")
    ]
    assert found[0] == found[1]
    assert len(set(found[0])) == 3
    scores = load_scalar_model(ModelConfig(path=str(tmp_path / "reward"), weights="bfloat16"), frozen=True)
    # a head that adapters would train beside them
    assert scores.causal_lm.score.weight.dtype == torch.float32
    assert scores.kept_bytes > 0


def noting(measured, read, *words):
    found = measured(*words)
    read.append(found.tolist())
    return found


def test_an_engine_and_a_judge_say_the_same(inputs, tmp_path):
    model = {"path": str(inputs / "model"), "dtype": "float32"}
    duels = [
        Duel("a film", "good", "bad and long"),
        Duel("a film", "bad", "good"),
        Duel("a film", "maybe", "good good"),
    ]
    logits, samples = [], []
    for weights in ("float32", "bfloat16"):
        out = tmp_path / f"{weights}.jsonl"
        sample = [f"out={out}", f"prompts={inputs / 'good.jsonl'}", "sample.max_new_tokens=6", "samples_per_prompt=4"]
        engine = [f"engine.model.{key}={value}" for key, value in (model | {"weights": weights}).items()]
        write_samples(load(SamplesConfig, None, [*sample, *engine]), lambda *_: None)
        samples.append([row["responses"] for row in read_jsonl(out)])
        config = {"kind": "hf", "model": model | {"weights": weights}}
        with pytest.MonkeyPatch.context() as patch:
            read = []
            patch.setattr(judges, "measured", partial(noting, judges.measured, read))
            verdicts = judged(TypeAdapter(JudgeConfig).validate_python(config), duels)
        logits.append((verdicts, read))
    assert samples[0] == samples[1]
    assert len({text for texts in samples[0] for text in texts}) > 3
    assert logits[0] == logits[1]


def test_tokens_too(inputs):
    """What LD-DPO and PPO read."""
    found = [
        scored_logps(
            load_policy(ModelConfig(path=str(inputs / "same"), weights=weights), frozen=True), build(TREES, "rows")
        ).detach()
        for weights in ("float32", "bfloat16")
    ]
    assert torch.equal(*found)


def saved_bytes(policy):
    """Bytes that the forward leaves for the backward, weights left out; and the gradient."""
    policy, _ = settle(policy, "auto", TREES)
    own, saved = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(partial(noted, saved), lambda t: t):
        value = response_logps(policy, build(TREES, policy.layout)).sum()
    value.backward()
    sizes = {t.untyped_storage().data_ptr(): t.nbytes for t in saved}
    return sum(size for at, size in sizes.items() if at not in own), [p.grad for p in policy.trainable().values()]


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_every_kth_layer_is_recomputed(weights):
    """The gradient is the same; of four layers all, two, one or none keep their activations."""
    found = {}
    for every in (False, 4, 2, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(tiny._GQA | {"num_hidden_layers": 4}))).bfloat16().float()
        found[every] = saved_bytes(policy_of(model, weights, gradient_checkpointing=every))
    sizes = [size for size, _ in found.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    # a layer is what each saves beside what is kept of it: the same for every one
    assert sizes[0] - sizes[1] == pytest.approx(sizes[1] - sizes[2], rel=0.1)
    assert sizes[2] - sizes[3] == pytest.approx(2 * (sizes[1] - sizes[2]), rel=0.1)
    for _, gradients in found.values():
        for mine, theirs in zip(gradients, found[False][1], strict=True):
            assert torch.allclose(mine, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max() + 1e-12))


def test_more_layers_apart_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="every 3th layer of 2 is none"):
        policy_of(tiny.model(), "float32", gradient_checkpointing=3)
