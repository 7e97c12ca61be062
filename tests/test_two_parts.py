"""model.dtype = "bfloat16x2": what its products are, that small updates are seen, what composes and what is refused."""

import copy
import json

import pytest
import tiny
import torch
from oracles import tree
from pydantic import ValidationError
from rich.console import Console
from safetensors import safe_open
from test_self_check import capped
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from favor.config import load
from favor.data.batches import build
from favor.errors import ConfigError
from favor.model import logprobs, two_parts
from favor.model.adapters import LoraSettings
from favor.model.layout import settle
from favor.model.load import ModelConfig, frozen_copy, make_policy, precise
from favor.model.logprobs import response_logps
from favor.ranks import World
from favor.run import RunFolder
from favor.stop import StopRequest
from favor.train.preference import TrainConfig, train
from favor.train.reward import RewardTrainConfig, train_reward
from favor.train.session import Session

# the three ways to the same sum: float32 weights whole, two float32 products of parts, one bfloat16 product of joined parts
WAYS = ("whole", "parts", "joined")


@pytest.fixture
def way(request, monkeypatch):
    """This machine, or what runs on a GPU (its products emulated), or on a CPU that multiplies bfloat16."""
    monkeypatch.setattr(two_parts, "_joins", lambda device: request.param == "joined")
    if request.param == "parts":
        monkeypatch.setattr(two_parts, "parts", two_parts.split)
        monkeypatch.setattr(two_parts, "narrowed", lambda gradient: gradient.bfloat16())
    return request.param


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trees(count=4):
    ids = torch.randint(5, tiny.VOCAB, (50 * count + 100,), generator=torch.Generator().manual_seed(1)).tolist()
    return [
        tree(ids[k : k + 9], [ids[20 + k : 32 + k], ids[40 + k : 55 + k]], [(0, 1)], 2 * (k // 50))
        for k in range(0, 50 * count, 50)
    ]


def policy_of(model, dtype="bfloat16x2", **more):
    config = ModelConfig(path="tiny", device="cpu", dtype=dtype, **more)
    return settle(make_policy(model, tiny.tokenizer(), config), "auto", trees(), train=True)[0]


def moved(model, lr=3e-4):
    """The model after updates far below bfloat16's step of most weights."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(lr * normal(*parameter.shape, seed=i).sign())
    return model


def logps(policy, count=4):
    with torch.no_grad():
        return response_logps(policy, build(trees(count), policy.layout))


def test_two_parts_are_the_weight_to_16_bits():
    weight = normal(300, 70) * 10 ** (3 * normal(300, 70, seed=1))
    high, low = two_parts.split(weight)
    assert high.dtype == low.dtype == torch.bfloat16
    off = (high.double() + low.double() - weight.double()).abs()
    assert float((off / weight.abs()).max()) <= 2.0**-16
    # one part alone has 8 bits
    assert float(((high.double() - weight.double()).abs() / weight.abs()).max()) > 2.0**-10


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_product_is_rounded_once_and_its_gradients_are_those_of_the_sum(way, kind):
    """Against float64: y = round(x W^T + b), dx = round(g W), dW = g^T x, db = sum g."""
    layer = nn.Linear(96, 64) if kind is nn.Linear else Conv1D(64, 96)
    with torch.no_grad():
        layer.weight.copy_(normal(*layer.weight.shape))
        layer.bias.copy_(normal(64, seed=1))
    weight = layer.weight if kind is nn.Linear else layer.weight.t()
    layer.forward = two_parts.partial(two_parts._linear, layer, layer.forward, torch.bfloat16)
    x = normal(5, 40, 96, seed=2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    narrow = x.detach().bfloat16().double().flatten(0, 1)
    exact = narrow @ weight.detach().double().t() + layer.bias.detach().double()
    assert y.dtype == torch.bfloat16
    assert same(y.flatten(0, 1), exact) > 0.99
    # what two rounded products add up to is another number in every tenth place and more
    high, low = two_parts.split(weight.detach())
    apart = (narrow @ high.double().t()).bfloat16() + (narrow @ low.double().t()).bfloat16()
    assert same(apart + layer.bias.detach().bfloat16(), exact) < 0.9
    gradient = normal(*y.shape, seed=3).bfloat16()
    y.backward(gradient)
    g = gradient.double().flatten(0, 1)
    assert same(x.grad.flatten(0, 1), g @ weight.detach().double()) > 0.99
    found = layer.weight.grad if kind is nn.Linear else layer.weight.grad.t()
    for mine, truth in ((found, g.t() @ narrow), (layer.bias.grad, g.sum(0))):
        assert mine.dtype == torch.float32
        assert float((mine - truth).abs().max() / truth.abs().max()) < 1e-5
    # outside of autocast it is the layer it was
    assert torch.equal(layer(x), type(layer).forward(layer, x))


def same(found, exact):
    """Share of places that hold the bfloat16 number nearest to the exact one."""
    return float((found.double() == exact.bfloat16().double()).double().mean())


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("family", ["llama", "gpt2", "capped"])
def test_what_it_costs_beside_bfloat16(way, family):
    """Rounding of activations is left, of weights it is gone: of two equal parts of the variance one, so 0.7 of the size.

    Real models gain more, as their weights' rounding is the larger part (docs/log.md).
    """
    make = capped if family == "capped" else lambda: tiny.model(family)
    policies = {dtype: policy_of(moved(make()), dtype) for dtype in ("float32", "bfloat16", "bfloat16x2")}
    values = {dtype: logps(policy, 64) for dtype, policy in policies.items()}
    off = {dtype: float((value - values["float32"]).square().mean().sqrt()) for dtype, value in values.items()}
    assert off["bfloat16x2"] < 0.9 * off["bfloat16"]
    gradients = {dtype: gradient(policy) for dtype, policy in policies.items()}
    angle = {dtype: 1 - cosine(gradients[dtype], gradients["float32"]) for dtype in policies}
    assert angle["bfloat16x2"] < angle["bfloat16"]


def gradient(policy):
    value_R = response_logps(policy, build(trees(), policy.layout))
    value = (value_R * torch.linspace(-1, 1, len(value_R), dtype=value_R.dtype)).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.trainable().values()))]).double()


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("keep", [1 << 30, 0], ids=["kept", "tiles"])
def test_the_head_rounds_its_backward_in_bfloat16_alone(monkeypatch, keep):
    """From the same states: log-probs to the bit those of float32; gradients too, but for bfloat16, whose products are rounded."""
    monkeypatch.setattr(logprobs, "_KEEP_BYTES", keep)
    monkeypatch.setattr(logprobs, "_TILE_BYTES", 4 * tiny.VOCAB * 7)
    found = {}
    for dtype in ("float32", "bfloat16x2", "bfloat16"):
        policy = policy_of(tiny.model("llama"), dtype)
        batch = build(trees(), policy.layout)
        states_NH = normal(len(batch.head_N), policy.fast_head.weight.shape[1], seed=3).requires_grad_()
        logp_E = logprobs.logps_of_states(policy, batch, states_NH)
        found[dtype] = (logp_E, *torch.autograd.grad(logp_E.cumsum(0).sum(), (states_NH, policy.fast_head.weight)))
    assert all(torch.equal(mine, exact) for mine, exact in zip(found["bfloat16x2"], found["float32"], strict=True))
    assert torch.equal(found["bfloat16"][0], found["float32"][0])
    for mine, exact in zip(found["bfloat16"][1:], found["float32"][1:], strict=True):
        assert mine.dtype == torch.float32
        assert 1e-4 < float((mine - exact).norm() / exact.norm()) < 5e-3


def test_an_update_that_bfloat16_passes_over_is_seen():
    """A weight of 1 + 2^-10 is 1 in bfloat16."""
    layer = nn.Linear(8, 1, bias=False)
    outputs = {}
    for value in (1.0, 1 + 2.0**-10):
        with torch.no_grad():
            layer.weight.fill_(value)
        for name, forward in (
            ("autocast", layer),
            ("two parts", two_parts.partial(two_parts._linear, layer, layer, torch.float32)),
        ):
            with torch.autocast("cpu", torch.bfloat16):
                outputs[name, value] = float(forward(torch.full((1, 8), 2.0**-3)).detach())
    assert outputs["autocast", 1.0] == outputs["autocast", 1 + 2.0**-10] == 1.0
    assert outputs["two parts", 1 + 2.0**-10] == 1 + 2.0**-10


def test_it_composes():
    """Reference, measuring, recomputed layers, adapters, kept weights and both layouts."""
    policy = policy_of(moved(tiny.model("llama")))
    assert policy.layout == "tree"
    first = logps(policy)
    # the start of a run is its reference, to the bit; the copy reads its own weights
    reference = frozen_copy(policy)
    assert torch.equal(logps(reference), first)
    moved(policy.causal_lm, 1e-2)
    assert torch.equal(logps(reference), first)
    assert not torch.equal(logps(policy), first)
    # what is measured is float32's, to the bit
    exact = policy_of(moved(moved(tiny.model("llama")), 1e-2), "float32")
    assert torch.equal(logps(precise(policy)), logps(exact))
    assert not torch.equal(logps(policy), logps(exact))
    # recomputed in the backward as in the forward
    recomputed = policy_of(moved(moved(tiny.model("llama")), 1e-2), gradient_checkpointing=True)
    assert torch.equal(gradient(recomputed), gradient(policy))
    rows = settle(policy_of(moved(moved(tiny.model("llama")), 1e-2)), "rows", trees())[0]
    assert float((logps(rows) - logps(policy)).abs().max()) < 0.05 * float(logps(policy).abs().max())


def test_adapters_and_kept_weights():
    model = tiny.model("llama").bfloat16().float()
    lora = policy_of(copy.deepcopy(model), lora=LoraSettings(rank=4), weights="bfloat16")
    plain = policy_of(copy.deepcopy(model), lora=LoraSettings(rank=4))
    assert lora.kept_bytes > 0
    for policy in (lora, plain):
        moved(nn.ParameterList(policy.trainable().values()), 0.05)
    assert float((logps(lora) - logps(plain)).abs().max()) < 0.01 * float(logps(plain).abs().max())
    assert cosine(gradient(lora), gradient(plain)) > 0.99
    with lora.model.disable_adapter():
        assert float((logps(lora) - logps(policy_of(copy.deepcopy(model), weights="float32"))).abs().max()) < 1.0


def test_other_weights_than_those_of_linear_layers_are_refused():
    sizes = tiny._GQA | {"num_local_experts": 2, "num_experts_per_tok": 1}
    with pytest.raises(ConfigError, match="multiplies by others .*; set model.dtype=float32 or bfloat16"):
        policy_of(MixtralForCausalLM(MixtralConfig(**sizes)))
    with pytest.raises(ValidationError, match="would read one part"):
        ModelConfig(path="tiny", dtype="bfloat16x2", weights="nf4", lora=LoraSettings())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_parts")
    tiny.save(folder / "model")
    rows = [{"prompt": f"film {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(8)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(("schema", "command"), [(TrainConfig, train), (RewardTrainConfig, train_reward)])
def test_a_run_computes_so_and_says_it(inputs, schema, command, monkeypatch):
    asked, counted = two_parts._TwoParts.apply, []
    monkeypatch.setattr(two_parts._TwoParts, "apply", lambda *args: counted.append(1) or asked(*args))
    run = inputs / command.__name__
    sizes = ["train.batch_prompts=4", "optim.lr=1e-3"]
    words = [
        f"run={run}",
        f"model.path={inputs}/model",
        f"data.train={inputs}/p.jsonl",
        "model.dtype=bfloat16x2",
        *sizes,
    ]
    command(
        load(schema, None, words), lambda root: Session(RunFolder(root), World(), Console(quiet=True), StopRequest())
    )
    lines = [json.loads(line) for line in RunFolder(run).metrics.read_text("utf-8").splitlines()]
    said = next(line["message"] for line in lines if line.get("name") == "self_check")
    assert "bfloat16 products, in two parts, on float32 weights" in said
    assert "bfloat16x2 costs" in said
    assert counted
    steps = [line["loss"] for line in lines if line["kind"] == "step"]
    assert abs(steps[0] - 0.6931472) < 1e-6
    assert steps[-1] < steps[0]
    if command is train:
        with safe_open(RunFolder(run).reference, framework="pt") as file:
            assert file.metadata()["dtype"] == "bfloat16x2"
