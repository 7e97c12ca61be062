"""Run folders -> one static page: verdict first, then figures, curves, answers, data, settings; works offline from a file.

In: run records. Out: report.html of one run, compare.html of several; neither names a place of this machine. What stands on
a page is `contents`; sections of other packages bring their own verdict. Next: verdict.py.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from favor.report import samples
from favor.report.curves import Drawn, curves
from favor.report.found import other
from favor.report.frame import rendered
from favor.report.plot import Axes, Line, bars, chart
from favor.report.records import Record, RunRecord, anywhere
from favor.report.table import figure_columns, figure_rows, winrate_rows
from favor.report.verdict import is_warning, sides_of, verdict
from favor.report.words import between, percent
from favor.run import dotted, write_text

# events, letters of the settings and rows on the data that a page shows
_EVENTS, _SETTINGS, _ROWS, _JUDGED = 100, 20_000, 150, 20
# letters of what a judge saw
_SAID = 120_000
# histogram bars
_BARS = 20


def write_page(run: RunRecord, path: Path) -> None:
    """Write the page of one run; whole or not at all."""
    write_text(path, page_html(run))


def page_html(run: RunRecord) -> str:
    """The page of one run, which names no place of this machine."""
    return str(page(anywhere(run)))


def page(run: RunRecord) -> Markup:
    """The page of one run."""
    answers, left_out = samples.shown(run.samples)
    plots = {over: curves([run], over, inner=False) for over in ("step", "tokens")}
    return rendered(
        "favor.report",
        "page.html.jinja",
        run=run,
        verdict=verdict(run),
        own=contents(run),
        contents=[*_named_in(run.sections), *contents(run)],
        figure_rows=figure_rows,
        figure_columns=figure_columns,
        winrate_rows=winrate_rows,
        winrate_bar=winrate_bar(run.winrate) if run.winrate else "",
        names=sides_of(run.winrate) if run.winrate else (),
        judged=_judged(run),
        calibration=calibration(run),
        histogram=[]
        if run.evaluation.get("calibration")
        else _histogram(run, "Margins of held-out pairs", "beta x nats"),
        rounds=_rounds(run),
        round_rows=[
            [
                str(each["round"]),
                f"{each['mean_score']:.4g}",
                *(each.get(k, "") for k in ("prompts", "samples", "comparisons")),
            ]
            for each in run.rounds
        ],
        plots=plots if plots["step"] else {"step": []},
        inner=curves([run], "step", inner=True),
        samples=answers,
        left_out=left_out,
        score_name=(run.evaluation.get("score") or {}).get("name", "the scorer"),
        events=_events(run),
        data_rows=data_rows(run.data),
        config=_shortened(run.config),
    )


def contents(run: RunRecord) -> list[tuple[str, str]]:
    """(id, title) of the parts that this run has something for, in order."""
    parts = {
        "winrate": ("Win rate", run.winrate),
        "judged": ("Judged side by side", run.winrate and run.winrate_samples),
        "calibration": ("Calibration", run.evaluation.get("calibration")),
        "rounds": ("Rounds", run.rounds),
        "figures": ("Held-out figures", run.evaluation or not (other(run) or "ppo" in run.settings)),
        "samples": ("Answers before and after", run.samples),
        "curves": ("Curves", run.steps or not other(run)),
        "events": ("What happened", run.events),
        "data": ("Data", data_rows(run.data)),
        "settings": ("Settings", True),
    }
    return [(name, title) for name, (title, there) in parts.items() if there]


def _named_in(sections: Sequence[str]) -> list[tuple[str, str]]:
    """(id, title) of the parts that sections of other packages bring."""
    return [
        part
        for section in sections
        for part in re.findall(r'<section class="more" id="([\w-]+)"><h2>([^<]+)</h2>', section)
    ]


def winrate_bar(figures: dict[str, Any]) -> Markup:
    """Shares of pairs won, tied and lost, in one bar, with a key."""
    a, b = sides_of(figures)
    total = max(figures["pairs"], 1)
    shares = [
        ("won-a", f"{a} wins", figures["wins"]),
        ("tied", "ties", figures["ties"]),
        ("won-b", f"{b} wins", figures["losses"]),
    ]
    told = ", ".join(f"{name} {percent(count / total)}" for _, name, count in shares)
    parts = [
        Markup('<span class="{}" style="width:{:.2f}%"></span>').format(kind, 100 * count / total)
        for kind, _, count in shares
    ]
    key = [Markup('<span class="{}"></span>{} {}').format(kind, name, count) for kind, name, count in shares]
    rate = f"{percent(figures['win_rate'])} for {a}, ties as halves ({between(figures['win_rate_interval'])})"
    return Markup(
        '<div class="share" role="img" aria-label="{}">{}</div><p class="key share-key">{}</p><p class="lead">{}</p>'
    ).format(told, Markup("").join(parts), Markup("").join(key), rate)


def calibration(run: RunRecord) -> list[Drawn]:
    """Predicted chance of being right against the share that was, with the number of pairs at each point; and the margins."""
    parts = (run.evaluation.get("calibration") or {}).get("curve", ())
    if not parts:
        return []
    x = [part["predicted"] for part in parts]
    errors = [1.96 * (part["observed"] * (1 - part["observed"]) / part["num_pairs"]) ** 0.5 for part in parts]
    up = [(max(p["observed"] - e, 0.0), min(p["observed"] + e, 1.0)) for p, e in zip(parts, errors, strict=True)]
    texts = [f"n={part['num_pairs']}" for part in parts]
    line = Line(x, [p["observed"] for p in parts], marks=True, texts=texts, up=up)
    low = min([0.4, *(end for ends in up for end in ends)])
    axes = Axes(
        "Calibration",
        "predicted chance",
        "share right",
        x_range=(0.48, 1.02),
        y_range=(low, 1.04),
        diagonal=True,
        inside=True,
    )
    note = "dotted: perfect; whiskers: 95 % of a share of n pairs, prompts taken as independent"
    return [Drawn("Calibration", "", note, chart(axes, [line])), *_histogram(run, "Margins of held-out pairs", "score")]


def _histogram(run: RunRecord, title: str, unit: str) -> list[Drawn]:
    """How far the preferred answer is ahead, pair by pair."""
    margins = np.array([record["margin"] for record in run.pairs if isinstance(record["margin"], int | float)])
    if not len(margins):
        return []
    reach = float(np.abs(margins).max()) or 1.0
    # symmetric, so that 0 is an edge between two bars
    counts, edges = np.histogram(margins, bins=_BARS if len(margins) >= _BARS else 8, range=(-reach, reach))
    axes = Axes(title, f"margin, {unit}", "pairs")
    note = f"{len(margins)} pairs; left of 0 the other answer is ahead ({int((margins < 0).sum())} pairs)"
    return [Drawn(title, "", note, bars(axes, edges.tolist(), counts.tolist(), 0.0))]


def _judged(run: RunRecord) -> list[dict[str, Any]]:
    """What the judge saw, of the first prompts."""
    most = _SAID // max(3 * len(run.winrate_samples[:_JUDGED]), 1)
    return [
        {"prompt": samples.within(samples.prompt_text(one["prompt"]), most), "verdict": one["verdict"]}
        | {side: samples.within(str(one[side]), most) for side in ("a", "b")}
        for one in run.winrate_samples[:_JUDGED]
    ]


def _rounds(run: RunRecord) -> list[Drawn]:
    if not run.rounds:
        return []
    line = Line(
        [each["round"] for each in run.rounds], [each["mean_score"] for each in run.rounds], "score", marks=True
    )
    axes = Axes("Mean score of a round's samples", "round", "score", whole=True)
    return [Drawn(axes.what, "up", "sampled before the round's training", chart(axes, [line]))]


def data_rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    """What was read, as rows; what is zero or empty is left out."""
    rows = [
        (key.replace(".", " · ").replace("_", " "), text)
        for key, text in flatten(data)
        if text not in ("0", "0.0", "", "None", "False")
    ]
    more = [("more", f"{len(rows) - _ROWS} in data.json")] if len(rows) > _ROWS else []
    return rows[:_ROWS] + more


def flatten(record: Record) -> list[tuple[str, str]]:
    """Nested records as (dotted key, text) rows; long lists are counted and opened."""
    return [(key, _opened(value) if isinstance(value, list) else str(value)) for key, value in dotted(record).items()]


def _opened(values: list[Any]) -> str:
    shown = "; ".join(map(_words, values[:5]))
    return f"{len(values)}" + (f": {shown}" if values else "") + (" ..." if len(values) > 5 else "")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(map(str, value.values()))
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _events(run: RunRecord) -> list[dict[str, Any]]:
    """Warnings first where there are too many to show all."""
    told = [
        {"message": str(event["message"])[:1000], "warn": is_warning(str(event["message"]))} for event in run.events
    ]
    if len(told) <= _EVENTS:
        return told
    kept = sorted(told, key=lambda event: not event["warn"])[:_EVENTS]
    return [*kept, {"message": f"{len(told) - _EVENTS} more are in metrics.jsonl", "warn": False}]


def _shortened(text: str) -> str:
    return text if len(text) <= _SETTINGS else text[:_SETTINGS] + "\n... the rest is in config.toml"
