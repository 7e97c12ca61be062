"""What needs a whole optimizer batch before its gradient: losses that couple all of it, exactly, and KTO's z0.

Pass 1: log-probs of every response without a graph; the loss over the whole optimizer batch and its derivative c by
every token's log-prob. Pass 2: the gradient of sum c log pi, one micro-batch of single branches after the other.
In: the trees of an optimizer batch. Out: branch batches and an Objective for step(). Next: step.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from favor.data.batches import build
from favor.data.types import Batch, TokenTree
from favor.losses.table import LossConfig, item_weight, needs, term_sums
from favor.losses.view import Scored
from favor.model.batched import measured
from favor.model.load import Policy
from favor.model.logprobs import mean_overlap, position_M, response_logps, scored_logps
from favor.ranks import World
from favor.train.reference import Reference
from favor.train.step import Objective


class Whole(NamedTuple):
    """An optimizer batch (or a part of the held-out data) at once, equal on all ranks: its log-probs without a graph."""

    scored: Scored
    batch: Batch


def gather(
    config: LossConfig, policy: Policy, reference: Reference, trees: Sequence[TokenTree], budget: int, world: World
) -> Whole:
    """Pass 1: everything the loss reads, computed in micro-batches of `budget` tokens, shared among the ranks."""
    batch = build(trees, policy.layout).to(policy.device)

    def both(part: Batch) -> Tensor:
        # the policy's log-probs [M] and, of a live reference, its own beside them: [1 or 2, M]
        logps = [scored_logps(policy, part), *([reference.tokens(part)] if reference.tokens else [])]
        return torch.stack([logp_E.double()[part.member_edge_M] for logp_E in logps])

    pi_M, *live = measured(policy, trees, both, budget, world, tokens=True).to(policy.device)
    ref_M = live[0] if live else None
    # a stored reference only looks up
    ref_R = reference.logps(batch) if ref_M is None else _per_response(ref_M, batch)
    overlap_R = None
    if needs(config).overlap:
        overlap_R = measured(policy, trees, lambda part: mean_overlap(policy, part), budget, world).to(policy.device)
    return Whole(Scored(_per_response(pi_M, batch), ref_R, pi_M, ref_M, overlap_R), batch)


def surrogate(config: LossConfig, policy: Policy, whole: Whole, stats: Mapping[str, Tensor], world: World) -> Objective:
    """Pass 2's objective: its gradient is that of [loss] over the whole optimizer batch; its value and statistics too.

    Example, AOT with two pairs of log-ratio gaps u = (3, 1) of the policy and l = (2, 0) of the reference, in nats: the loss
    is a mean of f(u_sorted - l_sorted), so which l a pair is held against depends on every other pair. Pass 1 computes u
    once, without a graph; d loss / d log pi(token) = c, a number per token, is then a constant; and the gradient of
    sum c log pi by the weights, which *is* a sum over single responses, equals that of the loss (chain rule).
    """
    scored, all_of_it = whole
    assert scored.pi_M is not None
    leaf_M = scored.pi_M.clone().requires_grad_()
    seen = replace(scored, pi_R=_per_response(leaf_M, all_of_it), pi_M=leaf_M)
    counts = torch.tensor(item_weight(config, all_of_it), dtype=torch.float64, device=leaf_M.device)
    # a term without items in this optimizer batch adds nothing
    value = (term_sums(config, seen, all_of_it) / counts.clamp_min(1e-12)).sum()
    (coefficient_M,) = torch.autograd.grad(value, leaf_M)
    start_R = all_of_it.length_R.cumsum(0) - all_of_it.length_R
    index_R, row_R = all_of_it.index_R.sort()
    reports = _once(value.detach() * all_of_it.num_responses, stats, here=world.is_main)

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        place_M = start_R[row_R[torch.searchsorted(index_R, batch.index_R)]][batch.member_response_M] + position_M(
            batch
        )
        logp_M = scored_logps(policy, batch).double()[batch.member_edge_M]
        linear = (coefficient_M[place_M] * logp_M).sum() * all_of_it.num_responses
        share, figures = next(reports)
        return linear - linear.detach() + share, figures

    return Objective(loss, lambda batch: (float(batch.num_responses),), tuple(stats))


def branches(trees: Sequence[TokenTree]) -> list[TokenTree]:
    """Every response as a tree of its own: what pass 2 cuts into micro-batches."""
    return [
        _of(tree, (response,), tree.first_response + i, complete=tree.complete[i])
        for tree in trees
        for i, response in enumerate(tree.response_ids)
    ]


def kto_zero(
    policy: Policy, live: Callable[[Batch], Tensor], trees: Sequence[TokenTree], budget: int, world: World
) -> float:
    """KTO's z0 = max(0, mean of log pi(y'|x) - log ref(y'|x)), y' a response to the next prompt of the optimizer batch.

    0 for a batch of one prompt, which has no mismatched response. live: log-probs of the reference.
    """
    if len(trees) < 2:
        return 0.0
    # at i = 0 the tree before is the last one
    mismatched = [
        _of(tree, trees[i - 1].response_ids[:1], tree.first_response, complete=True) for i, tree in enumerate(trees)
    ]
    ratio_R = measured(policy, mismatched, lambda batch: response_logps(policy, batch) - live(batch), budget, world)
    return max(0.0, float(ratio_R.mean()))


def _of(tree: TokenTree, responses: tuple[tuple[int, ...], ...], first: int, *, complete: bool) -> TokenTree:
    """The prompt of a tree, its pictures too, with another response and nothing compared."""
    alone = replace(tree, response_ids=responses, complete=(complete,), first_response=first)
    return replace(alone, comparisons=(), ties=(), thumbs=())


def _once(value: Tensor, stats: Mapping[str, Tensor], *, here: bool) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
    """Value and statistics of the optimizer batch for the main rank's first micro-batch, zeros for all others."""
    if here:
        yield value, stats
    nothing = {name: torch.zeros_like(stat) for name, stat in stats.items()}
    while True:
        yield torch.zeros_like(value), nothing


def _per_response(value_M: Tensor, batch: Batch) -> Tensor:
    total_R = torch.zeros(batch.num_responses, dtype=value_M.dtype, device=value_M.device)
    return total_R.index_add(0, batch.member_response_M, value_M)
