"""Losses of a whole ranking.

In: log-ratios of all responses and rankings as index rows, best first. Out: loss_Q. Next: ../train/step.py.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def plackett_luce(log_ratio_R: Tensor, ranking_QK: Tensor, beta: float, top_k: int | None = None) -> Tensor:
    """Plackett-Luce DPO: -sum_{k<K} [ r_k - logsumexp_{j>=k} r_j ], r = beta log pi/ref. arXiv 2305.18290, appendix A.3.

    log_ratio_R: nats, summed over tokens. ranking_QK: int64, best first, padded with -1 (rankings may
    differ in length). top_k: only the first k places count; who is among the others is all that matters of them.
    Returns loss [Q], nats. K = 2 is DPO; at pi = ref it is ln K!, ln K with top_k 1.
    Worked number: r = (0, 0, 0) -> ln 6 = 1.791759.
    """
    real_QK = ranking_QK >= 0
    reward_QK = beta * log_ratio_R[ranking_QK.clamp_min(0)]
    # a finite floor, not -inf: the log-sum-exp of nothing would have no gradient
    masked_QK = reward_QK.masked_fill(~real_QK, torch.finfo(reward_QK.dtype).min)
    tail_QK = masked_QK.flip(1).logcumsumexp(1).flip(1)
    stage_QK = (tail_QK - reward_QK).masked_fill(~real_QK, 0.0)
    return stage_QK.sum(1) if top_k is None else stage_QK[:, :top_k].sum(1)


def nca(log_ratio_R: Tensor, ranking_QK: Tensor, drop_QK: Tensor, beta: float, temperature: float) -> Tensor:
    """NCA: -sum_k [ w_k log s(r_k) + (1/K) log s(-r_k) ], r = beta log pi/ref. Chen et al. 2024, arXiv 2402.05369.

    w = softmax(score/temperature) where the data has scores (drop_QK: how far each lies below the best), else all
    weight on the best. K = 2 without scores is NCA-preference. Worked number: K 2, r = (0, 0) -> 2 ln 2.
    """
    real_QK = ranking_QK >= 0
    reward_QK = beta * log_ratio_R[ranking_QK.clamp_min(0)]
    share_QK = (-drop_QK.to(reward_QK.dtype) / temperature).masked_fill(~real_QK, -torch.inf).softmax(1)
    best_QK = torch.zeros_like(share_QK)
    best_QK[:, 0] = 1
    scored_Q1 = (drop_QK > 0).any(1, keepdim=True)
    share_QK = torch.where(scored_Q1, share_QK, best_QK)
    count_Q1 = real_QK.sum(1, keepdim=True)
    item_QK = share_QK * logsigmoid(reward_QK) + logsigmoid(-reward_QK) / count_Q1
    return -item_QK.masked_fill(~real_QK, 0.0).sum(1)
