"""Sums over ranks: counts before the forward, gradients and statistics after the backward.

In: tensors of this rank. Out: the same tensors holding the sum over all ranks. Next: ../train/step.py.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from favor.dist.world import World


def sum_(tensor: Tensor, members: World) -> Tensor:
    """Sum a tensor over ranks, in place; returns it."""
    if members.size > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(number: int, members: World, device: torch.device) -> int:
    """The largest of the ranks' numbers, so that all of them decide alike."""
    if members.size == 1:
        return number
    tensor = torch.tensor([number], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def sum_gradients_(parameters: Iterable[nn.Parameter], members: World) -> None:
    """Sum gradients over ranks, in place. A parameter this rank did not touch counts as zero.

    Sums, not means: the loss was divided by the global count before the backward.
    """
    if members.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
