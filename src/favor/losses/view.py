"""What a loss sees of a batch: every number a loss function can take, by the name of its parameter.

In: log-probs of every response and a Batch. Out: the View. Next: pairwise.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import torch
from pydantic import BaseModel, Field, TypeAdapter
from torch import Tensor
from torch.nn.functional import logsigmoid

from favor.config import choice, options
from favor.data.types import Batch

Alpha = Annotated[float, Field(gt=0, lt=1, description="Near 0 it is the reverse KL, near 1 the forward KL.")]
Mean = Annotated[bool, Field(description="Divide every log-ratio by its response's length in tokens.")]
LdAlpha = Annotated[float | None, Field(ge=0, le=1, description="Factor of tokens beyond the shorter side's length.")]
Wpo = Annotated[
    Literal["off", "probability", "aligned"],
    Field(description="Weigh pairs by the policy's probability of them, as it is or over that of its own samples."),
]


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


# Divergences between policy and reference: DPO's implicit reward is beta f'(pi/ref) up to a constant of the prompt. Each takes
# l = log pi/ref of a response, nats, and returns f'(e^l) - f'(1). Wang et al. 2023, arXiv 2309.16240, table 1.
def reverse_kl(log_ratio: Tensor) -> Tensor:
    """KL(pi || ref), DPO's own: f'(u) = log u + 1, so l."""
    return log_ratio


def forward_kl(log_ratio: Tensor) -> Tensor:
    """KL(ref || pi): f'(u) = -1/u, so 1 - e^-l. Worked number: l = 0.5 -> 0.393469."""
    return -(-log_ratio).expm1()


def jensen_shannon(log_ratio: Tensor) -> Tensor:
    """f'(u) = log(2u/(1 + u)), so l + ln 2 - log(1 + e^l). Worked number: l = 0.5 -> 0.219070."""
    return log_ratio + math.log(2) + logsigmoid(-log_ratio)


def alpha_divergence(log_ratio: Tensor, alpha: Alpha = 0.5) -> Tensor:
    """f'(u) = (1 - u^-alpha)/alpha. Worked number: alpha 0.5, l = 0.5 -> 0.442398."""
    return -(-alpha * log_ratio).expm1() / alpha


DIVERGENCES: Mapping[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jensen_shannon": jensen_shannon,
    "alpha": alpha_divergence,
}
if TYPE_CHECKING:
    Divergence: TypeAlias = BaseModel
else:
    Divergence = choice(
        {name: options(function) for name, function in DIVERGENCES.items()},
        "reverse_kl",
        "The divergence that holds the policy to the reference.",
    )
_REVERSE_KL: Divergence = TypeAdapter[Divergence](Divergence).validate_python({})


@dataclass(frozen=True)
class View:
    """A batch as one loss sees it. The annotated fields are settings of [loss] that change what it sees."""

    scored: Scored
    batch: Batch
    length_normalized: Mean = False
    divergence: Annotated[Divergence, Field()] = _REVERSE_KL
    ld_alpha: LdAlpha = None
    wpo: Wpo = "off"

    def ratio_R(self) -> Tensor:
        """f'(pi/ref) of every response, log pi/ref for the reverse KL; over the response's length when asked."""
        ratio_R = self.per_length(self.scored.pi_R - self.scored.ref_R)
        chosen = dict(self.divergence)
        return DIVERGENCES[chosen.pop("kind")](ratio_R, **chosen)

    def per_length(self, value_R: Tensor) -> Tensor:
        """A sum over tokens as the loss wants it: with length_normalized a mean."""
        return value_R / self.batch.length_R if self.length_normalized else value_R

    def sides(self) -> tuple[Tensor, Tensor]:
        """The ratio of the chosen and of the rejected response of every pair [P]."""
        batch = self.batch
        if self.ld_alpha is None:
            ratio_R = self.ratio_R()
            return ratio_R[batch.chosen_P], ratio_R[batch.rejected_P]
        # LD-DPO, Liu et al. 2024, arXiv 2409.06411: tokens beyond the shorter side's length count ld_alpha
        assert self.scored.pi_M is not None
        assert self.scored.ref_M is not None
        prefix = torch.nn.functional.pad((self.scored.pi_M - self.scored.ref_M).cumsum(0), (1, 0))
        end_R = batch.length_R.cumsum(0)
        public_P = torch.minimum(batch.length_R[batch.chosen_P], batch.length_R[batch.rejected_P])
        alpha, start_R = self.ld_alpha, end_R - batch.length_R

        def side(response_P: Tensor) -> Tensor:
            start_P, end_P = start_R[response_P], end_R[response_P]
            head_P = prefix[start_P + public_P] - prefix[start_P]
            return head_P + alpha * (prefix[end_P] - prefix[start_P + public_P])

        return side(batch.chosen_P), side(batch.rejected_P)

    def gap_P(self) -> Tensor:
        """h: ratio of the chosen less that of the rejected response [P]."""
        chosen_P, rejected_P = self.sides()
        return chosen_P - rejected_P

    def mean_R(self) -> Tensor:
        """The mean over tokens of log pi of every response."""
        return self.scored.pi_R / self.batch.length_R

    def trust_P(self) -> Tensor:
        """WPO's weight of every pair, a constant: 1 when it is off.

        probability: exp(mean log pi) of both sides; aligned: exp(mean(log pi - log sum_v pi(v)^2)), at most 1.
        Zhou et al. 2024, arXiv 2406.11827.
        """
        if self.wpo == "off":
            return torch.ones_like(self.batch.weight_P, dtype=self.scored.pi_R.dtype)
        mean_R = self.mean_R().detach()
        if self.wpo == "aligned":
            assert self.scored.overlap_R is not None
            mean_R = mean_R - self.scored.overlap_R
        return (mean_R[self.batch.chosen_P] + mean_R[self.batch.rejected_P]).exp().clamp_max(1.0)


def _difference(value_R: Tensor, pair_P2: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    first_P, second_P = pair_P2
    return value_R[first_P] - value_R[second_P]


# what a loss can read: the name of its parameter -> the value
READINGS: Mapping[str, Callable[[View], Tensor | float]] = {
    "h_P": View.gap_P,
    "chosen_P": lambda v: v.sides()[0],
    "rejected_P": lambda v: v.sides()[1],
    # the probability that a pair's order is right, and by how much the data scores it apart
    "label_P": lambda v: v.batch.label_P,
    "margin_P": lambda v: v.batch.margin_P.double(),
    # h of ties
    "h_U": lambda v: _difference(v.ratio_R(), v.batch.tie_U2.T),
    # log pi alone, summed and averaged over tokens
    "logp_chosen_P": lambda v: v.scored.pi_R[v.batch.chosen_P],
    "logp_rejected_P": lambda v: v.scored.pi_R[v.batch.rejected_P],
    "mean_chosen_P": lambda v: v.mean_R()[v.batch.chosen_P],
    "mean_rejected_P": lambda v: v.mean_R()[v.batch.rejected_P],
    # log pi(y_w)/pi(y_l) and log ref(y_w)/ref(y_l)
    "policy_gap_P": lambda v: _difference(v.per_length(v.scored.pi_R), (v.batch.chosen_P, v.batch.rejected_P)),
    "reference_gap_P": lambda v: _difference(v.per_length(v.scored.ref_R), (v.batch.chosen_P, v.batch.rejected_P)),
    # rankings, best first, padded with -1; how far each place's score lies below the best
    "ratio_R": View.ratio_R,
    "ranking_QK": lambda v: v.batch.ranking_QK,
    "drop_QK": lambda v: v.batch.drop_QK,
    # thumbs: ratio, whether up, KTO's z0
    "ratio_I": lambda v: v.ratio_R()[torch.cat([v.batch.thumb_I, v.batch.chosen_P, v.batch.rejected_P])],
    "good_I": lambda v: torch.cat([v.batch.good_I, v.batch.chosen_P >= 0, v.batch.rejected_P < 0]),
    "zero": lambda v: v.scored.zero,
    # of the whole optimizer batch: a loss that reads weights cannot be cut into micro-batches
    "weight_P": lambda v: v.batch.weight_P,
    "weight_I": lambda v: torch.cat([v.batch.weight_I, v.batch.weight_P, v.batch.weight_P]),
}
# those that compare with the reference
RATIOS = frozenset({"h_P", "chosen_P", "rejected_P", "reference_gap_P", "ratio_R", "ratio_I"})
