"""`--fix`: a cleaned copy of the training rows, and what was done to every row that changed.

In: Rows and what the checks found. Out: a JSONL file of rows and one of actions. Next: run.py.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from favor.lint.rows import mended
from favor.lint.sets import contradicting, repeats
from favor.lint.settings import Finding, Row

# findings whose rows are left out: nothing in the row itself says how to mend it
_DROPPED = ("secret", "personal", "echo", "repeated_turn", "lost_characters", "special_text", "round_trip", "language")
_ALSO = ("equal_ids", "near_duplicate", "doubled_special", "truncation")


class Action(NamedTuple):
    """What happened to a row: dropped, or mended."""

    row: int
    action: str
    reason: str


def clean(rows: Sequence[Row], findings: Sequence[Finding]) -> tuple[list[dict[str, Any]], list[Action]]:
    """The training rows that stay, mended where that is safe, and every action. Raises nothing; changes nothing in place."""
    reasons = _reasons(rows, findings)
    kept: list[dict[str, Any]] = []
    actions: list[Action] = []
    for row in rows:
        if reason := reasons.get(row.where):
            actions.append(Action(row.number, "dropped", reason))
            continue
        repaired = _mend(row.raw)
        if repaired != row.raw:
            actions.append(
                Action(
                    row.number, "mended", "text repaired: encoding, entities, invisible characters or trailing blanks"
                )
            )
        kept.append(repaired)
    return kept, actions


def texts(kept: Sequence[Mapping[str, Any]], actions: Sequence[Action], path: Path) -> dict[Path, str]:
    """The clean copy at `path`, and its actions beside it."""
    return {
        path: "".join(json.dumps(row, ensure_ascii=False, default=_as_text) + "\n" for row in kept),
        actions_of(path): "".join(json.dumps(action._asdict(), ensure_ascii=False) + "\n" for action in actions),
    }


def _as_text(value: object) -> str:
    """What a Parquet column may hold and JSON has not."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def actions_of(path: Path) -> Path:
    """Where the actions of a clean copy lie."""
    return path.with_name(f"{path.stem}.actions.jsonl")


def _reasons(rows: Sequence[Row], findings: Sequence[Finding]) -> dict[tuple[str, int], str]:
    """Why each row goes; the first reason counts."""
    found: dict[tuple[str, int], str] = {row.where: row.refusal for row in rows if row.refusal}
    read = [row for row in rows if row.judgment is not None]
    for row, other in repeats(read):
        found.setdefault(row.where, f"the same as row {other.number}")
    # neither side of a contradiction can be known to be right
    for row, other in contradicting(read):
        found.setdefault(row.where, f"contradicts row {other.number}")
        found.setdefault(other.where, f"contradicts row {row.number}")
    for finding in findings:
        if finding.name in (*_DROPPED, *_ALSO):
            for where in finding.rows:
                found.setdefault(where, finding.name.replace("_", " "))
    return found


def _mend(value: Any) -> Any:
    """Every string inside a row repaired."""
    if isinstance(value, str):
        return mended(value)
    if isinstance(value, dict):
        return {key: _mend(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mend(inner) for inner in value]
    return value
