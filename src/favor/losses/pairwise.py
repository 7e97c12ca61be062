"""Losses of a pair, as functions of h, the gap of log-ratios: pure, per item, no model in sight.

In: h_P = (log pi/ref)(chosen) - (log pi/ref)(rejected), nats, summed over tokens. Out: loss_P.
`dpo_loss` is the same loss in the article's signature. Next: ../train/step.py.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid(h_P: Tensor, beta: float, label_P: Tensor | float = 1.0) -> Tensor:
    """DPO: -log sigmoid(beta h). Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

    Gradient in h: -beta sigmoid(-beta h) (eq. 8): large where the implicit reward orders the pair wrongly.
    label_P, a soft label: the probability p that the order is right, -p log sigmoid(beta h) - (1-p) log sigmoid(-beta h).
    Worked number: beta 0.1, h 0.2 -> 0.683197; h 0 -> ln 2 = 0.693147; p 0.75, h 2 -> 0.648139.
    """
    return -label_P * logsigmoid(beta * h_P) - (1 - label_P) * logsigmoid(-beta * h_P)


def cdpo(h_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Conservative DPO: -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h). Mitchell 2023, "A note on DPO with noisy preferences".

    e is the assumed share of flipped labels; the minimum lies where sigmoid(beta h) = 1 - e.
    Worked number: beta 0.1, h 0.2, e 0.1 -> 0.685197.
    """
    return sigmoid(h_P, beta, 1 - label_smoothing)


def robust(h_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: [-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1-2e). Chowdhury et al. 2024, arXiv 2403.00409.

    Unbiased for the clean loss when a share e of the labels is flipped. Worked number: beta 0.1, h 0.2, e 0.1 -> 0.680697.
    """
    right, flipped = logsigmoid(beta * h_P), logsigmoid(-beta * h_P)
    return -((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


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


def exo(h_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """EXO-pref: KL(p || q), p = (sigmoid(beta h), sigmoid(-beta h)), q = (1-e, e). Ji et al. 2024, arXiv 2402.00856.

    The reverse of cDPO's cross-entropy: mode-seeking. Worked number: beta 0.1, h 0, e 0.1 -> ln(5/3) = 0.510826.
    """
    p_P = (beta * h_P).sigmoid()
    chosen_P = p_P * (logsigmoid(beta * h_P) - math.log1p(-label_smoothing))
    return chosen_P + (1 - p_P) * (logsigmoid(-beta * h_P) - math.log(label_smoothing))


def discopop(h_P: Tensor, beta: float, tau: float) -> Tensor:
    """DiscoPOP, the log-ratio modulated loss: (1-m)(-log sigmoid(beta h)) + m exp(-beta h), m = sigmoid(beta h/tau).

    Lu et al. 2024, arXiv 2406.08414. Worked number: h 0 -> (ln 2 + 1)/2 = 0.846574.
    """
    x_P = beta * h_P
    # m exp(-x) in logarithms: far out one factor overflows while the other vanishes
    return -(-x_P / tau).sigmoid() * logsigmoid(x_P) + (logsigmoid(x_P / tau) - x_P).exp()


def odpo(h_P: Tensor, beta: float, margin_P: Tensor, scale: float, *, log: bool) -> Tensor:
    """DPO with an offset: -log sigmoid(beta h - scale f(margin)), f the logarithm or the identity.

    Amini et al. 2024, arXiv 2402.10571. margin_P: by how much the data scores chosen above rejected, > 0.
    Worked number: margin e, scale 1, h 0 -> 1.313262.
    """
    return -logsigmoid(beta * h_P - scale * (margin_P.log() if log else margin_P))


def dpop(chosen_P: Tensor, rejected_P: Tensor, beta: float, penalty: float) -> Tensor:
    """DPO-positive: -log sigmoid(beta (h - penalty max(0, -chosen))). Pal et al. 2024, arXiv 2402.13228.

    chosen, rejected: log pi/ref, nats. The penalty acts when chosen falls below the reference.
    Worked number: beta 0.1, chosen -1, rejected -3, penalty 5 -> 0.854355.
    """
    return -logsigmoid(beta * (chosen_P - rejected_P - penalty * (-chosen_P).clamp_min(0)))


def sppo_hard(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """SPPO with hard labels: (chosen - 1/(2 beta))^2 + (rejected + 1/(2 beta))^2. Wu et al. 2024, arXiv 2405.00675 (eta = 1/beta).

    chosen, rejected: log pi/ref, nats. Worked number: beta 0.1, both 0 -> 50.
    """
    return (chosen_P - 1 / (2 * beta)) ** 2 + (rejected_P + 1 / (2 * beta)) ** 2


def apo_zero(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """APO-zero: 1 - sigmoid(beta chosen) + sigmoid(beta rejected): chosen up, rejected down.

    D'Oosterlinck et al. 2024, arXiv 2408.06266. Worked number: both 0 -> 1.
    """
    return 1 - (beta * chosen_P).sigmoid() + (beta * rejected_P).sigmoid()


def apo_down(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """APO-down: sigmoid(beta chosen) + 1 - sigmoid(beta h): both down, rejected more. D'Oosterlinck et al. 2024, arXiv 2408.06266.

    Worked number: both 0 -> 1.
    """
    return (beta * chosen_P).sigmoid() + 1 - (beta * (chosen_P - rejected_P)).sigmoid()


def davidson_win(h_P: Tensor, beta: float, nu: float) -> Tensor:
    """-log P(win) = log(1 + e^-d + nu e^(-d/2)), d = beta h. Davidson 1970; Chen et al. 2024, arXiv 2409.17431. Nu 0 is DPO.

    Worked number: nu 1, d 0 -> ln 3.
    """
    d_P = beta * h_P
    return torch.stack([torch.zeros_like(d_P), -d_P, math.log(nu) - d_P / 2]).logsumexp(0)


def davidson_tie(h_U: Tensor, beta: float, nu: float) -> Tensor:
    """-log P(tie) = davidson_win + d/2 - log nu: smallest at d = 0. Worked number: nu 1, d 0 -> ln 3."""
    return davidson_win(h_U, beta, nu) + beta * h_U / 2 - math.log(nu)


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
