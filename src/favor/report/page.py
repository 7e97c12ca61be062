"""Runs -> one static page: curves, figures, samples, data report, settings; works offline from a file.

In: RunRecords, the first being the page's own run. Out: report.html. Next: page.html.jinja.
"""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
import plotly.offline
from markupsafe import Markup
from plotly.io import to_html

from favor.hide import in_texts, places_in, without_places
from favor.report.collect import RunRecord
from favor.report.table import figure_rows, rendered
from favor.report.winrate import winrate_rows
from favor.run import write_text


class Curve(NamedTuple):
    """A plot: title, unit, and the step records' keys drawn in it with their labels."""

    title: str
    unit: str
    keys: tuple[tuple[str, str], ...]
    log: bool = False


CURVES = (
    Curve("Loss", "nats", (("loss", "loss"),)),
    Curve("Preference accuracy (training pairs)", "share", (("accuracy", "accuracy"),)),
    Curve("Margin of implicit rewards", "beta x nats", (("margin", "margin"),)),
    Curve("Implicit rewards", "beta x nats", (("reward_chosen", "chosen"), ("reward_rejected", "rejected"))),
    Curve("Log-prob per token", "nats", (("logp_chosen_per_token", "chosen"), ("logp_rejected_per_token", "rejected"))),
    Curve("Chosen below reference", "share of pairs", (("chosen_below_reference", "chosen below"),)),
    Curve("Sampled KL(policy || reference)", "nats", (("kl", "KL"),)),
    Curve("Reward of samples", "score", (("reward", "reward"),)),
    Curve("Reward less KL penalty", "score", (("objective", "objective"),)),
    Curve("KL coefficient", "", (("kl_coef", "coefficient"),)),
    Curve("Reward gap (chosen - rejected)", "score", (("gap", "gap"),)),
    Curve("Scores", "score", (("score_chosen", "chosen"), ("score_rejected", "rejected"))),
    Curve("Value loss", "", (("value_loss", "value loss"),)),
    Curve("Clipped ratios", "share of tokens", (("clipped", "clipped"),)),
    Curve("KL of one update", "nats a token", (("update_kl", "update KL"),)),
    Curve("Entropy", "nats a token", (("entropy", "entropy"),)),
    Curve("Response length", "tokens", (("length", "length"),)),
    Curve("Ended with an end token", "share", (("ended", "ended"),)),
    Curve("Gradient norm", "before clipping", (("grad_norm", "norm"),)),
    Curve("Learning rate", "", (("lr", "rate"),)),
    Curve("Speed", "unique tokens a second", (("tokens_per_s", "tokens/s"),)),
)
_COLOURS = ("#2f6f9f", "#c2603a", "#3f8f5f", "#8a5fa8", "#8c7a2f", "#555555")


def write_page(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page for one run, or for several compared; whole or not at all. It names no place of this machine."""
    runs = [_anywhere(run) for run in runs]
    by_step, by_tokens = _plots(runs, "step"), _plots(runs, "tokens")
    page = rendered(
        "favor.report",
        "page.html.jinja",
        runs=runs,
        title=" / ".join(run.name for run in runs),
        plotly=Markup(plotly.offline.get_plotlyjs()),
        sections=any(run.sections for run in runs),
        calibrations=[plot_html(f) for f in (_calibration(runs),) if f.data],
        winrates=[(run.name, winrate_rows(run.winrate)) for run in runs if run.winrate],
        judged=[(run.name, run.winrate_samples) for run in runs if run.winrate_samples],
        by_step=by_step,
        by_tokens=by_tokens,
        figures=[(run.name, figure_rows(run.evaluation)) for run in runs if run.evaluation],
        notes=[(run.name, event["message"]) for run in runs for event in run.events],
        data=[(run.name, flatten(run.data)) for run in runs if run.data],
        samples=[(run.name, [_sides(sample) for sample in run.samples]) for run in runs if run.samples],
    )
    write_text(path, page)


def _anywhere(run: RunRecord) -> RunRecord:
    """The record as others may see it: paths cut to their last name, but for the texts of the samples."""
    try:
        known = places_in(tomllib.loads(run.config))
    except tomllib.TOMLDecodeError:
        known = []

    def shown(text: str) -> str:
        return without_places(text, known)

    return replace(
        run,
        config=shown(run.config),
        events=tuple(in_texts(run.events, shown)),
        data=in_texts(run.data, shown),
        winrate=in_texts(run.winrate, shown),
    )


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


def _plots(runs: Sequence[RunRecord], over: str) -> list[Markup]:
    """The curves for which any run has figures, as HTML without the library."""
    figures = [_figure(runs, curve, over) for curve in CURVES]
    return [plot_html(figure) for figure in figures if figure.data]


def plot_html(figure: go.Figure) -> Markup:
    """A plot as HTML without the plotting library, which the page holds once."""
    settings = {"displayModeBar": False, "responsive": True}
    return Markup(to_html(figure, include_plotlyjs=False, full_html=False, config=settings))


def _calibration(runs: Sequence[RunRecord]) -> go.Figure:
    """Predicted p*(winner) against the share predicted rightly, with the diagonal of perfect calibration."""
    figure = go.Figure()
    for number, run in enumerate(runs):
        if calibration := run.evaluation.get("calibration"):
            curve = calibration["curve"]
            figure.add_scatter(
                x=[part["predicted"] for part in curve],
                y=[part["observed"] for part in curve],
                text=[f"{part['num_pairs']} pairs" for part in curve],
                name=run.name,
                mode="lines+markers",
                line={"color": _COLOURS[number % len(_COLOURS)]},
            )
    if figure.data:
        figure.add_scatter(x=[0.5, 1], y=[0.5, 1], name="perfect", mode="lines", line={"dash": "dot", "color": "#999"})
    figure.update_layout(
        title={"text": "Calibration of the reward", "font": {"size": 15}},
        height=320,
        margin={"l": 54, "r": 12, "t": 40, "b": 44},
        template="plotly_white",
        xaxis_title="predicted p*(winner)",
        yaxis_title="share predicted rightly",
    )
    return figure


def _figure(runs: Sequence[RunRecord], curve: Curve, over: str) -> go.Figure:
    figure = go.Figure()
    for number, run in enumerate(runs):
        for part, (key, label) in enumerate(curve.keys):
            x, y = _series(run, key, over)
            if not y:
                continue
            name = label if len(runs) == 1 else f"{run.name}: {label}"
            line = {"color": _COLOURS[(number * len(curve.keys) + part) % len(_COLOURS)], "width": 2}
            mode = "lines+markers" if len(y) < 30 else "lines"
            figure.add_scatter(x=x, y=y, name=name, mode=mode, line=line, marker={"size": 5})
    if curve.keys[0][0] == "loss" and any("accuracy" in record for run in runs for record in run.steps):
        figure.add_hline(y=math.log(2), line_dash="dot", line_color="#999", annotation_text="ln 2")
    figure.update_layout(
        title={"text": curve.title, "font": {"size": 15}},
        height=280,
        margin={"l": 54, "r": 12, "t": 40, "b": 44},
        template="plotly_white",
        showlegend=len(list(figure.data)) > 1,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1.0, "xanchor": "right"},
        xaxis_title="step" if over == "step" else "unique tokens",
        yaxis_title=curve.unit,
    )
    return figure


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


def _sides(sample: dict[str, Any]) -> dict[str, Any]:
    """One prompt with the texts and scores of both models, at most three of each."""
    prompt = sample["prompt"]
    text = prompt if isinstance(prompt, str) else "\n".join(str(m.get("content", "")) for m in prompt)
    sides = {
        side: list(zip(sample[side][:3], sample.get(f"{side}_scores", [None] * len(sample[side])), strict=False))
        for side in ("reference", "policy")
    }
    return {"prompt": text, **sides}
