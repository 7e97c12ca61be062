"""Losses of what is not a pair: rankings, responses rated one by one (thumbs), and whole batches.

In: log-ratios log pi/ref, float64, nats, summed over tokens; rankings as index rows. Out: loss per item.
BCO and AOT compare a response with the whole optimizer batch: they need all of it at once. Next: ../train/step.py.
"""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from favor.losses.pairwise import Beta, sigmoid

TopK = Annotated[int | None, Field(ge=1, description="Only the first N places count; absent: all.")]
Temperature = Annotated[float, Field(gt=0, description="Temperature of the softmax over the data's scores.")]
GoodWeight = Annotated[float, Field(gt=0, description="Weight of responses rated good.")]
BadWeight = Annotated[float, Field(gt=0, description="Weight of responses rated bad.")]


def plackett_luce(ratio_R: Tensor, ranking_QK: Tensor, beta: Beta = 0.1, top_k: TopK = None) -> Tensor:
    """Plackett-Luce DPO: -sum_{k<K} [ r_k - logsumexp_{j>=k} r_j ], r = beta log pi/ref. arXiv 2305.18290, appendix A.3.

    ratio_R: nats, summed over tokens. ranking_QK: int64, best first, padded with -1 (rankings may
    differ in length). top_k: only the first k places count; who is among the others is all that matters of them.
    Returns loss [Q], nats. K = 2 is DPO; at pi = ref it is ln K!, ln K with top_k 1.
    Worked number: r = (0, 0, 0) -> ln 6 = 1.791759.
    """
    real_QK = ranking_QK >= 0
    reward_QK = beta * ratio_R[ranking_QK.clamp_min(0)]
    # a finite floor, not -inf: the log-sum-exp of nothing would have no gradient
    masked_QK = reward_QK.masked_fill(~real_QK, torch.finfo(reward_QK.dtype).min)
    tail_QK = masked_QK.flip(1).logcumsumexp(1).flip(1)
    stage_QK = (tail_QK - reward_QK).masked_fill(~real_QK, 0.0)
    return stage_QK.sum(1) if top_k is None else stage_QK[:, :top_k].sum(1)


def nca(
    ratio_R: Tensor, ranking_QK: Tensor, drop_QK: Tensor, beta: Beta = 0.1, score_temperature: Temperature = 1.0
) -> Tensor:
    """NCA: -sum_k [ w_k log s(r_k) + (1/K) log s(-r_k) ], r = beta log pi/ref. Chen et al. 2024, arXiv 2402.05369.

    w = softmax(score/score_temperature) where the data has scores (drop_QK: how far each lies below the best), else all
    weight on the best. K = 2 without scores is NCA-preference. Worked number: K 2, r = (0, 0) -> 2 ln 2.
    """
    real_QK = ranking_QK >= 0
    reward_QK = beta * ratio_R[ranking_QK.clamp_min(0)]
    share_QK = (-drop_QK.to(reward_QK.dtype) / score_temperature).masked_fill(~real_QK, -torch.inf).softmax(1)
    best_QK = torch.zeros_like(share_QK)
    best_QK[:, 0] = 1
    scored_Q1 = (drop_QK > 0).any(1, keepdim=True)
    share_QK = torch.where(scored_Q1, share_QK, best_QK)
    count_Q1 = real_QK.sum(1, keepdim=True)
    item_QK = share_QK * logsigmoid(reward_QK) + logsigmoid(-reward_QK) / count_Q1
    return -item_QK.masked_fill(~real_QK, 0.0).sum(1)


def kto(
    ratio_I: Tensor,
    good_I: Tensor,
    zero: float,
    beta: Beta = 0.1,
    desirable_weight: GoodWeight = 1.0,
    undesirable_weight: BadWeight = 1.0,
) -> Tensor:
    """KTO: w_D (1 - s(beta (r - z0))) where good, w_U (1 - s(beta (z0 - r))) where bad.

    r = log pi/ref; zero is z0 = max(0, KL(pi || ref)), estimated on mismatched prompts and responses of the whole
    optimizer batch and taken as a constant. Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8.
    Worked number: at pi = ref with weights 1 -> 0.5.
    """
    good_loss_I = desirable_weight * (1 - (beta * (ratio_I - zero)).sigmoid())
    return torch.where(good_I, good_loss_I, undesirable_weight * (1 - (beta * (zero - ratio_I)).sigmoid()))


def bco(ratio_I: Tensor, good_I: Tensor, weight_I: Tensor, beta: Beta = 0.1) -> Tensor:
    """BCO: -log s(beta r - d) where good, -log s(d - beta r) where bad.

    d, a constant, lies midway between the means of beta r over the good and over the bad: of the optimizer batch here,
    where the paper keeps a moving average. Jung et al. 2024, arXiv 2404.04656.
    Worked number: beta 1, good r = 1, bad r = -1 -> d = 0, loss 0.313262 each.
    """
    reward_I = beta * ratio_I
    sides = [_mean(reward_I.detach(), weight_I, mask_I) for mask_I in (good_I, ~good_I)]
    shift = torch.stack([side for side in sides if side is not None]).mean()
    return -logsigmoid(torch.where(good_I, reward_I - shift, shift - reward_I))


def _mean(value_I: Tensor, weight_I: Tensor, mask_I: Tensor) -> Tensor | None:
    weight = weight_I[mask_I].to(value_I.dtype)
    return (value_I[mask_I] * weight).sum() / weight.sum() if weight.numel() else None


class Coupling(NamedTuple):
    """Optimal transport between two weighted samples on the line: entry c moves mass_C[c] from a to b."""

    a_C: Tensor
    b_C: Tensor
    mass_C: Tensor


def coupling(a: Tensor, weight_a: Tensor, b: Tensor, weight_b: Tensor) -> Coupling:
    """The monotone coupling: quantile with quantile. With equal weights it pairs the sorted values.

    Weights of other sums are scaled to that of `weight_a`. Example: a (4, 0) of weights (1, 2) and b (-2, 2) of weights
    (1, 2). Sorted, a is 0 up to mass 2 and 4 up to 3; b is -2 up to 1 and 2 up to 3. Cut at 1, 2 and 3: pairs (0, -2),
    (0, 2) and (4, 2), each of mass 1.
    """
    order_a, order_b = a.detach().argsort(stable=True), b.detach().argsort(stable=True)
    end_a, end_b = weight_a[order_a].double().cumsum(0), weight_b[order_b].double().cumsum(0)
    total = end_a[-1]
    end_b = end_b * (total / end_b[-1])
    # a pair for every stretch of mass between two ends; its middle lies within one entry of a and one of b
    cuts = torch.cat([end_a, end_b]).sort().values
    mass = cuts.diff(prepend=cuts.new_zeros(1))
    middle = cuts - mass / 2
    # ends that coincide leave stretches of no mass
    keep = mass > 1e-9 * total
    at_a = torch.searchsorted(end_a, middle[keep]).clamp_max(a.shape[0] - 1)
    at_b = torch.searchsorted(end_b, middle[keep]).clamp_max(b.shape[0] - 1)
    return Coupling(a[order_a[at_a]], b[order_b[at_b]], mass[keep])


def dominance(
    upper: Tensor, weight_upper: Tensor, lower: Tensor, weight_lower: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """AOT: `upper` shall dominate `lower` stochastically, quantile by quantile: DPO's loss of the sorted difference.

    Melnyk et al. 2024, arXiv 2406.05882. Sorted over the whole optimizer batch. Returns (loss, mass) of
    every matched pair of quantiles. Worked number: upper (0, 4), lower (2, -2), beta 0.5 -> 0.313262 both.
    """
    pairs = coupling(upper, weight_upper, lower, weight_lower)
    return sigmoid(pairs.a_C - pairs.b_C, beta), pairs.mass_C


def aot(policy_gap_P: Tensor, reference_gap_P: Tensor, weight_P: Tensor, beta: Beta = 0.1) -> tuple[Tensor, Tensor]:
    """AOT of pairs: log pi(y_w)/pi(y_l) shall dominate log ref(y_w)/ref(y_l)."""
    return dominance(policy_gap_P, weight_P, reference_gap_P, weight_P, beta)


def aot_unpaired(ratio_I: Tensor, good_I: Tensor, weight_I: Tensor, beta: Beta = 0.1) -> tuple[Tensor, Tensor]:
    """AOT of thumbs: log pi/ref of the good shall dominate that of the bad; no loss where one of them is missing."""
    if good_I.all() or not good_I.any():
        return ratio_I * 0, weight_I
    item_C, mass_C = dominance(ratio_I[good_I], weight_I[good_I], ratio_I[~good_I], weight_I[~good_I], beta)
    # the mass is that of the good thumbs; items are counted over all
    return item_C, mass_C * (weight_I.double().sum() / mass_C.sum())
