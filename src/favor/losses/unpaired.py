"""Losses of responses judged one by one, and of whole batches: KTO, BCO, AOT.

In: log-ratios log pi/ref, nats, summed over tokens, of responses with a thumb up or down. Out: loss per item.
BCO and AOT compare a response with the whole optimizer batch: they need all of it at once. Next: ../train/step.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from favor.losses.pairwise import sigmoid


def kto(ratio_I: Tensor, good_I: Tensor, beta: float, zero: float, weights: tuple[float, float]) -> Tensor:
    """KTO: w_D (1 - s(beta (r - z0))) where good, w_U (1 - s(beta (z0 - r))) where bad.

    r = log pi/ref; zero is z0 = max(0, KL(pi || ref)), estimated on mismatched prompts and responses of the whole
    optimizer batch and taken as a constant. Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8.
    Worked number: at pi = ref with weights 1 -> 0.5.
    """
    good, bad = weights
    return torch.where(
        good_I, good * (1 - (beta * (ratio_I - zero)).sigmoid()), bad * (1 - (beta * (zero - ratio_I)).sigmoid())
    )


def bco(ratio_I: Tensor, good_I: Tensor, weight_I: Tensor, beta: float) -> Tensor:
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
    """The monotone coupling: quantile with quantile. Weights of equal sum; with equal weights it pairs the sorted values."""
    order_a, order_b = a.detach().argsort(stable=True), b.detach().argsort(stable=True)
    end_a, end_b = weight_a[order_a].double().cumsum(0), weight_b[order_b].double().cumsum(0)
    total = end_a[-1]
    end_b = end_b * (total / end_b[-1])
    cuts = torch.cat([end_a, end_b]).sort().values
    mass = cuts.diff(prepend=cuts.new_zeros(1))
    middle = cuts - mass / 2
    keep = mass > 1e-9 * total
    at_a = torch.searchsorted(end_a, middle[keep]).clamp_max(a.shape[0] - 1)
    at_b = torch.searchsorted(end_b, middle[keep]).clamp_max(b.shape[0] - 1)
    return Coupling(a[order_a[at_a]], b[order_b[at_b]], mass[keep])


def aot(upper: Tensor, weight_upper: Tensor, lower: Tensor, weight_lower: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """AOT: `upper` shall dominate `lower` stochastically, quantile by quantile: DPO's loss of the sorted difference.

    Paired: upper = log pi(y_w)/pi(y_l), lower = log ref(y_w)/ref(y_l). Unpaired: upper = log pi/ref of the good, lower
    of the bad. Melnyk et al. 2024, arXiv 2406.05882. Sorted over the whole optimizer batch. Returns (loss, mass) of
    every matched pair of quantiles. Worked number: upper (0, 4), lower (2, -2), beta 0.5 -> 0.313262 both.
    """
    pairs = coupling(upper, weight_upper, lower, weight_lower)
    return sigmoid(pairs.a_C - pairs.b_C, beta), pairs.mass_C
