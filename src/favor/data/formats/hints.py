"""What to say of a row of no known format: the nearest one, and a setting to try.

In: a row and the table of formats. Out: a RowError. Next: common.py.
"""

import difflib
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from favor.data.formats.fields import Format, RowError, brief

# words in the names of columns, by what such columns mostly mean
_WORDS = {
    "rejected": ("reject", "dispref", "non_pref", "lose", "losing", "worse", "worst", "negative", "bad"),
    "chosen": ("chosen", "prefer", "winn", "accept", "better", "best", "positive", "good"),
    "prompt": ("prompt", "question", "instruction", "query", "problem", "input", "post", "context", "user", "text"),
    "completion": ("completion", "response", "answer", "output", "reply", "target", "summary"),
}
_JUDGED = ("winner", "verdict", "preference", "preferred", "label", "choice", "better", "judg", "vote", "rating")
_PLAIN = ("pairs", "ranked", "sft")


def unknown(row: Mapping[str, Any], columns: Collection[str], formats: Mapping[str, Format]) -> RowError:
    """What is wrong with a row whose columns fit no format."""
    plain = ", ".join(f"prompt with {formats[name]}" for name in _PLAIN)
    special = ", ".join(name for name in formats if name not in _PLAIN)
    near = {name: _nearness(form, columns) for name, form in formats.items()}
    best = max(near, key=near.__getitem__)
    nearest = f"; the nearest is {best} ({formats[best]})" if near[best] >= 0.75 else ""
    values = ", ".join(f"{name} = {brief(value, 30)}" for name, value in [*row.items()][:12])
    to_try = " and ".join(f"'{setting}'" for setting in _settings(row))
    return RowError(
        f"its columns ({', '.join(sorted(columns)) or 'none'}) are of no known format; expected {plain}, or the columns of "
        f"{special}{nearest}; data.columns maps columns of other names. The row: {values}"
        + (f"; to try, if that is what they mean: {to_try}" if to_try else "")
    )


def _nearness(form: Format, columns: Collection[str]) -> float:
    """How much of a format a row has, and how much of the row the format reads; nearly right names count in part."""
    return max(_covered(needed, columns) for needed in form.needs) + _covered(columns, form.columns)


def _covered(wanted: Collection[str], given: Collection[str]) -> float:
    alike = [max((difflib.SequenceMatcher(None, want, name).ratio() for name in given), default=0.0) for want in wanted]
    return sum(ratio for ratio in alike if ratio >= 0.6) / max(1, len(alike))


def _settings(row: Mapping[str, Any]) -> list[str]:
    """Settings that would read the row, from the names and kinds of its columns; none without any idea."""
    texts = [name for name, value in row.items() if isinstance(value, str | list | dict) and value]
    found: dict[str, str] = {}
    for ours, words in _WORDS.items():
        free = [name for name in texts if name not in found.values()]
        like = next((name for word in words for name in free if word in name.lower()), None)
        if like is not None:
            found[ours] = like
    if "chosen" in found and "rejected" in found:
        return _mapped(found, "prompt", "chosen", "rejected")
    if two := _two_alike([name for name in texts if name != found.get("prompt")]):
        judged = next((name for word in _JUDGED for name in row if word in name.lower() and name not in two), "VERDICT")
        first, second, column, value = map(_quoted, (*two, judged, row.get(judged, "A")))
        values = f"values={{first=[{value}], second=[...]}}"
        return [
            f"data.verdict={{first={first}, second={second}, column={column}, {values}}}",
            *_mapped(found, "prompt"),
        ]
    return _mapped(found, "prompt", "completion") if "prompt" in found and "completion" in found else []


def _two_alike(names: Sequence[str]) -> tuple[str, str] | None:
    """Two columns whose names differ in one letter or digit: response_a and response_b."""
    for first, second in itertools.combinations(names, 2):
        if len(first) == len(second) and sum(a != b for a, b in zip(first, second, strict=True)) == 1:
            return first, second
    return None


def _mapped(found: Mapping[str, str], *wanted: str) -> list[str]:
    inside = ", ".join(f"{ours}={_quoted(found[ours])}" for ours in wanted if found.get(ours, ours) != ours)
    return [f"data.columns={{{inside}}}"] if inside else []


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
