"""Reward against KL, who dominates whom, and stability over training: plots and rows of a frontier.

In: the content of frontier.json. Out: a section of the report, rows for the terminal. Next: page.html.jinja.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from rich.table import Table

from favor.report.page import plot_html
from favor.report.table import FEW, rendered

LABELS = {
    "start": "SFT (start)",
    "dpo": "DPO",
    "ipo": "IPO",
    "kto": "KTO",
    "ppo": "PPO, learnt reward",
    "ppo_true": "PPO, ground truth",
    "unlikelihood": "Unlikelihood",
    "preferred_ft": "Preferred-FT",
    "best_of_n": "Best-of-N",
}
_STRENGTH = {
    **dict.fromkeys(("dpo", "ipo", "kto"), "beta"),
    **dict.fromkeys(("ppo", "ppo_true"), "target KL"),
    "unlikelihood": "alpha",
    "preferred_ft": "epochs",
    "best_of_n": "N",
}
_COLOURS = {
    "start": "#222222",
    "dpo": "#2f6f9f",
    "ipo": "#3fa7a0",
    "kto": "#8a5fa8",
    "ppo": "#c2603a",
    "ppo_true": "#e0a030",
    "unlikelihood": "#999999",
    "preferred_ft": "#3f8f5f",
    "best_of_n": "#b0487a",
}


class FrontierRows(NamedTuple):
    """Tables as text: every point; every pair of methods; notes."""

    points: list[tuple[str, str, str, str]]
    dominance: list[tuple[str, str, str]]
    notes: list[str]


def frontier_section(found: Mapping[str, Any]) -> str:
    """What the report of a frontier's run folder shows of frontier.json, as HTML."""
    return rendered(
        "favor_frontier",
        "page.html.jinja",
        rows=frontier_rows(found),
        plot=plot_html(frontier_figure(found)),
        stability=[plot_html(figure) for figure in stability_figures(found)],
        samples=samples_side_by_side(found),
    )


def frontier_rows(found: Mapping[str, Any]) -> FrontierRows:
    """Rows of (method, strength, KL, reward) and (comparison, difference at equal KL, verdict)."""
    points = [
        (LABELS[method], _strength(method, p["strength"]), _interval(p["kl"], ".2f"), _interval(p["reward"], ".3f"))
        for method, members in found["points"].items()
        for p in members
    ]
    dominance = [
        (f"{LABELS[d['a']]} against {LABELS[d['b']]}", _difference(d), _verdict(d)) for d in found["dominance"]
    ]
    each = (
        f"{found['num_prompts']} held-out prompts x {found['samples_per_prompt']} samples x {len(found['seeds'])} seeds"
    )
    notes = [
        f"{found['finished']} of {found['wanted']} points; {each}",
        f"{_brackets(found)}. A method dominates another when its reward at equal KL is higher over the range both reach, by an "
        "interval that leaves out 0",
        "Best-of-N's KL is its bound log N - (N-1)/N, not a measurement",
    ]
    took = ", ".join(
        f"{LABELS[m]} {s / _runs(found, m):.0f}" for m, s in found["seconds"].items() if found["points"].get(m)
    )
    notes += [f"Seconds a point, training and measuring: {took}; the learnt rewards of PPO and Best-of-N come on top"]
    if far := _beyond(found["points"]):
        notes.append(f"Beyond the plot's right edge (double-click on the plot shows all): {', '.join(far)}")
    notes += [f"{item['point']} stopped early: {item['why']}" for item in found["stopped"]]
    return FrontierRows(points, dominance, notes)


def _brackets(found: Mapping[str, Any]) -> str:
    """What the intervals are and what they leave out."""
    if found.get("intervals") != "crossed":
        return "Brackets are of an earlier favor and too narrow; the same `favor frontier` command computes them again"
    seeds = len(found["seeds"])
    if seeds == 1:
        return "Brackets are 95 % intervals over prompts of this one seed: they say nothing of another seed, so no method dominates"
    rest = f" (few: {found['num_prompts']} prompts)" if found["num_prompts"] < FEW else ""
    return f"Brackets are 95 % intervals: seeds crossed with prompts, Student's t with {seeds - 1} d.o.f. for the seeds{rest}"


def _difference(pair: Mapping[str, Any]) -> str:
    if pair["difference"] is None:
        return "no KL range in common"
    return f"{pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]"


def _verdict(pair: Mapping[str, Any]) -> str:
    return {"neither": "neither", "one seed": "no verdict: one seed"}.get(
        pair["wins"]
    ) or f"{LABELS[pair['wins']]} dominates"


def _runs(found: Mapping[str, Any], method: str) -> int:
    return len(found["points"][method]) * len(found["seeds"])


def frontier_table(found: Mapping[str, Any]) -> Table:
    """The points as a rich table."""
    table = Table("method", "strength", "KL(policy || SFT), nats", "ground-truth reward", caption=_brackets(found))
    for row in frontier_rows(found).points:
        table.add_row(*row)
    return table


def frontier_figure(found: Mapping[str, Any]) -> go.Figure:
    """Reward against KL, with intervals both ways; the axis ends at widest_kl."""
    figure = go.Figure()
    for method, members in found["points"].items():
        ordered = sorted(members, key=lambda p: p["kl"]["mean"])
        figure.add_scatter(
            x=[p["kl"]["mean"] for p in ordered],
            y=[p["reward"]["mean"] for p in ordered],
            error_x=_bars(ordered, "kl"),
            error_y=_bars(ordered, "reward"),
            text=[_strength(method, p["strength"]) for p in ordered],
            name=LABELS[method],
            mode="markers" if len(ordered) == 1 else "lines+markers",
            line={"color": _COLOURS[method], "width": 2},
            marker={"size": 8},
        )
    shown = widest_kl(found["points"])
    figure.update_layout(
        xaxis={"title": "sampled KL, nats a response", "range": [-0.02 * shown, 1.05 * shown]},
        yaxis_title="ground-truth reward",
    )
    return _styled(figure, "Reward against KL: up and to the left is better", 480)


def widest_kl(points: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """The largest interval end among points whose KL is at most 3 times the median of the methods' largest ones.

    A method that broke down would otherwise squash all others.
    """
    largest = sorted(max(p["kl"]["mean"] for p in members) for members in points.values() if members)
    limit = 3 * largest[len(largest) // 2] if largest else 0.0
    ends = [p["kl"]["high"] for members in points.values() for p in members if p["kl"]["mean"] <= limit]
    return max(ends, default=0.0) or 1.0


def _beyond(points: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    shown = widest_kl(points)
    return [
        f"{LABELS[method]} {_strength(method, p['strength'])} (KL {p['kl']['mean']:.0f}, reward {p['reward']['mean']:.2f})"
        for method, members in points.items()
        for p in members
        if p["kl"]["mean"] > shown
    ]


def stability_figures(found: Mapping[str, Any]) -> list[go.Figure]:
    """KL and reward over training, a small plot a method: every line is a run (strength and seed)."""
    curves = found["stability"]
    top = max((r["kl"] for curve in curves for r in curve["curve"]), default=0.0)
    methods = list(dict.fromkeys(curve["method"] for curve in curves))
    figures = [_stability(curves, method, "kl", f"KL over training: {LABELS[method]}") for method in methods]
    for figure in figures:
        figure.update_yaxes(title_text="KL, nats", range=[min(0.0, -0.05 * top), 1.05 * top])
    for method in methods:
        figure = _stability(curves, method, "reward", f"Reward over training: {LABELS[method]}")
        # PPO's own reward has no fixed scale, so it shares no axis with the ground truth
        title = "learnt reward (its own scale)" if method == "ppo" else "ground-truth reward"
        figure.update_yaxes(title_text=title, range=None if method == "ppo" else [0, 1])
        figures.append(figure)
    return figures


def _stability(curves: Sequence[Mapping[str, Any]], method: str, key: str, title: str) -> go.Figure:
    figure = go.Figure()
    for curve in curves:
        if curve["method"] == method:
            records = curve["curve"]
            figure.add_scatter(
                x=[r["step"] / records[-1]["step"] for r in records],
                y=[r[key] for r in records],
                name=f"{_strength(method, curve['strength'])}, seed {curve['seed']}",
                mode="lines",
                line={"color": _COLOURS[method], "width": 1},
                showlegend=False,
            )
    figure.update_xaxes(title_text="share of training", range=[0, 1])
    return _styled(figure, title, 260)


def samples_side_by_side(found: Mapping[str, Any], prompts: int = 4) -> list[tuple[str, list[tuple[str, float, str]]]]:
    """Per held-out prompt: (method and strength, reward, sample) of every method at its middle strength, first seed."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for item in sorted(found["samples"], key=lambda item: item["strength"]):
        by_method.setdefault(item["method"], []).append(item)
    middle = [by_method[method][len(by_method[method]) // 2] for method in LABELS if method in by_method]
    rows: dict[str, list[tuple[str, float, str]]] = {}
    for item in middle:
        label = f"{LABELS[item['method']]} {_strength(item['method'], item['strength'])}".strip()
        for sample in item["samples"][:prompts]:
            rows.setdefault(sample["prompt"], []).append((label, sample["reward"], sample["text"]))
    return list(rows.items())


def _styled(figure: go.Figure, title: str, height: int) -> go.Figure:
    figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        height=height,
        margin={"l": 54, "r": 12, "t": 64, "b": 44},
        template="plotly_white",
        legend={"orientation": "h", "y": -0.25, "yanchor": "top"},
    )
    return figure


def _bars(points: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [p[key]["high"] - p[key]["mean"] for p in points],
        "arrayminus": [p[key]["mean"] - p[key]["low"] for p in points],
        "thickness": 1,
        "width": 2,
    }


def _strength(method: str, value: float) -> str:
    return f"{_STRENGTH[method]} {value:g}" if method in _STRENGTH else ""


def _interval(value: Mapping[str, float], spec: str) -> str:
    # without spread the value is exact (the start's KL, Best-of-N's bound)
    ends = "" if value["low"] == value["high"] else f" [{value['low']:{spec}}, {value['high']:{spec}}]"
    return f"{value['mean']:{spec}}{ends}"


# for `collect`: what a report shows of a frontier's run folder
SECTIONS = {"frontier.json": frontier_section}
