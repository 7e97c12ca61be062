"""Losses by closed form: values, derivatives, limits, and METHOD's worked examples."""

import math
import re
from pathlib import Path

import pytest
import slow_losses
import torch
from oracles import tree

import favor
from favor.data.batches import build
from favor.losses import pairwise
from favor.losses import table as losses
from favor.losses.table import LOSSES, Loss, make_loss
from favor.losses.unpaired import plackett_luce
from favor.losses.view import Scored

D = torch.float64


def test_worked_example_1_implicit_rewards_and_bradley_terry():
    """pi = (0.6, 0.4), ref = (0.5, 0.5): r = beta ln 1.2 and beta ln 0.8; p*(1 > 2) = sigmoid(0.405465 beta)."""
    pi, ref = torch.tensor([0.6, 0.4], dtype=D).log(), torch.tensor([0.5, 0.5], dtype=D).log()
    for beta, expected in ((0.1, 0.510135), (1.0, 0.6)):
        loss, rewards = favor.dpo_loss(pi, ref, torch.tensor([0]), torch.tensor([1]), beta)
        assert rewards.tolist() == pytest.approx([0.182322 * beta, -0.223144 * beta], abs=1e-6)
        assert math.exp(-loss.item()) == pytest.approx(expected, abs=1e-6)
        assert (rewards[0] - rewards[1]).item() == pytest.approx(0.405465 * beta, abs=1e-6)


def test_worked_example_2_capital_of_france():
    """Log-ratios +0.1 and -0.1, margin 0.2 beta, loss 0.683197 at beta 0.1; the weight is below one half."""
    pi = torch.tensor([-0.2, -0.8], dtype=D, requires_grad=True)
    ref = torch.tensor([-0.3, -0.7], dtype=D)
    loss, rewards = favor.dpo_loss(pi, ref, torch.tensor([0]), torch.tensor([1]), 0.1)
    assert (rewards / 0.1).tolist() == pytest.approx([0.1, -0.1])
    assert loss.item() == pytest.approx(0.683197, abs=1e-6)
    loss.sum().backward()
    weight = -pi.grad[0].item() / 0.1
    assert weight == pytest.approx(1 / (1 + math.exp(0.02)))
    assert weight < 0.5


def test_dpo_gradient_is_equation_8():
    """dL = -beta sigmoid(r_l - r_w) (d log pi_w - d log pi_l), pair by pair; rewards carry no gradient."""
    pi = torch.randn(6, dtype=D, requires_grad=True)
    ref, beta = torch.randn(6, dtype=D), 0.3
    yw, yl = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 3, 4, 0])
    loss, rewards = favor.dpo_loss(pi, ref, yw, yl, beta)
    assert not rewards.requires_grad
    loss.sum().backward()
    expected = torch.zeros(6, dtype=D)
    for w, l in zip(yw.tolist(), yl.tolist(), strict=True):
        weight = beta * torch.sigmoid(rewards[l] - rewards[w])
        expected[w] -= weight
        expected[l] += weight
    assert torch.allclose(pi.grad, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "value", "slope"),
    [
        (lambda h: pairwise.sigmoid(h, 0.1), 0.683197, lambda h: -0.1 / (1 + math.exp(0.1 * h))),
        (
            lambda h: pairwise.cdpo(h, 0.1, 0.1),
            0.685197,
            lambda h: -0.1 * (1 / (1 + math.exp(0.1 * h)) - 0.1),
        ),
        (lambda h: pairwise.ipo(h, 0.1), 23.04, lambda h: 2 * (h - 5)),
        (lambda h: pairwise.hinge(h, 0.1), 0.98, lambda h: -0.1 if h < 10 else 0.0),
    ],
    ids=["sigmoid", "cdpo", "ipo", "hinge"],
)
def test_value_and_slope(function, value, slope):
    """The docstrings' worked numbers at h = 0.2, and the derivative over a range of h."""
    assert function(torch.tensor([0.2], dtype=D)).item() == pytest.approx(value, abs=1e-6)
    for at in (-30.0, -1.0, 0.0, 0.2, 4.0, 30.0):
        h = torch.tensor([at], dtype=D, requires_grad=True)
        function(h).sum().backward()
        assert h.grad.item() == pytest.approx(slope(at), abs=1e-9)


def test_limits():
    """cDPO has its minimum at sigmoid(beta h) = 1 - e; hinge is zero from 1/beta on; DPO goes to ln 2 as beta -> 0."""
    e, beta = 0.2, 0.5
    h = torch.tensor([math.log((1 - e) / e) / beta], dtype=D, requires_grad=True)
    pairwise.cdpo(h, beta, e).sum().backward()
    assert abs(h.grad.item()) < 1e-12
    assert pairwise.hinge(torch.tensor([2.0, 2.5], dtype=D), 0.5).tolist() == [0, 0]
    assert pairwise.sigmoid(torch.tensor([7.0], dtype=D), 1e-9).item() == pytest.approx(math.log(2), abs=1e-7)
    assert torch.isfinite(pairwise.sigmoid(torch.tensor([-1e6, 1e6]), 0.1)).all()


def test_plackett_luce_of_two_is_dpo():
    """K = 2: -[r_w - log(e^r_w + e^r_l)] = -log sigmoid(r_w - r_l), values and gradients."""
    ratio = torch.randn(8, dtype=D, requires_grad=True)
    order = torch.tensor([[0, 1], [3, 2], [7, 4]])
    ranked = plackett_luce(ratio, order, 0.7)
    (gradient,) = torch.autograd.grad(ranked.sum(), ratio)
    paired, _ = favor.dpo_loss(ratio, torch.zeros(8, dtype=D), order[:, 0], order[:, 1], 0.7)
    (expected,) = torch.autograd.grad(paired.sum(), ratio)
    assert torch.allclose(ranked, paired, atol=1e-12)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_plackett_luce_is_minus_log_of_successive_choices():
    """Oracle: the product over places of softmax among those left; padding with -1 changes nothing."""
    ratio = torch.randn(5, dtype=D, requires_grad=True)
    order, beta = [3, 0, 4, 1], 0.4
    probability = torch.ones((), dtype=D)
    for place in range(len(order)):
        left = beta * ratio[order[place:]]
        probability = probability * torch.softmax(left, 0)[0]
    padded = torch.tensor([[*order, -1, -1]])
    loss = plackett_luce(ratio, padded, beta)
    assert loss.item() == pytest.approx(-math.log(probability.item()), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), ratio)
    (expected,) = torch.autograd.grad(-probability.log(), ratio)
    assert torch.allclose(gradient, expected, atol=1e-12)
    assert gradient[2] == 0


def items(config, ratio, batch, zero=0.0):
    """Loss of every item of the first term, with ref = 0 so that pi is the log-ratio."""
    return losses.term_losses(config, Scored(ratio, torch.zeros_like(ratio), zero=zero), batch)[0][0]


def test_length_normalised_ipo():
    """The option divides every log-ratio by its response's length before the gap is taken."""
    batch = build([tree([5], [[7, 8, 2], [9, 2]], [(0, 1)])], "tree")
    ratio = torch.tensor([0.9, -0.4], dtype=D)
    item = items(make_loss("ipo", beta=0.1, length_normalized=True), ratio, batch)
    assert item.item() == pytest.approx((0.9 / 3 + 0.4 / 2 - 5) ** 2)


def test_kto_by_its_equation():
    """w_D (1 - s(beta (r_w - z0))) and w_U (1 - s(beta (z0 - r_l))); z0 carries no gradient."""
    ratio = torch.tensor([0.9, -0.4], dtype=D, requires_grad=True)
    pairs = build([tree([5], [[7, 2], [9, 2]], [(0, 1)])], "tree")
    config = make_loss("kto", beta=0.5, desirable_weight=1.2, undesirable_weight=0.8)
    item = items(config, ratio, pairs, 0.3)

    def s(x):
        return 1 / (1 + math.exp(-x))

    assert item.tolist() == pytest.approx([1.2 * (1 - s(0.5 * 0.6)), 0.8 * (1 - s(0.5 * 0.7))])
    assert losses.item_weight(config, pairs) == [2.0]
    (gradient,) = torch.autograd.grad(item.sum(), ratio)
    expected = [-1.2 * 0.5 * s(0.3) * s(-0.3), 0.8 * 0.5 * s(0.35) * s(-0.35)]
    assert gradient.tolist() == pytest.approx(expected)


def test_unlikelihood_and_preferred_ft_have_the_gradients_of_likelihoods():
    """d/d(log pi): -1 on the chosen, +alpha on the rejected; preferred-FT leaves the rejected alone."""
    pairs = build([tree([5], [[7, 2], [9, 2]], [(0, 1)])], "tree")
    for config, expected in (
        (make_loss("unlikelihood", alpha=0.3), [-1.0, 0.3]),
        (make_loss("preferred_ft"), [-1.0, 0.0]),
    ):
        ratio = torch.tensor([0.9, -0.4], dtype=D, requires_grad=True)
        item = items(config, ratio, pairs)
        assert item.item() == pytest.approx(expected[0] * 0.9 + expected[1] * -0.4)
        assert torch.autograd.grad(item.sum(), ratio)[0].tolist() == pytest.approx(expected)


def test_unread_option_is_refused():
    with pytest.raises(ValueError, match=r"dpo.label_smoothing\n  Extra inputs"):
        make_loss(label_smoothing=0.1)
    for name, loss in LOSSES.items():
        found = make_loss(name).model_dump()
        assert found.keys() <= {"kind", "passes"} | loss.settings().keys()
        assert make_loss(**found).model_dump() == found
    assert make_loss(**make_loss("cdpo").model_dump()).label_smoothing == 0.1


def test_a_parameter_that_is_neither_read_nor_a_setting_is_refused():
    def knee(h_P: torch.Tensor, knee: float = 1.0) -> torch.Tensor:
        return torch.relu(knee - h_P)

    with pytest.raises(TypeError, match=r"knee is neither a name of READINGS .*Annotated\["):
        Loss(knee)


def test_every_loss_has_slow_code():
    missing = set(LOSSES) ^ set(slow_losses.NAMES)
    assert not missing, (
        f"write {sorted(missing)} again, in scalars, in tests/slow_losses.py: the fast code is held against it"
    )


def test_the_page_of_losses_says_what_each_reads():
    """docs/losses.md has a row for every loss, whose column of settings is the function's."""
    page = (Path(__file__).parent.parent / "docs/losses.md").read_text("utf-8")
    rows = {}
    for line in page.splitlines():
        cells = line.strip().strip("|").split(" | ")
        if cells[0].strip(" `") in LOSSES:
            rows[cells[0].strip(" `")] = re.findall(r"`(\w+)`", cells[-2])
    assert rows == {kind: list(loss.settings()) for kind, loss in LOSSES.items()}


def test_the_readme_counts_the_losses():
    assert f"**Every loss exactly**: {len(LOSSES)}, from" in (Path(__file__).parent.parent / "README.md").read_text()
