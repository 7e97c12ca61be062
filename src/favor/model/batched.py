"""THE pass without gradients: trees are planned, built, computed and put back in order, split over ranks.

In: a Policy, token trees and what to measure of a Batch. Out: the measure of every response (or of each of its tokens),
equal on all ranks. Next: ../train/reference.py.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from favor.data import batches
from favor.data.types import Batch, TokenTree
from favor.model.load import Policy
from favor.ranks import World, sum_

# Trees planned together: enough to fill the budget, few enough to start at once.
_WINDOW = 128
_ALONE = World()


def measured(
    policy: Policy,
    trees: Sequence[TokenTree],
    measure: Callable[[Batch], Tensor],
    budget: int,
    world: World = _ALONE,
    progress: Callable[[int], None] | None = None,
    *,
    tokens: bool = False,
) -> Tensor:
    """`measure(batch)` [..., R] of every response in the trees' order: float64 [..., responses], on the CPU.

    With `tokens` it is measured for every scored token of every response, [..., M]. A batch has at most `budget` tokens, padding
    included, or holds a single tree. `progress` is told how many trees all ranks have done.
    """
    found = [torch.zeros(0, dtype=torch.float64)] if not trees else []
    for start in range(0, len(trees), _WINDOW):
        window = trees[start : start + _WINDOW]
        # where each tree's values begin among those of the window
        counts = [tree.num_scored if tokens else len(tree.response_ids) for tree in window]
        begins = list(accumulate(counts, initial=0))
        bins = batches.plan(window, policy.layout, budget, world.size)
        total = torch.empty(0)
        for first in range(0, len(bins), world.size):
            together = bins[first : first + world.size]
            # the emptiest bin is filled first: where this one has nothing, none behind it has
            if not together[0]:
                break
            members = together[world.rank]
            # a rank without trees computes the main rank's too: all run equally many forwards, and know the shape
            batch = batches.build([window[i] for i in members or together[0]], policy.layout).to(policy.device)
            with torch.no_grad():
                value = measure(batch).double()
            if first == 0:
                total = value.new_zeros(*value.shape[:-1], begins[-1])
            if members:
                place = torch.cat([torch.arange(begins[i], begins[i + 1]) for i in members])
                total[..., place.to(value.device)] = value
            if progress is not None:
                progress(sum(map(len, together)))
        found.append(sum_(total, world))
    return torch.cat(found, -1).cpu()
