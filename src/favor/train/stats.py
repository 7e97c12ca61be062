"""Which trees a loss learns from, and the figures of a step.

In: section [loss], token trees; a batch with its log-probs. Out: refusals; sums over pairs and thumbs, and their means.
Next: step.py.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from favor.data.types import Batch, TokenTree
from favor.errors import ConfigError
from favor.losses.table import LossConfig, Term, beta_of, needs, terms
from favor.losses.view import Scored

_WANTS = {
    "pairs": "it needs pairs: chosen and rejected, a ranking or scores",
    "pairs and ties": "it needs pairs or ties",
    "rankings": "it needs pairs or rankings",
    "thumbs": "it needs labels, or pairs",
}


# margins that rounding alone makes, as before the first step, when both models are one
_ROUNDING = 1e-5
# sums over the pairs and thumbs of a batch; docs/metrics.md defines their means
STATS = (
    *("pairs", "correct", "margin", "reward_chosen", "reward_rejected"),
    *("logp_chosen_per_token", "logp_rejected_per_token", "chosen_below_reference", "referenced"),
    *("good", "bad", "reward_good", "reward_bad"),
)
# the items that each mean is over
_PER = {
    **dict.fromkeys(("margin", "reward_chosen", "reward_rejected"), "pairs"),
    **dict.fromkeys(("logp_chosen_per_token", "logp_rejected_per_token"), "pairs"),
    "chosen_below_reference": "referenced",
    "reward_good": "good",
    "reward_bad": "bad",
}


def usable(config: LossConfig, trees: Iterable[TokenTree], source: str) -> list[int]:
    """Indices of the trees that hold items of any term.

    Raises ConfigError when a term finds none, needs margins that are missing, or would pass over soft labels.
    """
    kept: list[int] = []
    found = terms(config)
    reads = [(term, term.loss.reads()) for term in found]
    items = [0] * len(found)
    for index, tree in enumerate(trees):
        _check_tree(reads, tree, source)
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


def _num_items(items: str, tree: TokenTree) -> int:
    extra = {"pairs and ties": len(tree.ties), "thumbs": len(tree.thumbs)}
    return len(tree.comparisons) + extra.get(items, 0)


def _check_tree(found: Sequence[tuple[Term, set[str]]], tree: TokenTree, source: str) -> None:
    soft = any(comparison.label != 1.0 for comparison in tree.comparisons)
    unmarked = any(not _has_margins(comparison.gaps) for comparison in tree.comparisons)
    for term, reads in found:
        if soft and "label_P" not in reads:
            raise ConfigError(
                f"{source}, row {tree.row}: it has a soft label, which loss '{term.kind}' does not read; "
                "use loss.kind=dpo, or data.compare.votes=weight or majority"
            )
        if unmarked and "margin_P" in reads:
            raise ConfigError(
                f"{source}, row {tree.row}: loss '{term.kind}' needs a margin above 0 for every pair; "
                "give margins or scores, or choose another loss"
            )


def _has_margins(gaps: Sequence[float]) -> bool:
    return bool(gaps) and all(gap > 0 for gap in gaps)


def batch_sums(config: LossConfig, scored: Scored, batch: Batch) -> dict[str, Tensor]:
    """STATS of a batch, each a scalar on its device. A margin of 0, up to rounding, counts as half right."""
    pi_R, reward_R = scored.pi_R.detach(), rewards(config, scored, batch)
    per_token_R = pi_R / batch.length_R
    free = not needs(config).reference
    chosen_P, rejected_P = reward_R[batch.chosen_P], reward_R[batch.rejected_P]
    margin_P, thumb_I = chosen_P - rejected_P, reward_R[batch.thumb_I]
    ones_P, none = torch.ones_like(margin_P), margin_P.new_zeros(())
    return {
        "pairs": ones_P.sum(),
        "correct": ((hardshrink(margin_P, _ROUNDING).sign() + 1) / 2).sum(),
        "margin": margin_P.sum(),
        "reward_chosen": chosen_P.sum(),
        "reward_rejected": rejected_P.sum(),
        "logp_chosen_per_token": per_token_R[batch.chosen_P].sum(),
        "logp_rejected_per_token": per_token_R[batch.rejected_P].sum(),
        "chosen_below_reference": none if free else (chosen_P < 0).double().sum(),
        "referenced": none if free else ones_P.sum(),
        "good": batch.good_I.double().sum(),
        "bad": (~batch.good_I).double().sum(),
        "reward_good": thumb_I.where(batch.good_I, 0).sum(),
        "reward_bad": thumb_I.where(~batch.good_I, 0).sum(),
    }


def rewards(config: LossConfig, scored: Scored, batch: Batch) -> Tensor:
    """The implicit reward of every response [R]: beta log(pi/ref); without a reference beta log pi a token."""
    pi_R = scored.pi_R.detach()
    return beta_of(config) * (pi_R - scored.ref_R if needs(config).reference else pi_R / batch.length_R)


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """The step record's figures from its STATS; those without items are left out."""
    found = {"accuracy": sums["correct"] / sums["pairs"]} if sums["pairs"] else {}
    found |= {name: sums[name] / sums[items] for name, items in _PER.items() if sums[items]}
    thumbs = round(sums["good"] + sums["bad"])
    return found | {"pairs": round(sums["pairs"])} | ({"thumbs": thumbs} if thumbs else {})


def shown(record: Mapping[str, object]) -> str:
    """The progress line's figures, from a step record."""
    labels = {
        "loss": ("loss", ".4f"),
        "accuracy": ("acc", ".2f"),
        "margin": ("margin", "+.3f"),
        "kl": ("KL", ".2f"),
        "reward": ("reward", ".3f"),
        "pairs_per_s": ("pairs/s", ".2f"),
        "tokens_per_s": ("tokens/s", ".0f"),
    }
    return "  ".join(f"{label} {record[key]:{spec}}" for key, (label, spec) in labels.items() if key in record)


def displacement(
    below: Sequence[tuple[float, float]], sums: Mapping[str, float], window: int, threshold: float
) -> tuple[tuple[tuple[float, float], ...], str | None]:
    """The last `window` steps' (chosen below the reference, chosen), and a warning once their share passes the threshold."""
    now = (*below, (sums["chosen_below_reference"], sums["referenced"]))[-window:]
    share, before = _share(now), _share(below)
    was_over = len(below) == window and before > threshold
    if len(now) < window or share <= threshold or was_over:
        return now, None
    return now, (
        f"warning: {share:.0%} of the last pairs have a chosen response less likely than under the reference "
        f"(threshold {threshold:.0%}); a larger loss.beta, a smaller optim.lr or SFT on the chosen first helps"
    )


def _share(below: Sequence[tuple[float, float]]) -> float:
    return sum(b for b, _ in below) / max(1.0, sum(n for _, n in below))
