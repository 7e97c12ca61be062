"""favor's losses against what TRL 1.16 and OpenRLHF 0.11 gave on fixed inputs (benchmarks/trl_losses.py wrote the file)."""

import json
from pathlib import Path

import pytest
import torch
from oracles import tree

from favor.data.batches import build
from favor.data.types import Comparison
from favor.losses.table import make_loss
from favor.losses.table import terms as terms_of
from favor.losses.view import Scored, View

GOLDEN = json.loads((Path(__file__).parent / "golden/trl_losses.json").read_text("utf-8"))
INPUTS = GOLDEN["inputs"]
CASES = [case for case in GOLDEN["cases"] if case["compare"] != "nothing"]
D = torch.float64
LENGTHS = [n for pair in zip(INPUTS["length_chosen"], INPUTS["length_rejected"], strict=True) for n in pair]
# from our order (chosen, rejected, chosen, ...) to the file's (all chosen, then all rejected)
ORDER = [*range(0, 16, 2), *range(1, 16, 2)]


def tokens(name):
    """Values token by token in our order of responses."""
    sides = (INPUTS[f"{name}_chosen_tokens"], INPUTS[f"{name}_rejected_tokens"])
    return torch.tensor([x for pair in zip(*sides, strict=True) for response in pair for x in response], dtype=D)


def batch():
    """Eight pairs with the file's lengths; the ids do not matter."""
    trees = []
    for i in range(8):
        responses = [[20 + i] * (n - 1) + [2] for n in LENGTHS[2 * i : 2 * i + 2]]
        responses[1][0] = 9
        item = tree([5, i], responses, first=2 * i, row=i)
        trees.append(item.__class__(**(vars(item) | {"comparisons": (Comparison((0, 1)),)})))
    return build(trees, "tree")


def per_response(value_M):
    return torch.stack([part.sum() for part in value_M.split(LENGTHS)])


def terms(case):
    """(loss, options, factor) of a case; two are sums of terms."""
    name, options = case["favor_loss"], case["favor_options"]
    if name == "orpo - sft":
        return [("orpo", options, 1.0), ("sft", {}, -1.0)]
    if "+" in name:
        return [("dpo", options, 1.0), ("sft", {}, 0.5)]
    return [(name, options, 1.0)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['trl']}-{c['options']}")
def test_agrees(case):
    pi_M = tokens("pi").requires_grad_()
    ref_M, seen = tokens("ref"), batch()
    overlap_R = per_response(tokens("log_sum_sq")) / seen.length_R
    zero = max(0.0, sum(a - b for a, b in zip(INPUTS["kl_pi"], INPUTS["kl_ref"], strict=True)) / 8)
    scored = Scored(per_response(pi_M), per_response(ref_M), pi_M, ref_M, overlap_R, zero)
    mean, items = torch.zeros((), dtype=D), torch.zeros((), dtype=D)
    for name, options, factor in terms(case):
        (term,) = terms_of(make_loss(name, **options))
        view = View(scored, seen, **{key: term.settings[key] for key in term.loss.sees})
        item, weight = term.losses(scored, seen)
        mean = mean + factor * (item * weight).sum() / weight.sum()
        items = items + factor * item
    (gradient,) = torch.autograd.grad(mean, pi_M)
    first_R = [part[0] for part in gradient.split(LENGTHS)]
    found = torch.stack(first_R)[ORDER]
    expected = torch.tensor(case["grad_first"], dtype=D)
    close = {"rtol": 1e-6, "atol": 1e-6}
    if case["compare"] == "all":
        torch.testing.assert_close(mean.item(), case["mean"], **close)
        torch.testing.assert_close(found, expected, **close)
    elif case["compare"] == "half":
        torch.testing.assert_close(2 * mean.item(), case["mean"], **close)
        torch.testing.assert_close(2 * found, expected, **close)
        items = items[:8] + items[8:]
    keep = slice(None)
    if "weight" in case["compare"]:
        keep = view.trust_P() < 1
        assert 0 < int(keep.sum()) < 8
    if "per_item" in case and items.shape == (8,):
        torch.testing.assert_close(items[keep], torch.tensor(case["per_item"], dtype=D)[keep], **close)
