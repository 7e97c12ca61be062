"""Exact gradients of losses that couple a whole optimizer batch, with the memory of one branch.

Pass 1: log-probs of every response without a graph; the loss over the whole optimizer batch and its derivative c by
every token's log-prob. Pass 2: the gradient of sum c log pi, one micro-batch of single branches after the other.
In: the trees of an optimizer batch. Out: branch batches and an Objective for step(). Next: step.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from favor.data import batches
from favor.data.types import Batch, TokenTree
from favor.losses.table import LossConfig, item_weight, needs, term_sums
from favor.losses.view import Scored
from favor.model.batched import measured
from favor.model.load import Policy
from favor.model.logprobs import mean_overlap, scored_logps
from favor.ranks import World
from favor.train.reference import Reference
from favor.train.step import Objective


def gather(
    config: LossConfig, policy: Policy, reference: Reference, trees: Sequence[TokenTree], settings: tuple[int, World]
) -> tuple[Scored, Batch]:
    """Pass 1: the whole optimizer batch as Scored, equal on all ranks, without a graph. settings: token budget, ranks."""
    budget, world = settings
    needed = needs(config)
    whole = batches.build(trees, policy.layout).to(policy.device)

    def both(batch: Batch) -> Tensor:
        logps = [scored_logps(policy, batch), *([reference.tokens(batch)] if reference.tokens else [])]
        return torch.stack([logp_E.double()[batch.member_edge_M] for logp_E in logps])

    pi_M, *ref = measured(policy, trees, both, budget, world, tokens=True).to(policy.device)
    assert ref or not needed.tokens, "[reference] is live where tokens are read"
    # a stored reference only looks up; a live one has just been computed
    ref_R = _per_response(ref[0], whole) if ref else reference.logps(whole)
    overlap_R = None
    if needed.overlap:
        overlap_R = measured(policy, trees, lambda batch: mean_overlap(policy, batch), budget, world).to(policy.device)
    return Scored(_per_response(pi_M, whole), ref_R, pi_M, ref[0] if ref else None, overlap_R), whole


def surrogate(
    config: LossConfig, policy: Policy, found: tuple[Scored, Batch], stats: Mapping[str, Tensor], world: World
) -> Objective:
    """Pass 2's objective: its gradient is that of [loss] over the whole optimizer batch; its value and statistics too."""
    scored, whole = found
    assert scored.pi_M is not None
    leaf_M = scored.pi_M.clone().requires_grad_()
    seen = replace(scored, pi_R=_per_response(leaf_M, whole), pi_M=leaf_M)
    counts = torch.tensor(item_weight(config, whole), dtype=torch.float64, device=leaf_M.device)
    # a term without items in this optimizer batch adds nothing
    value = (term_sums(config, seen, whole) / counts.clamp_min(1e-12)).sum()
    (coefficient_M,) = torch.autograd.grad(value, leaf_M)
    start_R = whole.length_R.cumsum(0) - whole.length_R
    row_of = {index: row for row, index in enumerate(whole.index_R.tolist())}
    reports = _once(value.detach() * whole.num_responses, stats, here=world.is_main)

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        row_R = torch.tensor([row_of[index] for index in batch.index_R.tolist()], device=leaf_M.device)
        place_M = start_R[row_R][batch.member_response_M] + _within(batch)
        logp_M = scored_logps(policy, batch).double()[batch.member_edge_M]
        linear = (coefficient_M[place_M] * logp_M).sum() * whole.num_responses
        share, figures = next(reports)
        return linear - linear.detach() + share, figures

    return Objective(loss, lambda batch: (float(batch.num_responses),), tuple(stats))


def branches(trees: Sequence[TokenTree]) -> list[TokenTree]:
    """Every response as a tree of its own: what pass 2 cuts into micro-batches."""
    return [
        TokenTree(tree.prompt_ids, (response,), (tree.complete[i],), (), tree.first_response + i, tree.row)
        for tree in trees
        for i, response in enumerate(tree.response_ids)
    ]


def _once(value: Tensor, stats: Mapping[str, Tensor], *, here: bool) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
    """Value and statistics of the optimizer batch for the main rank's first micro-batch, zeros for all others."""
    if here:
        yield value, stats
    nothing = {name: torch.zeros_like(stat) for name, stat in stats.items()}
    while True:
        yield torch.zeros_like(value), nothing


def _within(batch: Batch) -> Tensor:
    """The place of every membership within its response."""
    start_R = batch.length_R.cumsum(0) - batch.length_R
    index_M = torch.arange(batch.member_edge_M.shape[0], device=batch.length_R.device)
    return index_M - start_R[batch.member_response_M]


def _per_response(value_M: Tensor, batch: Batch) -> Tensor:
    total_R = torch.zeros(batch.num_responses, dtype=value_M.dtype, device=value_M.device)
    return total_R.index_add(0, batch.member_response_M, value_M)
