"""Losses of a whole ranking.

In: log-ratios of all responses and rankings as index rows, best first. Out: loss_Q. Next: ../train/step.py.
"""

import torch
from torch import Tensor


def plackett_luce(log_ratio_R: Tensor, ranking_QK: Tensor, beta: float) -> Tensor:
    """Plackett-Luce DPO: -sum_{k<K} [ r_k - logsumexp_{j>=k} r_j ], r = beta log pi/ref. arXiv 2305.18290, appendix A.3.

    log_ratio_R: nats, summed over tokens. ranking_QK: int64, best first, padded with -1 (rankings may
    differ in length). Returns loss [Q], nats. K = 2 is DPO; at pi = ref it is ln K!.
    Worked number: r = (0, 0, 0) -> ln 6 = 1.791759.
    """
    real_QK = ranking_QK >= 0
    reward_QK = beta * log_ratio_R[ranking_QK.clamp_min(0)]
    # a finite floor, not -inf: the log-sum-exp of nothing would have no gradient
    masked_QK = reward_QK.masked_fill(~real_QK, torch.finfo(reward_QK.dtype).min)
    tail_QK = masked_QK.flip(1).logcumsumexp(1).flip(1)
    return (tail_QK - reward_QK).masked_fill(~real_QK, 0.0).sum(1)
