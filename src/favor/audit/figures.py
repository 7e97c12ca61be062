"""The figures of a judge: flips, order, position, length, its own answers, agreement with people; intervals over prompts.

In: judged pairs as arrays. Out: figures by name, each with `NAME_interval`. A bias is what a judge adds to people's verdicts:
it is read off a logistic regression that holds them fixed, so that a judge who errs at random, or always, has none.
Next: powered.py.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from favor.audit.pairs import Pair
from favor.eval.intervals import SHARE, Array, Interval, jackknife, mean_interval, t_quantile
from favor.winrate.stats import JudgedPair, Verdict, fitted, position_bias

Ints: TypeAlias = NDArray[np.int64]
Figures: TypeAlias = dict[str, Any]
# a pair in both orders: the verdict with a first, the one with b first
Both: TypeAlias = tuple[Verdict, Verdict]
# differences of two shares
_DIFFERENCE = (-1.0, 1.0)
# prior variance of a coefficient: so wide that it moves nothing; two more prompts keep every fit finite
_WIDE = 1e4
_MIRROR: dict[Verdict, Verdict] = {"A": "B", "B": "A", "tie": "tie", "invalid": "invalid"}


class Judged(NamedTuple):
    """Arrays over pairs.

    judge_P: 1 where the judge prefers a in both orders, 0 where b, between where they differ or tie, nan without two readable
    verdicts. human_P: the share of people for a, nan where nobody was asked. votes_P3: theirs for a, a tie, b. longer_P:
    tanh(difference of lengths / its deviation), in (-1, 1). own_P: 1 where a is the judge's own answer, -1 where b is.
    """

    judge_P: Array
    human_P: Array
    votes_P3: Array
    longer_P: Array
    own_P: Array
    prompt_P: Ints
    named_P: NDArray[np.bool_]

    def only(self, kept: NDArray[np.bool_]) -> "Judged":
        """The pairs that are kept."""
        return Judged._make(values[kept] for values in self)


def judged(pairs: Sequence[Pair], both: Sequence[Both]) -> Judged:
    """Pairs and their verdicts as arrays."""
    outcomes = [JudgedPair(0, *verdicts, 0, 0).outcome for verdicts in both]
    difference = np.array([len(pair.a) - len(pair.b) for pair in pairs], np.float64)
    return Judged(
        judge_P=np.array([np.nan if outcome is None else outcome for outcome in outcomes]),
        human_P=np.array([pair.votes.share for pair in pairs]),
        votes_P3=np.array([pair.votes for pair in pairs], np.float64),
        longer_P=np.tanh(difference / (difference.std() or 1.0)),
        own_P=np.array([pair.own for pair in pairs], np.float64),
        prompt_P=np.array([pair.group for pair in pairs], np.int64),
        named_P=np.array([pair.named for pair in pairs]),
    )


def order_figures(pairs: Sequence[Pair], both: Sequence[Both]) -> Figures:
    """What the order does over all pairs: inconsistency, position bias; and ties and unusable verdicts."""
    prompt_P = np.array([pair.group for pair in pairs], np.int64)
    told = [JudgedPair(pair.group, *verdicts, 0, 0) for pair, verdicts in zip(pairs, both, strict=True)]
    usable = [one for one in told if one.outcome is not None]
    ties, unusable = (np.array([[v == what for v in verdicts] for verdicts in both]) for what in ("tie", "invalid"))
    inconsistent = [not one.consistent for one in usable]
    bias, decisive = position_bias(usable)
    return {
        **_share("inconsistency", inconsistent, [one.prompt for one in usable]),
        **_named("position_bias", bias),
        "decisive_verdicts": decisive,
        **_share("ties", ties[~unusable], np.repeat(prompt_P, 2)[~unusable.ravel()]),
        **_share("unusable", unusable.ravel(), np.repeat(prompt_P, 2)),
    }


def repeat_figures(groups: Sequence[int], asked: Sequence[Sequence[Both]]) -> Figures:
    """Of pairs asked n >= 2 times in both orders: how often the same question gets another verdict, and what the order adds.

    flip_rate: of two verdicts on one question, the chance that they differ. order_effect: of two verdicts in the two orders
    that chance, less the flip rate; for chances p and q of the verdicts in either order it is sum (p - q)^2 / 2, 0 for a judge
    that flips by chance alone.
    """
    if not asked:
        return {**_named("flip_rate", None), **_named("order_effect", None)}
    flips, across = np.array([_disagreement(each) for each in asked]).T
    prompt = np.array(groups, np.int64)
    effect = mean_interval(across - flips, clusters=prompt, bounds=_DIFFERENCE)
    return {**_share("flip_rate", flips, prompt), **_named("order_effect", effect)}


def _disagreement(asked: Sequence[Both]) -> tuple[float, float]:
    """Of couples of verdicts the share that differs: on one question, and on the two orders of it."""
    times = len(asked)
    first, second = Counter(a for a, _ in asked), Counter(_MIRROR[b] for _, b in asked)
    same = sum(count * (count - 1) for order in (first, second) for count in order.values())
    both = sum(first[verdict] * second[verdict] for verdict in first)
    return 1 - same / (2 * times * (times - 1)), 1 - both / times**2


def length_figures(all_pairs: Judged) -> Figures:
    """How the verdict goes with length, in log-odds that an answer gains by being much longer than the other.

    length_association: as it is, whatever its reason. length_difference: the judge's less the people's on the same pairs.
    length_bias: with the people's verdict held fixed. longer_rate: how often the longer one is preferred.
    """
    usable = all_pairs.only(~np.isnan(all_pairs.judge_P))
    known = usable.only(~np.isnan(usable.human_P))
    raw, same, people = (
        _effects(y, part, 0) for y, part in ((usable.judge_P, usable), (known.judge_P, known), (known.human_P, known))
    )
    difference = same and people and (same[0] - people[0], same[1] - people[1])
    return {
        **_named("length_association", _interval(raw, usable)),
        **_named("length_difference", _interval(difference, known)),
        **_named("length_bias", _interval(_effects(known.judge_P, known, 0, fixed=True), known)),
        **_named("longer_rate", _rate(usable.judge_P, np.sign(usable.longer_P), usable.prompt_P)),
        **_named("longer_rate_human", _rate(known.human_P, np.sign(known.longer_P), known.prompt_P)),
    }


def self_figures(all_pairs: Judged) -> Figures:
    """Whether the judge is partial to its own answers: own_rate, how often it prefers them; self_preference, that less the

    people's rate on the same pairs; self_bias, log-odds that its own answer gains with the people's verdict and length fixed.
    """
    usable = all_pairs.only(~np.isnan(all_pairs.judge_P) & (all_pairs.own_P != 0))
    known = usable.only(~np.isnan(usable.human_P))
    gap = known.own_P * (known.judge_P - known.human_P)
    return {
        "own_pairs": len(usable.own_P),
        **_named("own_rate", _rate(usable.judge_P, usable.own_P, usable.prompt_P)),
        **_named(
            "self_preference", mean_interval(gap, clusters=known.prompt_P, bounds=_DIFFERENCE) if len(gap) else None
        ),
        **_named("self_bias", _interval(_effects(known.judge_P, known, 1, fixed=True), known)),
    }


def agreement_figures(all_pairs: Judged) -> Figures:
    """How often the judge says what a person says, of a, tie and b; a pair whose orders disagree counts as a tie.

    agreement: with one vote of the pair, drawn at random. agreement_decided: where both prefer an answer. kappa: Cohen's
    (1960, Educational and Psychological Measurement 20), beyond chance; where no side is named, of pairs seen from both sides.
    ceiling: of two votes on one pair, the chance that they are the same.
    """
    known = all_pairs.only(~np.isnan(all_pairs.judge_P) & ~np.isnan(all_pairs.human_P))
    said_P3 = np.stack([known.judge_P > 0.5, known.judge_P == 0.5, known.judge_P < 0.5], 1)
    votes_P3 = known.votes_P3 / known.votes_P3.sum(1, keepdims=True)
    sides = np.delete(votes_P3, 1, axis=1).sum(1) * ~said_P3[:, 1]
    decided = sides > 0
    right = (votes_P3 * said_P3)[:, [0, 2]].sum(1)
    return {
        **_share("agreement", (votes_P3 * said_P3).sum(1), known.prompt_P),
        **_share("agreement_decided", right[decided] / sides[decided], known.prompt_P[decided]),
        **_named("kappa", _kappa(said_P3, votes_P3, known) if len(said_P3) else None),
        **_ceiling(all_pairs),
    }


def _ceiling(pairs: Judged) -> Figures:
    """Agreement of people with each other, over the pairs with two whole votes or more."""
    counts = pairs.votes_P3
    several = (counts.sum(1) >= 2) & (counts == counts.round()).all(1)
    counts, total = counts[several], counts[several].sum(1)
    same = (counts * (counts - 1)).sum(1) / np.maximum(total * (total - 1), 1)
    return {**_share("ceiling", same, pairs.prompt_P[several]), "ceiling_pairs": int(several.sum())}


def _kappa(said_P3: NDArray[np.bool_], votes_P3: Array, pairs: Judged) -> Interval | None:
    """Cohen's kappa by a jackknife over prompts; None where chance alone would always agree."""
    table_P33 = said_P3[:, :, None] * votes_P3[:, None, :]
    if not pairs.named_P.all():
        # which answer is called a says nothing, so neither may it matter
        table_P33 = (table_P33 + table_P33[:, ::-1, ::-1]) / 2
    group = np.unique(pairs.prompt_P, return_inverse=True)[1]
    table = np.zeros((group.max() + 1, 3, 3))
    np.add.at(table, group, table_P33)
    total = table.sum(0)
    without = np.concatenate([total[None], total - table]) if len(table) > 1 else total[None]
    share = without / without.sum((1, 2), keepdims=True)
    chance = (share.sum(1) * share.sum(2)).sum(1)
    if (chance > 1 - 1e-9).any():
        return None
    kappa = (np.trace(share, axis1=1, axis2=2) - chance) / (1 - chance)
    reach = (
        t_quantile(np.bincount(group).astype(np.float64)) * jackknife(kappa[1:] - kappa[0]) if len(kappa) > 1 else 0.0
    )
    if not reach > 1e-12:
        return Interval(float(kappa[0]), np.nan, np.nan)
    return Interval(float(kappa[0]), max(float(kappa[0] - reach), -1.0), min(float(kappa[0] + reach), 1.0))


def _effects(outcome: Array, pairs: Judged, which: int, *, fixed: bool = False) -> tuple[float, Array] | None:
    """A coefficient of P(a) = sigmoid(b0 longer + b1 own + b2 human), and what it moves by without each prompt.

    which: 0 for length, 1 for its own answers. The people's verdict is among the terms where it is `fixed`. There is no
    constant, so that it does not matter which answer is called a. None where nothing varies.
    """
    terms = [pairs.longer_P, pairs.own_P, *([2 * pairs.human_P - 1] if fixed else [])]
    if not terms[which].any() or len(np.unique(pairs.prompt_P)) < 2:
        return None
    group = np.unique(pairs.prompt_P, return_inverse=True)[1]
    found = fitted(outcome, np.stack(terms, 1), group, _WIDE)
    return float(found.coefficients[which]), found.moved[:, which]


def _interval(effect: tuple[float, Array] | None, pairs: Judged) -> Interval | None:
    if effect is None:
        return None
    counts = np.unique(pairs.prompt_P, return_counts=True)[1].astype(np.float64)
    reach = t_quantile(counts) * jackknife(effect[1])
    return Interval(effect[0], effect[0] - reach, effect[0] + reach)


def _rate(outcome: Array, side: Array, prompt: Ints) -> Interval | None:
    """How often the side's answer is preferred: a where it is positive, b where negative; others do not count."""
    there = side != 0
    if not there.any():
        return None
    wins = np.where(side > 0, outcome, 1 - outcome)[there]
    return mean_interval(wins, clusters=prompt[there], bounds=SHARE)


def _share(name: str, values: Sequence[bool] | NDArray[Any], prompts: Sequence[int] | Ints) -> Figures:
    found = np.asarray(values, np.float64)
    return _named(
        name, mean_interval(found, clusters=np.asarray(prompts, np.int64), bounds=SHARE) if len(found) else None
    )


def _named(name: str, interval: Interval | None) -> Figures:
    return interval.named(name) if interval else {name: None, f"{name}_interval": None}
