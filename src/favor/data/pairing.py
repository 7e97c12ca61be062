"""Which comparisons a row's judgment becomes: pairs or a ranking, how close is too close, what votes count.

In: a Judgment. Out: the Judgment with its final orders and ties, and what was left out. Pure. Next: grow.py.
"""

from itertools import combinations
from typing import Literal, NamedTuple, TypeAlias

from favor.data.formats import Judgment

Pairing: TypeAlias = Literal["auto", "ranking", "all", "best_worst", "best_rest"]
Votes: TypeAlias = Literal["soft", "weight", "majority"]
Pair: TypeAlias = tuple[int, int]


class Rules(NamedTuple):
    """How judgments become comparisons (section [data] says what each value means)."""

    pairing: Pairing = "auto"
    min_gap: float = 0.0
    votes: Votes = "soft"


class LeftOut(NamedTuple):
    """Pairs that a row implies and no comparison says: closer than min_gap, or not asked for by the pairing.

    unknown: comparisons kept although min_gap could not be checked, as the data gives no scores.
    """

    close: int = 0
    unasked: int = 0
    unknown: int = 0


def arrange(judgment: Judgment, rules: Rules) -> tuple[Judgment, LeftOut]:
    """The judgment as the rules want it. Single responses and plain SFT data pass as they are."""
    if judgment.votes:
        return _voted(judgment, rules)
    if not judgment.orders and not judgment.ties:
        return judgment, LeftOut()
    better = sorted({pair for order in judgment.orders for pair in combinations(order, 2)})
    far = [pair for pair in better if _gap(judgment, pair) >= rules.min_gap]
    asked, ties = _asked(judgment, better, far, rules)
    said = {pair for order in asked for pair in combinations(order, 2)}
    unknown = len(asked) if rules.min_gap > 0 and not judgment.scores else 0
    unasked = len(set(far) - said) + len(judgment.ties) - len(ties)
    left_out = LeftOut(len(better) - len(far), unasked, unknown)
    return judgment._replace(orders=tuple(asked), ties=tuple(ties)), left_out


def _voted(judgment: Judgment, rules: Rules) -> tuple[Judgment, LeftOut]:
    """Votes count as scores, but how many more one got is no score difference: no gaps go on."""
    pair = len(judgment.responses) == 2
    labels, votes = judgment.labels, judgment.votes
    scored = judgment._replace(scores=votes, votes=(), labels=())
    found, left_out = arrange(scored, rules)
    found = found._replace(scores=())
    if not pair or not found.orders or rules.votes == "majority":
        return found, left_out
    if rules.votes == "soft":
        return found._replace(labels=labels), left_out
    return found._replace(weight=found.weight * abs(votes[0] - votes[1])), left_out


def _gap(judgment: Judgment, pair: Pair) -> float:
    """By how much the first is better; infinite where the data does not say."""
    return judgment.scores[pair[0]] - judgment.scores[pair[1]] if judgment.scores else float("inf")


def _asked(
    judgment: Judgment, better: list[Pair], far: list[Pair], rules: Rules
) -> tuple[list[tuple[int, ...]], list[Pair]]:
    """The orders and the ties that the pairing wants, out of the pairs that are far enough apart."""
    ties = list(judgment.ties)
    if rules.pairing == "all" or (rules.pairing == "auto" and len(far) < len(better)):
        return list[tuple[int, ...]](far), ties
    if rules.pairing == "auto":
        return list(judgment.orders), ties
    from_best = _from_best(judgment, better)
    if rules.pairing == "ranking":
        chain = _chain(from_best, set(far))
        return ([tuple(chain)] if len(chain) > 1 else []), ties
    best, others = from_best[0], from_best[1:]
    wanted = others[-1:] if rules.pairing == "best_worst" else others
    met = {frozenset((best, other)) for other in wanted}
    return [(best, other) for other in wanted if (best, other) in set(far)], [t for t in ties if frozenset(t) in met]


def _from_best(judgment: Judgment, better: list[Pair]) -> list[int]:
    """The responses that are compared, best first; of equals the earlier in the row."""
    wins = {i: 0 for order in (*judgment.orders, *judgment.ties) for i in order}
    for winner, _ in better:
        wins[winner] += 1
    return sorted(wins, key=lambda i: (-wins[i], i))


def _chain(from_best: list[int], far: set[Pair]) -> list[int]:
    """A strict ranking: from the best down, each member far enough below the last one kept."""
    kept = from_best[:1]
    for i in from_best[1:]:
        if (kept[-1], i) in far:
            kept.append(i)
    return kept
