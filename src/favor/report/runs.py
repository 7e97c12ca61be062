"""`favor runs`: the runs below a folder as a table, and the settings in which they differ.

In: a folder. Out: Listed records, in an order; a rich table. A run that cannot be read is listed as damaged. Next: records.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from favor.errors import CheckpointError, ConfigError
from favor.report.compare import settings_rows
from favor.report.records import RunRecord, collect
from favor.run import RunFolder

# the best first; of time the newest
ORDERS = ("name", "loss", "accuracy", "time")
# deeper than experiment/method/seed nobody looks
_DEEPEST = 4


class Listed(NamedTuple):
    """A run in a line. accuracy: held out, of eval.json, else the last while training. seconds: of training; began: its recipe."""

    name: str
    began: float
    state: Literal["finished", "unfinished", "not begun"]
    steps: int
    loss: float | None
    accuracy: float | None
    seconds: float
    record: RunRecord


def show(folder: Path, order: str, *, settings: bool) -> None:
    """Print the table, and with `settings` what differs. Raises ConfigError for an order that is none, and as `listed`."""
    if order not in ORDERS:
        raise ConfigError(f"--sort {order}: runs are sorted by one of {', '.join(ORDERS)}")
    found, console = listed(folder, order), Console(highlight=False)
    console.print(runs_table(found))
    if settings and len(found) > 1:
        console.print(differing(found))


def listed(folder: Path, order: str = "name") -> list[Listed]:
    """Every run at or below the folder, in an order of ORDERS. Raises CheckpointError when there is none."""
    places = [path.parent for depth in range(_DEEPEST) for path in sorted(folder.glob("*/" * depth + "config.toml"))]
    if not places:
        raise CheckpointError(f"{folder}: no run in it (no config.toml); name a folder that runs were written into")
    found = [_line(place, folder) for place in places]
    return sorted(found, key=lambda run: _place(run, order))


def _place(run: Listed, order: str) -> tuple[float, str]:
    """Where a run stands in an order; one without the figure comes last."""
    figure = {
        "name": 0.0,
        "loss": run.loss,
        "accuracy": None if run.accuracy is None else -run.accuracy,
        "time": -run.began,
    }[order]
    return float("inf") if figure is None else figure, run.name


def _line(place: Path, folder: Path) -> Listed:
    record, files = collect(place), RunFolder(place)
    last = record.steps[-1] if record.steps else {}
    state = "finished" if files.model.exists() else "unfinished" if record.steps else "not begun"
    held_out = record.evaluation.get("accuracy", record.evals[-1].get("accuracy") if record.evals else None)
    name = str(place.relative_to(folder)) if place != folder else place.name
    steps, seconds = int(last.get("step", 0)), float(last.get("seconds", 0.0))
    return Listed(name, files.config.stat().st_mtime, state, steps, last.get("loss"), held_out, seconds, record)


def runs_table(runs: Sequence[Listed]) -> Table:
    """For the terminal."""
    table = Table("run", "state", "steps", "loss", "held-out accuracy", "training")
    for run in runs:
        numbers = ("" if value is None else f"{value:.3f}" for value in (run.loss, run.accuracy))
        table.add_row(run.name, run.state, str(run.steps), *numbers, f"{run.seconds:.0f} s")
    return table


def differing(runs: Sequence[Listed]) -> Table:
    """The settings that are not the same in all runs: a row a setting, a column a run."""
    table = Table("setting", *(run.name for run in runs))
    for key, *values in settings_rows([run.record for run in runs]):
        table.add_row(key, *values)
    return table
