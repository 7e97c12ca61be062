"""Losses of a pair, as functions of h, the gap of log-ratios: pure, per item, no model in sight.

In: h_P = (log pi/ref)(chosen) - (log pi/ref)(rejected), nats, summed over tokens. Out: loss_P.
`dpo_loss` is the same loss in the article's signature. Next: ../train/step.py.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid(h_P: Tensor, beta: float) -> Tensor:
    """DPO: -log sigmoid(beta h). Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

    Gradient in h: -beta sigmoid(-beta h) (eq. 8): large where the implicit reward orders the pair wrongly.
    Worked number: beta 0.1, h 0.2 -> 0.683197; h 0 -> ln 2 = 0.693147.
    """
    return -logsigmoid(beta * h_P)


def cdpo(h_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Conservative DPO: -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h). Mitchell 2023, "A note on DPO with noisy preferences".

    e is the assumed share of flipped labels; the minimum lies where sigmoid(beta h) = 1 - e.
    Worked number: beta 0.1, h 0.2, e 0.1 -> 0.685197.
    """
    return -(1 - label_smoothing) * logsigmoid(beta * h_P) - label_smoothing * logsigmoid(-beta * h_P)


def ipo(h_P: Tensor, beta: float) -> Tensor:
    """IPO: (h - 1/(2 beta))^2. Azar et al. 2023, arXiv 2310.12036, eq. 17 (their tau is beta).

    h is of per-sequence sums, as in the paper; some code bases average over tokens instead: option
    `length_normalized`. Worked number: beta 0.1, h 0.2 -> 23.04; h 0 -> 25.
    """
    return (h_P - 1 / (2 * beta)) ** 2


def hinge(h_P: Tensor, beta: float) -> Tensor:
    """Hinge: max(0, 1 - beta h). SLiC, Zhao et al. 2023, arXiv 2305.10425; RSO, Liu et al. 2023, arXiv 2309.06657.

    Worked number: beta 0.1, h 0.2 -> 0.98; h 0 -> 1; zero from h = 1/beta on.
    """
    return (1 - beta * h_P).clamp_min(0)


def dpo_loss(
    pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """DPO in the signature of the source article.

    pi_logps, ref_logps: float [R], nats summed over each response's tokens; yw_idxs, yl_idxs: int64 [P],
    indices of the preferred and the dispreferred response of each pair. Returns (losses [P], rewards
    [R] = beta (log pi - log ref), detached). Worked number: pi (-0.2, -0.8), ref (-0.3, -0.7), beta 0.1: 0.683197.
    """
    log_ratio_R = pi_logps - ref_logps
    losses_P = sigmoid(log_ratio_R[yw_idxs] - log_ratio_R[yl_idxs], beta)
    return losses_P, (beta * log_ratio_R).detach()
