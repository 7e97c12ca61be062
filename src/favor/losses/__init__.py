"""The loss family: name -> pure function, what it needs, and its value at pi = ref.

In: nothing. Out: LOSSES and the section [loss]. Every function takes tensors and floats and returns a
loss per comparison. Next: pairwise.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from favor.config import STRICT
from favor.data.types import Batch
from favor.losses import baselines, pairwise, ranking

LossName = Literal["sigmoid", "cdpo", "ipo", "hinge", "plackett_luce", "kto", "unlikelihood", "preferred_ft"]


@dataclass(frozen=True)
class Loss:
    """`per_item(log-ratios, members, settings, zero)` -> loss per comparison; `options` it reads.

    zero: KTO's z0, a constant; losses that need none get 0 (`needs_zero`). `at_reference(settings, length)` is the
    closed form at pi = ref for a comparison of `length` responses.
    """

    kind: Literal["pairs", "rankings"]
    options: frozenset[str]
    per_item: Callable[[Tensor, Tensor, "LossConfig", Tensor], Tensor]
    at_reference: Callable[["LossConfig", int], float]
    needs_zero: bool = False


class LossConfig(BaseModel):
    """Section [loss]. beta: temperature of the KL constraint, in 1/nats (METHOD.md)."""

    model_config = STRICT
    name: LossName = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5)
    length_normalized: bool = False
    alpha: float = Field(default=0.5, ge=0, le=1)
    desirable_weight: float = Field(default=1.0, gt=0)
    undesirable_weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "LossConfig":
        unread = sorted(self.model_fields_set - {"name"} - LOSSES[self.name].options)
        if unread:
            raise ValueError(
                f"loss.{unread[0]} is not read by loss '{self.name}'; remove it or choose a loss that uses it"
            )
        return self

    @model_serializer(mode="wrap")
    def _only_what_is_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The resolved recipe holds what this loss reads, so that it can be read back."""
        used = {"name"} | LOSSES[self.name].options
        return {key: value for key, value in handler(self).items() if key in used}


def per_comparison(config: LossConfig, log_ratio_R: Tensor, batch: Batch, zero: float = 0.0) -> tuple[Tensor, Tensor]:
    """Loss and weight of every comparison of a batch.

    log_ratio_R: log pi(y|x) - log ref(y|x), nats, summed over tokens. zero: KTO's z0, nats. Returns (loss [P or Q],
    weight of the same shape); differentiable in log_ratio_R.
    """
    zero_ = torch.tensor(zero, dtype=log_ratio_R.dtype, device=log_ratio_R.device)
    loss = LOSSES[config.name]
    scaled_R = log_ratio_R / batch.length_R if config.length_normalized else log_ratio_R
    if loss.kind == "rankings":
        return loss.per_item(scaled_R, batch.ranking_QK, config, zero_), batch.weight_Q
    pair_P2 = torch.stack([batch.chosen_P, batch.rejected_P], 1)
    return loss.per_item(scaled_R, pair_P2, config, zero_), batch.weight_P


def total_weight(config: LossConfig, batch: Batch) -> float:
    """Summed weight of the comparisons this loss sees: what the global batch is divided by."""
    weight = batch.weight_Q if LOSSES[config.name].kind == "rankings" else batch.weight_P
    return float(weight.double().sum())


def at_reference(config: LossConfig, batch: Batch) -> Tensor:
    """The closed form of every comparison's loss when policy and reference are equal: float64 [P or Q]."""
    loss = LOSSES[config.name]
    if loss.kind == "pairs":
        return torch.full((batch.chosen_P.shape[0],), loss.at_reference(config, 2), dtype=torch.float64)
    lengths = (batch.ranking_QK >= 0).sum(1).tolist()
    return torch.tensor([loss.at_reference(config, length) for length in lengths], dtype=torch.float64)


def _gap(log_ratio_R: Tensor, pair_P2: Tensor) -> Tensor:
    """H = (log pi/ref)(chosen) - (log pi/ref)(rejected), nats [P]."""
    return log_ratio_R[pair_P2[:, 0]] - log_ratio_R[pair_P2[:, 1]]


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(
        "pairs",
        frozenset({"beta"}),
        lambda ratio, pairs, c, z: pairwise.sigmoid(_gap(ratio, pairs), c.beta),
        lambda c, k: math.log(2),
    ),
    "cdpo": Loss(
        "pairs",
        frozenset({"beta", "label_smoothing"}),
        lambda ratio, pairs, c, z: pairwise.cdpo(_gap(ratio, pairs), c.beta, c.label_smoothing),
        lambda c, k: math.log(2),
    ),
    "ipo": Loss(
        "pairs",
        frozenset({"beta", "length_normalized"}),
        lambda ratio, pairs, c, z: pairwise.ipo(_gap(ratio, pairs), c.beta),
        lambda c, k: 1 / (4 * c.beta**2),
    ),
    "hinge": Loss(
        "pairs",
        frozenset({"beta"}),
        lambda ratio, pairs, c, z: pairwise.hinge(_gap(ratio, pairs), c.beta),
        lambda c, k: 1.0,
    ),
    "plackett_luce": Loss(
        "rankings",
        frozenset({"beta"}),
        lambda ratio, order, c, z: ranking.plackett_luce(ratio, order, c.beta),
        lambda c, k: math.lgamma(k + 1),
    ),
    "kto": Loss(
        "pairs",
        frozenset({"beta", "desirable_weight", "undesirable_weight"}),
        lambda ratio, pairs, c, z: baselines.kto(
            ratio[pairs[:, 0]], ratio[pairs[:, 1]], c.beta, z, (c.desirable_weight, c.undesirable_weight)
        ),
        lambda c, k: (c.desirable_weight + c.undesirable_weight) / 4,
        needs_zero=True,
    ),
    "unlikelihood": Loss(
        "pairs",
        frozenset({"alpha"}),
        lambda ratio, pairs, c, z: baselines.unlikelihood(ratio[pairs[:, 0]], ratio[pairs[:, 1]], c.alpha),
        lambda c, k: 0.0,
    ),
    "preferred_ft": Loss(
        "pairs",
        frozenset(),
        lambda ratio, pairs, c, z: baselines.preferred_ft(ratio[pairs[:, 0]]),
        lambda c, k: 0.0,
    ),
}
