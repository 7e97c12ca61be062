"""Rows of preferences -> pairs for the judge, with what people said of them; equal pairs of several rows are one.

In: AuditConfig. Out: Taken. Next: figures.py.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from favor.audit.settings import AuditConfig
from favor.data import sources
from favor.data.formats import FORMATS, Judgment, RowError, check_order, recognise
from favor.data.formats.columns import named
from favor.data.prompts import sample_text
from favor.data.types import Text
from favor.errors import DataError
from favor.guard import sha
from favor.winrate.run import text_key

_PLACED = ("first", "second")


class Votes(NamedTuple):
    """How many people prefer a, see none better, prefer b; fractions where a row gives shares."""

    a: float = 0.0
    tie: float = 0.0
    b: float = 0.0

    @property
    def share(self) -> float:
        """Of the votes for a; a tie counts one half. nan without votes."""
        return (self.a + self.tie / 2) / sum(self) if sum(self) else float("nan")

    @property
    def swapped(self) -> "Votes":
        """The same, seen from b."""
        return Votes(self.b, self.tie, self.a)


class Pair(NamedTuple):
    """Two answers to a prompt. group: the number of the prompt, from 0.

    named: a is the side whose win rate is asked. own: 1 where a is the judge's own answer, -1 where b is, else 0. ended: whether
    each came to its end.
    """

    prompt: Text
    group: int
    a: str
    b: str
    votes: Votes = Votes()
    named: bool = False
    own: int = 0
    ended: tuple[bool, bool] = (True, True)
    tools: Any = None

    @property
    def swapped(self) -> "Pair":
        """The same pair with its answers in the other order."""
        return self._replace(
            a=self.b, b=self.a, votes=self.votes.swapped, named=False, own=-self.own, ended=self.ended[::-1]
        )


class Taken(NamedTuple):
    """The pairs to judge, and how many of what were left out."""

    pairs: list[Pair]
    left_out: dict[str, int]


def take(config: AuditConfig) -> Taken:
    """The pairs of `data` with the labels of `human`, as many as are asked for.

    Raises DataError, naming the row, for what cannot be read, and when nothing is compared or no label belongs to a pair.
    """
    left_out: Counter[str] = Counter()
    found = _collected(config.data, config, left_out)
    if not found:
        raise DataError(f"{config.data}: nothing to judge: no row compares two different answers; name another file")
    labelled: dict[str, Votes] = {}
    if config.human is not None:
        # labels need not say what the answers come from
        plain = config.model_copy(update={"source": (), "own": None, "side": None})
        said = found if config.human == config.data else _collected(config.human, plain, left_out)
        for key, pair in said.items():
            if sum(pair.votes) and key in found:
                labelled[key] = (pair if pair.a == found[key].a else pair.swapped).votes
        left_out["labels of people on other pairs"] = sum(sum(pair.votes) > 0 for pair in said.values()) - len(labelled)
        if not labelled:
            raise DataError(
                f"{config.human}: none of its labels is of a pair of {config.data} (same prompt, same two answers); "
                "name the labels of these pairs, or leave human out"
            )
    pairs = [pair._replace(votes=labelled.get(key, Votes())) for key, pair in found.items()]
    chosen = _drawn([sum(pair.votes) > 0 for pair in pairs], config)
    left_out["pairs beyond those asked for"] = len(pairs) - len(chosen)
    groups = {group: place for place, group in enumerate(dict.fromkeys(pairs[i].group for i in chosen))}
    return Taken([pairs[i]._replace(group=groups[pairs[i].group]) for i in chosen], dict(left_out))


def _drawn(labelled: Sequence[bool], config: AuditConfig) -> list[int]:
    """Places of the pairs: those with labels first, each part in an order of the seed."""
    order = np.random.default_rng(config.seed).permutation(len(labelled)).tolist()
    return sorted(sorted(order, key=lambda i: not labelled[i])[: config.pairs])


def _collected(source: str, config: AuditConfig, left_out: Counter[str]) -> dict[str, Pair]:
    """Every pair of a source by its texts; what several rows say of one adds up."""
    found: dict[str, Pair] = {}
    groups: dict[str, int] = {}
    for number, row in sources.read_objects(source, config.split):
        try:
            new = list(_pairs_of(named(row, config.columns, None), config))
        except RowError as error:
            if error.kind == "identical":
                left_out["rows whose answers are the same"] += 1
                continue
            fix = "" if error.of_names else "; fix the row"
            raise DataError(f"{sources.where(source, number)}: {error}{fix}") from None
        for pair in new:
            prompt = text_key(pair.prompt)
            key = sha(f"{prompt}\n{sorted((pair.a, pair.b))}")
            mine = pair._replace(group=groups.setdefault(prompt, len(groups)))
            before = found.setdefault(key, mine._replace(votes=Votes()))
            votes = (mine if mine.a == before.a else mine.swapped).votes
            found[key] = before._replace(votes=Votes(*map(sum, zip(before.votes, votes, strict=True))))
    return found


def _pairs_of(row: dict[str, Any], config: AuditConfig) -> Iterator[Pair]:
    """The pairs of a row; a row of first and second without a verdict is a pair of which nobody has said anything."""
    silent = row.keys() >= {*_PLACED} and "verdict" not in row
    row = row | {"verdict": "tie"} if silent else row
    form = recognise(row)
    check_order(row, form)
    said = FORMATS[form](row)
    texts = [sample_text(answer if isinstance(answer, str) else list(answer), "an answer") for answer in said.responses]
    votes = _votes(row, form, said)
    if not votes:
        raise RowError("it compares no two answers; give preferences, or prompt, first and second")
    names = _sources(row, config, len(texts))
    for (i, j), mine in votes.items():
        ended = (i not in said.cut, j not in said.cut)
        pair = Pair(said.prompt, 0, texts[i], texts[j], Votes() if silent else mine, ended=ended, tools=said.tools)
        if names:
            pair = pair._replace(own=(names[i] == config.own) - (names[j] == config.own))
        yield _placed(pair, said.placed, [names[i], names[j]] if names else [], config.side)


def _placed(pair: Pair, placed: bool, names: Sequence[str], side: str | None) -> Pair:
    """The pair with the side that is asked for as a; where none is, in an order that has nothing to do with the labels."""
    if side is not None:
        mine = [name == side for name in names]
        return pair if mine[0] == mine[1] else (pair if mine[0] else pair.swapped)._replace(named=True)
    if placed:
        return pair._replace(named=True)
    return pair if sha(pair.a) <= sha(pair.b) else pair.swapped


def _votes(row: Mapping[str, Any], form: str, said: Judgment) -> dict[tuple[int, int], Votes]:
    """What a row says of each two of its answers."""
    listed = (
        row["verdict"] if form == "verdict" else row.get("choices") if form == "votes" and "votes" not in row else None
    )
    if listed is not None and len(said.responses) == 2:
        listed = listed if isinstance(listed, list) else [listed]
        a, b = (sum(one in ways for one in listed) for ways in ((0, "first"), (1, "second")))
        return {(0, 1): Votes(a, len(listed) - a - b, b)}
    if said.votes and len(said.responses) == 2:
        return {(0, 1): Votes(said.votes[0], 0.0, said.votes[1])}
    found = {pair: Votes(a=1.0) for order in said.orders for pair in combinations(order, 2)}
    return found | dict.fromkeys(said.ties, Votes(tie=1.0))


def _sources(row: Mapping[str, Any], config: AuditConfig, count: int) -> list[str]:
    """What each answer comes from; nothing where nobody asks."""
    if not config.source:
        return []
    names = (config.source,) if isinstance(config.source, str) else config.source
    missing = next((name for name in names if name not in row), None)
    if missing is not None:
        raise RowError(f"column '{missing}', which source names, is missing or empty")
    values = row[names[0]] if len(names) == 1 else [row[name] for name in names]
    if not isinstance(values, list) or len(values) != count:
        raise RowError(f"source {', '.join(names)} must name the source of each of {count} answers")
    return [str(value) for value in values]
