"""Tree attention by variable-length flash kernels (CUDA, bfloat16): two launches a layer, whatever the number of nodes.

In: q, k, v of one packed row and the Plan of its nodes. Out: what attention.py gives. Only GPUs come here. Next: engines.py.

Call 1, causal: every node against itself. Call 2, unmasked: the children of a node against the node and all above it. The
row is laid out level by level (roots that have children, their children, theirs ..., last the roots without), so siblings
stand together and both calls read slices of it; keys are copied only where a child has more than one node above it.
Parts merge in float32 by their log-sum-exp, and both backward calls read the merged out and lse (see attention.py).
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from favor.data.types import Node

# what kernels want of the size of a head
_MULTIPLE = 8


class Segments(NamedTuple):
    """One varlen call: queries [q_S[i], q_S[i + 1]) against keys [k_S[i], k_S[i + 1]), int32 on the device; never an empty one.

    The longest of each are numbers of the host, so that no launch waits for the device.
    """

    q_S: Tensor
    k_S: Tensor
    max_q: int
    max_k: int


class Plan(NamedTuple):
    """How the row of one batch is computed.

    order: which token of the pre-order row stands at each place, place: its inverse (int64 [T]). below: the call of children
    against what is above them, None where nothing is shared; its queries are a slice of the row, its keys too, or copies.
    """

    order_T: Tensor
    place_T: Tensor
    own: Segments
    below: Segments | None
    queries: slice
    keys: slice | Tensor


# q, k, v [tokens, heads, size] -> out alike, lse [heads, tokens] (float32, natural log)
Forward: TypeAlias = Callable[[Tensor, Tensor, Tensor, Segments, bool, float], tuple[Tensor, Tensor]]
# gradient of out, q, k, v, the merged out and lse -> gradients of q, k, v, new tensors
Backward: TypeAlias = Callable[
    [Tensor, tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor], Segments, bool, float], tuple[Tensor, Tensor, Tensor]
]


class Kernels(NamedTuple):
    """A forward and its backward over segments: (..., segments, causal, scale)."""

    forward: Forward
    backward: Backward


def plan(nodes: Sequence[Node], device: torch.device) -> Plan:
    """The plan of a packed row, on the device."""
    parents, lengths = _parents(nodes), [node.stop - node.start for node in nodes]
    by_level = _by_level(nodes, parents)
    begins = dict(zip(by_level, accumulate((lengths[i] for i in by_level), initial=0), strict=False))
    order_T = np.concatenate([np.arange(nodes[i].start, nodes[i].stop) for i in by_level])
    # a call for the children of each inner node: siblings stand side by side, in the order of their parents
    paths = {i: _path(i, parents) for i in by_level if nodes[i].stop < nodes[i].end}
    children = dict.fromkeys(paths, 0)
    for i, parent in enumerate(parents):
        if parent >= 0:
            children[parent] += lengths[i]
    above = [sum(lengths[i] for i in path) for path in paths.values()]
    roots = sum(lengths[i] for i in paths if parents[i] < 0)
    keys: slice | Tensor = slice(0, roots)
    if any(len(path) > 1 for path in paths.values()):
        runs = [np.arange(begins[i], begins[i] + lengths[i]) for path in paths.values() for i in path]
        keys = there(np.concatenate(runs), device)
    each = [lengths[i] for i in by_level]
    return Plan(
        there(order_T, device),
        there(np.argsort(order_T), device),
        _segments(each, each, device),
        _segments(list(children.values()), above, device) if paths else None,
        slice(roots, roots + sum(children.values())),
        keys,
    )


def attend(made: Plan, kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Of q [1, Hq, T, D], k and v [1, Hkv, T, D], in the plan's order -> [1, Hq, T, D], in autocast's format where it is on."""
    dtype, size = products(q), v.shape[-1]
    width = -(-max(q.shape[-1], size) // _MULTIPLE) * _MULTIPLE
    out = _Varlen.apply(*(_laid(x, dtype, width) for x in (q, k, v)), made, kernels, scale)
    assert isinstance(out, Tensor)
    return out[..., :size].transpose(0, 1).unsqueeze(0)


def products(x: Tensor) -> torch.dtype:
    """What autocast computes products in here; without it the tensor's own format."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, made: Plan, kernels: Kernels, scale: float) -> Tensor:
        out, lse = kernels.forward(q, k, v, made.own, True, scale)
        if made.below is not None:
            rows = made.queries
            part, part_lse = kernels.forward(q[rows], k[made.keys], v[made.keys], made.below, False, scale)
            # e^part_lse / (e^lse + e^part_lse), without overflow: [H, rows] -> [rows, H, 1]
            share = torch.sigmoid(part_lse - lse[:, rows]).T.unsqueeze(-1)
            out[rows] = torch.lerp(out[rows].to(share.dtype), part.to(share.dtype), share).to(out.dtype)
            lse[:, rows] = torch.logaddexp(lse[:, rows], part_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.made, ctx.kernels, ctx.scale = made, kernels, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        made, kernels, scale = ctx.made, ctx.kernels, ctx.scale
        grad = grads[0].to(q.dtype).contiguous()
        dq, dk, dv = kernels.backward(grad, (q, k, v), (out, lse), made.own, True, scale)
        if made.below is not None:
            rows, keys = made.queries, made.keys
            # kernels read lse as [H, rows] without gaps and look at no stride
            merged = (out[rows], lse[:, rows].contiguous())
            part = kernels.backward(grad[rows], (q[rows], k[keys], v[keys]), merged, made.below, False, scale)
            dq[rows] += part[0]
            dk, dv = _added(dk, part[1], keys), _added(dv, part[2], keys)
        return dq, dk, dv, None, None, None


def _added(total: Tensor, part: Tensor, keys: slice | Tensor) -> Tensor:
    """A key's gradients over both calls; copies of one key add up in float32."""
    if isinstance(keys, slice):
        total[keys] += part
        return total
    wide = torch.promote_types(total.dtype, torch.float32)
    return total.to(wide).index_add_(0, keys, part.to(wide)).to(total.dtype)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """FlashAttention of torch itself, or what `activate_flash_attention_impl` put in its place."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *segments, 0.0, causal, False, scale=scale)
    return out, lse


def flash_backward(
    grad: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    merged: tuple[Tensor, Tensor],
    segments: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of one call, from the merged out and lse."""
    # the state of a dropout that there is not
    state, unused = grad.new_zeros(2, dtype=torch.uint64), grad.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        grad, *qkv, *merged, *segments, 0.0, causal, state, unused, scale=scale
    )


FLASH = Kernels(flash_forward, flash_backward)


def _parents(nodes: Sequence[Node]) -> list[int]:
    """The node above each node, -1 for a root; nodes are in pre-order."""
    parents: list[int] = []
    above: list[int] = []
    for i, node in enumerate(nodes):
        while above and nodes[above[-1]].end <= node.start:
            above.pop()
        parents.append(above[-1] if above else -1)
        if node.stop < node.end:
            above.append(i)
    return parents


def _by_level(nodes: Sequence[Node], parents: Sequence[int]) -> list[int]:
    """Nodes by their distance from the root, each level in pre-order; roots without children last."""
    levels: list[int] = []
    for node, parent in zip(nodes, parents, strict=True):
        alone = parent < 0 and node.stop == node.end
        levels.append(len(nodes) if alone else levels[parent] + 1 if parent >= 0 else 0)
    return sorted(range(len(nodes)), key=lambda i: (levels[i], i))


def _path(node: int, parents: Sequence[int]) -> list[int]:
    """From the root to a node."""
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def _segments(queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Segments:
    assert min(*queries, *keys) > 0, "an empty segment has no log-sum-exp (kernels disagree on its sign)"
    q_S, k_S = (there(np.array([*accumulate(x, initial=0)], np.int32), device) for x in (queries, keys))
    # for queries of one token each kernels swap heads and rows, another layout of lse: never asked for
    return Segments(q_S, k_S, max(2, *queries), max(2, *keys))


def there(array: np.ndarray, device: torch.device) -> Tensor:
    """On the device without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _laid(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """[1, H, T, D] -> [T, H, width], as it lies in memory. Zeros add nothing to a score, and what they give is cut off."""
    x = x[0].transpose(0, 1).to(dtype)
    x = functional.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
    # kernels want the numbers of a head side by side
    return x if x.stride(-1) == 1 else x.contiguous()
