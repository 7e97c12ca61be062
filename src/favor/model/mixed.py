"""The family between a reference and a policy: at every token softmax((1 - w) ref_logits + w policy_logits).

Decoding-time realignment, Liu et al. 2024, arXiv 2402.02992. w = 0 is the reference, w = 1 the policy, w > 1 goes beyond it.
Over whole responses it would be ref (pi/ref)^w with one sum for all of them; here every token has its own, over the vocabulary.
In: both models and a Batch. Out: log-probs and divergences of scored tokens, nats; one forward of each model serves all
weights. Next: sample.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from favor.data.types import Batch
from favor.model.load import Policy
from favor.model.logprobs import logit_tiles


def family_logps(reference: Policy, policy: Policy, batch: Batch, weights: Sequence[float]) -> Tensor:
    """Log pi_w of every scored token, for each of the weights: float32 [weights, E], nats, without gradients.

    log pi_w(y) = z(y) - log sum_v exp z(v), z = (1 - w) ref_logits + w policy_logits; exactly one of the two at 0 and 1.
    """
    found = torch.empty(len(weights), batch.edge_head_E.shape[0], device=batch.ids_BT.device)
    with torch.no_grad():
        for start, here, (ref_NV, policy_NV) in logit_tiles((reference, policy), batch):
            place, token = batch.edge_head_E[here] - start, batch.edge_target_E[here]
            for row, weight in zip(found, weights, strict=True):
                mixed_NV = torch.lerp(ref_NV, policy_NV, weight)
                row[here] = mixed_NV[place, token] - mixed_NV.logsumexp(-1)[place]
    return found


def family_kl(reference: Policy, policy: Policy, batch: Batch, weight: float, other: Policy | None = None) -> Tensor:
    """KL(pi_w || other) of the next token where each scored token stands: float32 [E], nats; other: the reference if None.

    Over the whole vocabulary. Summed over the tokens of a response that pi_w sampled it is an unbiased estimate of the KL of
    responses (the chain rule), of less variance than log pi_w - log ref (Amini et al. 2025, arXiv 2504.10637).
    """
    models = (reference, policy) if other is None else (reference, policy, other)
    found = torch.empty(batch.edge_head_E.shape[0], device=batch.ids_BT.device)
    with torch.no_grad():
        for start, here, (ref_NV, policy_NV, *rest) in logit_tiles(models, batch):
            logp_NV = torch.lerp(ref_NV, policy_NV, weight).log_softmax(-1)
            other_NV = (rest[0] if rest else ref_NV).log_softmax(-1)
            kl_N = kl_div(other_NV, logp_NV, reduction="none", log_target=True).sum(-1)
            found[here] = kl_N[batch.edge_head_E[here] - start]
    return found
