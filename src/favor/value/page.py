"""The page of `favor value`: how many labels are wrong, which, and what cleaning them is worth.

In: figures, pairs with their verdicts. Out: HTML that names no folder of this machine. Next: value.html.jinja.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from favor.data.types import words_of
from favor.errors import places_in, without_known_places
from favor.lint.cheap import place
from favor.lint.page import Example, cut
from favor.report.frame import rendered
from favor.report.words import between, percent, plural
from favor.value.pairs import Pair
from favor.value.settings import ValueConfig
from favor.value.verdict import Judged, Verdict

_TITLES: dict[Verdict, tuple[str, str]] = {
    "flip": (
        "Labels that are turned round",
        "Surely wrong: value.clean=FILE writes them with the other answer preferred.",
    ),
    "ask": (
        "Pairs worth asking a person about",
        "Where an answer helps most: favor label reads the lines of value.out.",
    ),
    "drop": ("Pairs that are left out", "More likely wrong than right, and not surely enough to turn them round."),
    "keep": ("Pairs that stay", "The most certain ones are shown."),
}


class Section(NamedTuple):
    """A verdict on the page."""

    name: str
    title: str
    what: str
    number: str
    examples: list[Example]


def page(config: ValueConfig, figures: dict[str, Any], found: Sequence[tuple[Pair, Judged]]) -> str:
    """The whole page."""
    sources = {pair.text.source for pair, _ in found}
    anywhere = partial(without_known_places, known=sources.union(places_in(config.model_dump(mode="json"))))
    sections: list[Section] = []
    for name, (title, what) in _TITLES.items():
        mine = [(pair, one) for pair, one in found if one.verdict == name]
        # the most certain of each first, of those to ask about the least
        mine.sort(key=lambda both: -abs(both[1].worth) if name != "ask" else abs(both[1].worth))
        examples = [_example(*both, anywhere) for both in mine[: config.value.examples]]
        sections.append(Section(name, title, what, plural(len(mine), "pair"), examples))
    values = {
        "source": anywhere(config.data.training),
        "headline": headline(figures),
        "sections": sections,
        "curve": [_point(row) for row in figures["curve"]],
    }
    return rendered("favor.value", "value.html.jinja", figures=figures, percent=percent, between=between, **values)


def headline(figures: dict[str, Any]) -> str:
    """What was found, in a sentence."""
    low, high = figures["wrong_labels_interval"]
    share = f"{percent(figures['wrong_labels'])} of the labels are wrong ({between((low, high))})"
    if low > 0:
        return f"About {share}."
    if high > 0.25:
        known = f"the cheap models know too little of these answers ({between((low, high))})"
        return f"How many labels are wrong cannot be told: {known}."
    return f"No wrong labels are certain: at most {percent(high)} are."


def _example(pair: Pair, one: Judged, anywhere: "partial[str]") -> Example:
    where = anywhere(place((pair.text.source, pair.text.rows[0])))
    texts = (pair.text.prompt, pair.text.responses[pair.chosen], pair.text.responses[pair.rejected])
    return Example(where, one.reason, *(cut(words_of(text)) for text in texts))


def _point(row: dict[str, Any]) -> tuple[str, str, str, str]:
    share = row["share"] if isinstance(row["share"], str) else percent(row["share"])
    chance = "" if row["by_chance"] is None else percent(row["by_chance"])
    return share, percent(row["accuracy"]), between(row["accuracy_interval"]), chance
