"""Rows whose columns have other names: data.columns maps them, data.verdict says where a verdict stands and what it means.

In: a row as the file has it. Out: the row under our names, or a RowError that names the column. Next: settings.py.
"""

from collections.abc import Mapping
from typing import Any, Self, TypeAlias

from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT
from favor.data.formats.fields import brief
from favor.data.readers import RowError

Value: TypeAlias = str | bool | int | float


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
            raise ValueError(f"data.verdict.values: {twice} is there twice, so it would mean two things; name it once")
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
        found = {ours: _lookup(row, theirs, f"data.columns names for '{ours}'") for ours, theirs in columns.items()}
        rest = {name: value for name, value in row.items() if name not in columns.values()}
        row = rest | {name: value for name, value in found.items() if value is not None}
    return row if verdict is None else _with_verdict(row, verdict)


def _with_verdict(row: dict[str, Any], table: VerdictConfig) -> dict[str, Any]:
    """The row with first, second and verdict; several annotators make a list of verdicts."""
    several = len(table.columns) > 1
    said: list[Any] = []
    for column in table.columns:
        value = _lookup(row, column, "data.verdict names for 'column'", needed=not several)
        said += value if isinstance(value, list) else [] if value is None else [value]
    if not said:
        raise RowError(f"none of the verdict's columns {', '.join(table.columns)} has a value")
    first, second = (
        _lookup(row, theirs, f"data.verdict names for '{ours}'")
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
    raise RowError(f"the verdict is {brief(value)}, and data.verdict.values holds only {known}; add it to one of them")


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
            raise RowError(f"there is no column '{path}', which {whose}; its columns are {', '.join(row) or 'none'}")
    return value
