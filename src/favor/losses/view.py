"""What a loss sees of a batch: log-probs of the policy and the reference, and who was preferred to whom.

In: log-probs of every response and a Batch. Out: the View's pairs, rankings and thumbs. Next: pairwise.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from favor.data.types import Batch
from favor.losses.config import LossConfig
from favor.losses.divergence import DIVERGENCES


@dataclass(frozen=True)
class Scored:
    """One entry a response: log pi(y|x) (differentiable) and log ref(y|x), float64 [R], nats summed over tokens.

    ref_R is 0 for losses without a reference. pi_M and ref_M, where LD-DPO needs them, are the same token by token.
    overlap_R: WPO's mean over tokens of log sum_v pi(v)^2. zero: KTO's z0. All but pi are constants.
    """

    pi_R: Tensor
    ref_R: Tensor
    pi_M: Tensor | None = None
    ref_M: Tensor | None = None
    overlap_R: Tensor | None = None
    zero: float = 0.0


@dataclass(frozen=True)
class View:
    """A batch as one loss sees it. The properties are float64, nats."""

    scored: Scored
    batch: Batch
    config: LossConfig

    @property
    def ratio_R(self) -> Tensor:
        """f'(pi/ref) of every response, log pi/ref for the reverse KL; over the response's length when asked."""
        ratio_R = self.scored.pi_R - self.scored.ref_R
        if self.config.length_normalized:
            ratio_R = ratio_R / self.batch.length_R
        return DIVERGENCES[self.config.divergence](ratio_R, self.config.divergence_alpha)

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """The ratio of the chosen and of the rejected response of every pair [P]."""
        if self.config.ld_alpha is not None:
            return self._desensitised(self.config.ld_alpha)
        ratio_R = self.ratio_R
        return ratio_R[self.batch.chosen_P], ratio_R[self.batch.rejected_P]

    @property
    def gap_P(self) -> Tensor:
        """h: ratio of the chosen less that of the rejected response [P]."""
        chosen_P, rejected_P = self.sides
        return chosen_P - rejected_P

    @property
    def mean_R(self) -> Tensor:
        """The mean over tokens of log pi of every response."""
        return self.scored.pi_R / self.batch.length_R

    @property
    def trust_P(self) -> Tensor:
        """WPO's weight of every pair, a constant: 1 when it is off.

        probability: exp(mean log pi) of both sides; aligned: exp(mean(log pi - log sum_v pi(v)^2)), at most 1.
        Zhou et al. 2024, arXiv 2406.11827.
        """
        if self.config.wpo == "off":
            return torch.ones_like(self.batch.weight_P, dtype=self.scored.pi_R.dtype)
        mean_R = self.mean_R.detach()
        if self.config.wpo == "aligned":
            assert self.scored.overlap_R is not None
            mean_R = mean_R - self.scored.overlap_R
        return (mean_R[self.batch.chosen_P] + mean_R[self.batch.rejected_P]).exp().clamp_max(1.0)

    @property
    def thumbs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(response, good, weight) of every thumb, and of the two that every pair implies."""
        batch = self.batch
        good_P = torch.ones_like(batch.chosen_P, dtype=torch.bool)
        return (
            torch.cat([batch.thumb_I, batch.chosen_P, batch.rejected_P]),
            torch.cat([batch.good_I, good_P, ~good_P]),
            torch.cat([batch.weight_I, batch.weight_P, batch.weight_P]),
        )

    def _desensitised(self, alpha: float) -> tuple[Tensor, Tensor]:
        """LD-DPO: tokens beyond the shorter side's length count alpha. Liu et al. 2024, arXiv 2409.06411."""
        pi_M, ref_M = self.scored.pi_M, self.scored.ref_M
        assert pi_M is not None
        assert ref_M is not None
        batch, nothing = self.batch, pi_M.new_zeros(1)
        prefix = torch.cat([nothing, (pi_M - ref_M).cumsum(0)])
        end_R = batch.length_R.cumsum(0)
        start_R = end_R - batch.length_R
        public_P = torch.minimum(batch.length_R[batch.chosen_P], batch.length_R[batch.rejected_P])

        def side(response_P: Tensor) -> Tensor:
            start_P, end_P = start_R[response_P], end_R[response_P]
            head_P = prefix[start_P + public_P] - prefix[start_P]
            return head_P + alpha * (prefix[end_P] - prefix[start_P + public_P])

        return side(batch.chosen_P), side(batch.rejected_P)
