"""A run folder -> one record for the report.

In: a run folder; any part but its recipe may be missing. Out: RunRecord. Next: page.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from favor.errors import CheckpointError
from favor.run import RunFolder, read_jsonl


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
    frontier: dict[str, Any]
    winrate: dict[str, Any]
    winrate_samples: tuple[dict[str, Any], ...]


def collect(root: Path) -> RunRecord:
    """Read a run folder. Raises CheckpointError when it is none or a file of it is damaged."""
    folder = RunFolder(root)
    if not folder.config.exists():
        raise CheckpointError(f"{root}: no run here (no config.toml); name a run folder that favor wrote")
    metrics = read_jsonl(folder.metrics) if folder.metrics.exists() else []
    return RunRecord(
        name=root.name or str(root),
        steps=_last_of_each_step(metrics, "step"),
        evals=_last_of_each_step(metrics, "eval"),
        events=tuple(record for record in metrics if record.get("kind") == "event"),
        evaluation=_json(folder.evaluation),
        samples=tuple(read_jsonl(folder.samples)) if folder.samples.exists() else (),
        data=_json(folder.data_report),
        config=folder.config.read_text("utf-8"),
        frontier=_json(folder.frontier),
        winrate=_json(folder.winrate),
        winrate_samples=tuple(read_jsonl(folder.winrate_samples)) if folder.winrate_samples.exists() else (),
    )


def _last_of_each_step(metrics: list[dict[str, Any]], kind: str) -> tuple[dict[str, Any], ...]:
    """A resumed run writes some steps again: the last record of each counts."""
    by_step = {record["step"]: record for record in metrics if record.get("kind") == kind}
    return tuple(by_step[step] for step in sorted(by_step))


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}: not JSON ({error.msg}); delete it and run the command that writes it again"
        ) from None
