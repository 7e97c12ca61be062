"""Run folders -> one static page: curves, figures, samples, data report, settings; works offline from a file.

In: run folders, the first being the page's own; any part but the recipe may be missing. Out: report.html. Its plots: CURVES,
drawn by `curve`, and `calibration`; sections bring their own. Next: page.html.jinja.
"""

import json
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import plotly.graph_objects as go
import plotly.offline
from markupsafe import Markup
from plotly.io import to_html

from favor.errors import CheckpointError, in_texts, places_in, without_places
from favor.report.table import figure_rows, rendered, winrate_rows
from favor.run import RunFolder, read_text, write_text

Record = dict[str, Any]
# title -> (unit, {key of a step's record: its label}); a curve that no run has figures for is left out
CURVES: dict[str, tuple[str, dict[str, str]]] = {
    "Loss": ("nats", {"loss": "loss"}),
    "Preference accuracy (training pairs)": ("share", {"accuracy": "accuracy"}),
    "Margin of implicit rewards": ("beta x nats", {"margin": "margin"}),
    "Implicit rewards": ("beta x nats", {"reward_chosen": "chosen", "reward_rejected": "rejected"}),
    "Log-prob per token": ("nats", {"logp_chosen_per_token": "chosen", "logp_rejected_per_token": "rejected"}),
    "Chosen below reference": ("share of pairs", {"chosen_below_reference": "chosen below"}),
    "Sampled KL(policy || reference)": ("nats", {"kl": "KL"}),
    "Reward of samples": ("score", {"reward": "reward"}),
    "Reward less KL penalty": ("score", {"objective": "objective"}),
    "KL coefficient": ("", {"kl_coef": "coefficient"}),
    "Reward gap (chosen - rejected)": ("score", {"gap": "gap"}),
    "Scores": ("score", {"score_chosen": "chosen", "score_rejected": "rejected"}),
    "Value loss": ("", {"value_loss": "value loss"}),
    "Clipped ratios": ("share of tokens", {"clipped": "clipped"}),
    "KL of one update": ("nats a token", {"update_kl": "update KL"}),
    "Entropy": ("nats a token", {"entropy": "entropy"}),
    "Response length": ("tokens", {"length": "length"}),
    "Ended with an end token": ("share", {"ended": "ended"}),
    "Gradient norm": ("before clipping", {"grad_norm": "norm"}),
    "Learning rate": ("", {"lr": "rate"}),
    "Speed": ("unique tokens a second", {"tokens_per_s": "tokens/s"}),
}
_COLOURS = ("#2f6f9f", "#c2603a", "#3f8f5f", "#8a5fa8", "#8c7a2f", "#555555")


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind: records by step, events, held-out figures, samples, data report, recipe; sections as HTML."""

    name: str
    config: str
    steps: tuple[Record, ...]
    evals: tuple[Record, ...]
    events: tuple[Record, ...]
    evaluation: Record
    winrate: Record
    data: Record
    samples: tuple[Record, ...]
    winrate_samples: tuple[Record, ...]
    sections: tuple[str, ...]


def write_page(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page for one run, or for several compared; whole or not at all. It names no place of this machine."""
    shown = [_anywhere(run) for run in runs]
    figures = {over: [curve(shown, title, over) for title in CURVES] for over in ("step", "tokens")}
    plots = {over: [plot_html(figure) for figure in found if figure.data] for over, found in figures.items()}
    page = rendered(
        "favor.report",
        "page.html.jinja",
        runs=shown,
        title=" / ".join(run.name for run in shown),
        plotly=Markup(plotly.offline.get_plotlyjs()),
        plots=plots,
        calibration=plot_html(calibration(shown)) if any("calibration" in run.evaluation for run in shown) else "",
        figure_rows=figure_rows,
        winrate_rows=winrate_rows,
        flatten=flatten,
        sides=_sides,
    )
    write_text(path, page)


def curve(runs: Sequence[RunRecord], title: str, over: str) -> go.Figure:
    """A plot of CURVES over the steps or the unique tokens, one line a run and key; without data when no run has it."""
    unit, keys = CURVES[title]
    figure = go.Figure()
    lines = [(run, key, label) for run in runs for key, label in keys.items()]
    for number, (run, key, label) in enumerate(lines):
        x, y = _series(run, key, over)
        if y:
            name = label if len(runs) == 1 else f"{run.name}: {label}"
            line = {"color": _COLOURS[number % len(_COLOURS)], "width": 2}
            mode = "lines+markers" if len(y) < 30 else "lines"
            figure.add_scatter(x=x, y=y, name=name, mode=mode, line=line, marker={"size": 5})
    if title == "Loss" and any("accuracy" in record for run in runs for record in run.steps):
        figure.add_hline(y=math.log(2), line_dash="dot", line_color="#999", annotation_text="ln 2")
    figure.update_layout(
        showlegend=len(list(figure.data)) > 1,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1.0, "xanchor": "right"},
    )
    return _styled(figure, title, 280, "step" if over == "step" else "unique tokens", unit)


def calibration(runs: Sequence[RunRecord]) -> go.Figure:
    """Predicted p*(winner) against the share predicted rightly, with the diagonal of perfect calibration."""
    figure = go.Figure()
    for number, run in enumerate(runs):
        parts = run.evaluation.get("calibration", {}).get("curve", ())
        figure.add_scatter(
            x=[part["predicted"] for part in parts],
            y=[part["observed"] for part in parts],
            text=[f"{part['num_pairs']} pairs" for part in parts],
            name=run.name,
            mode="lines+markers",
            line={"color": _COLOURS[number % len(_COLOURS)]},
        )
    figure.add_scatter(x=[0.5, 1], y=[0.5, 1], name="perfect", mode="lines", line={"dash": "dot", "color": "#999"})
    return _styled(figure, "Calibration of the reward", 320, "predicted p*(winner)", "share predicted rightly")


def plot_html(figure: go.Figure) -> Markup:
    """A plot as HTML without the plotting library, which the page holds once."""
    settings = {"displayModeBar": False, "responsive": True}
    return Markup(to_html(figure, include_plotlyjs=False, full_html=False, config=settings))


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested records as (dotted key, text) rows; long lists are counted and opened."""
    if isinstance(value, dict):
        return [
            row for key, inner in value.items() for row in flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list):
        shown = "; ".join(" ".join(map(str, v.values() if isinstance(v, dict) else v)) for v in value[:5])
        return [(prefix, f"{len(value)}" + (f": {shown}" if value else "") + (" ..." if len(value) > 5 else ""))]
    return [(prefix, str(value))]


def _anywhere(run: RunRecord) -> RunRecord:
    """The record as others may see it: paths cut to their last name, but for the texts of the samples."""
    try:
        known = places_in(tomllib.loads(run.config))
    except tomllib.TOMLDecodeError:
        known = []
    told = {"config": run.config, "events": run.events, "data": run.data, "winrate": run.winrate}
    return replace(run, **in_texts(told, lambda text: without_places(text, known)))


def _series(run: RunRecord, key: str, over: str) -> tuple[list[float], list[float]]:
    x: list[float] = []
    y: list[float] = []
    tokens = 0
    last: object = None
    for record in run.steps:
        tokens += record.get("unique_tokens", 0)
        # a KL probe's figure is repeated until the next one: draw each once
        repeated = key == "kl" and record.get(key) == last
        last = record.get(key)
        if key in record and not repeated:
            x.append(record["step"] if over == "step" else tokens)
            y.append(record[key])
    return x, y


def _sides(sample: dict[str, Any], side: str) -> list[tuple[Any, Any]]:
    """The texts of one model with their scores, at most three."""
    return list(zip(sample[side][:3], sample.get(f"{side}_scores", [None] * 3), strict=False))


def _styled(figure: go.Figure, title: str, height: int, x: str, y: str) -> go.Figure:
    return figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        height=height,
        margin={"l": 54, "r": 12, "t": 40, "b": 44},
        template="plotly_white",
        xaxis_title=x,
        yaxis_title=y,
    )


def collect(root: Path, sections: Mapping[str, Callable[[Record], str]] = MappingProxyType({})) -> RunRecord:
    """Read a run folder; what of it is damaged is left out and told among the events. Raises CheckpointError when it is none.

    sections: a file of the folder that only the caller knows -> the function that shows its content as HTML.
    """
    folder, notes = RunFolder(root), list[str]()
    if not folder.config.exists():
        raise CheckpointError(f"{root}: no run here (no config.toml); name a run folder that favor wrote")
    metrics = _lines(folder.metrics, {"kind"}, notes)
    told = [record for record in metrics if record["kind"] == "event" and isinstance(record.get("message"), str)]
    sampled = _lines(folder.samples, {"prompt", "reference", "policy"}, notes)
    shown = ((root / name, render) for name, render in sections.items())
    return RunRecord(
        name=root.name or str(root),
        config=read_text(folder.config),
        steps=_last_of_each_step(metrics, "step"),
        evals=_last_of_each_step(metrics, "eval"),
        evaluation=_json(folder.evaluation, _shows_figures, notes),
        winrate=_json(folder.winrate, winrate_rows, notes),
        data=_json(folder.data_report, dict, notes),
        samples=tuple(r for r in sampled if isinstance(r["reference"], list) and isinstance(r["policy"], list)),
        winrate_samples=tuple(_lines(folder.winrate_samples, {"prompt", "a", "b", "verdict"}, notes)),
        sections=tuple(render(found) for path, render in shown if (found := _json(path, render, notes))),
        events=(*told, *({"message": f"warning: {note}"} for note in notes)),
    )


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
