"""Divergences between policy and reference: DPO's implicit reward is beta f'(pi/ref) up to a constant of the prompt.

In: l = log pi/ref of a response, nats. Out: f'(e^l) - f'(1). Wang et al. 2023, arXiv 2309.16240, table 1. Next: view.py.
"""

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import logsigmoid


def reverse_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    """KL(pi || ref), DPO's own: f'(u) = log u + 1, so l. Worked number: l = 0.5 -> 0.5."""
    del alpha
    return log_ratio


def forward_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    """KL(ref || pi): f'(u) = -1/u, so 1 - e^-l. Worked number: l = 0.5 -> 0.393469."""
    del alpha
    return -(-log_ratio).expm1()


def jensen_shannon(log_ratio: Tensor, alpha: float) -> Tensor:
    """f'(u) = log(2u/(1 + u)), so l + ln 2 - log(1 + e^l). Worked number: l = 0.5 -> 0.219070."""
    del alpha
    return log_ratio + math.log(2) + logsigmoid(-log_ratio)


def alpha_divergence(log_ratio: Tensor, alpha: float) -> Tensor:
    """f'(u) = (1 - u^-alpha)/alpha: reverse KL for alpha -> 0, forward KL at 1.

    Worked number: alpha 0.5, l = 0.5 -> 0.442398.
    """
    return -(-alpha * log_ratio).expm1() / alpha


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jensen_shannon": jensen_shannon,
    "alpha": alpha_divergence,
}
