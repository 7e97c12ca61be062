"""Does the implicit reward order held-out pairs as people did, and did the reference already?

In: a policy, its reference's log-probs and token trees with comparisons. Out: PairFigures. Next: divergence.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from favor.data import batches
from favor.data.types import Batch, TokenTree
from favor.eval.intervals import SHARE, mean_interval, sign_share
from favor.losses.pairwise import sigmoid
from favor.model.load import Policy
from favor.model.logprobs import response_logps


@dataclass(frozen=True)
class PairFigures:
    """Arrays over pairs: implicit-reward margin (nats x beta), the reference's own log-prob gap (nats), prompt index."""

    margin_P: np.ndarray
    reference_gap_P: np.ndarray
    prompt_P: np.ndarray
    loss: float

    def as_json(self) -> dict[str, object]:
        """Means with 95 % intervals over prompts."""
        accuracy = mean_interval(sign_share(self.margin_P), clusters=self.prompt_P, bounds=SHARE)
        reference = mean_interval(sign_share(self.reference_gap_P), clusters=self.prompt_P, bounds=SHARE)
        margin = mean_interval(self.margin_P, clusters=self.prompt_P)
        return {
            "pairs": len(self.margin_P),
            "prompts": len(np.unique(self.prompt_P)),
            "accuracy": accuracy.mean,
            "accuracy_interval": accuracy.ends,
            "reference_accuracy": reference.mean,
            "reference_accuracy_interval": reference.ends,
            "margin": margin.mean,
            "margin_interval": margin.ends,
            "loss": self.loss,
        }


def pair_figures(
    policy: Policy,
    reference: Callable[[Batch], Tensor],
    trees: Sequence[TokenTree],
    beta: float,
    budget: int,
    progress: Callable[[int], None],
) -> PairFigures:
    """Implicit reward r = beta log(pi/ref) on every pair; `loss` is the mean DPO loss, nats a pair."""
    margins, gaps, prompts = [], [], []
    with torch.no_grad():
        for members in batches.plan([batches.computed_tokens(tree, policy.layout) for tree in trees], budget):
            chosen = [trees[i] for i in members]
            batch = batches.build(chosen, policy.layout).to(policy.device)
            ref_R = reference(batch)
            reward_R = beta * (response_logps(policy, batch) - ref_R)
            margins.append((reward_R[batch.chosen_P] - reward_R[batch.rejected_P]).cpu())
            gaps.append((ref_R[batch.chosen_P] - ref_R[batch.rejected_P]).cpu())
            prompts += [i for i, tree in zip(members, chosen, strict=True) for _ in range(_num_pairs(tree))]
            progress(len(members))
    margin_P = torch.cat(margins)
    return PairFigures(
        margin_P.numpy(), torch.cat(gaps).numpy(), np.array(prompts), float(sigmoid(margin_P, 1.0).mean())
    )


def _num_pairs(tree: TokenTree) -> int:
    return sum(len(c.order) * (len(c.order) - 1) // 2 for c in tree.comparisons)
