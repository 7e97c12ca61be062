"""What [loss] needs to see of a batch: log-probs of policy and reference, and whether the data can feed it.

In: LossConfig, Policy, Reference. Out: Scored, the trees that hold items, refusals. Next: step.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from favor.data.types import Batch, TokenTree
from favor.errors import ConfigError
from favor.losses.table import LossConfig, Term, needs, terms
from favor.losses.view import Scored
from favor.model.batched import measured
from favor.model.load import Policy
from favor.model.logprobs import mean_overlap, response_logps, scored_logps, sum_tokens
from favor.ranks import World
from favor.train.reference import Reference


def score(config: LossConfig, policy: Policy, reference: Reference, batch: Batch, zero: float = 0.0) -> Scored:
    """Log-probs of policy (with a graph) and reference, with what the loss needs beside."""
    needed = needs(config)
    overlap_R = mean_overlap(policy, batch) if needed.overlap else None
    if not needed.tokens:
        return Scored(response_logps(policy, batch), reference.logps(batch), overlap_R=overlap_R, zero=zero)
    assert reference.tokens is not None
    pi_E, ref_E = scored_logps(policy, batch), reference.tokens(batch)
    pi_M, ref_M = (value_E.double()[batch.member_edge_M] for value_E in (pi_E, ref_E))
    return Scored(sum_tokens(batch, pi_E), sum_tokens(batch, ref_E), pi_M, ref_M, overlap_R, zero)


def usable(config: LossConfig, trees: Iterable[TokenTree], source: str) -> list[int]:
    """Indices of the trees that hold items of any term.

    Raises ConfigError when a term finds none, needs margins that are missing, or would pass over soft labels.
    """
    kept: list[int] = []
    found = terms(config)
    items = [0] * len(found)
    for index, tree in enumerate(trees):
        _check_tree(found, tree, source)
        counts = [_num_items(term.loss.items, tree) for term in found]
        items = [a + b for a, b in zip(items, counts, strict=True)]
        if any(counts):
            kept.append(index)
    for term, count in zip(found, items, strict=True):
        if not count:
            raise ConfigError(
                f"{source}: loss '{term.kind}' finds nothing to learn from ({_WANTS[term.loss.items]}); "
                "give such rows, or another loss.kind"
            )
    return kept


_WANTS = {
    "pairs": "it wants pairs: chosen and rejected, a ranking or scores",
    "pairs and ties": "it wants pairs or ties",
    "rankings": "it wants pairs or rankings",
    "thumbs": "it wants labels, or pairs",
}


def _num_items(items: str, tree: TokenTree) -> int:
    extra = {"pairs and ties": len(tree.ties), "thumbs": len(tree.thumbs)}
    return len(tree.comparisons) + extra.get(items, 0)


def _check_tree(found: Sequence[Term], tree: TokenTree, source: str) -> None:
    soft = any(comparison.label != 1.0 for comparison in tree.comparisons)
    unmarked = any(not _has_margins(comparison.gaps) for comparison in tree.comparisons)
    for term in found:
        reads = term.loss.reads()
        if soft and "label_P" not in reads:
            raise ConfigError(
                f"{source}, row {tree.row}: it has a soft label, which loss '{term.kind}' does not read; "
                "use loss.kind=dpo, or data.votes=weight or majority"
            )
        if unmarked and "margin_P" in reads:
            raise ConfigError(
                f"{source}, row {tree.row}: loss '{term.kind}' needs a margin above 0 for every pair; "
                "give margins or scores, or choose another loss"
            )


def _has_margins(gaps: Sequence[float]) -> bool:
    return bool(gaps) and all(gap > 0 for gap in gaps)


def kto_zero(
    config: LossConfig,
    policy: Policy,
    alive: Callable[[Batch], Tensor] | None,
    trees: Sequence[TokenTree],
    settings: tuple[int, World],
) -> float:
    """KTO's z0 = max(0, mean of log pi(y'|x) - log ref(y'|x)), y' a response to the next prompt of the optimizer batch.

    0 for other losses, and for a batch of one prompt, which has no mismatched response. settings: token budget, ranks.
    """
    if not needs(config).zero or len(trees) < 2:
        return 0.0
    assert alive is not None
    strangers = [
        replace(
            trees[i], response_ids=trees[i - 1].response_ids[:1], complete=(True,), comparisons=(), ties=(), thumbs=()
        )
        for i in range(len(trees))
    ]
    budget, world = settings
    ratio_R = measured(policy, strangers, lambda batch: response_logps(policy, batch) - alive(batch), budget, world)
    return max(0.0, float(ratio_R.mean()))
