"""Losses of a reward model: Bradley-Terry with margins, ties, and scores held around zero.

In: scores of responses and who beat whom. Out: loss per comparison, nats. Next: ../train/reward.py.
"""

import math

from torch import Tensor
from torch.nn.functional import logsigmoid


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
