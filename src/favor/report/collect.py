"""A run folder -> one record for the report.

In: a run folder; any part but its recipe may be missing. Out: RunRecord. Next: page.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from favor.errors import CheckpointError
from favor.report.table import figure_rows
from favor.report.winrate import winrate_rows
from favor.run import RunFolder, read_text


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind: step and eval records by step, events, held-out figures, samples, data report, recipe."""

    name: str
    steps: tuple[dict[str, Any], ...]
    evals: tuple[dict[str, Any], ...]
    events: tuple[dict[str, Any], ...]
    evaluation: dict[str, Any]
    samples: tuple[dict[str, Any], ...]
    data: dict[str, Any]
    config: str
    winrate: dict[str, Any]
    winrate_samples: tuple[dict[str, Any], ...]
    sections: tuple[str, ...] = ()


def collect(root: Path, sections: Mapping[str, Callable[[dict[str, Any]], str]] = MappingProxyType({})) -> RunRecord:
    """Read a run folder; what of it is damaged is left out and told among the events. Raises CheckpointError when it is none.

    sections: a file of the folder that only the caller knows -> the function that shows its content as HTML.
    """
    folder = RunFolder(root)
    if not folder.config.exists():
        raise CheckpointError(f"{root}: no run here (no config.toml); name a run folder that favor wrote")
    notes: list[str] = []
    metrics = _lines(folder.metrics, notes)
    found: dict[str, Any] = {
        "evaluation": _json(folder.evaluation, notes, (figure_rows, _curve)),
        "sections": tuple(
            render(content) for name, render in sections.items() if (content := _json(root / name, notes, (render,)))
        ),
        "winrate": _json(folder.winrate, notes, (winrate_rows,)),
        "data": _json(folder.data_report, notes, ()),
        "samples": tuple(r for r in _lines(folder.samples, notes) if _is_sample(r)),
        "winrate_samples": tuple(
            r for r in _lines(folder.winrate_samples, notes) if {"prompt", "a", "b", "verdict"} <= r.keys()
        ),
    }
    events = [r for r in metrics if r.get("kind") == "event" and isinstance(r.get("message"), str)]
    return RunRecord(
        name=root.name or str(root),
        steps=_last_of_each_step(metrics, "step"),
        evals=_last_of_each_step(metrics, "eval"),
        events=(*events, *({"message": f"warning: {note}"} for note in notes)),
        config=read_text(folder.config),
        **found,
    )


def _last_of_each_step(metrics: list[dict[str, Any]], kind: str) -> tuple[dict[str, Any], ...]:
    """A resumed run writes the steps after its checkpoint again: what it wrote of them before does not count."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in metrics:
        step = record.get("step")
        if not isinstance(step, int):
            continue
        if record.get("kind") == kind:
            by_step[step] = {key: value for key, value in record.items() if isinstance(value, int | float)}
        elif record.get("name") == "resume":
            by_step = {before: old for before, old in by_step.items() if before <= step}
    return tuple(by_step[step] for step in sorted(by_step))


def _curve(evaluation: dict[str, Any]) -> object:
    """The calibration curve, as the page draws it."""
    return [
        (part["predicted"] + 0, part["observed"] + 0, part["num_pairs"])
        for part in (evaluation.get("calibration") or {}).get("curve", ())
    ]


def _is_sample(record: dict[str, Any]) -> bool:
    sides = [record.get(side) for side in ("reference", "policy")]
    return "prompt" in record and all(isinstance(side, list) for side in sides)


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON lines that can be read."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    if len(found) < len(lines) and any(lines):
        notes.append(f"{path.name}: {len(lines) - len(found)} of {len(lines)} lines are damaged and left out")
    return found


def _json(path: Path, notes: list[str], shown_by: Sequence[Callable[[dict[str, Any]], object]]) -> dict[str, Any]:
    """A record that everything that shows it can read; {} when it is not there or damaged."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        if isinstance(found, dict):
            for show in shown_by:
                show(found)
            return found
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError):
        pass
    notes.append(f"{path.name}: damaged, left out; run the command that writes it again")
    return {}
