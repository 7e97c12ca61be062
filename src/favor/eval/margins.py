"""Does the implicit reward order held-out pairs as people did, and did the reference already?

In: a policy, its reference's log-probs and token trees with comparisons. Out: PairFigures. Next: divergence.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from favor.data import pack
from favor.data.types import Batch, TokenTree
from favor.eval.intervals import bootstrap_mean
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

    def as_json(self, seed: int) -> dict[str, object]:
        """Means with bootstrap intervals that resample prompts."""
        accuracy = bootstrap_mean(_right(self.margin_P), seed, clusters=self.prompt_P)
        reference = bootstrap_mean(_right(self.reference_gap_P), seed, clusters=self.prompt_P)
        margin = bootstrap_mean(self.margin_P, seed, clusters=self.prompt_P)
        return {
            "pairs": len(self.margin_P),
            "accuracy": accuracy.mean,
            "accuracy_interval": [accuracy.low, accuracy.high],
            "reference_accuracy": reference.mean,
            "reference_accuracy_interval": [reference.low, reference.high],
            "margin": margin.mean,
            "margin_interval": [margin.low, margin.high],
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
        for members in pack.plan([pack.computed_tokens(tree, policy.layout) for tree in trees], budget):
            chosen = [trees[i] for i in members]
            batch = pack.build(chosen, policy.layout).to(policy.device)
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


def _right(gap_P: np.ndarray) -> np.ndarray:
    """1 where the gap is positive, 0 where negative, one half for a tie."""
    return (np.sign(gap_P) + 1) / 2
