"""Reward against KL, who dominates whom, and stability over training: plots and rows of a frontier.

In: the content of frontier.json. Out: figures for the page, rows for page and terminal. Next: page.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.table import Table

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


def frontier_rows(found: Mapping[str, Any]) -> FrontierRows:
    """Rows of (method, strength, KL, reward) and (comparison, difference at equal KL, verdict)."""
    points = [
        (LABELS[method], _strength(method, p["strength"]), _interval(p["kl"], ".2f"), _interval(p["reward"], ".3f"))
        for method, members in found["points"].items()
        for p in members
    ]
    dominance = [
        (
            f"{LABELS[d['a']]} against {LABELS[d['b']]}",
            f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]",
            "neither" if d["wins"] == "neither" else f"{LABELS[d['wins']]} dominates",
        )
        for d in found["dominance"]
    ]
    each = (
        f"{found['num_prompts']} held-out prompts x {found['samples_per_prompt']} samples x {len(found['seeds'])} seeds"
    )
    notes = [
        f"{found['finished']} of {found['wanted']} points; {each}",
        "Brackets are 95 % two-level bootstrap intervals: seeds, then prompts. A method dominates another when its reward "
        "at equal KL is higher over the range both reach, by an interval that leaves out 0",
        "Best-of-N's KL is its bound log N - (N-1)/N, not a measurement",
    ]
    notes += [f"{item['point']} stopped early: {item['why']}" for item in found["stopped"]]
    return FrontierRows(points, dominance, notes)


def frontier_table(found: Mapping[str, Any]) -> Table:
    """The points as a rich table."""
    table = Table("method", "strength", "KL(policy || SFT), nats", "ground-truth reward")
    for row in frontier_rows(found).points:
        table.add_row(*row)
    return table


def frontier_figures(found: Mapping[str, Any]) -> list[go.Figure]:
    """Reward against KL with intervals both ways, and KL and reward over training for DPO and PPO."""
    figures = [_reward_against_kl(found["points"])]
    if found["stability"]:
        figures += [
            _stability(found["stability"], key, unit) for key, unit in (("kl", "KL, nats"), ("reward", "reward"))
        ]
    return figures


def _reward_against_kl(points: Mapping[str, Sequence[Mapping[str, Any]]]) -> go.Figure:
    figure = go.Figure()
    for method, members in points.items():
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
    figure.update_layout(xaxis_title="sampled KL(policy || SFT), nats a response", yaxis_title="ground-truth reward")
    return _styled(figure, "Reward against KL: up and to the left is better", 460)


def _stability(curves: Sequence[Mapping[str, Any]], key: str, unit: str) -> go.Figure:
    """One small plot a method; every line is a run (strength and seed), over the share of its training."""
    methods = list(dict.fromkeys(curve["method"] for curve in curves))
    figure = make_subplots(1, len(methods), shared_yaxes=True, subplot_titles=[LABELS[m] for m in methods])
    for curve in curves:
        records = curve["curve"]
        last = records[-1]["step"]
        figure.add_scatter(
            x=[r["step"] / last for r in records],
            y=[r[key] for r in records],
            name=f"{_strength(curve['method'], curve['strength'])}, seed {curve['seed']}",
            mode="lines",
            line={"color": _COLOURS[curve["method"]], "width": 1},
            showlegend=False,
            row=1,
            col=methods.index(curve["method"]) + 1,
        )
    figure.update_xaxes(title_text="share of training", range=[0, 1])
    figure.update_yaxes(title_text=unit, col=1)
    return _styled(figure, f"Stability: {unit} over training, every run", 320)


def _styled(figure: go.Figure, title: str, height: int) -> go.Figure:
    figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        height=height,
        margin={"l": 54, "r": 12, "t": 64, "b": 44},
        template="plotly_white",
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
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
    return f"{value['mean']:{spec}} [{value['low']:{spec}}, {value['high']:{spec}}]"
