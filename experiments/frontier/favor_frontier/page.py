"""Reward against KL, who dominates whom, and stability over training: plots and rows of a frontier.

In: the content of frontier.json. Out: a section of the report, rows for the terminal. Next: frontier.html.jinja.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from rich.table import Table

from favor.report.curves import Drawn
from favor.report.found import Found, card
from favor.report.frame import rendered
from favor.report.plot import Axes, Line, chart
from favor.report.table import FEW

LABELS = {
    "start": "SFT (start)",
    "dpo": "DPO",
    "dpo_fresh": "DPO, fresh answers",
    "ipo": "IPO",
    "kto": "KTO",
    "ppo": "PPO, learnt reward",
    "ppo_true": "PPO, ground truth",
    "unlikelihood": "Unlikelihood",
    "preferred_ft": "Preferred-FT",
    "best_of_n": "Best-of-N",
}
_STRENGTH = {
    **dict.fromkeys(("dpo", "dpo_fresh", "ipo", "kto"), "beta"),
    **dict.fromkeys(("ppo", "ppo_true"), "target KL"),
    "unlikelihood": "alpha",
    "preferred_ft": "epochs",
    "best_of_n": "N",
}
# of the plots' colours, a method's own
_COLOURS = {
    "start": 6,
    "dpo": 0,
    "dpo_fresh": 8,
    "ipo": 5,
    "kto": 3,
    "ppo": 1,
    "ppo_true": 4,
    "unlikelihood": 7,
    "preferred_ft": 2,
    "best_of_n": 6,
}
# (width, height) of the picture on a screen, and on a phone
_WIDE, _SMALL = (1000, 480), (360, 330)


class FrontierRows(NamedTuple):
    """Tables as text: every point; every pair of methods; what a budget buys; notes."""

    points: list[tuple[str, str, str, str]]
    dominance: list[tuple[str, str, str, str]]
    budgets: list[tuple[str, ...]]
    notes: list[str]


def frontier_section(found: Mapping[str, Any]) -> str:
    """What the report of a frontier's run folder shows of frontier.json, as HTML."""
    return rendered(
        "favor_frontier",
        "frontier.html.jinja",
        verdict=card(frontier_verdict(found)),
        rows=frontier_rows(found),
        plot=frontier_plot(found),
        costs=cost_plots(found),
        small=frontier_plot(found, _SMALL),
        stability=stability_plots(found),
        samples=samples_side_by_side(found),
    )


def frontier_verdict(found: Mapping[str, Any]) -> Found:
    """What the differences at equal KL say of DPO, and of all pairs of methods."""
    told = [d for d in found["dominance"] if "dpo" in (d["a"], d["b"]) and d["wins"] not in ("neither", "one seed")]
    over, under = ([_other(d) for d in told if (d["wins"] == "dpo") == won] for won in (True, False))
    parts = [f"DPO beats {_listed(over)}"] * bool(over) + [
        f"{_listed(under)} beat{'s' * (len(under) == 1)} DPO"
    ] * bool(under)
    settled = sum(d["wins"] not in ("neither", "one seed") for d in found["dominance"])
    one_seed = len(found["seeds"]) == 1
    headline = (
        "; ".join(parts) + ", at equal KL."
        if parts
        else "At equal KL no method is settled to be better than DPO, or worse."
    )
    wrong = [f"{item['point']} stopped early: {item['why']}" for item in found["stopped"][:3]]
    if found["finished"] < found["wanted"]:
        wrong.append(
            f"{found['wanted'] - found['finished']} of {found['wanted']} points are missing: the same command makes them."
        )
    return Found(
        "settled" if parts else "unsure",
        headline,
        changed=[f"{_versus(d)}: {_difference(d)}." for d in told]
        + [f"Of {len(found['dominance'])} pairs of methods {settled} are settled."],
        sure=[f"{_brackets(found)}." + " One seed settles nothing: give more (seeds=[0, 1, 2])." * one_seed],
        cost=["How far a method had to move the model for its reward is the KL, to the right in the picture."],
        wrong=wrong,
    )


def _other(pair: Mapping[str, Any]) -> str:
    return LABELS[pair["b"] if pair["a"] == "dpo" else pair["a"]]


def _versus(pair: Mapping[str, Any]) -> str:
    return f"{LABELS[pair['a']]} less {LABELS[pair['b']]}, reward at equal KL"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def frontier_rows(found: Mapping[str, Any]) -> FrontierRows:
    """Rows of (method, strength, KL, reward) and (comparison, difference at equal KL, corrected interval, verdict)."""
    points = [
        (LABELS[method], _strength(method, p["strength"]), _interval(p["kl"], ".2f"), _interval(p["reward"], ".3f"))
        for method, members in found["points"].items()
        for p in members
    ]
    dominance = [
        (f"{LABELS[d['a']]} against {LABELS[d['b']]}", _difference(d), _together(d), _verdict(d))
        for d in found["dominance"]
    ]
    each = (
        f"{found['num_prompts']} held-out prompts x {found['samples_per_prompt']} samples x {len(found['seeds'])} seeds"
    )
    notes = [
        f"{found['finished']} of {found['wanted']} points; {each}",
        f"{_brackets(found)}. A method dominates another when its reward at equal KL is higher over the range both reach, "
        + _rule(found),
        "Best-of-N's KL is its bound log N - (N-1)/N, not a measurement",
    ]
    took = ", ".join(f"{LABELS[m]} {s:.0f}" for m, s in found.get("core_seconds", {}).items() if found["points"].get(m))
    if took:
        notes.append(
            "Seconds of one core to train a point, with its labels, its reward model and its reference, without measuring it: "
            f"{took}. Best-of-N trains nothing and draws N answers for each that it gives"
        )
    if far := _beyond(found["points"]):
        notes.append(f"Beyond the plot's right edge: {', '.join(far)}")
    notes += [f"{item['point']} stopped early: {item['why']}" for item in found["stopped"]]
    budgets = [
        (
            f"{LABELS[p['method']]}, {_strength(p['method'], p['strength'])}",
            f"{p['calls']:,}",
            f"{p['core_seconds']:.0f}",
            _interval(p["kl"], ".2f"),
            _interval(p["reward"], ".3f"),
        )
        for p in found.get("budgets", ())
    ]
    return FrontierRows(points, dominance, budgets, notes)


def _rule(found: Mapping[str, Any]) -> str:
    if found.get("correction") == "holm":
        return "and that stands after Holm's correction for having looked at all pairs (5 % for any wrong verdict)"
    return "by an interval that leaves out 0; the pairs are many, and files of an earlier favor do not correct for that"


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
    # files of an earlier favor have none
    p = "" if pair.get("p") is None else f", p {pair['p']:.2g}"
    return f"{pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]{p}"


def _together(pair: Mapping[str, Any]) -> str:
    # files of an earlier favor have none
    both = pair.get("together")
    return "" if both is None else f"[{both[0]:+.3f}, {both[1]:+.3f}]"


def _verdict(pair: Mapping[str, Any]) -> str:
    return {"neither": "neither", "one seed": "no verdict: one seed"}.get(
        pair["wins"]
    ) or f"{LABELS[pair['wins']]} dominates"


def frontier_table(found: Mapping[str, Any]) -> Table:
    """The points as a rich table."""
    table = Table("method", "strength", "KL(policy || SFT), nats", "ground-truth reward", caption=_brackets(found))
    for row in frontier_rows(found).points:
        table.add_row(*row)
    return table


def frontier_plot(found: Mapping[str, Any], size: tuple[int, int] = _WIDE) -> Markup:
    """Reward against KL, with intervals both ways; the axis ends at widest_kl, and what goes on beyond it has an arrow."""
    wide, lines = size == _WIDE, list[Line]()
    for method, members in found["points"].items():
        p = sorted(members, key=lambda point: point["kl"]["mean"])
        lines.append(
            Line(
                [point["kl"]["mean"] for point in p],
                [point["reward"]["mean"] for point in p],
                LABELS[method],
                _COLOURS[method],
                # it shares the start's colour
                dash=int(method == "best_of_n"),
                marks=True,
                joined=len(p) > 1,
                texts=[_strength(method, point["strength"]).rpartition(" ")[2] for point in p] if wide else (),
                across=[(point["kl"]["low"], point["kl"]["high"]) for point in p] if wide else (),
                up=[(point["reward"]["low"], point["reward"]["high"]) for point in p],
            )
        )
    ends = (0.0, 1.05 * widest_kl(found["points"]))
    what = "Reward against KL: up and to the left is better"
    axes = Axes(
        what, "sampled KL, nats a response (square root)", "ground-truth reward", *size, "sqrt", ends, inside=True
    )
    return chart(axes, lines)


def cost_plots(found: Mapping[str, Any]) -> list[Drawn]:
    """Reward against calls of the ground truth, and against seconds of a core, a line a method."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for point in found.get("budgets", ()):
        by_method.setdefault(point["method"], []).append(point)
    if not any(len(members) > 1 for members in by_method.values()):
        return []
    plots: list[Drawn] = []
    for key, unit in (("calls", "calls of the ground truth"), ("core_seconds", "seconds of a core")):
        lines = [
            Line(
                [p[key] for p in sorted(members, key=lambda p: p[key])],
                [p["reward"]["mean"] for p in sorted(members, key=lambda p: p[key])],
                f"{LABELS[method]}, {_strength(method, members[0]['strength'])}",
                _COLOURS[method],
                marks=True,
                up=[(p["reward"]["low"], p["reward"]["high"]) for p in sorted(members, key=lambda p: p[key])],
            )
            for method, members in by_method.items()
        ]
        title = f"Reward against {unit}"
        plots.append(Drawn(title, "", "", chart(Axes(title, unit, "ground-truth reward"), lines)))
    return plots


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


def stability_plots(found: Mapping[str, Any]) -> list[Drawn]:
    """KL and reward over training, a small plot a method: every line is a run (strength and seed)."""
    curves = found["stability"]
    top = max((r["kl"] for curve in curves for r in curve["curve"]), default=0.0)
    low = min((r["kl"] for curve in curves for r in curve["curve"]), default=0.0)
    methods = list(dict.fromkeys(curve["method"] for curve in curves))
    plots = [_stability(curves, method, "kl", "KL, nats", (min(low, 0.0), 1.05 * top or 1.0)) for method in methods]
    for method in methods:
        # PPO's own reward has no fixed scale, so it shares no axis with the ground truth
        unit, ends = ("learnt reward (its own scale)", None) if method == "ppo" else ("ground-truth reward", (0.0, 1.0))
        plots.append(_stability(curves, method, "reward", unit, ends))
    return plots


def _stability(
    curves: Sequence[Mapping[str, Any]], method: str, key: str, unit: str, ends: tuple[float, float] | None
) -> Drawn:
    """Seeds of one strength have one colour; the first carries its label."""
    mine = [curve for curve in curves if curve["method"] == method]
    strengths = sorted({curve["strength"] for curve in mine})
    lines = [
        Line(
            [r["step"] / curve["curve"][-1]["step"] for r in curve["curve"]],
            [r[key] for r in curve["curve"]],
            _strength(method, curve["strength"]) if curve["seed"] == min(c["seed"] for c in mine) else "",
            strengths.index(curve["strength"]),
        )
        for curve in mine
    ]
    title = f"{'KL' if key == 'kl' else 'Reward'} over training: {LABELS[method]}"
    axes = Axes(title, "share of training", unit, x_range=(0.0, 1.0), y_range=ends)
    return Drawn(title, "", "", chart(axes, lines))


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


def _strength(method: str, value: float) -> str:
    return f"{_STRENGTH[method]} {value:g}" if method in _STRENGTH else ""


def _interval(value: Mapping[str, float], spec: str) -> str:
    # without spread the value is exact (the start's KL, Best-of-N's bound)
    ends = "" if value["low"] == value["high"] else f" [{value['low']:{spec}}, {value['high']:{spec}}]"
    return f"{value['mean']:{spec}}{ends}"


# for `collect`: what a report shows of a frontier's run folder
SECTIONS = {"frontier.json": frontier_section}
