"""Log-probabilities of responses: one forward for a whole batch of trees, logits only where they are scored.

In: a Policy and a Batch. Out: logp_R, the sum in nats over each response's tokens, end-of-turn
token included, prompt excluded. Next: attention.py.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from favor.data.types import Batch, Picture
from favor.model import vision
from favor.model.load import Policy

T = TypeVar("T")
# Keep the probabilities of a batch for the backward up to this size, else compute the tiles again.
_KEEP_BYTES = 1 << 30
# A tile of logits of this size stays in a last-level cache between the matrix product and the softmax; GPUs want more.
_TILE_BYTES, _GPU_TILE_BYTES = 1 << 24, 1 << 28
# Tokens of a row from which on plain transformers is not asked for all its logits.
_LONG_ROW = 512


def response_logps(policy: Policy, batch: Batch) -> Tensor:
    """Sum of log pi(token | prefix) over the tokens of every response.

    Returns logp_R, float64 [R], nats; differentiable in the policy's weights. A scored token that
    several responses share is computed once and its gradient is the sum of theirs.
    """
    return sum_tokens(batch, scored_logps(policy, batch))


def sum_tokens(batch: Batch, value_E: Tensor) -> Tensor:
    """Values of scored tokens, summed over each response: float64 [R]."""
    total_R = torch.zeros(batch.num_responses, dtype=torch.float64, device=value_E.device)
    # float64: a sum over hundreds of tokens in float32 would cost the margins their last digits
    return total_R.index_add(0, batch.member_response_M, value_E.double()[batch.member_edge_M])


def position_M(batch: Batch) -> Tensor:
    """The place of every scored token within its response: int64 [M]."""
    start_R = batch.length_R.cumsum(0) - batch.length_R
    return torch.arange(batch.member_response_M.shape[0], device=start_R.device) - start_R[batch.member_response_M]


def scored_logps(policy: Policy, batch: Batch) -> Tensor:
    """Log-probability of every scored token, each once: float32 [E], nats."""
    return within(policy, lambda: edge_logps(policy, batch))


def within(policy: Policy, forward: Callable[[], T]) -> T:
    """What forwards of a model give. One whose weights are split over ranks collects them for the time of the block."""
    if policy.root is None:
        return forward()
    try:
        return policy.root(forward)
    except BaseException:
        # what a self-check tried may fail; the weights go back to their ranks
        policy.root.reset_iter_state()
        raise


def edge_logps(policy: Policy, batch: Batch) -> Tensor:
    """`scored_logps`, inside `within`."""
    # head_N are places, edge_E is which place and which token: "a" -> "b" and "a" -> "c" share a place, not an edge
    if policy.fast_head is None:
        with precision(policy):
            logits_NV = _full_head(policy, batch)
        return logits_NV.float().log_softmax(-1)[batch.edge_head_E, batch.edge_target_E]
    return logps_of_states(policy, batch, head_states(policy, batch, batch.head_N))


def plain_logits(policy: Policy, ids_1T: Tensor, keep: int, pictures: Sequence[Picture] = ()) -> Tensor:
    """The last `keep` rows of model(input_ids).logits, by plain transformers, inside `within`: float32 [keep, V]."""
    # the logits of a long row would not fit: then only those that are read are made
    fewer = {"logits_to_keep": keep} if ids_1T.shape[1] > _LONG_ROW else {}
    # the tower once more for every row
    seen = vision.plain(policy.sight, pictures, policy.device) if policy.sight is not None else {}
    return policy.model(input_ids=ids_1T, use_cache=False, **fewer, **seen).logits[0, -keep:].float()


def plain_logp(policy: Policy, ids_1T: Tensor, start: int, pictures: Sequence[Picture] = ()) -> Tensor:
    """Sum of the log-probs of ids[start:] of one unpadded row, nats, by plain transformers: float64 scalar."""
    targets_E = ids_1T[0, start:]

    def forward() -> Tensor:
        logp_EV = plain_logits(policy, ids_1T, len(targets_E) + 1, pictures)[:-1].log_softmax(-1)
        return logp_EV.gather(1, targets_E[:, None]).double().sum()

    return within(policy, forward)


def mean_overlap(policy: Policy, batch: Batch) -> Tensor:
    """Mean over a response's tokens of log sum_v pi(v | prefix)^2, without a graph: float64 [R], nats."""

    def forward() -> Tensor:
        if policy.fast_head is None:
            with precision(policy):
                return _full_head(policy, batch)
        # outside of it, as the head of the log-probs is
        states_NH = head_states(policy, batch, batch.head_N)
        return _logits(states_NH, policy.fast_head.weight, policy.fast_head.bias)

    with torch.no_grad():
        overlap_N = (2 * within(policy, forward).float().log_softmax(-1)).logsumexp(-1)
        return sum_tokens(batch, overlap_N[batch.edge_head_E]) / batch.length_R


def logit_tiles(policies: Sequence[Policy], batch: Batch) -> Iterator[tuple[int, slice, list[Tensor]]]:
    """The logits of several models where tokens are scored, a tile of places at a time, from one forward of each.

    Yields the tile's first place in head_N, which edges are scored in it, and float32 [places, V] of every model. Without
    gradients; weights may not be split over ranks. A model without a plain head makes all its logits at once.
    """
    found: list[tuple[Tensor, nn.Linear | None]] = []
    for policy in policies:
        with precision(policy):
            whole = _full_head(policy, batch) if policy.fast_head is None else None
        states_NH = head_states(policy, batch, batch.head_N) if whole is None else whole
        found.append((states_NH, policy.fast_head))
    first, head = found[0]
    rows = _rows(first, first.shape[1] if head is None else head.weight.shape[0])
    for start, stop, here in _tiles(batch.head_N.shape[0], rows, batch.edge_begins):
        parts = [(x[start:stop], head) for x, head in found]
        yield start, here, [x.float() if head is None else _logits(x, head.weight, head.bias) for x, head in parts]


def head_states(policy: Policy, batch: Batch, flat_index: Tensor) -> Tensor:
    """The backbone's last hidden states at flat places of the batch: [positions, hidden], in the compute dtype; inside `within`."""
    # [B, T, H] -> [B T, H] -> [N, H]: the head sees only the places that score a token
    with precision(policy):
        inputs, index_N = _inputs(policy, batch, flat_index)
        states_NH = policy.backbone(**inputs).last_hidden_state.flatten(0, 1)[index_N]
    # the head reads its whole weights then; of most models these states are float32 anyway
    return states_NH.float() if policy.two_parts else states_NH


def logps_of_states(policy: Policy, batch: Batch, hidden_NH: Tensor) -> Tensor:
    """Log-probability of every scored token from the states at head_N, through the linear head: float32 [E], nats."""
    assert policy.fast_head is not None
    weight_VH, bias_V = policy.fast_head.weight, policy.fast_head.bias
    edges = (batch.edge_head_E, batch.edge_target_E, batch.edge_begins)
    # where all products of the backward are rounded, these two are; the forward is not, for log-probs are sums
    rounded = policy.compute_dtype == torch.bfloat16 and not policy.two_parts
    logp_E = _ScoredHead.apply(hidden_NH, weight_VH, bias_V, edges, torch.bfloat16 if rounded else hidden_NH.dtype)
    assert isinstance(logp_E, Tensor)
    return logp_E


def precision(policy: Policy) -> torch.autocast:
    """The products' number format: bfloat16 where the policy asks for it (of both parts of a weight: two_parts.py)."""
    # split weights are freed after their layer; a cache would hold them all in bfloat16
    cached, wanted = policy.root is None, policy.compute_dtype == torch.bfloat16
    return torch.autocast(policy.device.type, torch.bfloat16, enabled=wanted, cache_enabled=cached)


def _inputs(policy: Policy, batch: Batch, index: Tensor) -> tuple[dict[str, Any], Tensor]:
    """What the model is called with, and where the tokens of an index stand in it."""
    if policy.sight is None:
        return _laid_out(policy, batch, index)
    if batch.seen_J is None or batch.feature_J is None:
        # the model would read the placeholder's own embedding, and nobody would know
        assert not bool((batch.ids_BT == policy.sight.token_id).any()), "every picture of a batch comes with it"
        return _laid_out(policy, batch, index)
    feature_FH = vision.features(policy.backbone, policy.sight, batch.pictures)
    # a GPU's way may have an order of its own, and the model takes features in that of the places
    inputs, found = _laid_out(policy, batch, torch.cat([index, batch.seen_J]))
    order_J = batch.feature_J[found[len(index) :].argsort()]
    return inputs | vision.seen(feature_FH, order_J), found[: len(index)]


def _laid_out(policy: Policy, batch: Batch, index: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The batch as the model's layout and attention want it."""
    common = {"input_ids": batch.ids_BT, "position_ids": batch.position_BT, "use_cache": False}
    if batch.mask_BT is not None:
        return common | {"attention_mask": batch.mask_BT.long()}, index
    # a packed row has no mask: tree_nodes reach attention.py through the model's own keyword arguments
    if policy.attention == "parts":
        return common | {"tree_nodes": batch.nodes}, index
    # only GPUs come here
    from favor.model import engines

    return engines.inputs(policy.attention, batch, common, index)


def _full_head(policy: Policy, batch: Batch) -> Tensor:
    """The model's own head with everything it does to logits, on the columns that hold a scored position."""
    inputs, column_C = _inputs(policy, batch, batch.column_C)
    logits = policy.model(**inputs, logits_to_keep=column_C).logits
    return logits[batch.head_N // batch.ids_BT.shape[1], batch.head_column_N]


class _ScoredHead(torch.autograd.Function):
    """logp_E = log softmax(h W^T + b) at the scored tokens, without ever holding all the logits and their gradient.

    Backward, with g_E the incoming gradient and c_n the sum of g over the tokens scored at position n:
    dlogits_n = sum_e g_e onehot(target_e) - c_n softmax_n.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        edges: tuple[Tensor, Tensor, tuple[int, ...]],
        backward_dtype: torch.dtype,
    ) -> Tensor:
        edge_head_E, edge_target_E, edge_begins = edges
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, edge_head_E, edge_target_E)
        ctx.edge_begins, ctx.backward_dtype = edge_begins, backward_dtype
        count, vocabulary = hidden_NH.shape[0], weight_VH.shape[0]
        needed = any(ctx.needs_input_grad)
        # widened or narrowed once, not once a tile
        cast_VH = weight_VH.to(hidden_NH.dtype)
        # 4 bytes a float32: 2,000 places of a 49,152-word vocabulary are 0.4 GB
        keep = needed and count * vocabulary * 4 <= _KEEP_BYTES
        probs_NV = hidden_NH.new_empty((count, vocabulary), dtype=torch.float32) if keep else None
        top_N = hidden_NH.new_empty(count, dtype=torch.float32)
        logit_E = hidden_NH.new_empty(edge_head_E.shape[0], dtype=torch.float32)
        for start, stop, here in _tiles(count, _rows(hidden_NH, vocabulary), edge_begins):
            # [tile, V]: the one moment at which these logits exist
            logits = _logits(hidden_NH[start:stop], cast_VH, bias_V)
            logit_E[here] = logits[edge_head_E[here] - start, edge_target_E[here]]
            peak, where = logits.max(-1)
            probs = probs_NV[start:stop] if probs_NV is not None else torch.empty_like(logits)
            torch.softmax(logits, -1, out=probs)
            # log-sum-exp from the largest probability, which cannot underflow
            top_N[start:stop] = peak - probs.gather(1, where.unsqueeze(1)).squeeze(1).log()
        ctx.probs_NV = probs_NV
        ctx.lse_N = top_N
        return logit_E - top_N[edge_head_E]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, edge_head_E, edge_target_E = ctx.saved_tensors
        (grad_E,) = grads
        share_N = torch.zeros_like(ctx.lse_N).index_add_(0, edge_head_E, grad_E)
        grad_hidden = torch.empty_like(hidden_NH)
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        cast = weight_VH.to(hidden_NH.dtype)
        narrow_VH, narrow_NH = cast.to(ctx.backward_dtype), hidden_NH.to(ctx.backward_dtype)
        count = hidden_NH.shape[0]
        # kept probabilities are one big tile: fewer, larger products
        rows = count if ctx.probs_NV is not None else _rows(hidden_NH, weight_VH.shape[0])
        for start, stop, edges in _tiles(count, rows, ctx.edge_begins):
            # [tile, V]: -c softmax, then + g at the scored tokens
            grad = _probabilities(ctx, cast, start, stop).mul_(-share_N[start:stop, None])
            grad.index_put_((edge_head_E[edges] - start, edge_target_E[edges]), grad_E[edges], accumulate=True)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(ctx.backward_dtype)
            grad_hidden[start:stop] = grad @ narrow_VH
            if grad_weight is not None:
                _add_product(grad_weight, grad, narrow_NH[start:stop])
        ctx.probs_NV = None
        return grad_hidden, grad_weight, grad_bias, None, None


def _add_product(total_VH: Tensor, grad_NV: Tensor, hidden_NH: Tensor) -> None:
    if grad_NV.dtype == total_VH.dtype:
        total_VH.addmm_(grad_NV.T, hidden_NH)
    else:
        total_VH.add_(grad_NV.T @ hidden_NH)


def _probabilities(ctx: Any, weight_VH: Tensor, start: int, stop: int) -> Tensor:
    """Softmax of a tile, kept from the forward or computed again; the caller overwrites it, so it is used once."""
    if ctx.probs_NV is not None:
        return ctx.probs_NV[start:stop]
    hidden_NH, _, bias_V, *_ = ctx.saved_tensors
    logits = _logits(hidden_NH[start:stop], weight_VH, bias_V)
    return logits.sub_(ctx.lse_N[start:stop, None]).exp_()


def _logits(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    bias = None if bias_V is None else bias_V.to(hidden.dtype)
    return nn.functional.linear(hidden, weight_VH.to(hidden.dtype), bias).float()


def _rows(hidden: Tensor, vocabulary: int) -> int:
    """Positions whose logits make up a tile."""
    return max(1, (_TILE_BYTES if hidden.device.type == "cpu" else _GPU_TILE_BYTES) // (4 * vocabulary))


def _tiles(count: int, rows: int, edge_begins: tuple[int, ...]) -> Iterator[tuple[int, int, slice]]:
    """Row ranges of one tile each, with the scored tokens whose position falls into them."""
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        yield start, stop, slice(edge_begins[start], edge_begins[stop])
