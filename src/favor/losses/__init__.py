"""The loss family: name -> pure function, and what it needs of data, batch and reference.

In: a View of a batch. Out: the loss of every item and its weight. Next: pairwise.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from favor.data.types import Batch
from favor.losses import baselines, pairwise, ranking, reference_free, reward, unpaired
from favor.losses.config import COUPLED, OPTIONS, LossConfig, LossName
from favor.losses.view import Scored, View

__all__ = [
    "COUPLED",
    "LOSSES",
    "OPTIONS",
    "Loss",
    "LossConfig",
    "LossName",
    "Scored",
    "View",
    "item_weight",
    "term_losses",
    "term_sums",
]

Items = Literal["pairs", "pairs_and_ties", "rankings", "thumbs"]


@dataclass(frozen=True)
class Loss:
    """`per_item(view)` -> (loss, weight) of every item.

    items: what it is a mean over.
    reference: whether it reads log ref. zero: whether it reads KTO's z0. labels, margins: whether it reads soft labels,
    and needs margins.
    """

    items: Items
    per_item: Callable[[View], tuple[Tensor, Tensor]]
    reference: bool = True
    zero: bool = False
    labels: bool = False
    margins: bool = False


def term_losses(config: LossConfig, scored: Scored, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """(loss, weight) of every item of every term of [loss]; differentiable in scored.pi_R (and pi_M). float64."""
    return [LOSSES[term.name].per_item(View(scored, batch, term)) for term in config.terms]


def term_sums(config: LossConfig, scored: Scored, batch: Batch) -> Tensor:
    """Every term's loss summed over its items, times the term's weight: float64 [terms]."""
    found = zip(config.terms, term_losses(config, scored, batch), strict=True)
    return torch.stack([term.weight * (item * weight).sum() for term, (item, weight) in found])


def item_weight(config: LossConfig, batch: Batch) -> list[float]:
    """Summed weight of the items of every term: what the global batch's loss is divided by."""
    pairs, ties = float(batch.weight_P.double().sum()), float(batch.weight_U.double().sum())
    found = {
        "pairs": pairs,
        "pairs_and_ties": pairs + ties,
        "rankings": float(batch.weight_Q.double().sum()),
        "thumbs": float(batch.weight_I.double().sum()) + 2 * pairs,
    }
    return [found[LOSSES[term.name].items] for term in config.terms]


def _gap(loss: Callable[[Tensor, View], Tensor]) -> Callable[[View], tuple[Tensor, Tensor]]:
    """A loss of h alone."""
    return lambda v: (loss(v.gap_P, v) * v.trust_P, v.batch.weight_P)


def _sides(loss: Callable[[Tensor, Tensor, View], Tensor]) -> Callable[[View], tuple[Tensor, Tensor]]:
    """A loss of the chosen's and the rejected's log-ratio."""
    return lambda v: (loss(*v.sides, v) * v.trust_P, v.batch.weight_P)


def _likelihoods(
    loss: Callable[[Tensor, Tensor, View], Tensor], *, mean: bool
) -> Callable[[View], tuple[Tensor, Tensor]]:
    """A loss of log pi of both sides, without a reference: sums or means over tokens."""

    def per_item(view: View) -> tuple[Tensor, Tensor]:
        logp_R = view.mean_R if mean else view.scored.pi_R
        item = loss(logp_R[view.batch.chosen_P], logp_R[view.batch.rejected_P], view)
        return item * view.trust_P, view.batch.weight_P

    return per_item


def _with_ties(
    win: Callable[[Tensor, LossConfig], Tensor], tie: Callable[[Tensor, LossConfig], Tensor]
) -> Callable[[View], tuple[Tensor, Tensor]]:
    def per_item(view: View) -> tuple[Tensor, Tensor]:
        batch, ratio_R = view.batch, view.ratio_R
        gap_U = ratio_R[batch.tie_U2[:, 0]] - ratio_R[batch.tie_U2[:, 1]]
        item = torch.cat([win(view.gap_P, view.config) * view.trust_P, tie(gap_U, view.config)])
        return item, torch.cat([batch.weight_P, batch.weight_U])

    return per_item


def _kto(view: View) -> tuple[Tensor, Tensor]:
    response_I, good_I, weight_I = view.thumbs
    weights = (view.config.desirable_weight, view.config.undesirable_weight)
    return unpaired.kto(view.ratio_R[response_I], good_I, view.config.beta, view.scored.zero, weights), weight_I


def _bco(view: View) -> tuple[Tensor, Tensor]:
    response_I, good_I, weight_I = view.thumbs
    return unpaired.bco(view.ratio_R[response_I], good_I, weight_I, view.config.beta), weight_I


def _aot(view: View) -> tuple[Tensor, Tensor]:
    batch = view.batch
    scale_R = batch.length_R if view.config.length_normalized else torch.ones_like(batch.length_R)
    pi_R, ref_R = view.scored.pi_R / scale_R, view.scored.ref_R / scale_R
    upper, lower = (logp_R[batch.chosen_P] - logp_R[batch.rejected_P] for logp_R in (pi_R, ref_R))
    return unpaired.aot(upper, batch.weight_P, lower, batch.weight_P, view.config.beta)


def _aot_unpaired(view: View) -> tuple[Tensor, Tensor]:
    response_I, good_I, weight_I = view.thumbs
    if good_I.all() or not good_I.any():
        # nothing to dominate: no loss, with a gradient of 0
        return view.ratio_R[response_I] * 0, weight_I
    ratio_I = view.ratio_R[response_I]
    item_C, mass_C = unpaired.aot(
        ratio_I[good_I], weight_I[good_I], ratio_I[~good_I], weight_I[~good_I], view.config.beta
    )
    # the mass is that of the good thumbs; items are counted over all
    return item_C, mass_C * (weight_I.double().sum() / mass_C.sum())


def _rankings(loss: Callable[[View], Tensor]) -> Callable[[View], tuple[Tensor, Tensor]]:
    return lambda v: (loss(v), v.batch.weight_Q)


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss("pairs", _gap(lambda h, v: pairwise.sigmoid(h, v.config.beta, v.batch.label_P)), labels=True),
    "cdpo": Loss("pairs", _gap(lambda h, v: pairwise.cdpo(h, v.config.beta, v.config.label_smoothing))),
    "robust": Loss("pairs", _gap(lambda h, v: pairwise.robust(h, v.config.beta, v.config.label_smoothing))),
    "hinge": Loss("pairs", _gap(lambda h, v: pairwise.hinge(h, v.config.beta))),
    "ipo": Loss("pairs", _gap(lambda h, v: pairwise.ipo(h, v.config.beta))),
    "exo": Loss("pairs", _gap(lambda h, v: pairwise.exo(h, v.config.beta, v.config.label_smoothing))),
    "discopop": Loss("pairs", _gap(lambda h, v: pairwise.discopop(h, v.config.beta, v.config.discopop_tau))),
    "odpo": Loss(
        "pairs",
        _gap(
            lambda h, v: pairwise.odpo(
                h, v.config.beta, v.batch.margin_P.double(), v.config.offset_scale, log=v.config.offset == "log"
            )
        ),
        margins=True,
    ),
    "rao_kupper": Loss(
        "pairs_and_ties",
        _with_ties(
            lambda h, c: reward.bradley_terry(c.beta * h, torch.full_like(h, c.tie_width)),
            lambda h, c: reward.rao_kupper_tie(c.beta * h, c.tie_width),
        ),
    ),
    "davidson": Loss(
        "pairs_and_ties",
        _with_ties(
            lambda h, c: pairwise.davidson_win(h, c.beta, c.tie_nu),
            lambda h, c: pairwise.davidson_tie(h, c.beta, c.tie_nu),
        ),
    ),
    "dpop": Loss("pairs", _sides(lambda w, r, v: pairwise.dpop(w, r, v.config.beta, v.config.dpop_lambda))),
    "sppo_hard": Loss("pairs", _sides(lambda w, r, v: pairwise.sppo_hard(w, r, v.config.beta))),
    "apo_zero": Loss("pairs", _sides(lambda w, r, v: pairwise.apo_zero(w, r, v.config.beta))),
    "apo_down": Loss("pairs", _sides(lambda w, r, v: pairwise.apo_down(w, r, v.config.beta))),
    "aot": Loss("pairs", _aot),
    "aot_unpaired": Loss("thumbs", _aot_unpaired),
    "nca": Loss(
        "rankings",
        _rankings(
            lambda v: ranking.nca(
                v.ratio_R, v.batch.ranking_QK, v.batch.drop_QK, v.config.beta, v.config.score_temperature
            )
        ),
    ),
    "plackett_luce": Loss(
        "rankings",
        _rankings(lambda v: ranking.plackett_luce(v.ratio_R, v.batch.ranking_QK, v.config.beta, v.config.top_k)),
    ),
    "kto": Loss("thumbs", _kto, zero=True),
    "bco": Loss("thumbs", _bco),
    "simpo": Loss(
        "pairs",
        _likelihoods(lambda w, r, v: reference_free.simpo(w, r, v.config.beta, v.config.gamma), mean=True),
        reference=False,
    ),
    "cpo": Loss(
        "pairs",
        _likelihoods(lambda w, r, v: reference_free.cpo(w, r, v.config.beta, v.config.nll_weight), mean=False),
        reference=False,
    ),
    "orpo": Loss(
        "pairs", _likelihoods(lambda w, r, v: reference_free.orpo(w, r, v.config.beta), mean=True), reference=False
    ),
    "sft": Loss("pairs", _likelihoods(lambda w, r, v: reference_free.sft(w), mean=True), reference=False),
    "preferred_ft": Loss("pairs", _sides(lambda w, r, v: baselines.preferred_ft(w))),
    "unlikelihood": Loss("pairs", _sides(lambda w, r, v: baselines.unlikelihood(w, r, v.config.alpha))),
}
