"""One optimizer step: count globally, accumulate, sum over ranks, clip, step. The ONLY backward().

In: micro-batches of this rank and an objective. Out: updated weights and the step's statistics. This is the
last file of the path from a preference to its gradient.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from favor.data.types import Batch
from favor.errors import NumericsError
from favor.parts import clip_
from favor.ranks import World, sum_, sum_gradients_


@dataclass(frozen=True)
class Objective:
    """What a step minimises: the sum over terms of a mean over items.

    `loss(batch)` returns the losses [terms], each *summed* over its items, and statistics, also summed, by the names in
    `stats`; `count(batch)` the items of each term.
    """

    loss: Callable[[Batch], tuple[Tensor, Mapping[str, Tensor]]]
    count: Callable[[Batch], Sequence[float]]
    stats: tuple[str, ...]
    num_terms: int = 1


class Stepped(NamedTuple):
    """What a step did: the mean loss and summed statistics over all ranks, the gradient norm before clipping."""

    sums: dict[str, float]
    grad_norm: float


class Learner(NamedTuple):
    """What learns, and how. moving: weights that move without being trained, such as TR-DPO's reference; checkpoints keep them.

    split: some of the parameters are split over ranks.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    clip: float
    device: torch.device
    world: World
    moving: Mapping[str, Tensor] = MappingProxyType({})
    split: bool = False


def step(learner: Learner, batches: Sequence[Batch], objective: Objective) -> Stepped:
    """Update the weights once from the whole optimizer batch.

    The items (pairs, rankings or tokens) of all micro-batches and ranks are counted first and every
    micro-batch's loss is divided by that count, so packing, accumulation and world size cannot change
    the gradient beyond summation order. Raises NumericsError, before the weights change, when the
    loss or the gradient is not finite.
    """
    # before any backward: 3 pairs here and 1 there are 4 pairs, not a mean of two means
    total = global_count(learner, batches, objective)
    sums = _accumulate(learner, batches, objective, total)
    sum_gradients_(learner.parameters.values(), learner.world)
    values = sum_(sums, learner.world)
    norm = (clip_ if learner.split else nn.utils.clip_grad_norm_)(learner.parameters.values(), learner.clip)
    # the step's one synchronisation: a broken step must be seen before it reaches the weights
    *numbers, grad_norm, items = torch.cat([values, norm.double().view(1), total.sum().view(1)]).tolist()
    assert items > 0, "an optimizer batch holds at least one item"
    result = Stepped(dict(zip(("loss", *objective.stats), numbers, strict=True)), grad_norm)
    _check(result)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    return result


def global_count(learner: Learner, batches: Iterable[Batch], objective: Objective) -> Tensor:
    """Items of the optimizer batch over all micro-batches and ranks: float64 [terms]."""
    local = torch.zeros(objective.num_terms, dtype=torch.float64)
    for batch in batches:
        if not batch.idle:
            local += torch.tensor(objective.count(batch), dtype=torch.float64)
    # what is not pinned is copied while everything waits
    local = local.pin_memory() if learner.device.type == "cuda" else local
    return sum_(local.to(learner.device, non_blocking=True), learner.world)


def _accumulate(learner: Learner, batches: Sequence[Batch], objective: Objective, total: Tensor) -> Tensor:
    """Add the gradient of every micro-batch; returns the mean loss and the statistics' sums, on the device."""
    sums = torch.zeros(1 + len(objective.stats), dtype=torch.float64, device=learner.device)
    # [terms] of this micro-batch; dividing by the global count makes their sum the mean over all items
    for batch in batches:
        loss, stats = objective.loss(batch.to(learner.device))
        # a term without items in this optimizer batch adds nothing
        loss = (torch.atleast_1d(loss) / total.clamp_min(1e-12)).sum()
        if batch.idle:
            loss = 0 * loss
        loss.backward()
        if not batch.idle:
            sums += torch.stack([loss.detach(), *(stats[name] for name in objective.stats)]).double()
    return sums


def _check(result: Stepped) -> None:
    loss = result.sums["loss"]
    if not (abs(loss) < float("inf") and result.grad_norm < float("inf")):
        raise NumericsError(
            f"the loss ({loss}) or the gradient norm ({result.grad_norm}) is not finite; the weights were not changed: "
            "lower optim.lr, or use model.dtype=float32"
        )
