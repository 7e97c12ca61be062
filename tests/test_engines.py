"""How a GPU's way of computing is chosen, and whole models through it, with flash's kernels exchanged for plain ones."""

import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import varlen_kernels
from oracles import plain_logps
from test_invariance import adapted, assert_same_gradients, forest, gradients, policy_of, updated_weights
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from favor.data import batches
from favor.errors import ConfigError
from favor.losses.table import LOSSES, make_loss
from favor.model import engines, layout, varlen
from favor.model.layout import settle
from favor.model.load import ModelConfig, precise
from favor.model.logprobs import mean_overlap, response_logps
from favor.ranks import World
from favor.train.loop import micro_batches
from favor.train.preference import make_objective
from favor.train.reference import Reference
from favor.train.step import Learner, Objective, _accumulate, global_count

FLEX_HERE = "FlexAttention does not support backward on CPU"


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(varlen, "FLASH", varlen_kernels.PLAIN)


def on_gpu(policy, asked="auto", trees=None, train=True):
    """`settle` as it goes on a GPU: trees settled in parts, in float32, then the ways of a GPU."""
    trees = trees or forest()
    exact = settle(precise(policy), "tree", trees, train=train)[0]
    looked = layout._looked_at(exact, trees)
    truths = layout._truths(exact, [layout._cut(tree) for tree in trees[:2]], looked, layout.LOGPS, train=train)
    layout.use_attention(exact, layout.attention.NAME)
    return layout._on_gpu(policy, exact, asked, truths, layout.LOGPS, trees if train else ())


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_through_varlen_calls_is_plain_transformers(family, checkpointing):
    model, trees = tiny.model(family), forest()
    plain = plain_logps(model, trees)
    expected = gradients(plain, model)
    policy, _ = settle(policy_of(model, gradient_checkpointing=checkpointing), "tree", trees)
    batch = batches.build(trees, "tree")
    for head in (policy.fast_head, None):
        variant = replace(policy, fast_head=head, attention="fa2")
        found = response_logps(variant, batch)
        assert_close(found, plain, rtol=1e-5, atol=1e-5)
        assert_same_gradients(gradients(found, model), expected)
        assert_close(mean_overlap(variant, batch), mean_overlap(policy, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_adapters_through_varlen_calls():
    trees = forest()
    oracle = adapted("llama")
    plain = plain_logps(oracle.causal_lm, trees)
    expected = gradients(plain, oracle.model)
    policy, _ = settle(adapted("llama", gradient_checkpointing=2), "tree", trees)
    found = response_logps(replace(policy, attention="fa2"), batches.build(trees, "tree"))
    assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(found, policy.model), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_a_model_through_flex_is_plain_transformers():
    """Forward alone, which is all that torch has of it on a CPU."""
    model, trees = tiny.model("qwen3"), forest()
    policy, _ = settle(policy_of(model), "tree", trees)
    with torch.no_grad():
        found = response_logps(replace(policy, attention="flex"), batches.build(trees, "tree"))
        assert_close(found, plain_logps(model, trees), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dpo", "kto", "plackett_luce"])
def test_a_step_is_the_same_step(name, monkeypatch):
    """The whole optimizer step, in one pack and in several."""
    loss, trees = make_loss(name, beta=0.2), forest()
    parts, _, _ = updated_weights(trees, 10_000, loss)
    start = {n: p.detach().clone() for n, p in tiny.model("llama").named_parameters()}
    moved = max((parts[n] - start[n]).abs().max() for n in start)
    before = settle

    def through_varlen(*given, **more):
        policy, why = before(*given, **more)
        return (replace(policy, attention="fa2") if policy.layout == "tree" else policy), why

    monkeypatch.setattr("test_invariance.settle", through_varlen)
    for budget in (10_000, 60):
        other, _, _ = updated_weights(trees, budget, loss)
        for n in parts:
            assert (other[n] - parts[n]).abs().max() <= 1e-5 * moved, n


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_way_is_checked_and_said(dtype, monkeypatch):
    """What passes computes the products; what fails (here flex, which has no backward on a CPU) is named with its reason."""
    monkeypatch.setattr(engines, "ways", lambda dtype: ["fa2", "flex"] if dtype == torch.bfloat16 else ["flex"])
    policy = replace(policy_of(tiny.model("llama")), compute_dtype=getattr(torch, dtype))
    found, why = on_gpu(policy, "tree")
    assert found.layout == "tree"
    assert found.attention == ("fa2" if dtype == "bfloat16" else "parts")
    assert found.compute_dtype == policy.compute_dtype
    assert precise(found).attention == "parts"
    assert FLEX_HERE in why
    assert "FALL-BACK (slower) from flex" in why
    assert ("attention by fa2, plain operations, node by node in float32" in why) == (dtype == "bfloat16")


def half_precision(monkeypatch, kernels=varlen_kernels.PLAIN):
    monkeypatch.setattr(varlen, "FLASH", kernels)
    monkeypatch.setattr(engines, "ways", lambda dtype: ["fa2"] if dtype == torch.bfloat16 else [])
    return replace(policy_of(tiny.model("llama")), compute_dtype=torch.bfloat16)


def wrong_gradient(*given):
    dq, dk, dv = varlen_kernels.backward(*given)
    return dq, dk, dv * 1.5


def all_see_all(q, k, v, segments, _causal, scale):
    return varlen_kernels.forward(q, k, v, segments, False, scale)


def refuses(*_):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")


FAULTY = {
    "off the plain path": varlen.Kernels(all_see_all, varlen_kernels.backward),
    "gradients of": varlen.Kernels(varlen_kernels.forward, wrong_gradient),
    "only supports Ampere": varlen.Kernels(refuses, refuses),
    "CUDA out of memory": varlen.Kernels(full, full),
}


@pytest.mark.parametrize("word", FAULTY)
def test_a_faulty_kernel_is_given_up_loudly_and_refused_by_name(word, monkeypatch):
    policy = half_precision(monkeypatch, FAULTY[word])
    found, why = on_gpu(policy, "tree")
    assert found.attention == "parts"
    assert "FALL-BACK" in why
    assert word in why
    with pytest.raises(ConfigError, match="model.layout is 'fa2', but fa2: .*set model.layout=auto"):
        on_gpu(policy, "fa2")


def test_what_only_measures_is_not_timed(monkeypatch):
    policy = half_precision(monkeypatch)
    found, why = on_gpu(policy, train=False)
    assert found.attention == "fa2"
    assert "measured" not in why


def test_the_fastest_way_is_taken_and_the_figures_said(monkeypatch):
    """The clock runs on this machine, whichever wins; the sentence names all that were timed."""
    policy = half_precision(monkeypatch)
    found, why = on_gpu(policy)
    assert "fa2 " in why
    assert "one row per response " in why
    assert why.count(" ms") == 2
    monkeypatch.setattr(engines, "seconds_of", lambda policy, *_: 1.0 if policy.layout == "tree" else 0.5)
    found, why = on_gpu(policy)
    assert found.layout == "rows"
    assert why.startswith("one row per response, checked against plain transformers, measured (fa2 1000.0 ms")
    assert found.causal_lm.config._attn_implementation == policy.plain_attention
    found, _ = on_gpu(policy, "tree")
    assert found.layout == "tree"


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"fa3": 1.0, "fa2": 0.96, "flex": 2.0}, "fa3"),
        ({"fa3": 1.0, "fa2": 0.94, "flex": 2.0}, "fa2"),
        ({"fa2": 1.0, "rows": float("inf")}, "fa2"),
        ({"fa2": float("inf"), "flex": 3.0}, "flex"),
        ({"a": 1.0, "b": 0.97, "c": 0.94}, "c"),
    ],
)
def test_a_change_must_be_worth_it(seconds, best):
    assert engines.fastest(seconds) == best


def test_memory_that_ends_is_no_time(monkeypatch):
    policy, _ = settle(policy_of(tiny.model("llama")), "tree", forest())

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert engines.seconds_of(policy, forest(), full) == float("inf")
    assert engines._ms(float("inf")) == "out of memory"
    assert 0 < engines.seconds_of(policy, forest(), lambda batch: response_logps(policy, batch)) < 60


def test_flash_is_asked_for_in_half_precision_alone():
    assert engines.ways(torch.float32) == ["flex"]
    assert engines.ways(torch.bfloat16)[-2:] == ["fa2", "flex"]
    assert set(engines.ways(torch.bfloat16)) <= {*engines.FLASH, "flex"}


def test_torch_knows_the_kernels_by_these_names():
    """Not installed here: torch fails at the module that brings them, not at the name."""
    from torch.nn.attention import list_flash_attention_impls

    assert {name for name, _ in engines.FLASH.values() if name} <= set(list_flash_attention_impls())
    for name, module in engines.FLASH.values():
        if name and not engines._installed(module):
            with pytest.raises(ImportError, match=module.split(".")[0]):
                engines._switch(name)
    engines._switch(None)


def test_a_name_that_cannot_run_is_refused(monkeypatch):
    for name in ("fa2", "fa3", "fa4", "flex"):
        with pytest.raises(ValueError, match=f"model.layout = '{name}' is for GPUs alone"):
            ModelConfig(path="x", layout=name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="computes in bfloat16 alone"):
        ModelConfig(path="x", layout="fa2")
    with pytest.raises(ValueError, match="for GPUs alone"):
        ModelConfig(path="x", layout="fa2", device="cpu", dtype="bfloat16")
    ModelConfig(path="x", layout="fa2", dtype="bfloat16")
    ModelConfig(path="x", layout="flex")


# what makes the host wait for the device: reading a number, or a result whose size depends on the data
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "bincount")


class Waits(TorchDispatchMode):
    """The operators met that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
        )
        sized = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        if name in READS or by_mask or sized:
            asked = next(f for f in reversed(traceback.extract_stack()[:-1]) if "/torch/" not in f.filename)
            self.found.append((name, Path(asked.filename).name))
        return function(*args, **(kwargs or {}))


def test_a_planted_wait_is_seen():
    x = torch.arange(3.0)
    for planted in (lambda: float(x.sum()), lambda: x[x > 1], lambda: x.nonzero(), lambda: bool((x > 1).any())):
        with Waits() as waits:
            planted()
        assert {file for _, file in waits.found} == {"test_engines.py"}


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"aot", "aot_unpaired", "bco"}))
@pytest.mark.parametrize("way", ["tree", "fa2", "rows", "own head"])
def test_no_step_waits_for_the_device(name, way, monkeypatch):
    """From the batches to the gradients nothing is read: the step reads its figures once, at its end.

    But for padded rows, whose mask transformers reads (is all of it set?), twice a forward. The losses left out sort or centre the whole optimizer batch between two passes, and read there, once a step.
    """
    if way == "fa2":
        kernels = varlen.Kernels(_no_mode(varlen_kernels.forward), _no_mode(varlen_kernels.backward))
        monkeypatch.setattr(varlen, "FLASH", kernels)
    trees = [tree for tree in forest() if all(len(c.order) == 2 for c in tree.comparisons)]
    policy, _ = settle(policy_of(tiny.model("llama")), "rows" if way == "rows" else "tree", trees)
    policy = replace(policy, **{"fa2": {"attention": "fa2"}, "own head": {"fast_head": None}}.get(way, {}))
    stored = torch.zeros(20, dtype=torch.float64)
    objective = make_objective(make_loss(name), policy, Reference(lambda b: stored[b.index_R], ""))
    learner = Learner(policy.trainable(), torch.optim.SGD(policy.trainable().values()), 1.0, policy.device, World())
    cut = micro_batches(trees, policy, 60, World())
    with Waits() as waits:
        _accumulate(learner, cut, objective, torch.ones(objective.num_terms, dtype=torch.float64))
    ours = [(name, file) for name, file in waits.found if (way, file) != ("rows", "masking_utils.py")]
    assert ours == []


def test_counts_go_to_the_device_without_waiting():
    """The one copy of a step that is not a batch's; from memory that is pinned, where there is a GPU (tests/test_gpu.py)."""
    learner = Learner({}, torch.optim.SGD([torch.zeros(1)]), 1.0, torch.device("meta"), World())
    batch = batches.build(forest(), "tree")
    objective = Objective(lambda batch: (torch.zeros(1), {}), lambda batch: [3.0], ())
    with Copies() as copies:
        assert global_count(learner, [batch], objective).shape == (1,)
    assert copies.waiting == [False]


class Copies(TorchDispatchMode):
    """The copies to another device that are met, and whether each waits."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::_to_copy":
            self.waiting.append(not (kwargs or {}).get("non_blocking", False))
        return function(*args, **(kwargs or {}))


def _no_mode(kernel):
    """The stand-in reads segments; the kernel whose place it takes does not."""

    def called(*given):
        with torch.utils._python_dispatch._disable_current_modes():
            return kernel(*given)

    return called
