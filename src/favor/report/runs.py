"""`favor runs`: the runs below a folder as a table, and the settings in which they differ.

In: a folder. Out: Listed records, in an order; rich tables. What of a run is damaged is left out. Next: records.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rich.table import Table

from favor.errors import CheckpointError, ConfigError
from favor.report.compare import settings_rows
from favor.report.records import curves, evaluation, settings_in
from favor.run import RunFolder, read_text

# the best first; of time the newest
ORDERS = ("name", "loss", "accuracy", "time")
# deeper than experiment/method/seed nobody looks
_DEEPEST = 4


class Listed(NamedTuple):
    """A run in a line. accuracy: held out, of eval.json, else the last while training. seconds: of training; began: its recipe."""

    name: str
    path: str
    began: float
    state: Literal["finished", "unfinished", "not begun"]
    steps: int
    loss: float | None
    accuracy: float | None
    seconds: float


def listed(folder: Path, order: str = "name") -> list[Listed]:
    """Every run at or below the folder, in an order of ORDERS.

    Raises ConfigError for an order that is none of them, CheckpointError when there is no run.
    """
    if order not in ORDERS:
        raise ConfigError(f"--sort {order}: runs are sorted by one of {', '.join(ORDERS)}")
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
    """Of the run's files those that the line needs."""
    files, notes = RunFolder(place), list[str]()
    steps, evals, *_ = curves(files, notes)
    last = steps[-1] if steps else {}
    state = "finished" if files.model.exists() else "unfinished" if steps else "not begun"
    held_out = evaluation(files, notes).get("accuracy", evals[-1].get("accuracy") if evals else None)
    name = str(place.relative_to(folder)) if place != folder else place.name
    took, began = float(last.get("seconds", 0.0)), files.config.stat().st_mtime
    return Listed(name, str(place), began, state, int(last.get("step", 0)), last.get("loss"), held_out, took)


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
    recipes = [settings_in(read_text(RunFolder(Path(run.path)).config)) for run in runs]
    for key, *values in settings_rows(recipes):
        table.add_row(key, *values)
    return table
