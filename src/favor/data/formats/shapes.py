"""Which columns belong to which format.

In: the columns of a row. Out: the format's name. Next: ../read.py.
"""

import difflib
from collections.abc import Collection, Mapping, Set
from typing import Any, NamedTuple

from favor.data.formats.common import RowError


class Shape(NamedTuple):
    """A format's columns: it needs all of `needs` and, where there are any, one of `either`; `more` are read too."""

    needs: frozenset[str]
    either: frozenset[str] = frozenset()
    more: frozenset[str] = frozenset()

    def fits(self, columns: Set[str]) -> bool:
        """Whether a row with these columns can be of this format."""
        return self.needs <= columns and (not self.either or bool(self.either & columns))

    def __str__(self) -> str:
        return " + ".join(
            [*sorted(self.needs, key=_rank), *([" or ".join(sorted(self.either))] if self.either else [])]
        )


def _rank(column: str) -> tuple[int, str]:
    return (0 if column in ("prompt", "instruction", "history", "context") else 1, column)


def _shape(needs: str, either: str = "", more: str = "weight") -> Shape:
    return Shape(frozenset(needs.split()), frozenset(either.split()), frozenset(more.split()))


# the first that fits is the format: what has more columns of its own stands before what has fewer
SHAPES: dict[str, Shape] = {
    "openai_preference": _shape("input preferred_output non_preferred_output"),
    "shp": _shape("history human_ref_A human_ref_B labels", more="score_A score_B score_ratio weight"),
    "helpsteer3": _shape("context response1 response2 overall_preference"),
    "helpsteer2_preference": _shape("prompt response_1 response_2 preference_strength"),
    "openai_tldr": _shape("info summaries choice"),
    "nectar": _shape("prompt answers"),
    "ultrafeedback": _shape("instruction completions"),
    "sharegpt": _shape("conversations", more="chosen rejected kto_tag system tools weight"),
    "alpaca": _shape("instruction", "output chosen", "input rejected kto_tag system history tools weight"),
    "ultrafeedback_binarized": _shape("chosen rejected score_chosen score_rejected", more="prompt tools weight"),
    "helpsteer": _shape("prompt response helpfulness"),
    "votes": _shape("prompt responses", "votes choices", "tools weight"),
    "ranked": _shape("responses", "ranking scores", "prompt ended tools weight"),
    "pairs": _shape("chosen rejected", more="prompt margin tie tools weight"),
    "thumbs": _shape("label", "completion response messages", "prompt tools weight"),
    "sft": _shape("", "messages completion response", "prompt tools"),
}
_PLAIN = (
    "expected prompt + chosen + rejected, chosen + rejected, prompt + responses + ranking or scores, prompt + completion, "
    "messages, or the columns of "
)


def columns_of(name: str) -> frozenset[str]:
    """Every column that a format reads."""
    shape = SHAPES[name]
    return shape.needs | shape.either | shape.more


def recognise(row: Mapping[str, Any]) -> str:
    """The format a row's columns belong to. Raises RowError, naming the columns found and the formats known."""
    columns = {name for name in row if row[name] is not None}
    for name, shape in SHAPES.items():
        if shape.fits(columns) and (name != "sft" or "messages" in columns or "prompt" in columns):
            return name
    special = ", ".join(name for name in SHAPES if name not in ("pairs", "ranked", "sft"))
    raise RowError(
        f"its columns ({', '.join(sorted(columns)) or 'none'}) are of no known format; {_PLAIN}{special}"
        f"{_nearest(columns)}; data.columns maps columns of other names"
    )


def _nearest(columns: Set[str]) -> str:
    """The format that lacks least, columns of nearly the right name counting."""

    def near(shape: Shape) -> float:
        wanted = [*shape.needs, *sorted(shape.either)[:1]]
        read = shape.needs | shape.either | shape.more
        return _covered(wanted, columns) + _covered(columns, read)

    name = max(SHAPES, key=lambda name: near(SHAPES[name]))
    return f"; the nearest is {name} ({SHAPES[name]})" if near(SHAPES[name]) >= 0.75 else ""


def _covered(wanted: Collection[str], given: Collection[str]) -> float:
    """The share of the wanted names that are given, nearly equal ones counting in part."""
    return sum(max((_alike(want, name) for name in given), default=0.0) for want in wanted) / max(1, len(wanted))


def _alike(a: str, b: str) -> float:
    ratio = difflib.SequenceMatcher(None, a, b).ratio()
    return ratio if ratio >= 0.6 else 0.0
