"""What the votes say of the people and of the work: agreement, gold, ability, sides; figures for the page and the terminal.

In: the store. Out: Figures. Next: export.py.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from favor.eval.intervals import SHARE, Interval, mean_interval
from favor.label import ability, store
from favor.label.store import Db, Verdict, Vote

Golds: TypeAlias = Mapping[int, Verdict | None]

VERDICTS = ("first", "second", "tie", "both_bad")
# what the model of ability knows of a verdict
_TRUTHS = {
    "first": ability.FIRST,
    "second": ability.SECOND,
    "tie": ability.NEITHER,
    "both_bad": ability.NEITHER,
    None: ability.UNKNOWN,
}


class Person(NamedTuple):
    """One annotator. right: the model's probability that they name the better answer of a pair that has one.

    gold: how often they were right where the answer is known; None without such a vote.
    """

    name: str
    votes: int
    skips: int
    edits: int
    right: float
    gold: Interval | None
    num_gold: int


class Figures(NamedTuple):
    """What the page of results shows.

    alpha: Krippendorff's, of all verdicts; None where nobody could agree or differ. alike: the share of couples of votes on
    one pair that are the same. left: how often the answer on the left was preferred. doubly: pairs with two votes or more.
    """

    pairs: int
    voted: int
    doubly: int
    verdicts: dict[str, int]
    alpha: float | None
    alike: float | None
    left: Interval | None
    people: list[Person]


def measured(db: Db) -> Figures:
    """All figures, from what the store holds now."""
    golds, names = store.golds(db), store.names(db)
    every = store.votes(db)
    said = [vote for vote in every if vote.verdict != "skip"]
    counts = _counts(golds, said)
    fitted = ability.fit(as_numbers(golds, names, said))
    chosen, decided = store.left_chosen(db)
    return Figures(
        pairs=len(golds),
        voted=len({vote.pair for vote in said}),
        doubly=int((counts.sum(1) > 1).sum()),
        verdicts=dict(Counter(vote.verdict for vote in said)),
        alpha=alpha(counts),
        alike=_alike(counts),
        left=_share([1.0] * chosen + [0.0] * (decided - chosen)),
        people=[
            _person(name, [v for v in every if v.annotator == number], golds, float(fitted.decided[place, 0]))
            for place, (number, name) in enumerate(names.items())
        ],
    )


def as_numbers(golds: Golds, people: Mapping[int, str], votes: Sequence[Vote]) -> ability.Votes:
    """Votes (without skips) as the model takes them; places are those of `golds` and `people`."""
    place_of = {number: place for place, number in enumerate(golds)}
    person_of = {number: place for place, number in enumerate(people)}
    said = [(place_of[v.pair], person_of[v.annotator], _TRUTHS[v.verdict]) for v in votes]
    pair, person, verdict = np.array(said, np.int64).reshape(-1, 3).T
    known = np.array([_TRUTHS[known] for known in golds.values()], np.int64)
    return ability.Votes(pair, person, verdict, known, len(people))


def alpha(counts: ability.Ints) -> float | None:
    """Krippendorff's alpha of nominal verdicts, counted [pairs, verdicts]: 1 all agree, 0 as by chance.

    None when no pair has two votes, or when all votes on such pairs are the same, so that chance agrees always too.
    """
    import krippendorff

    twice = counts[counts.sum(1) > 1]
    twice = twice[:, twice.sum(0) > 0]
    if twice.shape[1] < 2:
        return None
    return float(krippendorff.alpha(value_counts=twice, level_of_measurement="nominal"))


def _counts(golds: Golds, votes: Sequence[Vote]) -> ability.Ints:
    place_of = {number: place for place, number in enumerate(golds)}
    found = np.zeros((len(golds), len(VERDICTS)), np.int64)
    for vote in votes:
        found[place_of[vote.pair], VERDICTS.index(vote.verdict)] += 1
    return found


def _alike(counts: ability.Ints) -> float | None:
    """Of all couples of votes on one pair, the share that is the same."""
    totals = counts.sum(1)
    couples = (totals * (totals - 1)).sum()
    return float((counts * (counts - 1)).sum() / couples) if couples else None


def _share(right: Sequence[float]) -> Interval | None:
    return mean_interval(np.array(right), bounds=SHARE) if right else None


def _person(name: str, mine: Sequence[Vote], golds: Golds, right: float) -> Person:
    said = [vote for vote in mine if vote.verdict != "skip"]
    golden = [(vote.verdict, golds[vote.pair]) for vote in said if golds[vote.pair]]
    return Person(
        name=name,
        votes=len(said),
        skips=len(mine) - len(said),
        edits=sum(vote.edit is not None for vote in said),
        right=right,
        gold=_share([float(_TRUTHS[verdict] == _TRUTHS[known]) for verdict, known in golden]),
        num_gold=len(golden),
    )
