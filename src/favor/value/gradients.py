"""Does a pair pull an adapter where the trusted pairs pull it? Cosines of gradients at the start of training.

In: pairs as trees, trusted pairs. Out: a cosine of every pair. Next: run.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from favor.data.batches import build
from favor.data.types import TokenTree
from favor.model.adapters import LoraSettings
from favor.model.layout import settle
from favor.model.load import ModelConfig, Policy, load_policy
from favor.model.logprobs import response_logps


def cosines(
    config: ModelConfig,
    pairs: Sequence[TokenTree],
    trusted: Sequence[TokenTree],
    seed: int,
    progress: Callable[[int], None],
) -> list[float]:
    """cos(g_p, mean over trusted pairs of g_t / |g_t|), g = d (log pi(chosen) - log pi(rejected)) / d adapter.

    While the policy is the reference, DPO's gradient of a pair is -beta / 2 times that. A pair is a tree of its own: its
    response 0 is preferred to 1. Fein and Aranguiz-Dias 2025, arXiv 2507.14344.
    """
    adapted = config.model_copy(update={"lora": config.lora or LoraSettings()})
    policy, _ = settle(load_policy(adapted, seed), "auto", [*trusted, *pairs], train=True)
    mean = torch.stack([_direction(policy, tree) for tree in trusted]).mean(0)
    found: list[float] = []
    for tree in pairs:
        found.append(float(torch.nn.functional.cosine_similarity(_direction(policy, tree), mean, 0)))
        progress(1)
    return found


def _direction(policy: Policy, tree: TokenTree) -> Tensor:
    """The pair's g / |g|, float32 [parameters that train]."""
    logp_R = response_logps(policy, build([tree], policy.layout).to(policy.device))
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(logp_R[0] - logp_R[1], weights)
    return torch.nn.functional.normalize(torch.cat([one.float().flatten() for one in gradients]), dim=0)
