"""A run folder read for its page; what is damaged is left out and told.

In: a run folder. Out: RunRecord. Next: page.py.
"""

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from favor.errors import CheckpointError, in_texts, places_in, without_places
from favor.report.table import figure_rows, winrate_rows
from favor.run import RunFolder, read_text

Record = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind: records by step, events, figures, pairs and samples, data report, recipe; sections as HTML."""

    name: str
    config: str
    settings: Record
    steps: tuple[Record, ...]
    evals: tuple[Record, ...]
    looks: tuple[Record, ...]
    events: tuple[Record, ...]
    evaluation: Record
    pairs: tuple[Record, ...]
    winrate: Record
    data: Record
    samples: tuple[Record, ...]
    winrate_samples: tuple[Record, ...]
    rounds: tuple[Record, ...]
    sections: tuple[str, ...]


class Curves(NamedTuple):
    """Of metrics.jsonl: the last record of each step, by kind, and the events."""

    steps: tuple[Record, ...]
    evals: tuple[Record, ...]
    looks: tuple[Record, ...]
    events: tuple[Record, ...]


def curves(folder: RunFolder, notes: list[str]) -> Curves:
    """What metrics.jsonl holds; what of it is damaged is told in `notes`."""
    metrics = _lines(folder.metrics, {"kind"}, notes)
    events = (record for record in metrics if record["kind"] == "event" and isinstance(record.get("message"), str))
    steps, evals, looks = (_last_of_each_step(metrics, kind) for kind in ("step", "eval", "health"))
    return Curves(steps, evals, looks, tuple(events))


def evaluation(folder: RunFolder, notes: list[str]) -> Record:
    """The figures of eval.json."""
    return _json(folder.evaluation, _shows_figures, notes)


def collect(root: Path, sections: Mapping[str, Callable[[Record], str]] = MappingProxyType({})) -> RunRecord:
    """Read a run folder; what of it is damaged is left out and told among the events. Raises CheckpointError when it is none.

    sections: a file of the folder that only the caller knows -> the function that shows its content as HTML.
    """
    folder, notes = RunFolder(root), list[str]()
    if not folder.config.exists():
        raise CheckpointError(f"{root}: no run here (no config.toml); name a run folder that favor wrote")
    found = curves(folder, notes)
    sampled = _lines(folder.samples, {"prompt", "reference", "policy"}, notes)
    shown = ((root / name, render) for name, render in sections.items())
    config = read_text(folder.config)
    return RunRecord(
        name=root.name or str(root),
        config=config,
        settings=settings_in(config),
        steps=found.steps,
        evals=found.evals,
        looks=found.looks,
        evaluation=evaluation(folder, notes),
        pairs=tuple(_lines(folder.pairs, {"pair", "prompt", "margin"}, notes)),
        winrate=_json(folder.winrate, winrate_rows, notes),
        data=_json(folder.data_report, dict, notes),
        samples=tuple(r for r in sampled if isinstance(r["reference"], list) and isinstance(r["policy"], list)),
        winrate_samples=tuple(_lines(folder.winrate_samples, {"prompt", "a", "b", "verdict"}, notes)),
        rounds=tuple(_lines(folder.rounds, {"round", "mean_score"}, notes)),
        sections=tuple(render(one) for path, render in shown if (one := _json(path, render, notes))),
        events=(*found.events, *({"message": f"warning: {note}"} for note in notes)),
    )


def anywhere(run: RunRecord) -> RunRecord:
    """The record as others may see it: paths cut to their last name, but for the texts of the samples."""
    known = places_in(run.settings)
    told = {name: vars(run)[name] for name in ("config", "settings", "events", "data", "winrate")}
    return replace(run, **in_texts(told, lambda text: without_places(text, known)))


def settings_in(config: str) -> Record:
    """A recipe as nested dicts; nothing where it is damaged."""
    try:
        return tomllib.loads(config)
    except tomllib.TOMLDecodeError:
        return {}


def _last_of_each_step(metrics: Iterable[Record], kind: str) -> tuple[Record, ...]:
    """A resumed run writes the steps after its checkpoint again: what it wrote of them before does not count."""
    by_step: dict[int, Record] = {}
    for record in metrics:
        step = record.get("step")
        if isinstance(step, int) and record["kind"] == kind:
            by_step[step] = {key: value for key, value in record.items() if isinstance(value, int | float)}
        elif isinstance(step, int) and record.get("name") == "resume":
            by_step = {before: old for before, old in by_step.items() if before <= step}
    return tuple(by_step[step] for step in sorted(by_step))


def _shows_figures(evaluation: Record) -> object:
    """Everything that the page shows of eval.json; the calibration curve, too."""
    curve = (evaluation.get("calibration") or {}).get("curve", ())
    return figure_rows(evaluation), [(part["predicted"] + part["observed"], part["num_pairs"]) for part in curve]


def _lines(path: Path, needed: set[str], notes: list[str]) -> list[Record]:
    """The JSON lines that can be read and have the keys that are needed."""
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n") if path.exists() else []
    found: list[Record] = []
    damaged = 0
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        damaged += not isinstance(record, dict)
        if isinstance(record, dict) and needed <= record.keys():
            found.append(record)
    if damaged and any(lines):
        notes.append(f"{path.name}: {damaged} of {len(lines)} lines are damaged and left out")
    return found


def _json(path: Path, show: Callable[[Record], object], notes: list[str]) -> Record:
    """A record that what shows it can read; {} when it is not there or damaged."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        if isinstance(found, dict):
            show(found)
            return found
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError):
        pass
    notes.append(f"{path.name}: damaged, left out; run the command that writes it again")
    return {}
