"""Log-probs and gradients do not depend on layout, packing, sharing, checkpointing, accumulation or adapters.

The oracle is plain transformers: one unpadded forward per response, full logits (tests/oracles.py).
"""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from oracles import plain_logps, tree
from torch.testing import assert_close

from favor.data import batches
from favor.data.types import TokenTree
from favor.losses import table as losses
from favor.losses.table import make_loss
from favor.model import attention
from favor.model.adapters import LoraSettings
from favor.model.layout import config_obstacle, settle
from favor.model.load import ModelConfig, frozen_copy, make_policy
from favor.model.logprobs import response_logps
from favor.ranks import World
from favor.train.loop import micro_batches
from favor.train.optim import AdamW, make_optimizer
from favor.train.preference import make_objective
from favor.train.reference import Reference, frozen
from favor.train.step import Learner, step


def ids(count, rng):
    return [rng.randrange(4, tiny.VOCAB) for _ in range(count)]


def forest(seed=0):
    """Depth 1 to 4, responses that open alike, one that is a prefix of another, two trees sharing a prompt's start."""
    rng = random.Random(seed)
    prompt, opening, middle = ids(9, rng), ids(4, rng), ids(3, rng)
    first = [
        ids(6, rng),
        opening + ids(5, rng),
        opening + middle + ids(2, rng),
        opening + middle + ids(4, rng),
        opening + middle,  # a prefix of the two before it
    ]
    second = [ids(1, rng), ids(7, rng)]
    return [
        tree(prompt, first, [(1, 0), (2, 3), (4, 0)], first=0),
        tree(prompt[:5] + ids(3, rng), second, [(0, 1)], first=5),
        tree(prompt + first[0], [ids(3, rng), ids(2, rng)], [(1, 0)], first=7),  # a later turn of the first
        tree(ids(4, rng), [ids(3, rng), ids(5, rng), ids(2, rng)], [(2, 0, 1)], first=9),
    ]


def policy_of(model, **settings):
    return make_policy(model, tiny.tokenizer(), ModelConfig(path="tiny", dtype="float32", device="cpu", **settings))


def gradients(value, model):
    """d(value . fixed coefficients) by parameter name."""
    coefficient = torch.linspace(-1, 1, value.shape[0], dtype=torch.float64)
    model.zero_grad()
    (value * coefficient).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tree_equals_rows_equals_plain_transformers(family, layout, checkpointing):
    model = tiny.model(family)
    trees = forest()
    plain = plain_logps(model, trees)
    expected = gradients(plain, model)
    policy = policy_of(model, gradient_checkpointing=checkpointing)
    policy, _ = settle(policy, layout, trees)
    assert policy.layout == layout
    for variant in (policy, replace(policy, fast_head=None)):
        found = response_logps(variant, batches.build(trees, layout))
        assert_close(found, plain, rtol=1e-5, atol=1e-5)
        assert_same_gradients(gradients(found, model), expected)


def adapted(family, **settings):
    """A LoRA policy whose adapters have moved; the same one at every call."""
    policy = policy_of(tiny.model(family), lora=LoraSettings(rank=4), **settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            assert "lora_" in name
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_tree_equals_plain_and_adapter_off_is_the_base(family, checkpointing):
    trees = forest()
    base = plain_logps(tiny.model(family), trees).detach()
    oracle = adapted(family)
    plain = plain_logps(oracle.causal_lm, trees)
    expected = gradients(plain, oracle.model)
    policy, _ = settle(adapted(family, gradient_checkpointing=checkpointing), "tree", trees)
    batch = batches.build(trees, "tree")
    found = response_logps(policy, batch)
    assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(found, policy.model), expected)
    with torch.no_grad(), frozen(policy) as reference:
        assert_close(response_logps(reference, batch), base, rtol=1e-5, atol=1e-5)
    assert (found.detach() - base).abs().max() > 0.01


def test_attention_kernels_agree_and_match_masked_softmax():
    """The flash parts, the plain-torch parts and one masked softmax give the same output and gradients (GQA)."""
    rng = random.Random(3)
    nodes, packed, _, where = batches.radix([tuple(rng.randrange(2) for _ in range(n)) for n in (9, 7, 8, 6, 9, 3)])
    count = len(packed)
    q, k, v = (torch.randn(1, h, count, 16, requires_grad=True) for h in (4, 2, 2))
    allowed = torch.zeros(count, count, dtype=torch.bool)
    for path in where:
        for place, index in enumerate(path):
            allowed[index, path[: place + 1]] = True
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(~allowed, float("-inf"))
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    out, _ = attention.tree_attention(torch.nn.Identity(), q, k, v, None, tree_nodes=nodes, scaling=0.25)
    assert_close(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((out.transpose(1, 2) * weight).sum(), (q, k, v))
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)
    for part in attention.parts(nodes):
        rows, keys = slice(part.q0, part.q1), slice(part.k0, part.k1)
        piece = (q.detach()[:, :, rows], k.detach()[:, :, keys], v.detach()[:, :, keys])
        fast, fast_lse = attention._forward(*piece, part.causal, 0.25)
        slow, slow_lse = attention.math_forward(*piece, part.causal, 0.25)
        assert_close(fast, slow, rtol=1e-5, atol=1e-5)
        assert_close(fast_lse, slow_lse, rtol=1e-5, atol=1e-5)
        upstream = torch.randn_like(fast)
        for a, b in zip(
            attention._backward(upstream, piece, (fast, fast_lse), part.causal, 0.25),
            attention.math_backward(upstream, piece, (slow, slow_lse), part.causal, 0.25),
            strict=True,
        ):
            assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_radix_holds_every_distinct_prefix_once():
    rng = random.Random(1)
    for _ in range(200):
        paths = [tuple(rng.randrange(3) for _ in range(rng.randint(1, 9))) for _ in range(rng.randint(1, 9))]
        nodes, packed, position, where = batches.radix(paths)
        assert len(packed) == len({p[:i] for p in paths for i in range(1, len(p) + 1)})
        for path, index in zip(paths, where, strict=True):
            assert tuple(packed[index]) == path
            assert position[index].tolist() == list(range(len(path)))
        assert sum(stop - start for start, stop, _ in nodes) == len(packed)


def bare(prompt, *responses):
    """A tree of token ids alone."""
    return TokenTree(tuple(prompt), tuple(map(tuple, responses)), (True,) * len(responses), (), 0, 0)


def drawn_trees(rng, count, openings=0, opening=40):
    """Trees of random ids; with `openings`, each begins with one of so many long texts."""
    texts = [[rng.randrange(50) for _ in range(opening)] for _ in range(openings)] or [[]]
    return [
        bare(
            [*rng.choice(texts), *(rng.randrange(50) for _ in range(rng.randint(1, 30)))],
            *([rng.randrange(50) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(1, 3))),
        )
        for _ in range(count)
    ]


def by_size_alone(sizes, budget, world):
    """The slow oracle where nothing is shared: largest first into the emptiest bin, more bins until all fit."""
    num_bins = world * max(1, -(-sum(sizes) // (budget * world)))
    while True:
        bins, load = [[] for _ in range(num_bins)], [0] * num_bins
        for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            b = min(range(num_bins), key=lambda b: (load[b], b))
            bins[b].append(i)
            load[b] += sizes[i]
        if all(total <= budget or len(m) == 1 for total, m in zip(load, bins, strict=True)):
            return [sorted(m) for m in bins]
        num_bins += world


@pytest.mark.parametrize("openings", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [60, 150, 1000])
def test_plan_keeps_the_budget_and_is_deterministic(budget, world, openings):
    """By the tokens that a micro-batch really computes; bins without trees come last, as many for every rank."""
    rng = random.Random(f"{budget} {world} {openings}")
    for layout in ("tree", "rows"):
        trees = drawn_trees(rng, rng.randint(1, 30), openings)
        bins = batches.plan(trees, layout, budget, world)
        assert bins == batches.plan(list(trees), layout, budget, world)
        assert sorted(i for members in bins for i in members) == list(range(len(trees)))
        assert len(bins) % world == 0
        assert bins == sorted(bins, key=lambda members: not members)
        assert all(len(m) <= 1 or batches.build([trees[i] for i in m], layout).num_tokens <= budget for m in bins)


def cost(trees, bins, layout="tree"):
    return sum(batches.build([trees[i] for i in members], layout).num_tokens for members in bins if members)


@pytest.mark.parametrize("budget", [1024, 4096])
def test_rows_of_like_length_stand_together(budget):
    """Lengths as of chats: what is padding is little, what is planned is built; by size alone most would be padding."""
    lengths = np.random.default_rng(0).lognormal((4.0, 3.6, 3.6), 0.9, (64, 3)).clip(3, 500).astype(int).tolist()
    trees = [bare(range(p), range(a), range(b)) for p, a, b in lengths]
    alone = sum(batches.computed_tokens(tree, "rows") for tree in trees)
    found = cost(trees, batches.plan(trees, "rows", budget), "rows")
    assert found <= min(1.2 * alone, batches.planned_tokens(trees, "rows", budget))
    sizes = [batches.computed_tokens(tree, "rows") for tree in trees]
    assert cost(trees, by_size_alone(sizes, budget, 1), "rows") > 1.5 * alone
    # ranks are level: in every round each has nearly as much to do as the slowest
    bins = batches.plan(trees, "rows", budget, 2)
    loads = [cost(trees, [members], "rows") for members in bins]
    assert sum(max(loads[i : i + 2]) for i in range(0, len(loads), 2)) <= 1.25 * alone / 2


def test_trees_that_open_alike_stand_together():
    """Three system texts of 600 tokens, 24 prompts: each text is computed once where the budget allows, not once a bin."""
    rng = random.Random(3)
    trees = drawn_trees(rng, 24, openings=3, opening=600)
    whole = batches.build(trees, "tree").num_tokens
    assert len(batches.plan(trees, "tree", whole)) == 1
    # three bins, a text in each: nothing is computed twice
    third = max(
        batches.build([tree for tree in trees if tree.prompt_ids[:600] == text], "tree").num_tokens
        for text in {tree.prompt_ids[:600] for tree in trees}
    )
    assert cost(trees, batches.plan(trees, "tree", third)) == whole
    # by size alone each text was computed in nearly every bin
    sizes = [batches.computed_tokens(tree, "tree") for tree in trees]
    assert cost(trees, by_size_alone(sizes, third, 1)) > 3 * whole


def test_ranks_share_one_opening_evenly():
    """One system text, two ranks: both compute it once and about half of the rest."""
    trees = drawn_trees(random.Random(4), 40, openings=1, opening=600)
    whole = batches.build(trees, "tree").num_tokens
    bins = batches.plan(trees, "tree", 2 * whole, 2)
    loads = [batches.build([trees[i] for i in members], "tree").num_tokens for members in bins]
    assert len(loads) == 2
    assert max(loads) - 600 <= 0.55 * (whole - 600)


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize(("prompts", "world"), [(64, 4), (64, 8), (128, 16), (256, 64)])
def test_ranks_are_level_where_packs_are_large(layout, prompts, world):
    """As on GPUs: a pack or two for each rank, all prompts beginning with the few tokens of a chat template."""
    lengths = np.random.default_rng(0).lognormal((4.0, 3.6, 3.6), 0.9, (prompts, 3)).clip(3, 500).astype(int).tolist()
    trees = [
        bare([*range(-20, 0), *range(1000 * i, 1000 * i + p)], range(a), range(b))
        for i, (p, a, b) in enumerate(lengths)
    ]
    bins = batches.plan(trees, layout, 16_384, world)
    loads = [cost(trees, [members], layout) for members in bins]
    slowest = sum(max(loads[i : i + world]) for i in range(0, len(loads), world))
    # a rank of 4 prompts cannot be quite level, and rows are cut where their length changes
    assert slowest <= (1.1 if layout == "tree" else 1.35) * sum(loads) / world


def test_what_trees_share_is_counted_once():
    """Of a tree alone, and of every two, against the packed row."""
    trees = [*drawn_trees(random.Random(5), 12, openings=2), bare([1, 2, 3], [4, 5, 6], [4, 5, 7], [4, 8])]
    shared = batches.shared_tokens(trees)
    for i, first in enumerate(trees):
        alone = batches.computed_tokens(first, "tree")
        assert alone == batches.build([first], "tree").num_tokens
        for j, second in enumerate(trees[:i]):
            both = batches.build([first, second], "tree").num_tokens
            assert shared[i, j] == shared[j, i] == alone + batches.computed_tokens(second, "tree") - both
    assert batches.computed_tokens(trees[-1], "tree") == 3 + 5


def updated_weights(trees, budget, loss, layout="tree", world_cut=1):
    """Weights after one clipped AdamW step from the optimizer batch, cut as asked."""
    model = tiny.model("llama")
    policy, _ = settle(policy_of(model), layout, trees)
    reference = frozen_copy(policy_of(tiny.model("llama", seed=5)))
    reference, _ = settle(reference, "rows", trees)

    def ref_logps(batch):
        rows = batches.build(trees, "rows")
        with torch.no_grad():
            return response_logps(reference, rows)[batch.index_R]

    parameters = policy.trainable()
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    learner = Learner(parameters, optimizer, 1e9, policy.device, World())
    cut = micro_batches(trees, policy, budget, World())
    done = step(learner, cut, make_objective(loss, policy, Reference(ref_logps, "")))
    return {name: p.detach().clone() for name, p in parameters.items()}, done, len(cut)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "ipo", "hinge", "plackett_luce", "kto"])
def test_update_does_not_depend_on_the_cut(name):
    """One pack, several packs, one tree a row, padded rows: the same update to 1e-5 of its size."""
    loss, trees = make_loss(name, beta=0.2), forest()
    start = {n: p.detach().clone() for n, p in tiny.model("llama").named_parameters()}
    whole, done, count = updated_weights(trees, 10_000, loss)
    assert count == 1
    moved = max((whole[n] - start[n]).abs().max() for n in start)
    for budget, layout, at_least in ((60, "tree", 2), (1, "tree", 4), (10_000, "rows", 1), (1, "rows", 4)):
        other, again, packs = updated_weights(trees, budget, loss, layout)
        assert packs >= at_least
        assert again.sums["loss"] == pytest.approx(done.sums["loss"], rel=1e-5)
        assert again.grad_norm == pytest.approx(done.grad_norm, rel=1e-5)
        for key in ("pairs", "correct", "margin", "chosen_below_reference"):
            assert again.sums[key] == pytest.approx(done.sums[key], rel=1e-4)
        for n in whole:
            assert (other[n] - whole[n]).abs().max() <= 1e-5 * moved, n


def test_first_loss_is_ln_2_and_margins_are_zero():
    trees = forest()
    policy, _ = settle(policy_of(tiny.model("llama")), "tree", trees)
    reference = frozen_copy(policy)
    batch = batches.build(trees, "tree")
    with torch.no_grad():
        ref = response_logps(reference, batches.build(trees, "tree"))
    loss, stats = make_objective(make_loss(), policy, Reference(lambda _: ref, "")).loss(batch)
    assert loss.item() / losses.item_weight(make_loss(), batch)[0] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert abs(stats["margin"].item()) < 1e-6
    assert not any(p is q for p in policy.model.parameters() for q in reference.model.parameters())


def test_optimizer_groups_decay_matrices_only():
    policy = policy_of(tiny.model("llama"))
    groups = make_optimizer(AdamW(weight_decay=0.1), policy.trainable()).param_groups
    assert [(g["weight_decay"], {p.dim() for p in g["params"]}) for g in groups] == [(0.1, {2}), (0.0, {1})]


def test_models_on_which_trees_would_be_wrong_fall_back():
    assert config_obstacle({"layer_types": ["full_attention", "linear_attention"]}, 10) is not None
    assert config_obstacle({"layer_types": ["sliding_attention"], "sliding_window": 8}, 10) is not None
    assert config_obstacle({"layer_types": ["sliding_attention"], "sliding_window": 8}, 8) is None
    assert config_obstacle({"sliding_window": 8, "use_sliding_window": False}, 10) is None
    assert config_obstacle({"attn_logit_softcapping": 50.0}, 10) is not None
    assert config_obstacle({}, 10) is None


def test_fall_back_is_exact_and_said(tmp_path):
    """Gemma 2 soft-caps its logits: rows are chosen, the reason is given, log-probs equal plain transformers."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    gemma = Gemma2Config(**tiny._GQA, head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    mamba = MambaConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    for model, word in ((Gemma2ForCausalLM(gemma), "soft-caps"), (MambaForCausalLM(mamba), "plain path|does not run")):
        trees = forest()
        policy, why = settle(policy_of(model.eval()), "auto", trees)
        assert policy.layout == "rows"
        assert "FALL-BACK" in why
        assert re.search(word, why), why
