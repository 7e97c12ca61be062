"""The order of training: which trees form each optimizer batch, shuffled, resumable, the same on every rank.

In: the number of trees and a state. Out: (tree indices, state after them). Next: ../model/logprobs.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class LoaderState(NamedTuple):
    """Where the order stands: whole epochs done, trees of the current epoch already given out."""

    epoch: int = 0
    position: int = 0


class Order(NamedTuple):
    """How trees become optimizer batches."""

    num_trees: int
    batch_prompts: int
    seed: int
    shuffle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer batches an epoch; the last may be smaller."""
        return -(-self.num_trees // self.batch_prompts)


def batches(order: Order, state: LoaderState) -> Iterator[tuple[list[int], LoaderState]]:
    """Yield optimizer batches from `state` on, without end; each comes with the state that follows it.

    The order of an epoch depends on the seed and the epoch alone, so a run that stops and resumes sees
    what an unbroken one sees.
    """
    epoch, position = state
    while True:
        indices = _permutation(order, epoch)
        while position < order.num_trees:
            batch: list[int] = indices[position : position + order.batch_prompts].tolist()
            position += len(batch)
            done = position >= order.num_trees
            yield batch, LoaderState(epoch + 1, 0) if done else LoaderState(epoch, position)
        epoch, position = epoch + 1, 0


def _permutation(order: Order, epoch: int) -> np.ndarray:
    if not order.shuffle:
        return np.arange(order.num_trees)
    return np.random.default_rng([order.seed, epoch]).permutation(order.num_trees)
