"""Rows that judge one response alone, as KTO reads them.

In: a row as a dict. Out: its Judgment. Next: votes.py.
"""

from typing import Any

from favor.data.formats.common import Judgment, RowError, brief, need, tools_of, weight_of
from favor.data.formats.pairs import prompt_and_response


def thumbs(row: dict[str, Any]) -> Judgment:
    """TRL's unpaired preferences: `prompt, completion, label`, true for a good response; text or messages."""
    prompt, response = prompt_and_response(row)
    good = is_good(need(row, "label"), "label")
    return Judgment(prompt, (response,), (), weight_of(row), tools_of(row), thumbs=((0, good),))


def is_good(value: Any, name: str) -> bool:
    """A label that must be true or false."""
    if not isinstance(value, bool):
        raise RowError(f"{name} is {brief(value)}, expected true (a good response) or false (a bad one)")
    return value
