"""Losses of a pair: pure, per item, no model in sight.

In, by the parameter's name, made in view.py (h_P in gap_P): h_P = (log pi/ref)(chosen) - (log pi/ref)(rejected); chosen_P,
rejected_P = log pi/ref of either side; logp_..._P = log pi, mean_..._P = log pi / length; all float64 [P], nats. Out: loss_P.
Annotated parameters are settings of [loss] (table.py). `dpo_loss` is DPO in the article's signature. Next: ../train/step.py.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

Beta = Annotated[float, Field(gt=0, le=1e6, description="Temperature, 1/nats: larger stays closer to the reference.")]
Flipped = Annotated[
    float, Field(ge=0, lt=0.5, description="Share of the preferences assumed to be the wrong way round.")
]
SomeFlipped = Annotated[
    float, Field(gt=0, lt=0.5, description="Share of the preferences assumed to be the wrong way round.")
]
Tau = Annotated[float, Field(gt=0, description="Width of the switch between its two losses.")]
Offset = Annotated[
    Literal["log", "linear"], Field(description="Whether the offset is the margin's logarithm or itself.")
]
Scale = Annotated[float, Field(gt=0, description="What the offset is multiplied by.")]
Lambda = Annotated[float, Field(gt=0, description="What a chosen response below the reference costs.")]
TieWidth = Annotated[float, Field(gt=0, description="How wide a gap of rewards still counts as a tie, ln theta.")]
TieNu = Annotated[float, Field(gt=0, description="How common ties are: nu/(2 + nu) between equal responses.")]
Alpha = Annotated[float, Field(ge=0, le=1, description="How strongly the rejected response is pushed down.")]
Gamma = Annotated[float, Field(ge=0, description="The margin by which the chosen response must win.")]
NllWeight = Annotated[float, Field(ge=0, description="Weight of -log pi(chosen).")]


def sigmoid(h_P: Tensor, beta: Beta = 0.1, label_P: Tensor | float = 1.0) -> Tensor:
    """DPO: -log sigmoid(beta h). Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

    Gradient in h: -beta sigmoid(-beta h) (eq. 8): large where the implicit reward orders the pair wrongly.
    label_P, a soft label: the probability p that the order is right, -p log sigmoid(beta h) - (1-p) log sigmoid(-beta h).
    Worked number: beta 0.1, h 0.2 -> 0.683197; h 0 -> ln 2 = 0.693147; p 0.75, h 2 -> 0.648139.
    """
    # logsigmoid, not log of sigmoid: at beta h = -200 the latter is -inf and has no gradient
    return -label_P * logsigmoid(beta * h_P) - (1 - label_P) * logsigmoid(-beta * h_P)


def cdpo(h_P: Tensor, beta: Beta = 0.1, label_smoothing: Flipped = 0.1) -> Tensor:
    """Conservative DPO: -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h). Mitchell 2023, "A note on DPO with noisy preferences".

    e is the assumed share of flipped labels; the minimum lies where sigmoid(beta h) = 1 - e.
    Worked number: beta 0.1, h 0.2, e 0.1 -> 0.685197.
    """
    return sigmoid(h_P, beta, 1 - label_smoothing)


def robust(h_P: Tensor, beta: Beta = 0.1, label_smoothing: Flipped = 0.1) -> Tensor:
    """Robust DPO: [-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1-2e). Chowdhury et al. 2024, arXiv 2403.00409.

    Unbiased for the clean loss when a share e of the labels is flipped. Worked number: beta 0.1, h 0.2, e 0.1 -> 0.680697.
    """
    right, flipped = logsigmoid(beta * h_P), logsigmoid(-beta * h_P)
    # the mean of this over labels flipped with probability e is -right: what the flips add is taken off again
    return -((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(h_P: Tensor, beta: Beta = 0.1) -> Tensor:
    """IPO: (h - 1/(2 beta))^2. Azar et al. 2023, arXiv 2310.12036, eq. 17 (their tau is beta).

    h is of per-sequence sums, as in the paper; some code bases average over tokens instead: option
    `length_normalized`. Worked number: beta 0.1, h 0.2 -> 23.04; h 0 -> 25.
    """
    return (h_P - 1 / (2 * beta)) ** 2


def hinge(h_P: Tensor, beta: Beta = 0.1) -> Tensor:
    """Hinge: max(0, 1 - beta h). SLiC, Zhao et al. 2023, arXiv 2305.10425; RSO, Liu et al. 2023, arXiv 2309.06657.

    Worked number: beta 0.1, h 0.2 -> 0.98; h 0 -> 1; zero from h = 1/beta on.
    """
    return (1 - beta * h_P).clamp_min(0)


def exo(h_P: Tensor, beta: Beta = 0.1, label_smoothing: SomeFlipped = 0.1) -> Tensor:
    """EXO-pref: KL(p || q), p = (sigmoid(beta h), sigmoid(-beta h)), q = (1-e, e). Ji et al. 2024, arXiv 2402.00856.

    The reverse of cDPO's cross-entropy: mode-seeking. Worked number: beta 0.1, h 0, e 0.1 -> ln(5/3) = 0.510826.
    """
    p_P = (beta * h_P).sigmoid()
    # p log(p/q) of either side
    chosen_P = p_P * (logsigmoid(beta * h_P) - math.log1p(-label_smoothing))
    return chosen_P + (1 - p_P) * (logsigmoid(-beta * h_P) - math.log(label_smoothing))


def discopop(h_P: Tensor, beta: Beta = 0.1, discopop_tau: Tau = 0.05) -> Tensor:
    """DiscoPOP, the log-ratio modulated loss: (1-m)(-log sigmoid(beta h)) + m exp(-beta h) with

    m = sigmoid(beta h/discopop_tau). Lu et al. 2024, arXiv 2406.08414. Worked number: h 0 -> (ln 2 + 1)/2 = 0.846574.
    """
    x_P = beta * h_P
    # m exp(-x) in logarithms: far out one factor overflows while the other vanishes
    return -(-x_P / discopop_tau).sigmoid() * logsigmoid(x_P) + (logsigmoid(x_P / discopop_tau) - x_P).exp()


def odpo(h_P: Tensor, margin_P: Tensor, beta: Beta = 0.1, offset: Offset = "log", offset_scale: Scale = 1.0) -> Tensor:
    """DPO with an offset: -log sigmoid(beta h - offset_scale f(margin)), f the logarithm or the identity.

    Amini et al. 2024, arXiv 2402.10571. margin_P: by how much the data scores chosen above rejected, > 0.
    Worked number: margin e, scale 1, h 0 -> 1.313262.
    """
    return -logsigmoid(beta * h_P - offset_scale * (margin_P.log() if offset == "log" else margin_P))


def dpop(chosen_P: Tensor, rejected_P: Tensor, beta: Beta = 0.1, dpop_lambda: Lambda = 50.0) -> Tensor:
    """DPO-positive: -log sigmoid(beta (h - dpop_lambda max(0, -chosen))). Pal et al. 2024, arXiv 2402.13228.

    chosen, rejected: log pi/ref, nats. The penalty acts when chosen falls below the reference.
    Worked number: beta 0.1, chosen -1, rejected -3, dpop_lambda 5 -> 0.854355.
    """
    return -logsigmoid(beta * (chosen_P - rejected_P - dpop_lambda * (-chosen_P).clamp_min(0)))


def sppo_hard(chosen_P: Tensor, rejected_P: Tensor, beta: Beta = 0.1) -> Tensor:
    """SPPO with hard labels: (chosen - 1/(2 beta))^2 + (rejected + 1/(2 beta))^2. Wu et al. 2024, arXiv 2405.00675 (eta = 1/beta).

    chosen, rejected: log pi/ref, nats. Worked number: beta 0.1, both 0 -> 50.
    """
    return (chosen_P - 1 / (2 * beta)) ** 2 + (rejected_P + 1 / (2 * beta)) ** 2


def apo_zero(chosen_P: Tensor, rejected_P: Tensor, beta: Beta = 0.1) -> Tensor:
    """APO-zero: 1 - sigmoid(beta chosen) + sigmoid(beta rejected): chosen up, rejected down.

    D'Oosterlinck et al. 2024, arXiv 2408.06266. Worked number: both 0 -> 1.
    """
    return 1 - (beta * chosen_P).sigmoid() + (beta * rejected_P).sigmoid()


def apo_down(chosen_P: Tensor, rejected_P: Tensor, beta: Beta = 0.1) -> Tensor:
    """APO-down: sigmoid(beta chosen) + 1 - sigmoid(beta h): both down, rejected more. D'Oosterlinck et al. 2024, arXiv 2408.06266.

    Worked number: both 0 -> 1.
    """
    return (beta * chosen_P).sigmoid() + 1 - (beta * (chosen_P - rejected_P)).sigmoid()


def rao_kupper(h_P: Tensor, h_U: Tensor, beta: Beta = 0.1, tie_width: TieWidth = 0.5) -> Tensor:
    """DPO with ties, Rao & Kupper 1967; Chen et al. 2024, arXiv 2409.17431: losses of pairs won and of ties [P + U].

    Win: -log sigmoid(beta h - a); tie: rao_kupper_tie of beta h, a = tie_width.
    """
    return torch.cat(
        [bradley_terry(beta * h_P, torch.full_like(h_P, tie_width)), rao_kupper_tie(beta * h_U, tie_width)]
    )


def davidson(h_P: Tensor, h_U: Tensor, beta: Beta = 0.1, tie_nu: TieNu = 1.0) -> Tensor:
    """DPO with ties, Davidson 1970; Chen et al. 2024, arXiv 2409.17431: losses of pairs won and of ties [P + U].

    -log P(win) = log(1 + e^-d + nu e^(-d/2)), d = beta h; -log P(tie) = the same + d/2 - log nu. Nu 0 is DPO.
    Worked number: nu 1, d 0 -> ln 3 for both.
    """
    # three outcomes with weights e^(d/2), e^(-d/2) and nu, here over the first: 1, e^-d and nu e^(-d/2)
    d = beta * torch.cat([h_P, h_U])
    win = torch.stack([torch.zeros_like(d), -d, math.log(tie_nu) - d / 2]).logsumexp(0)
    is_tie = torch.arange(len(d), device=d.device) >= len(h_P)
    return torch.where(is_tie, win + d / 2 - math.log(tie_nu), win)


def preferred_ft(chosen_P: Tensor) -> Tensor:
    """Preferred-FT: -log pi(y_w|x), less the constant -log ref(y_w|x): 0 at the start. arXiv 2305.18290, section 6."""
    return -chosen_P


def unlikelihood(chosen_P: Tensor, rejected_P: Tensor, alpha: Alpha = 0.5) -> Tensor:
    """-(log pi(y_w|x) - alpha log pi(y_l|x)), less the reference's constants. arXiv 2305.18290, section 6; Welleck et al. 2019.

    It has no floor: alpha = 1 drives log pi(y_l) to minus infinity, which is the paper's point.
    """
    return alpha * rejected_P - chosen_P


def simpo(mean_chosen_P: Tensor, mean_rejected_P: Tensor, beta: Beta = 0.1, gamma: Gamma = 0.5) -> Tensor:
    """SimPO: -log s(beta (chosen - rejected) - gamma), both *means* over tokens. Meng et al. 2024, arXiv 2405.14734, eq. 6.

    Worked number: beta 2, gamma 0.5, chosen -1, rejected -1.25 -> ln 2.
    """
    return -logsigmoid(beta * (mean_chosen_P - mean_rejected_P) - gamma)


def cpo(logp_chosen_P: Tensor, logp_rejected_P: Tensor, beta: Beta = 0.1, nll_weight: NllWeight = 1.0) -> Tensor:
    """CPO: -log s(beta (chosen - rejected)) - nll_weight chosen, both *sums* over tokens. Xu et al. 2024, arXiv 2401.08417, eq. 5.

    Worked number: beta 0.1, chosen -4, rejected -6 -> 0.598139 + 4.
    """
    return sigmoid(logp_chosen_P - logp_rejected_P, beta) - nll_weight * logp_chosen_P


def orpo(mean_chosen_P: Tensor, mean_rejected_P: Tensor, beta: Beta = 0.1) -> Tensor:
    """ORPO: -chosen - beta log s(log odds(chosen) - log odds(rejected)), odds(y) = p/(1-p), p = e^mean.

    Hong et al. 2024, arXiv 2403.07691. chosen, rejected: *means* over tokens; beta is the paper's lambda.
    Worked number: equal sides at mean -1 -> 1 + beta ln 2.
    """
    return -mean_chosen_P - beta * logsigmoid(_log_odds(mean_chosen_P) - _log_odds(mean_rejected_P))


def _log_odds(mean_P: Tensor) -> Tensor:
    # a response of probability 1 has infinite odds and no gradient: hold it just below
    below_P = mean_P.clamp_max(-1e-12)
    return below_P - (-below_P.expm1()).log()


def sft(mean_chosen_P: Tensor) -> Tensor:
    """-log pi(y_w)/|y_w|. RPO's added term, Pang et al. 2024, arXiv 2404.19733, eq. 2."""
    return -mean_chosen_P


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


def bradley_terry(gap_P: Tensor, margin_P: Tensor) -> Tensor:
    """-log sigmoid(gap - m), gap = r_w - r_l. Bradley & Terry 1952; the margin m of Llama 2, arXiv 2307.09288, eq. 2.

    With m = ln theta it is -log P(w beats l) where ties are possible (Rao & Kupper 1967).
    Worked number: gap 1, margin 0 -> 0.313262; gap 0 -> ln 2.
    """
    return -logsigmoid(gap_P - margin_P)


def rao_kupper_tie(gap_U: Tensor, tie_width: float) -> Tensor:
    """-log P(tie) = -log[1 - sigmoid(gap - a) - sigmoid(-gap - a)], a = ln theta > 0. Rao & Kupper 1967.

    P(tie) = (theta^2 - 1) sigmoid(gap - a) sigmoid(-gap - a), smallest loss at gap 0.
    Worked number: a = ln 3, gap 0 -> P = 8/16, loss ln 2.
    """
    return -(math.log(math.expm1(2 * tie_width)) + logsigmoid(gap_U - tie_width) + logsigmoid(-gap_U - tie_width))


def centering(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """(r_w + r_l)^2: holds scores around zero, which no comparison fixes. Eisenstein et al. 2023, arXiv 2312.09244."""
    return (chosen_P + rejected_P) ** 2
