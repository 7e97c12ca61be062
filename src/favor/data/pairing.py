"""Which comparisons a row becomes: pairs or a ranking, how close is too close, what votes count.

In: a Judgment. Out: the Judgment with its final orders and ties, and what was left out. Pure. Next: grow.py.
"""

from collections.abc import Collection
from itertools import combinations
from typing import Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, Field

from favor.config import STRICT
from favor.data.formats import Judgment

Pairing: TypeAlias = Literal["auto", "ranking", "all", "best_worst", "best_rest"]
Votes: TypeAlias = Literal["soft", "weight", "majority"]
Pair: TypeAlias = tuple[int, int]


class Rules(BaseModel):
    """Section [data.compare]: which comparisons scores, rankings and votes become."""

    model_config = STRICT
    pairing: Pairing = "auto"
    """What scores and rankings become; auto keeps rankings, and makes pairs where members are equal or too close."""
    min_gap: float = Field(default=0.0, ge=0)
    """Pairs whose scores differ by less are left out."""
    votes: Votes = "soft"
    """What votes on two responses become: a soft label, a weight, or the majority alone."""


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
    scores = judgment.scores
    better = sorted({pair for order in judgment.orders for pair in combinations(order, 2)})
    far = {(a, b) for a, b in better if not scores or scores[a] - scores[b] >= rules.min_gap}
    orders, ties = _asked(judgment, better, far, rules.pairing)
    said = {pair for order in orders for pair in combinations(order, 2)}
    unknown = len(orders) if rules.min_gap > 0 and not scores else 0
    left_out = LeftOut(len(better) - len(far), len(far - said) + len(judgment.ties) - len(ties), unknown)
    return judgment._replace(orders=tuple(orders), ties=tuple(ties)), left_out


def _voted(judgment: Judgment, rules: Rules) -> tuple[Judgment, LeftOut]:
    """Votes are compared as scores are; how many more one got is not a score difference, so the scores go again."""
    votes = judgment.votes
    found, left_out = arrange(judgment._replace(scores=votes, votes=(), labels=()), rules)
    found = found._replace(scores=())
    if len(votes) != 2 or not found.orders or rules.votes == "majority":
        return found, left_out
    if rules.votes == "soft":
        return found._replace(labels=judgment.labels), left_out
    return found._replace(weight=found.weight * abs(votes[0] - votes[1])), left_out


def _asked(
    judgment: Judgment, better: list[Pair], far: Collection[Pair], pairing: Pairing
) -> tuple[list[tuple[int, ...]], list[Pair]]:
    """The orders and the ties that the pairing wants, out of the pairs that are far enough apart."""
    ties = list(judgment.ties)
    if pairing == "auto" and len(far) == len(better):
        return list(judgment.orders), ties
    if pairing in ("auto", "all"):
        return [pair for pair in better if pair in far], ties
    # best first; of equals the earlier in the row
    wins = {i: sum(pair[0] == i for pair in better) for order in (*judgment.orders, *ties) for i in order}
    best, *others = sorted(wins, key=lambda i: (-wins[i], i))
    if pairing == "ranking":
        # a strict one: from the best down, each far enough below the last one kept
        kept = [best]
        for i in others:
            kept += [i] if (kept[-1], i) in far else []
        return ([tuple(kept)] if len(kept) > 1 else []), ties
    wanted = others[-1:] if pairing == "best_worst" else others
    met = [{best, other} for other in wanted]
    return [(best, other) for other in wanted if (best, other) in far], [tie for tie in ties if set(tie) in met]
