"""Flash's varlen kernels in plain torch, for machines without a GPU: the same signature, and they refuse what flash refuses.

What no segment covers is left NaN, as flash leaves what was in memory.
"""

import torch

from favor.model.varlen import Kernels


def pieces(q, k, segments):
    """((queries, keys) slices of each segment); fails where flash would read what is not there, or write nothing."""
    for cu, count, most in ((segments.q_S, q.shape[0], segments.max_q), (segments.k_S, k.shape[0], segments.max_k)):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        lengths = cu.diff()
        assert int(cu[0]) == 0
        assert int(cu[-1]) == count
        assert int(lengths.min()) > 0, "an empty segment"
        assert isinstance(most, int)
        assert int(lengths.max()) <= most
        assert most > 1, "flash swaps heads and rows of single queries"
    bounds_q, bounds_k = segments.q_S.tolist(), segments.k_S.tolist()
    assert len(bounds_q) == len(bounds_k)
    for i in range(len(bounds_q) - 1):
        yield slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])


def fits(*tensors):
    for x in tensors:
        assert x.dtype == tensors[0].dtype
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0
        assert x.shape[-1] == tensors[0].shape[-1]


def scores(q, k, causal, scale):
    """[Hq, queries, keys], at least float32; causal is aligned at the last query and key."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = torch.einsum("qhd,khd->hqk", q.to(wide), k) * scale
    if causal:
        hidden = torch.ones(found.shape[1:], dtype=torch.bool).triu(1 + found.shape[2] - found.shape[1])
        found = found.masked_fill(hidden, float("-inf"))
    return found


def forward(q, k, v, segments, causal, scale):
    fits(q, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.full_like(q, float("nan"))
    lse = torch.full((q.shape[1], q.shape[0]), float("nan"), dtype=wide)
    for rows, keys in pieces(q, k, segments):
        found = scores(q[rows], k[keys], causal, scale)
        lse[:, rows] = found.logsumexp(-1)
        values = v[keys].to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[rows] = torch.einsum("hqk,khd->qhd", found.softmax(-1), values).to(q.dtype)
    return out, lse


def backward(grad, qkv, merged, segments, causal, scale):
    (q, k, v), (out, lse) = qkv, merged
    fits(q, k, v, out, grad)
    assert lse.is_contiguous(), "flash takes [H, rows] for granted"
    assert lse.shape == (q.shape[1], q.shape[0])
    wide, groups = lse.dtype, q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
    for rows, keys in pieces(q, k, segments):
        probs = (scores(q[rows], k[keys], causal, scale) - lse[:, rows, None]).exp()
        g, o = grad[rows].to(wide), out[rows].to(wide)
        wide_k, wide_v = (x[keys].to(wide).repeat_interleave(groups, 1) for x in (k, v))
        delta = (g * o).sum(-1).T[:, :, None]
        slope = probs * (torch.einsum("qhd,khd->hqk", g, wide_v) - delta) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", slope, wide_k).to(q.dtype)
        for total, part, other in ((dk, slope, q[rows].to(wide)), (dv, probs, g)):
            each = torch.einsum("hqk,qhd->khd", part, other)
            total[keys] = each.unflatten(1, (k.shape[1], groups)).sum(2).to(k.dtype)
    return dq, dk, dv


PLAIN = Kernels(forward, backward)
