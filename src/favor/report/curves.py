"""The curves of a page: which figure of a step is drawn where, smoothed, with held-out values and what chance would give.

In: the records of one run or several. Out: plots as Markup. The table is CURVES. Next: plot.py.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from markupsafe import Markup

from favor.report.plot import Axes, Line, chart
from favor.report.records import Record, RunRecord
from favor.report.words import rounded

# points of a line at most, over all lines of a page: more cannot be told apart, and would weigh
_POINTS, _ON_PAGE, _LEAST = 160, 9_000, 24
# below this many points each is marked; a mean over neighbours would hide more than it shows
_SMOOTHED = 20


class Curve(NamedTuple):
    """A plot: unit of its values, {key of a step's record: label}, which way is good, ends of the axis, and a level.

    chance: a height that knowing nothing gives, and its name; "ln 2" only for losses that begin there.
    """

    unit: str
    keys: dict[str, str]
    good: Literal["up", "down", ""] = ""
    ends: tuple[float, float] | None = None
    chance: tuple[float, str] | None = None
    inner: bool = False


_LN2 = (math.log(2), "ln 2: knows nothing")
_COIN = (0.5, "0.5: chance")
# title -> what is drawn; a curve that no run has figures for is left out; `inner` ones are folded away
CURVES: dict[str, Curve] = {
    "Loss": Curve("nats", {"loss": "loss"}, "down", chance=_LN2),
    "Preference accuracy": Curve("share of pairs", {"accuracy": "accuracy"}, "up", (0.0, 1.0), _COIN),
    "Margin of implicit rewards": Curve("beta x nats", {"margin": "margin"}, "up", chance=(0.0, "0: no difference")),
    "Sampled KL (how far the model moved)": Curve("nats an answer", {"kl": "KL"}),
    "Reward of samples": Curve("score", {"reward": "reward"}, "up"),
    "Reward gap (chosen - rejected)": Curve("score", {"gap": "gap"}, "up", chance=(0.0, "0: no difference")),
    "Implicit rewards": Curve("beta x nats", {"reward_chosen": "chosen", "reward_rejected": "rejected"}),
    "Log-prob per token": Curve("nats", {"logp_chosen_per_token": "chosen", "logp_rejected_per_token": "rejected"}),
    "Chosen below reference": Curve("share of pairs", {"chosen_below_reference": "chosen below"}, "down", (0.0, 1.0)),
    "Scores": Curve("score", {"score_chosen": "chosen", "score_rejected": "rejected"}),
    "Reward less KL penalty": Curve("score", {"objective": "objective"}, "up"),
    "Response length": Curve("tokens", {"length": "length"}),
    "Ended with an end token": Curve("share", {"ended": "ended"}, "up", (0.0, 1.0)),
    "Repeated 4-grams within a sample": Curve("share", {"repetition": "repeated"}, "down", (0.0, 1.0)),
    "Distinct 2-grams over samples": Curve("share", {"distinct": "distinct"}, "up", (0.0, 1.0)),
    "Chosen answers against the reference": Curve("nats a token", {"displacement": "chosen"}, "up"),
    "KL coefficient": Curve("", {"kl_coef": "coefficient"}, inner=True),
    "Value loss": Curve("", {"value_loss": "value loss"}, "down", inner=True),
    "Clipped ratios": Curve("share of tokens", {"clipped": "clipped"}, inner=True),
    "KL of one update": Curve("nats a token", {"update_kl": "update KL"}, inner=True),
    "Entropy": Curve("nats a token", {"entropy": "entropy"}, inner=True),
    "Gradient norm": Curve("before clipping", {"grad_norm": "norm"}, inner=True),
    "Learning rate": Curve("a step", {"lr": "rate"}, inner=True),
    "Speed": Curve("unique tokens a second", {"tokens_per_s": "tokens/s"}, inner=True),
}


class Drawn(NamedTuple):
    """A plot with its heading: title, which way is good, a sentence on the values."""

    title: str
    good: str
    note: str
    svg: Markup


def curves(runs: Sequence[RunRecord], over: str, *, inner: bool) -> list[Drawn]:
    """Every plot that a run has figures for, over the "step"s or the unique "tokens"."""
    titles = [title for title, found in CURVES.items() if found.inner == inner]
    lines = sum(len(CURVES[title].keys) for title in titles) * 2 * len(runs)
    points = max(_LEAST, min(_POINTS, _ON_PAGE // max(lines, 1)))
    drawn = (curve(runs, title, over, points) for title in titles)
    return [one for one in drawn if one.svg]


def curve(runs: Sequence[RunRecord], title: str, over: str, points: int = _POINTS) -> Drawn:
    """A plot of CURVES, one line a run and key; its SVG is empty when no run has it."""
    found, lines, several = CURVES[title], list[Line](), len(runs) > 1
    window = 1
    for number, run in enumerate(runs):
        for place, (key, label) in enumerate(found.keys.items()):
            x, y = series(run, key, over)
            window = max(window, _window(len(y)))
            # a run keeps its colour over all plots; a page of one run tells its lines apart by colour
            name = " ".join([run.name, label][: 1 + (len(found.keys) > 1)]) if several else label
            line = _line(x, y, name, (number, place) if several else (place, 0), points)
            lines.append(replace(line, up=_probe_ends(run)) if key == "kl" and line.marks else line)
            of = f"{run.name}, " if several else ""
            for named, records, colour in (("held out", run.evals, 2), ("health", run.looks, 3)):
                if beside := _beside(run, records, key, over):
                    lines.append(Line(*beside, f"{of}{named}", number if several else colour, 2, marks=True))
    axes = Axes(
        title,
        "step" if over == "step" else "unique tokens",
        found.unit,
        levels=_levels(found, runs),
        whole=True,
        y_range=found.ends,
    )
    return Drawn(title + _loss_of(title, runs), found.good, _note(lines, window), chart(axes, lines))


def series(run: RunRecord, key: str, over: str) -> tuple[list[float], list[float]]:
    """A figure over the steps, or over the tokens computed until then; a probe's is repeated until the next one: each once."""
    x: list[float] = []
    y: list[float] = []
    tokens = 0
    last: object = None
    for record in run.steps:
        tokens += record.get("unique_tokens", 0)
        repeated = key == "kl" and record.get(key) == last
        last = record.get(key)
        if key in record and not repeated:
            x.append(record["step"] if over == "step" else tokens)
            y.append(record[key])
    return x, y


def _probe_ends(run: RunRecord) -> list[tuple[float, float]]:
    """About 95 % around each probe of KL, as `series` lists them; of a probe without a standard error, nothing."""
    x, y = series(run, "kl", "step")
    error = {step["step"]: step.get("kl_se", 0.0) for step in run.steps}
    return [(value - 1.96 * error[at], value + 1.96 * error[at]) for at, value in zip(x, y, strict=True)]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value with its neighbours, `window` in all, fewer near the ends."""
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    half = window // 2
    ends = [(max(i - half, 0), min(i + half + 1, len(values))) for i in range(len(values))]
    return [(total[stop] - total[start]) / (stop - start) for start, stop in ends]


def thinned(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def loss_kind(run: RunRecord) -> str:
    """The kind of the run's loss; "" when it has several or none."""
    loss = run.settings.get("loss", {})
    kind = loss.get("kind", "dpo") if isinstance(loss, dict) else ""
    return kind if isinstance(kind, str) and "pairs" in (run.steps[-1] if run.steps else {}) else ""


def _window(count: int) -> int:
    return 1 if count < _SMOOTHED else 2 * max(1, count // 20) + 1


def _line(x: Sequence[float], y: Sequence[float], label: str, style: tuple[int, int], points: int) -> Line:
    soft, kept = smoothed(y, _window(len(y))), thinned(len(y), points)
    raw = [y[i] for i in kept] if _window(len(y)) > 1 else ()
    return Line([x[i] for i in kept], [soft[i] for i in kept], label, *style, len(y) < _SMOOTHED, behind=raw)


def _beside(run: RunRecord, records: Sequence[Record], key: str, over: str) -> tuple[list[float], list[float]] | None:
    """(x, y) of what was measured between steps: held-out evaluations, looks of [health]."""
    steps, tokens = {0: 0}, 0
    for record in run.steps:
        tokens += record.get("unique_tokens", 0)
        steps[record["step"]] = tokens
    found = [(record["step"], record[key]) for record in records if key in record and record["step"] in steps]
    return ([step if over == "step" else steps[step] for step, _ in found], [y for _, y in found]) if found else None


def _levels(found: Curve, runs: Sequence[RunRecord]) -> list[tuple[float, str]]:
    if found.chance is None:
        return []
    begins = all(loss_kind(run) == "dpo" or "bradley_terry" in run.settings for run in runs)
    return [found.chance] if found.chance is not _LN2 or begins else []


def _loss_of(title: str, runs: Sequence[RunRecord]) -> str:
    kinds = list(dict.fromkeys(filter(None, map(loss_kind, runs))))
    return f": {' / '.join(kinds)}" if title == "Loss" and kinds else ""


def _note(lines: Sequence[Line], window: int) -> str:
    """First and last value of the only line, and how it was smoothed."""
    own = [line for line in lines if line.dash != 2 and line.y]
    parts = [" to ".join(rounded(own[0].y[0], own[0].y[-1]))] if len(own) == 1 else []
    return ", ".join([*parts, f"mean over {window} steps, each step thin behind"] if window > 1 else parts)
