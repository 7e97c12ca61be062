"""The cleaned copy of `favor value`: pairs that stay, and those whose label is flipped, in a form that `favor train` reads.

In: pairs, verdicts. Out: rows of one format. Next: page.py.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from favor.value.pairs import Pair
from favor.value.verdict import Judged


class Kept(NamedTuple):
    """A pair that stays: which response is now the better one."""

    pair: Pair
    better: int
    worse: int

    @property
    def both(self) -> tuple[int, int]:
        """The better one first."""
        return self.better, self.worse

    @property
    def cut(self) -> bool:
        """Whether one of the two stops before its end."""
        return bool({*self.both}.intersection(self.pair.text.cut))


def cleaned(pairs: Sequence[Pair], verdicts: Sequence[Judged]) -> Iterator[dict[str, Any]]:
    """All rows in the simplest format that says what the pairs say: pairs, ranked (answers that were cut), votes (soft labels)."""
    kept: list[Kept] = []
    for pair, one in zip(pairs, verdicts, strict=True):
        if one.verdict == "keep":
            kept.append(Kept(pair, pair.chosen, pair.rejected))
        elif one.verdict == "flip":
            kept.append(Kept(pair, pair.rejected, pair.chosen))
    soft, cut = any(one.pair.said.label < 1 for one in kept), any(one.cut for one in kept)
    say: Callable[[Kept], dict[str, Any]] = _votes if soft else _ranked if cut else _pair
    for one in kept:
        text, weight = one.pair.text, one.pair.said.weight
        extra = {"tools": text.tools, "chat_template_kwargs": text.template_kwargs}
        row: dict[str, Any] = {"prompt": text.prompt, **say(one)}
        yield (
            row
            | ({} if weight == 1.0 else {"weight": weight})
            | {name: found for name, found in extra.items() if found}
        )


def _pair(one: Kept) -> dict[str, Any]:
    better, worse = _texts(one)
    return {"chosen": better, "rejected": worse} | ({} if one.pair.gap is None else {"margin": one.pair.gap})


def _ranked(one: Kept) -> dict[str, Any]:
    said = {"ranking": [0, 1]} if one.pair.gap is None else {"scores": [one.pair.gap, 0]}
    return {"responses": _texts(one), **said, **_ended(one)}


def _votes(one: Kept) -> dict[str, Any]:
    """A label is the share of the votes; where the votes are known by their difference, as many as it was."""
    label, gap = one.pair.said.label, one.pair.gap
    number = 1.0 if gap is None else gap / (2 * label - 1)
    return {"responses": _texts(one), "votes": [label * number, (1 - label) * number], **_ended(one)}


def _texts(one: Kept) -> list[Any]:
    return [one.pair.text.responses[place] for place in one.both]


def _ended(one: Kept) -> dict[str, Any]:
    return {"ended": [place not in one.pair.text.cut for place in one.both]} if one.cut else {}
