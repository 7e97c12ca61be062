"""Columns of other names: data.columns maps them, data.verdict says where a verdict stands and what it means.

In: a row as the file has it. Out: the row under our names, or a RowError that names the column; for a row of no known format
one that says the nearest format and a setting to try. Next: ../settings.py.
"""

import difflib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self, TypeAlias

from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT
from favor.data.formats.fields import Format, RowError, brief

Value: TypeAlias = str | bool | int | float

# words in the names of columns, by what such columns mostly mean
_WORDS = {
    "rejected": (
        *("reject", "dispref", "non_pref", "lose", "losing", "worse", "worst", "dislike", "negative", "bad"),
        *("discard", "threw", "thrown", "dropped", "unused", "passed_over", "not_used", "declined"),
    ),
    "chosen": (
        *("chosen", "prefer", "winn", "accept", "better", "best", "liked", "positive", "good"),
        *("picked", "selected", "approved", "kept", "final"),
    ),
    "prompt": (
        *("prompt", "question", "instruction", "query", "problem", "input", "message", "request", "post", "context"),
        *("user", "asked", "text"),
    ),
    "completion": ("completion", "response", "answer", "output", "reply", "target", "summary"),
}
_JUDGED = ("winner", "verdict", "preference", "preferred", "label", "choice", "better", "judg", "vote", "rating")
_PLAIN = ("pairs", "ranked", "sft")
# stands for a column whose name nobody has said
_UNKNOWN = "VERDICT"


class VerdictValues(BaseModel):
    """Which values of the verdict's column mean what."""

    model_config = STRICT
    first: tuple[Value, ...] = Field(min_length=1)
    """Values that say the first answer is better."""
    second: tuple[Value, ...] = Field(min_length=1)
    """Values that say the second is better."""
    tie: tuple[Value, ...] = ()
    """Values that say both are as good."""
    both_bad: tuple[Value, ...] = ()
    """Values that say neither is good."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        # 1 and true are equal in Python and are not the same value here
        every = [repr(value) for values in self.model_dump().values() for value in values]
        twice = next((value for value in every if every.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"data.verdict.values: {twice} appears twice, so it would mean two things; name it once")
        return self


class VerdictConfig(BaseModel):
    """A table [data.verdict]: two answers and which is better. Names are the file's (a.b for b inside a)."""

    model_config = STRICT
    first: str
    """The column of the first answer."""
    second: str
    """The column of the second answer."""
    column: str | tuple[str, ...]
    """Where the verdict stands: a column (its value may be a list, one an annotator), or a column an annotator."""
    values: VerdictValues
    """What the verdict's values mean."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The verdict's columns."""
        return (self.column,) if isinstance(self.column, str) else self.column

    @model_validator(mode="after")
    def _different(self) -> Self:
        names = (self.first, self.second, *self.columns)
        if not self.columns or len(set(names)) < len(names):
            raise ValueError(
                f"data.verdict names {', '.join(names)}: first, second and column must be different columns"
            )
        return self


def named(row: dict[str, Any], columns: Mapping[str, str], verdict: VerdictConfig | None) -> dict[str, Any]:
    """The row under our names. Raises RowError for a column that it lacks, or a verdict that no value stands for."""
    if columns:
        found = {ours: _lookup(row, theirs, f"columns.{ours} names") for ours, theirs in columns.items()}
        rest = {name: value for name, value in row.items() if name not in columns.values()}
        row = rest | {name: value for name, value in found.items() if value is not None}
    return row if verdict is None else _with_verdict(row, verdict)


def _with_verdict(row: dict[str, Any], table: VerdictConfig) -> dict[str, Any]:
    """The row with first, second and verdict; several annotators make a list of verdicts."""
    several = len(table.columns) > 1
    said: list[Any] = []
    for column in table.columns:
        value = _lookup(row, column, "verdict.column names", needed=not several)
        said += value if isinstance(value, list) else [] if value is None else [value]
    if not said:
        raise RowError(f"none of the verdict's columns {', '.join(table.columns)} has a value")
    first, second = (
        _lookup(row, theirs, f"verdict.{ours} names")
        for ours, theirs in (("first", table.first), ("second", table.second))
    )
    gone = {table.first, table.second, *table.columns}
    rest = {name: value for name, value in row.items() if name not in gone}
    return rest | {"first": first, "second": second, "verdict": [_meant(value, table) for value in said]}


def _meant(value: Any, table: VerdictConfig) -> str:
    """What a value of the verdict's column means; 1, "1" and true are different values, 1 and 1.0 the same."""
    meanings = table.values.model_dump()
    for meaning, values in meanings.items():
        if any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values):
            return meaning
    known = ", ".join(f"{meaning} {brief(list(values))}" for meaning, values in meanings.items() if values)
    raise RowError(f"the verdict is {brief(value)}, and verdict.values holds only {known}; add it to one of them")


def _lookup(row: dict[str, Any], path: str, whose: str, *, needed: bool = True) -> Any:
    """The value at a column's name, or at a.b of what lies inside."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        elif not needed:
            return None
        else:
            raise RowError(
                f"column '{path}', which {whose}, is missing or empty; those with a value are {', '.join(row) or 'none'}",
                of_names=True,
            )
    return value


def unknown(row: Mapping[str, Any], columns: Collection[str], formats: Mapping[str, Format]) -> RowError:
    """What is wrong with a row whose columns fit no format."""
    plain = ", ".join(f"prompt with {formats[name]}" for name in _PLAIN)
    near = {name: _nearness(form, columns) for name, form in formats.items()}
    best = max(near, key=near.__getitem__)
    nearest = f"; the nearest is {best} ({formats[best]})" if near[best] >= 0.75 else ""
    values = ", ".join(f"{name} = {brief(value, 30)}" for name, value in [*row.items()][:12])
    to_try = " and ".join(f"'{setting}'" for setting in proposed(row))
    # what to do stands first
    remedy = f"name them: {_by_hand(row)}"
    if to_try:
        # a name in capitals stands for one that is not known
        remedy = f"{remedy}, or as a verdict: {to_try}" if _UNKNOWN in to_try else f"give {to_try} if they mean that"
    return RowError(
        f"its columns ({', '.join(sorted(columns)) or 'none'}) are of no known format; {remedy}. The row: {values}. "
        f"Known are {plain}, and {len(formats) - len(_PLAIN)} more (docs/formats.md){nearest}",
        of_names=True,
    )


def _by_hand(row: Mapping[str, Any]) -> str:
    """The setting for who has to name the columns, as it is typed in a shell: their own names where three hold words."""
    held = [name for name, value in row.items() if isinstance(value, str) and " " in value.strip()]
    names = held if len(held) == 3 else ["COLUMN"] * 3
    said = f"'columns={{prompt={_quoted(names[0])}, chosen={_quoted(names[1])}, rejected={_quoted(names[2])}}}'"
    return f"{said}, if these three mean that in this order" if len(held) == 3 else said


def _nearness(form: Format, columns: Collection[str]) -> float:
    """How much of a format a row has, and how much of the row the format reads; nearly right names count in part."""
    return max(_covered(needed, columns) for needed in form.needs) + _covered(columns, form.columns)


def _covered(wanted: Collection[str], given: Collection[str]) -> float:
    alike = [max((difflib.SequenceMatcher(None, want, name).ratio() for name in given), default=0.0) for want in wanted]
    return sum(ratio for ratio in alike if ratio >= 0.6) / max(1, len(alike))


def proposed(row: Mapping[str, Any]) -> list[str]:
    """Settings that would read the row, from the names and kinds of its columns; none without any idea."""
    texts = [name for name, value in row.items() if isinstance(value, str | list | dict) and value]
    found: dict[str, str] = {}
    for ours in ("rejected", "chosen", "prompt"):
        free = [name for name in texts if name not in found.values()]
        if meant := like(ours, free):
            found[ours] = meant
    if ("chosen" in found) is not ("rejected" in found):
        # by exclusion: liked_reply and other_reply
        known, other = ("chosen", "rejected") if "chosen" in found else ("rejected", "chosen")
        beside = [name for name in texts if name not in found.values() and _parts(name) & _parts(found[known])]
        found |= {other: beside[0]} if len(beside) == 1 else {}
    elif completion := like("completion", [name for name in texts if name not in found.values()]):
        found["completion"] = completion
    if "chosen" in found and "rejected" in found:
        if "prompt" not in found:
            # by exclusion: the one other column that holds words
            words = [name for name in texts if name not in found.values() and " " in str(row[name])]
            found |= {"prompt": words[0]} if len(words) == 1 else {}
        return _mapped(found, "prompt", "chosen", "rejected")
    if two := _two_alike([name for name in texts if name != found.get("prompt")]):
        judged = next((name for word in _JUDGED for name in row if word in name.lower() and name not in two), _UNKNOWN)
        first, second, column, value = map(_quoted, (*two, judged, row.get(judged, "A")))
        values = f"values={{first=[{value}], second=[...]}}"
        return [
            f"verdict={{first={first}, second={second}, column={column}, {values}}}",
            *_mapped(found, "prompt"),
        ]
    return _mapped(found, "prompt", "completion") if "prompt" in found and "completion" in found else []


def like(ours: str, names: Iterable[str]) -> str | None:
    """The first of the names that mostly means what our column (prompt, chosen, rejected, completion) holds, or None."""
    known = list(names)
    return next((name for word in _WORDS[ours] for name in known if word in name.lower()), None)


def _parts(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+", name.lower()))


def _two_alike(names: Sequence[str]) -> tuple[str, str] | None:
    """Two columns whose names differ in one letter or digit: response_a and response_b."""
    for first, second in itertools.combinations(names, 2):
        if len(first) == len(second) and sum(a != b for a, b in zip(first, second, strict=True)) == 1:
            return first, second
    return None


def _mapped(found: Mapping[str, str], *wanted: str) -> list[str]:
    inside = ", ".join(f"{ours}={_quoted(found[ours])}" for ours in wanted if found.get(ours, ours) != ours)
    return [f"columns={{{inside}}}"] if inside else []


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
