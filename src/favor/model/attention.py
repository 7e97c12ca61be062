"""Exact attention over prompt trees, without a mask and without copying a shared token.

In: q, k, v of one packed row and the nodes of its trees. Out: what causal attention along every
root-to-leaf path gives. transformers calls `tree_attention` by name. Next: ../losses/table.py.

A token attends to its own node causally and to every ancestor node in full. Nodes lie in pre-order, so
the descendants of a node are one slice: one causal call inside each node and one unmasked call with
all its descendants as queries cover everything. Parts over disjoint keys merge by their log-sum-exp:
    lse = log(e^lse_1 + e^lse_2),   out = (e^lse_1 out_1 + e^lse_2 out_2) / e^lse.
The flash backward of a part needs only the *merged* out and lse, because P = exp(q k - lse) (Dao et al.
2022, arXiv 2205.14135, appendix B): gradients of the parts then simply add up.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from favor.data.types import Node
from favor.errors import ConfigError

NAME = "favor_tree"
# Arguments by which a model asks for attention that is not plain softmax(q k) v; none may be passed over.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


class Part(NamedTuple):
    """One rectangular attention call: queries [q0, q1) against keys [k0, k1)."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


def register() -> None:
    """Make the tree attention known to transformers under `favor_tree`; doing it twice is harmless."""
    AttentionInterface.register(NAME, tree_attention)


def tree_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention function in transformers' form: q [1, Hq, T, D], k and v [1, Hkv, T, D] -> [1, T, Hq, D].

    `tree_nodes` (tuple of Node; on a GPU a function of q, k, v and scale, from engines.py) arrives from the model call.
    Raises ConfigError when the model asks for something that trees do not compute (soft-capping, sinks, a mask); the
    self-check turns that into rows.
    """
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked or attention_mask is not None:
        raise ConfigError(
            f"{type(module).__name__} needs {', '.join(asked) or 'an attention mask'}, which trees do not compute"
        )
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    key, value = key.to(query.dtype), value.to(query.dtype)
    tree = kwargs["tree_nodes"]
    # [1, Hq, T, D] in, [1, Hq, T, D] out; transformers wants [1, T, Hq, D]
    if not isinstance(tree, tuple):
        return tree(query, key, value, scale).transpose(1, 2), None
    out = _TreeAttention.apply(query, key, value, tree, scale)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2), None


def parts(nodes: Sequence[Node]) -> Iterator[Part]:
    """The attention calls of a forest: first every node by itself, then every node under its descendants."""
    # prompt 0..5 with responses 5..8 and 8..10 is (0, 5, 10), (5, 8, 8), (8, 10, 10): three causal calls here ...
    for start, stop, _ in nodes:
        yield Part(start, stop, start, stop, causal=True)
    # ... and one full call: queries 5..10 (both responses) against keys 0..5; the responses never meet each other
    for start, stop, end in nodes:
        if stop < end:
            yield Part(stop, end, start, stop, causal=False)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, nodes: tuple[Node, ...], scale: float) -> Tensor:
        # out [1, Hq, T, D] and lse [1, Hq, T] lie in memory as [1, T, Hq, D], the order of the CPU kernel's own result
        out = torch.empty((1, q.shape[2], q.shape[1], v.shape[3]), dtype=torch.float32, device=q.device).transpose(1, 2)
        lse = torch.empty((1, q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device).transpose(1, 2)
        for q0, q1, k0, k1, causal in parts(nodes):
            # part [1, Hq, q1 - q0, D], part_lse [1, Hq, q1 - q0]
            part, part_lse = _forward(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], causal, scale)
            # a node's own part comes first, so there is always something to merge an ancestor's part into
            if causal:
                out[:, :, q0:q1], lse[:, :, q0:q1] = part, part_lse
            else:
                # e^part_lse / (e^lse + e^part_lse), without overflow
                share = torch.sigmoid(part_lse - lse[:, :, q0:q1]).unsqueeze(-1)
                out[:, :, q0:q1].lerp_(part.float(), share)
                lse[:, :, q0:q1] = torch.logaddexp(lse[:, :, q0:q1], part_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.nodes, ctx.scale = nodes, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        (grad_out,) = grads
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        # a key is read by its node and by every descendant: its gradients add up over the parts
        for q0, q1, k0, k1, causal in parts(ctx.nodes):
            rows, keys = slice(q0, q1), slice(k0, k1)
            part = _backward(
                grad_out[:, :, rows],
                (q[:, :, rows], k[:, :, keys], v[:, :, keys]),
                (out[:, :, rows], lse[:, :, rows]),
                causal,
                ctx.scale,
            )
            dq[:, :, rows] += part[0]
            dk[:, :, keys] += part[1]
            dv[:, :, keys] += part[2]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return math_forward(q, k, v, causal, scale)


def _backward(
    grad: Tensor, qkv: tuple[Tensor, ...], merged: tuple[Tensor, Tensor], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if grad.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *qkv, *merged, 0.0, causal, scale=scale
        )
    return math_backward(grad, qkv, merged, causal, scale)


def math_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One part in plain torch, for devices without a flash op that returns its log-sum-exp: (out, lse [1, H, T])."""
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    probs = torch.exp(scores - lse.unsqueeze(-1))
    return torch.einsum("bgrqk,bgkd->bgrqd", probs, v.float()).flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def math_backward(
    grad: Tensor, qkv: tuple[Tensor, ...], merged: tuple[Tensor, Tensor], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The flash backward of one part in plain torch, from the merged out and lse (float32 results)."""
    q, k, v = qkv
    out, lse = merged
    # grouped-query attention: [1, Hq, T, D] seen as [1, Hkv, Hq/Hkv, T, D]
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    probs = torch.exp(_scores(q, k, causal, scale) - lse.unflatten(1, groups).unsqueeze(-1))
    grad_f = grad.float().unflatten(1, groups)
    # sum_k P dP of the whole row, which needs only the merged out
    delta = (grad.float() * out.float()).sum(-1).unflatten(1, groups).unsqueeze(-1)
    grad_scores = probs * (torch.einsum("bgrqd,bgkd->bgrqk", grad_f, v.float()) - delta) * scale
    dq = torch.einsum("bgrqk,bgkd->bgrqd", grad_scores, k.float()).flatten(1, 2)
    dk = torch.einsum("bgrqk,bgrqd->bgkd", grad_scores, q.float().unflatten(1, groups))
    dv = torch.einsum("bgrqk,bgrqd->bgkd", probs, grad_f)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """Scaled scores, float32 [1, Hkv, Hq/Hkv, Tq, Tk]; -inf above the diagonal when causal."""
    grouped = q.float().unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
    scores = torch.einsum("bgrqd,bgkd->bgrqk", grouped, k.float()) * scale
    if not causal:
        return scores
    above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(above, float("-inf"))
