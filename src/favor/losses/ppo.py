"""The equations of PPO and its relatives: KL estimators, advantages, clipped losses. Pure, on padded [R, T] arrays.

In: log-probs, scores and values of sampled responses. Out: advantages and losses per token. T is the longest
response here; mask_RT marks its real tokens. Next: ../train/ppo.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """KL(pi || ref) of a sample y ~ pi by log pi(y) - log ref(y): unbiased, may be negative. Schulman 2020."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2: never negative, biased, with the right gradient to second order. Schulman 2020."""
    return log_ratio**2 / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-l) - 1 + l, l = log pi - log ref: unbiased and never negative. Schulman 2020."""
    return torch.expm1(-log_ratio) + log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def token_rewards(score_R: Tensor, kl_RT: Tensor, mask_RT: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef KL_t at every token, and the response's score at its last one. Ziegler et al. 2019, arXiv 1909.08593, eq. 2."""
    reward_RT = (-kl_coef * kl_RT).masked_fill(~mask_RT, 0.0)
    last_R1 = mask_RT.sum(1, keepdim=True) - 1
    return reward_RT.scatter_add(1, last_R1, score_R.to(reward_RT.dtype).unsqueeze(1))


def gae(reward_RT: Tensor, value_RT: Tensor, mask_RT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t, V = 0 after the end.

    Schulman et al. 2015, arXiv 1506.02438, eq. 16. Returns (advantage, return = advantage + value), both [R, T].
    """
    advantage_RT = torch.zeros_like(reward_RT)
    following_R = torch.zeros_like(reward_RT[:, 0])
    next_value_R = torch.zeros_like(following_R)
    for t in range(reward_RT.shape[1] - 1, -1, -1):
        real_R = mask_RT[:, t]
        delta_R = reward_RT[:, t] + gamma * next_value_R - value_RT[:, t]
        advantage_R = delta_R + gamma * lam * following_R
        # a padded position hands on nothing: the last real token sees a value of 0 behind it
        following_R = torch.where(real_R, advantage_R, 0.0)
        next_value_R = torch.where(real_R, value_RT[:, t], 0.0)
        advantage_RT[:, t] = following_R
    return advantage_RT, (advantage_RT + value_RT).masked_fill(~mask_RT, 0.0)


def group_advantage(return_R: Tensor, group_R: Tensor, name: str) -> Tensor:
    """One advantage per response, against the other samples of its prompt (group).

    rloo: r_i - mean of the others. Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740.
    grpo: (r_i - mean) / (standard deviation + 1e-4), all samples in both. Shao et al. 2024, arXiv 2402.03300.
    Every group needs two samples.
    """
    num_groups = int(group_R.max()) + 1
    ones_R = torch.ones_like(return_R)
    count_G = torch.zeros(num_groups, dtype=return_R.dtype).index_add(0, group_R, ones_R)
    mean_G = torch.zeros_like(count_G).index_add(0, group_R, return_R) / count_G
    centred_R = return_R - mean_G[group_R]
    if name == "rloo":
        return centred_R * (count_G / (count_G - 1))[group_R]
    square_G = torch.zeros_like(count_G).index_add(0, group_R, centred_R**2)
    deviation_G = (square_G / (count_G - 1)).sqrt()
    return centred_R / (deviation_G[group_R] + 1e-4)


def whiten(values_RT: Tensor, mask_RT: Tensor, *, shift: bool) -> Tensor:
    """Real entries scaled to variance 1; to mean 0 too when `shift`, else the mean stays. Padded entries become 0."""
    real = values_RT[mask_RT]
    mean, variance = real.mean(), real.var(unbiased=False)
    scaled_RT = (values_RT - mean) * torch.rsqrt(variance + 1e-8)
    return (scaled_RT if shift else scaled_RT + mean).masked_fill(~mask_RT, 0.0)


def policy_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(rho A, clip(rho, 1-e, 1+e) A), rho = exp(logp - old). Schulman et al. 2017, arXiv 1707.06347, eq. 7. Per token."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float) -> Tensor:
    """max((V - G)^2, (V_clipped - G)^2) / 2, V clipped to old_value +- clip. Per token."""
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return torch.maximum((value - target) ** 2, (clipped - target) ** 2) / 2


def adapted_kl_coef(kl_coef: float, kl: float, target: float, num_samples: int, horizon: int) -> float:
    """Beta' = beta (1 + clip(KL/target - 1, -0.2, 0.2) n/horizon). Ziegler et al. 2019, arXiv 1909.08593, section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_samples / horizon)
