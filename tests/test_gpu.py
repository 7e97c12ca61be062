"""What only a GPU can show: the real kernels. `pytest -m gpu`; skipped where torch sees no device.

In bfloat16 the oracle is one masked softmax in float64 over the same rounded q, k and v (tests/test_varlen.py).
"""

from dataclasses import replace

import pytest
import tiny
import torch
from oracles import plain_logps
from test_invariance import forest, gradients
from test_varlen import CASES, drawn, truth, weights, worst

from favor.data import batches
from favor.model import engines, flex, varlen
from favor.model.layout import settle
from favor.model.load import ModelConfig, make_policy, precise
from favor.model.logprobs import response_logps
from favor.ranks import World
from favor.train.loop import micro_batches
from favor.train.preference import make_objective
from favor.train.reference import Reference
from favor.train.step import Learner, step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
CUDA = torch.device("cuda")
FLASH = [name for name in ("fa2", "fa3", "fa4") if name in engines.ways(torch.bfloat16)]


def on_device(name, seed, dtype, way):
    """out and gradients by the real kernel, on the CPU, beside the oracle's."""
    nodes, qkv, allowed = drawn(name, seed, size=64, dtype=dtype)
    leaves = [x.to(CUDA).requires_grad_() for x in qkv]
    if way == "flex":
        out = flex.attend(flex.plan(nodes, CUDA), *leaves, 0.1)
    else:
        engines._switch(engines.FLASH[way][0])
        made = varlen.plan(nodes, CUDA)
        ordered = (x[:, :, made.order_T] for x in leaves)
        out = varlen.attend(made, varlen.FLASH, *ordered, 0.1)[:, :, made.place_T]
    grads = torch.autograd.grad((out * weights(out.double()).to(out.dtype)).sum(), leaves)
    return (out.detach().cpu(), [g.cpu() for g in grads]), truth(qkv, allowed, 0.1)


@pytest.mark.parametrize("way", FLASH)
@pytest.mark.parametrize(("name", "seed"), CASES)
def test_flash_is_the_masked_softmax(name, seed, way):
    assert max(worst(*on_device(name, seed, torch.bfloat16, way))) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "seed"), CASES[::3])
def test_flex_is_the_masked_softmax(name, seed, dtype):
    assert max(worst(*on_device(name, seed, dtype, "flex"))) < (1e-4 if dtype == torch.float32 else 0.03)


def policy_on(**settings):
    return make_policy(tiny.model("llama"), tiny.tokenizer(), ModelConfig(path="tiny", device="cuda", **settings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_settles_and_is_plain_transformers(dtype):
    """The whole start: checks, clock, sentence; then log-probs and gradients of what was chosen, in float32."""
    trees = forest()
    policy, why = settle(policy_on(dtype=dtype), "tree", trees, train=True)
    assert "attention by" in why
    model = tiny.model("llama")
    plain = plain_logps(model, trees)
    exact = precise(policy)
    found = response_logps(exact, batches.build(trees, "tree").to(CUDA))
    assert (found.cpu() - plain).abs().max() < 1e-3
    expected, got = gradients(plain, model), gradients(found, policy.model)
    scale = max(g.abs().max() for g in expected.values())
    for name in expected:
        assert (got[name].cpu() - expected[name]).abs().max() <= 1e-3 * scale, name


@pytest.mark.parametrize("way", [*FLASH, "flex"])
def test_a_step_reads_the_device_once(way):
    """torch itself counts what waits: none between the batches and the end of the step."""
    trees = forest()
    policy = replace(settle(policy_on(dtype="bfloat16"), "tree", trees)[0], attention=way)
    stored = torch.zeros(20, dtype=torch.float64, device=CUDA)
    objective = make_objective(losses_of(), policy, Reference(lambda b: stored[b.index_R], ""))
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.1)
    learner = Learner(policy.trainable(), optimizer, 1.0, policy.device, World())
    cut = micro_batches(trees, policy, 60, World())
    step(learner, cut, objective)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing CUDA operation") as seen:
            step(learner, cut, objective)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchronizing" in str(w.message)]) == 1


def losses_of():
    from favor.losses.table import make_loss

    return make_loss()
