"""Tree attention by torch's `flex_attention`: any GPU and number format, slower than flash kernels.

In: q, k, v of one packed row and its nodes. Out: what attention.py gives. Only GPUs come here. Next: engines.py.

In pre-order the descendants of a node are one slice, so the whole tree is one rule: k <= q and q < end[k], where end[k] is the
end of what descends from the node of k. Which blocks of the mask are empty or full follows from the least and largest end of
a block: nothing of the size [T, T] is made.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from favor.data.types import Node
from favor.model.varlen import products, there

BLOCK = 128


class Blocks(NamedTuple):
    """Blocks of keys that a block of queries meets: partly (a causal edge, a node's end) and wholly, bool [blocks, blocks]."""

    partly: np.ndarray
    wholly: np.ndarray


def ends(nodes: Sequence[Node]) -> np.ndarray:
    """Where what descends from the node of each token ends: int32 [T]."""
    return np.repeat([node.end for node in nodes], [node.stop - node.start for node in nodes]).astype(np.int32)


def blocks(end_T: np.ndarray, block: int = BLOCK) -> Blocks:
    """Which blocks of the mask hold anything, and which are full."""
    count = len(end_T)
    start_B = np.arange(0, count, block)
    last_B = np.minimum(start_B + block, count) - 1
    largest_B, least_B = np.maximum.reduceat(end_T, start_B), np.minimum.reduceat(end_T, start_B)
    # rows are blocks of queries; in those below the diagonal k <= q holds for all
    below = start_B[:, None] > start_B[None]
    wholly = below & (last_B[:, None] < least_B[None])
    partly = np.eye(len(start_B), dtype=np.bool_) | (below & (start_B[:, None] < largest_B[None]) & ~wholly)
    return Blocks(partly, wholly)


def plan(nodes: Sequence[Node], device: torch.device) -> flex.BlockMask:
    """The mask of a packed row, on the device."""
    end_T = ends(nodes)
    tables = [there(table, device) for kind in blocks(end_T) for table in _listed(kind)]
    return flex.BlockMask.from_kv_blocks(
        *tables, BLOCK_SIZE=BLOCK, mask_mod=rule(there(end_T, device)), seq_lengths=(len(end_T), len(end_T))
    )


def rule(end_T: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query sees a key."""

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end_T[key])

    return sees


def attend(made: flex.BlockMask, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Of q [1, Hq, T, D], k and v [1, Hkv, T, D] -> [1, Hq, T, D], in autocast's format where it is on."""
    q, k, v = (x.to(products(q)) for x in (q, k, v))
    return _kernel(q.device.type)(q, k, v, block_mask=made, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@lru_cache
def _kernel(kind: str) -> Callable[..., Any]:
    """Compiled where that makes one kernel of it; a row of another length is no reason to compile again."""
    return torch.compile(flex.flex_attention, dynamic=True) if kind == "cuda" else flex.flex_attention


def _listed(table_QK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many blocks of keys each block of queries meets, and which, these first: int32 [1, 1, Q] and [1, 1, Q, K]."""
    which_QK = np.argsort(~table_QK, axis=1, kind="stable").astype(np.int32)
    return table_QK.sum(1, dtype=np.int32)[None, None], which_QK[None, None]
