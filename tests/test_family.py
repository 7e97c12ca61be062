"""The loss family: worked numbers, derivatives, limits; the batch-coupled ones against plain loops."""

import math

import pytest
import torch
from oracles import tree

from favor.data.batches import build
from favor.data.types import Comparison, Thumb
from favor.losses import pairwise, unpaired
from favor.losses import table as losses
from favor.losses.table import LOSSES, make_loss
from favor.losses.view import DIVERGENCES, Scored

D = torch.float64


def t(*values):
    return torch.tensor(values, dtype=D)


WORKED = {
    "dpo, soft": (lambda: pairwise.sigmoid(t(2.0), 0.1, t(0.75)), 0.648139),
    "robust": (lambda: pairwise.robust(t(0.2), 0.1, 0.1), 0.680697),
    "exo": (lambda: pairwise.exo(t(0.0), 0.1, 0.1), math.log(5 / 3)),
    "discopop": (lambda: pairwise.discopop(t(0.0), 0.1, 0.05), 0.846574),
    "odpo": (lambda: pairwise.odpo(t(0.0), t(math.e), 0.1, "log", 1.0), 1.313262),
    "dpop": (lambda: pairwise.dpop(t(-1.0), t(-3.0), 0.1, 5.0), 0.854355),
    "sppo_hard": (lambda: pairwise.sppo_hard(t(0.0), t(0.0), 0.1), 50.0),
    "apo_zero": (lambda: pairwise.apo_zero(t(0.0), t(0.0), 0.1), 1.0),
    "apo_down": (lambda: pairwise.apo_down(t(0.0), t(0.0), 0.1), 1.0),
    "davidson win": (lambda: pairwise.davidson(t(0.0), t(), 0.1, 1.0), math.log(3)),
    "davidson tie": (lambda: pairwise.davidson(t(), t(0.0), 0.1, 1.0), math.log(3)),
    "bco": (lambda: unpaired.bco(t(1.0, -1.0), torch.tensor([True, False]), t(1.0, 1.0), 1.0)[:1], 0.313262),
    "aot": (lambda: unpaired.dominance(t(0.0, 4.0), t(1.0, 1.0), t(2.0, -2.0), t(1.0, 1.0), 0.5)[0][:1], 0.313262),
    "simpo": (lambda: pairwise.simpo(t(-1.0), t(-1.25), 2.0, 0.5), math.log(2)),
    "cpo": (lambda: pairwise.cpo(t(-4.0), t(-6.0), 0.1, 1.0), 0.598139 + 4),
    "orpo": (lambda: pairwise.orpo(t(-1.0), t(-1.0), 0.3), 1 + 0.3 * math.log(2)),
    "nca": (lambda: unpaired.nca(t(0.0, 0.0), torch.tensor([[0, 1]]), t(0.0, 0.0)[None], 0.1, 1.0), 2 * math.log(2)),
    "plackett_luce, top 1": (
        lambda: unpaired.plackett_luce(t(0.0, 0.0, 0.0), torch.tensor([[2, 0, 1]]), 0.1, 1),
        math.log(3),
    ),
    "forward KL": (lambda: DIVERGENCES["forward_kl"](t(0.5)), 0.393469),
    "Jensen-Shannon": (lambda: DIVERGENCES["jensen_shannon"](t(0.5)), 0.219070),
    "alpha": (lambda: DIVERGENCES["alpha"](t(0.5), 0.5), 0.442398),
}


@pytest.mark.parametrize("name", sorted(WORKED))
def test_worked_number(name):
    compute, expected = WORKED[name]
    assert compute().item() == pytest.approx(expected, abs=1e-6)


def forest():
    """Pairs with margins, a scored ranking, ties, thumbs."""
    from matrix import forest

    return build(forest(), "tree")


# which change of log pi each loss rewards, at pi = ref, on (chosen, rejected) of one pair: its exact derivative
SLOPES = {
    "dpo": lambda c: (-c.beta / 2, c.beta / 2),
    "cdpo": lambda c: (-c.beta * (0.5 - c.label_smoothing), c.beta * (0.5 - c.label_smoothing)),
    "robust": lambda c: (-c.beta / 2 / (1 - 2 * c.label_smoothing), c.beta / 2 / (1 - 2 * c.label_smoothing)),
    "hinge": lambda c: (-c.beta, c.beta),
    "ipo": lambda c: (-1 / c.beta, 1 / c.beta),
    "exo": lambda c: 2 * (0,),
    "discopop": lambda c: 2 * (0,),
    "odpo": lambda c: 2 * (0,),
    "rao_kupper": lambda c: 2 * (0,),
    "davidson": lambda c: (-c.beta / 2, c.beta / 2),
    "dpop": lambda c: 2 * (0,),
    "sppo_hard": lambda c: (-1 / c.beta, 1 / c.beta),
    "apo_zero": lambda c: (-c.beta / 4, c.beta / 4),
    "apo_down": lambda c: (0.0, -c.beta / 4 + c.beta / 2),
    "aot": lambda c: (-c.beta / 2, c.beta / 2),
    "aot_unpaired": lambda c: (-c.beta / 2 * 2, c.beta / 2 * 2),
    "nca": lambda c: (-c.beta / 2 + c.beta / 4, c.beta / 4),
    "plackett_luce": lambda c: (-c.beta / 2, c.beta / 2),
    "kto": lambda c: (-c.beta / 4, c.beta / 4),
    "bco": lambda c: (-c.beta / 2, c.beta / 2),
    "preferred_ft": lambda c: (-1.0, 0.0),
    "unlikelihood": lambda c: (-1.0, c.alpha),
}
SPECIAL = {
    # e-smoothed reverse KL: d/dh = beta s'(0) log((1/2)/(1-e) / ((1/2)/e)) = beta/4 log(e/(1-e))
    "exo": lambda c: c.beta / 4 * math.log(c.label_smoothing / (1 - c.label_smoothing)),
    # m = 1/2: -(beta/2)/2 - beta/2 + m'(1 - ln 2), m' = beta/(4 tau)
    "discopop": lambda c: -c.beta / 4 - c.beta / 2 + c.beta / (4 * c.discopop_tau) * (1 - math.log(2)),
    # margin 2: -beta s(ln 2)
    "odpo": lambda c: -c.beta * 2 / 3,
    "rao_kupper": lambda c: -c.beta / (1 + math.exp(-c.tie_width)),
    # at the kink the penalty's derivative is torch's choice of 0 at log pi/ref = 0 from above: see test_dpop_penalty
    "dpop": lambda c: -c.beta / 2,
}


@pytest.mark.parametrize("name", sorted(SLOPES))
def test_derivative_at_the_reference(name):
    """d loss / d log pi of chosen and rejected, by hand."""
    item = tree([5], [[7, 2], [9, 9, 2]], [], first=0)
    pair = Comparison((0, 1), 1.0, (2.0,) if "margin_P" in LOSSES[name].reads() else ())
    batch = build([item.__class__(**(vars(item) | {"comparisons": (pair,)}))], "tree")
    config = make_loss(name, **({"beta": 0.3} if "beta" in LOSSES[name].settings() else {}))
    # dpop: just above the reference, on the smooth side of its kink
    pi_R = (t(1e-9, 1e-9) if name == "dpop" else t(0.0, 0.0)).requires_grad_()
    (found, weight), *_ = losses.term_losses(config, Scored(pi_R, t(0.0, 0.0)), batch)
    (gradient,) = torch.autograd.grad((found * weight).sum(), pi_R)
    slope = SPECIAL[name](config) if name in SPECIAL else None
    expected = (slope, -slope) if slope is not None else SLOPES[name](config)
    assert gradient.tolist() == pytest.approx(list(expected), abs=1e-7)


FREE_SLOPES = {
    # d/d log pi of (chosen, rejected) at means -1 (length 2) and -1 (length 3), beta 0.3: by hand
    "simpo": lambda: (-0.3 / (1 + math.exp(-0.5)) / 2, 0.3 / (1 + math.exp(-0.5)) / 3),
    "cpo": lambda: (-0.3 / (1 + math.exp(0.3)) - 1, 0.3 / (1 + math.exp(0.3))),
    # d log odds/d mean = 1/(1 - e^mean)
    "orpo": lambda: ((-1 - 0.15 / (1 - math.exp(-1))) / 2, 0.15 / (1 - math.exp(-1)) / 3),
    "sft": lambda: (-0.5, 0.0),
}


def test_every_loss_has_a_derivative_by_hand():
    assert set(SLOPES) | set(FREE_SLOPES) == set(LOSSES)


@pytest.mark.parametrize("name", sorted(FREE_SLOPES))
def test_derivative_without_a_reference(name):
    item = tree([5], [[7, 2], [9, 9, 2]], [(0, 1)], first=0)
    batch = build([item], "tree")
    config = make_loss(name, **({"beta": 0.3} if "beta" in LOSSES[name].settings() else {}))
    pi_R = t(-2.0, -3.0).requires_grad_()
    (found, _), *_ = losses.term_losses(config, Scored(pi_R, t(0.0, 0.0)), batch)
    (gradient,) = torch.autograd.grad(found.sum(), pi_R)
    assert gradient.tolist() == pytest.approx(list(FREE_SLOPES[name]()), abs=1e-12)


# losses whose value does not run to its value at pi = ref when beta goes to 0
UNBOUNDED = {"ipo", "sppo_hard", "cpo", "orpo", "simpo", "sft", "preferred_ft", "unlikelihood"}


@pytest.mark.parametrize("name", sorted(set(LOSSES) - UNBOUNDED))
def test_beta_to_zero_and_equal_ratios(name):
    """Without temperature every policy is as good as the reference; moving all log-probs alike moves no loss of a gap."""
    batch = forest()
    ref_R = torch.linspace(-9, -4, batch.num_responses, dtype=D)
    pi_R = ref_R + torch.linspace(-2, 2, batch.num_responses, dtype=D)

    def value(pi_R, beta):
        config = make_loss(name, beta=beta)
        (found, weight), *_ = losses.term_losses(config, Scored(pi_R, ref_R), batch)
        return float((found * weight).sum() / weight.sum())

    assert value(pi_R, 1e-10) == pytest.approx(value(ref_R, 1e-10), abs=1e-7)
    shifts = {"kto", "apo_zero", "apo_down", "nca", "dpop"}
    if name not in shifts:
        assert value(pi_R + 0.7, 0.4) == pytest.approx(value(pi_R, 0.4), abs=1e-9)


def test_dpop_penalty():
    """Below the reference the chosen response's slope grows by the penalty's share."""
    chosen = t(-0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(pairwise.dpop(chosen, t(-4.0), 0.1, 5.0).sum(), chosen)
    d = 0.1 * (3.5 - 5.0 * 0.5)
    assert gradient.item() == pytest.approx(-0.1 * 6 / (1 + math.exp(d)))
    assert pairwise.dpop(t(0.5), t(-4.0), 0.1, 5.0).item() == pytest.approx(pairwise.sigmoid(t(4.5), 0.1).item())


def test_limits_within_the_family():
    h = torch.linspace(-8, 8, 33, dtype=D)
    dpo = pairwise.sigmoid(h, 0.3)
    assert torch.allclose(pairwise.cdpo(h, 0.3, 0.0), dpo)
    assert torch.allclose(pairwise.robust(h, 0.3, 0.0), dpo)
    assert torch.allclose(pairwise.davidson(h, t(), 0.3, 1e-12), dpo, atol=1e-9)
    assert torch.allclose(pairwise.odpo(h, torch.full_like(h, 1.0), 0.3), dpo)
    assert torch.allclose(pairwise.simpo(h, torch.zeros_like(h), 0.3, 0.0), dpo)
    assert torch.allclose(DIVERGENCES["alpha"](h, 1e-9), h, atol=1e-6)
    assert torch.allclose(DIVERGENCES["alpha"](h, 1 - 1e-12), DIVERGENCES["forward_kl"](h), atol=1e-7)
    # robust is unbiased: over flipped labels with probability e it is the clean loss
    e = 0.2
    both = (1 - e) * pairwise.robust(h, 0.3, e) + e * pairwise.robust(-h, 0.3, e)
    assert torch.allclose(both, dpo)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "alpha"])
def test_divergences_are_f_primes(name):
    """By autograd: f' of the divergence's generator f at u = pi/ref, less f'(1)."""
    generators = {
        "reverse_kl": lambda u: u * u.log(),
        "forward_kl": lambda u: -u.log(),
        "jensen_shannon": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha": lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.7 * (0.7 - 1)),
    }
    log_u = torch.linspace(-3, 3, 13, dtype=D)
    u = torch.cat([log_u.exp(), t(1.0)]).requires_grad_()
    (slope,) = torch.autograd.grad(generators[name](u).sum(), u)
    expected = slope[:-1] - slope[-1]
    # the paper's alpha-divergence has f'(u) = (1 - u^-alpha)/alpha, alpha = 1 - 0.7
    assert torch.allclose(DIVERGENCES[name](log_u, *([0.3] if name == "alpha" else [])), expected, atol=1e-9)


def test_rao_kupper_and_davidson_are_probabilities():
    """Win, loss and tie add up to 1."""
    h = torch.linspace(-5, 5, 11, dtype=D)
    from favor.losses import pairwise

    beta, width, nu = 0.7, 0.4, 1.3
    parts = [pairwise.bradley_terry(beta * x, torch.full_like(h, width)) for x in (h, -h)]
    total = sum((-x).exp() for x in parts) + (-pairwise.rao_kupper_tie(beta * h, width)).exp()
    assert torch.allclose(total, torch.ones_like(h))
    parts = [pairwise.davidson(x, t(), beta, nu) for x in (h, -h)] + [pairwise.davidson(t(), h, beta, nu)]
    assert torch.allclose(sum((-x).exp() for x in parts), torch.ones_like(h))


def test_coupling_is_the_cheapest_transport():
    """Against a linear programme's optimum: by brute force over permutations of unit masses."""
    import itertools

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randn(4, dtype=D, generator=generator), torch.randn(2, dtype=D, generator=generator)
        weight_b = t(1.0, 3.0)
        found = unpaired.coupling(a, torch.ones(4), b, weight_b)
        cost = (found.mass_C * (found.a_C - found.b_C) ** 2).sum()
        spread = b.repeat_interleave(weight_b.long())
        best = min(((a - spread[list(order)]) ** 2).sum() for order in itertools.permutations(range(4)))
        assert cost.item() == pytest.approx(best.item())
        assert found.mass_C.sum().item() == pytest.approx(4)


def test_thumbs_alone_and_one_sided():
    """KTO and BCO train on thumbs without pairs; AOT without a bad side has no loss."""
    item = tree([5], [[7, 2], [9, 2]], [], first=0)
    batch = build([item.__class__(**(vars(item) | {"thumbs": (Thumb(0, True), Thumb(1, True, 2.0))}))], "tree")
    for name, expected in (("kto", 0.5), ("bco", math.log(2)), ("aot_unpaired", 0.0)):
        config = make_loss(name)
        (found, weight), *_ = losses.term_losses(config, Scored(t(0.0, 0.0), t(0.0, 0.0)), batch)
        assert losses.item_weight(config, batch) == [3.0]
        assert float((found * weight).sum() / 3) == pytest.approx(expected)


def test_nca_weighs_by_scores():
    """softmax of the scores, whatever their origin; padding changes nothing."""
    ratio, order = t(0.3, -0.2, 0.5), torch.tensor([[2, 0, 1, -1]])
    drop = t(0.0, 1.0, 3.0, 0.0)[None]
    found = unpaired.nca(ratio, order, drop, 0.5, 2.0)
    share = torch.softmax(t(0.0, -0.5, -1.5), 0)
    r = 0.5 * ratio[[2, 0, 1]]
    expected = -(share * torch.log(1 / (1 + (-r).exp()))).sum() - torch.log(1 / (1 + r.exp())).mean()
    assert found.item() == pytest.approx(expected.item())


def test_the_options_that_do_not_go_together():
    for values, message in (
        ({"kind": "dpo", "ld_alpha": 0.5, "length_normalized": True}, "ld_alpha"),
        ({"kind": "dpo", "divergence": {"kind": "forward_kl", "alpha": 0.3}}, "Extra inputs"),
        ({"kind": "exo", "label_smoothing": 0.0}, "greater than 0"),
        (
            {"kind": "sum", "terms": [{"kind": "sum", "terms": [{"kind": "ipo"}]}]},
            "does not match any of the expected tags",
        ),
        ({"kind": "sum", "terms": [{"kind": "sft", "beta": 0.1}]}, "Extra inputs"),
        ({"kind": "kto", "wpo": "aligned"}, "Extra inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            make_loss(**values)


def test_every_loss_is_finite_far_out():
    """Log-ratios of hundreds of nats give finite losses and gradients (forward KL is exponential by nature)."""
    batch = forest()
    for name in LOSSES:
        for scale in (-300.0, 300.0):
            pi_R = (torch.linspace(-1, 1, batch.num_responses, dtype=D) * scale - 301).requires_grad_()
            ref_R = torch.full_like(pi_R, -301.0, requires_grad=False)
            scored = Scored(pi_R, ref_R.detach())
            config = make_loss(name)
            (found, weight), *_ = losses.term_losses(config, scored, batch)
            (gradient,) = torch.autograd.grad((found * weight).sum(), pi_R)
            assert found.isfinite().all(), name
            assert gradient.isfinite().all(), name


def test_edges_that_break_other_code():
    """ORPO of a response of probability 1, DiscoPOP far on the wrong side: finite values and gradients."""
    for compute, at in (
        (lambda x: pairwise.orpo(x, t(-1.0), 0.1), 0.0),
        (lambda x: pairwise.discopop(x, 0.5, 0.05), -4000.0),
        (lambda x: pairwise.discopop(x, 0.5, 0.05), 4000.0),
    ):
        x = t(at).requires_grad_()
        value = compute(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
