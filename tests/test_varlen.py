"""The attention of GPUs on a CPU: flash's kernels are exchanged for plain ones (varlen_kernels.py), all else is what runs there.

The oracle is one masked softmax in float64, whose mask is read off the paths themselves.
"""

import random
from functools import partial
from itertools import accumulate

import pytest
import torch
import varlen_kernels
from torch.testing import assert_close

from favor.data import batches
from favor.model import attention, flex, varlen

CPU = torch.device("cpu")


def pairs(rng, prompts=4, responses=2):
    """Prompts that share nothing, each with responses that part at their first token."""
    paths = []
    for p in range(prompts):
        prompt = [100 + p, *(rng.randrange(9) for _ in range(rng.randrange(7)))]
        paths += [(*prompt, r, *(rng.randrange(9) for _ in range(rng.randrange(6)))) for r in range(responses)]
    return paths


def mixed(rng):
    """Prefixes of prefixes, equal paths, single tokens, paths that share nothing."""
    return [tuple(rng.randrange(2 + 3 * (n % 2)) for _ in range(rng.randint(1, 9))) for n in range(rng.randint(1, 14))]


KINDS = {
    "pairs": pairs,
    "4 answers": partial(pairs, responses=4),
    "alone": partial(pairs, responses=1),
    "some alone": lambda rng: [*pairs(rng, 2), (200, 1, 2), (7,), *pairs(rng, 1)],
    "one token each": lambda rng: [(1, 2), (1, 3), (4, 5), (4, 6)],
    "one system text": lambda rng: [(50, 51, 52, *path) for path in pairs(rng, 5)],
    "mixed": mixed,
}
CASES = [(name, seed) for name in KINDS for seed in range(6 if name == "mixed" else 2)]


def drawn(name, seed, heads=(4, 2), size=8, dtype=torch.float64):
    """nodes, q, k, v and the mask of every (query, key), from the paths."""
    paths = KINDS[name](random.Random(seed))
    nodes, packed, _, where = batches.radix(paths)
    torch.manual_seed(seed)
    q, k, v = (
        3 * torch.randn(1, h, len(packed), size, dtype=torch.float64).to(dtype) for h in (heads[0], heads[1], heads[1])
    )
    allowed = torch.zeros(len(packed), len(packed), dtype=torch.bool)
    for path in where:
        for place, index in enumerate(path):
            allowed[index, path[: place + 1]] = True
    return nodes, (q, k, v), allowed


def truth(qkv, allowed, scale):
    """out and the gradients of a fixed sum of it, by one masked softmax in float64."""
    q, k, v = (x.double().requires_grad_() for x in qkv)
    groups = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(groups, 1).mT * scale).masked_fill(~allowed, float("-inf"))
    out = scores.softmax(-1) @ v.repeat_interleave(groups, 1)
    return out.detach(), torch.autograd.grad((out * weights(out)).sum(), (q, k, v))


def weights(out):
    return torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)


def computed(nodes, qkv, kernels=varlen_kernels.PLAIN, scale=0.4, made=None):
    """The same by varlen calls, back in the row's own order."""
    made = made or varlen.plan(nodes, CPU)
    leaves = [x.clone().requires_grad_() for x in qkv]
    ordered = (x[:, :, made.order_T] for x in leaves)
    out = varlen.attend(made, kernels, *ordered, scale)[:, :, made.place_T]
    grads = torch.autograd.grad((out * weights(out.double()).to(out.dtype)).sum(), leaves)
    return out.detach(), grads


def worst(found, expected):
    """Largest difference of out and of each gradient, over the largest value of out, or of all gradients."""
    scales = [expected[0].abs().max(), *3 * [max(g.abs().max() for g in expected[1])]]
    return [
        float((a.double() - b).abs().nan_to_num(1e9).max() / scale)
        for a, b, scale in zip((found[0], *found[1]), (expected[0], *expected[1]), scales, strict=True)
    ]


@pytest.mark.parametrize(("name", "seed"), CASES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_it_is_the_masked_softmax(name, seed, heads):
    nodes, qkv, allowed = drawn(name, seed, heads)
    assert max(worst(computed(nodes, qkv), truth(qkv, allowed, 0.4))) < 1e-12


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_it_is_the_attention_of_cpus(name, seed):
    nodes, qkv, _ = drawn(name, seed, dtype=torch.float32)
    leaves = [x.clone().requires_grad_() for x in qkv]
    out, _ = attention.tree_attention(torch.nn.Identity(), *leaves, None, tree_nodes=nodes, scaling=0.4)
    out = out.transpose(1, 2)
    grads = torch.autograd.grad((out * weights(out.double()).float()).sum(), leaves)
    assert max(worst(computed(nodes, qkv), (out.detach(), grads))) < 1e-5


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_bfloat16_costs_its_rounding(name, seed):
    """Kernels round out and gradients once, the merge once more: errors of a few units of 2^-8."""
    nodes, qkv, allowed = drawn(name, seed, dtype=torch.bfloat16)
    found = computed(nodes, qkv)
    assert found[0].dtype == torch.bfloat16
    assert max(worst(found, truth(qkv, allowed, 0.4))) < 0.1


def test_autocast_decides_the_format():
    """Norms of q and k give float32 under autocast; flash takes bfloat16 alone."""
    nodes, qkv, allowed = drawn("pairs", 0, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = computed(nodes, qkv)
    assert found[0].dtype == torch.bfloat16
    assert found[1][0].dtype == torch.float32
    assert max(worst(found, truth(qkv, allowed, 0.4))) < 0.1


@pytest.mark.parametrize("size", [3, 8, 20])
def test_heads_of_any_size(size):
    """Flash wants multiples of 8, and values as wide as keys: zeros fill up."""
    nodes, (q, k, v), allowed = drawn("mixed", 1, size=size)
    qkv = (q, k, torch.cat([v, v], -1)[..., : size + 2])
    assert max(worst(computed(nodes, qkv), truth(qkv, allowed, 0.4))) < 1e-12


@pytest.mark.parametrize(
    ("name", "calls", "copied"), [("pairs", 2, False), ("alone", 1, False), ("one system text", 2, True)]
)
def test_a_layer_takes_two_launches(name, calls, copied):
    """One call for all nodes, one for all that is shared; keys are copied only below the first level."""
    nodes, qkv, _ = drawn(name, 0)
    made, launched = varlen.plan(nodes, CPU), []

    def counted(*given):
        launched.append(given[3])
        return varlen_kernels.forward(*given)

    def counted_back(*given):
        launched.append(given[3])
        return varlen_kernels.backward(*given)

    computed(nodes, qkv, varlen.Kernels(counted, counted_back), made=made)
    assert len(launched) == 2 * calls
    assert isinstance(made.keys, torch.Tensor) == copied
    if calls == 2 and not copied:
        # the children of a prompt are one segment, whatever their number
        assert len(made.below.q_S) - 1 == 4


def test_siblings_share_their_copied_keys():
    """A system text of 3 tokens over 5 prompts of 2 responses: 1 + 5 segments, the text copied once for all prompts."""
    nodes, _, _ = drawn("one system text", 0)
    made = varlen.plan(nodes, CPU)
    prompts = [node.stop - node.start for node in nodes if node.start >= 3 and node.stop < node.end]
    assert len(prompts) == 5
    assert len(made.below.q_S) - 1 == 6
    assert len(made.keys) == 3 + sum(3 + count for count in prompts)


# what could be wrong and still run: each must be seen by the comparison above
def unmerged(grad, qkv, merged, segments, causal, scale):
    """Each call's own lse in its backward."""
    return varlen_kernels.backward(
        grad, qkv, (merged[0], varlen_kernels.forward(*qkv, segments, causal, scale)[1]), segments, causal, scale
    )


def unmerged_out(grad, qkv, merged, segments, causal, scale):
    own = varlen_kernels.forward(*qkv, segments, causal, scale)[0]
    return varlen_kernels.backward(grad, qkv, (own, merged[1]), segments, causal, scale)


def shifted(bounds):
    """One boundary between segments moved by a token."""
    moved = bounds.clone()
    widest = int(moved.diff()[:-1].argmax())
    moved[widest + 1] -= 1
    return moved


def swapped(bounds):
    """Two segments of different lengths exchanged."""
    lengths = bounds.diff().tolist()
    i = next(i for i in range(len(lengths) - 1) if lengths[i] != lengths[i + 1])
    lengths[i : i + 2] = lengths[i + 1], lengths[i]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def in_base_2(*given):
    out, lse = varlen_kernels.forward(*given)
    return out, lse / 0.6931472


def causal(q, k, v, segments, _causal, scale):
    return varlen_kernels.forward(q, k, v, segments, True, scale)


BACK, FORTH = varlen_kernels.backward, varlen_kernels.forward
FAULTS = {
    "backward reads a part's own lse": {"kernels": varlen.Kernels(FORTH, unmerged)},
    "backward reads a part's own out": {"kernels": varlen.Kernels(FORTH, unmerged_out)},
    "the call of children is causal": {"kernels": varlen.Kernels(causal, BACK)},
    "lse in base 2": {"kernels": varlen.Kernels(in_base_2, BACK)},
    "keys off by one": {"below": lambda s: s._replace(k_S=shifted(s.k_S))},
    "queries off by one": {"below": lambda s: s._replace(q_S=shifted(s.q_S))},
    "a response under another prompt": {"below": lambda s: s._replace(q_S=swapped(s.q_S))},
    "a prompt's keys of another": {"below": lambda s: s._replace(k_S=swapped(s.k_S))},
    "nodes off by one": {"own": lambda s: s._replace(q_S=shifted(s.q_S), k_S=shifted(s.k_S))},
    "the shared part forgotten": {"below": lambda s: None},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault):
    planted = dict(FAULTS[fault])
    nodes, qkv, allowed = drawn("pairs", 3)
    made, kernels = varlen.plan(nodes, CPU), planted.pop("kernels", varlen_kernels.PLAIN)
    made = made._replace(**{name: change(made._asdict()[name]) for name, change in planted.items()})
    assert max(worst(computed(nodes, qkv, kernels, made=made), truth(qkv, allowed, 0.4))) > 1e-3


def test_copies_of_a_key_add_up():
    """The fault of writing a key's gradient instead of adding it shows in deeper trees."""
    nodes, qkv, allowed = drawn("one system text", 1)
    made = varlen.plan(nodes, CPU)
    expected = truth(qkv, allowed, 0.4)
    assert max(worst(computed(nodes, qkv, made=made), expected)) < 1e-12
    lost = made._replace(keys=made.keys.clone())
    lost.keys[0] = made.keys[1]
    assert max(worst(computed(nodes, qkv, made=lost), expected)) > 1e-3


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_the_calls_fit_the_schema_of_torch(name, seed):
    """The real operators on the device that computes nothing: number, order and types of their arguments, shapes of results."""
    nodes, qkv, _ = drawn(name, seed, dtype=torch.bfloat16)
    made = varlen.plan(nodes, torch.device("meta"))
    q, k, v = (x.to("meta").requires_grad_() for x in qkv)
    out = varlen.attend(made, varlen.FLASH, q, k, v, 0.4)
    assert out.shape == q.shape
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]


def dense(table, count, block):
    """Blocks as tokens: bool [count, count]."""
    wide = torch.from_numpy(table).repeat_interleave(block, 0).repeat_interleave(block, 1)
    return wide[:count, :count]


@pytest.mark.parametrize(("name", "seed"), CASES)
@pytest.mark.parametrize("block", [1, 2, 3, 8, 128])
def test_the_mask_of_flex_is_the_tree(name, seed, block):
    """The rule against the paths; blocks called full are full, those left out are empty, by brute force."""
    nodes, (q, *_), allowed = drawn(name, seed)
    count = q.shape[2]
    end_T = flex.ends(nodes)
    place = torch.arange(count)
    rule = flex.rule(torch.from_numpy(end_T))(None, None, place[:, None], place[None])
    assert torch.equal(rule, allowed)
    found = flex.blocks(end_T, block)
    partly, wholly = (dense(table, count, block) for table in found)
    assert not bool((partly & wholly).any())
    assert bool(allowed[wholly].all())
    assert not bool(allowed[~partly & ~wholly].any())
    # a block is called partly filled only where it is neither empty nor full, but for the diagonal
    size = found.partly.shape[0]
    for row in range(size):
        for column in range(row):
            piece = allowed[row * block : (row + 1) * block, column * block : (column + 1) * block]
            assert bool(found.partly[row, column]) == (bool(piece.any()) and not bool(piece.all()))
            assert bool(found.wholly[row, column]) == bool(piece.all())


def test_a_mask_off_by_one_is_seen():
    nodes, (q, *_), allowed = drawn("pairs", 3)
    place = torch.arange(q.shape[2])
    for wrong in (flex.ends(nodes) + 1, flex.ends(nodes) - 1):
        rule = flex.rule(torch.from_numpy(wrong))(None, None, place[:, None], place[None])
        assert not torch.equal(rule, allowed)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_runs_forward_on_a_cpu():
    """torch has no backward of it here; the forward over more than one block is the masked softmax."""
    rng = random.Random(5)
    KINDS["long"] = lambda _: [tuple(rng.randrange(2) for _ in range(rng.randint(3, 40))) for _ in range(25)]
    nodes, qkv, allowed = drawn("long", 0, size=16, dtype=torch.float32)
    del KINDS["long"]
    assert qkv[0].shape[2] > 2 * flex.BLOCK
    with torch.no_grad():
        out = flex.attend(flex.plan(nodes, CPU), *qkv, 0.4)
    assert_close(out.double(), truth(qkv, allowed, 0.4)[0], rtol=1e-4, atol=1e-4)
