"""Losses that need no reference model: SimPO, CPO, ORPO and the likelihood itself.

In: log pi of chosen and rejected, nats, summed over tokens or averaged, as each says. Out: loss_P. Next: ../train/step.py.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from favor.losses.pairwise import sigmoid


def simpo(chosen_P: Tensor, rejected_P: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO: -log s(beta (chosen - rejected) - gamma), both *means* over tokens. Meng et al. 2024, arXiv 2405.14734, eq. 6.

    Worked number: beta 2, gamma 0.5, chosen -1, rejected -1.25 -> ln 2.
    """
    return -logsigmoid(beta * (chosen_P - rejected_P) - gamma)


def cpo(chosen_P: Tensor, rejected_P: Tensor, beta: float, nll_weight: float) -> Tensor:
    """CPO: -log s(beta (chosen - rejected)) - nll_weight chosen, both *sums* over tokens. Xu et al. 2024, arXiv 2401.08417, eq. 5.

    Worked number: beta 0.1, chosen -4, rejected -6 -> 0.598139 + 4.
    """
    return sigmoid(chosen_P - rejected_P, beta) - nll_weight * chosen_P


def orpo(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """ORPO: -chosen - beta log s(log odds(chosen) - log odds(rejected)), odds(y) = p/(1-p), p = e^mean.

    Hong et al. 2024, arXiv 2403.07691. chosen, rejected: *means* over tokens; beta is the paper's lambda.
    Worked number: equal sides at mean -1 -> 1 + beta ln 2.
    """
    return -chosen_P - beta * logsigmoid(_log_odds(chosen_P) - _log_odds(rejected_P))


def _log_odds(mean_P: Tensor) -> Tensor:
    # a response of probability 1 has infinite odds and no gradient: hold it just below
    below_P = mean_P.clamp_max(-1e-12)
    return below_P - (-below_P.expm1()).log()


def sft(chosen_P: Tensor) -> Tensor:
    """-log pi(y_w)/|y_w|: chosen is the *mean* over tokens. RPO's added term, Pang et al. 2024, arXiv 2404.19733, eq. 2."""
    return -chosen_P
