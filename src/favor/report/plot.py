"""Curves, points and bars as inline SVG: small, offline, readable in the light and in the dark.

In: lines of numbers and what the axes say. Out: SVG as Markup; colours come from plot.css (Okabe and Ito's, which colour-blind
people can tell apart). Next: labels.py.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

from markupsafe import Markup, escape

from favor.report.labels import Box, free_place, width_of

Span: TypeAlias = tuple[float, float]
# a point of the plot, pixels
Spot: TypeAlias = tuple[float, float]
# colours of plot.css; further lines repeat them with another dash
COLOURS = 8
_HEIGHT, _TOP, _BOTTOM, _LEFT = 13.0, 10.0, 38.0, 50.0
_TICKS = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Line:
    """One line of a plot: values, its label, and how it is drawn.

    behind: the values before smoothing, drawn thin. texts: a label at each point. across, up: ends of intervals at each
    point. dash: 0 drawn through, 1 dashed, 2 dotted.
    """

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    colour: int = 0
    dash: int = 0
    marks: bool = False
    joined: bool = True
    behind: Sequence[float] = ()
    texts: Sequence[str] = ()
    across: Sequence[Span] = ()
    up: Sequence[Span] = ()


@dataclass(frozen=True)
class Axes:
    """What a plot's axes say, its size in pixels, and fixed parts.

    levels: (height, what it is), drawn across. scale "sqrt" gives small x more room. x_range, y_range: ends of the axes
    instead of those of the values; lines that leave to the right end in an arrow. inside: labels stand at the lines' ends,
    wherever these are, else in a column to the right. whole: x counts something, so only whole numbers stand at it.
    """

    what: str
    x: str
    y: str
    width: int = 360
    height: int = 230
    scale: Literal["linear", "sqrt"] = "linear"
    x_range: Span | None = None
    y_range: Span | None = None
    levels: Sequence[tuple[float, str]] = ()
    diagonal: bool = False
    inside: bool = False
    whole: bool = False


class Scale(NamedTuple):
    """Values to pixels along one axis."""

    low: float
    high: float
    begin: float
    end: float
    root: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value, one decimal."""
        low, high, here = (self._bent(v) for v in (self.low, self.high, value))
        return round(self.begin + (here - low) / (high - low) * (self.end - self.begin), 1)

    def _bent(self, value: float) -> float:
        return math.copysign(math.sqrt(abs(value)), value) if self.root else value


@dataclass(frozen=True)
class Frame:
    """The plot's two scales, and the boxes that are taken by labels so far."""

    axes: Axes
    x: Scale
    y: Scale
    taken: list[Box] = field(default_factory=list[Box])

    def spots(self, line: Line, values: Sequence[float]) -> list[Spot]:
        """The points of a line that lie before the right end of the axis."""
        kept = [(x, y) for x, y in zip(line.x, values, strict=True) if x <= self.x.high]
        return [(self.x.at(x), self.y.at(y)) for x, y in kept]


def chart(axes: Axes, lines: Sequence[Line]) -> Markup:
    """A plot of lines, with a label at the end of each; "" without any values."""
    lines = [_finite(line) for line in lines]
    lines = [line for line in lines if line.x]
    if not lines:
        return Markup()
    frame = _frame(axes, lines)
    parts = [*_grid(frame), *_levels(frame)]
    for line in lines:
        parts += _drawn(frame, line)
    parts += _labels(frame, lines)
    said = "; ".join(f"{line.label or axes.y}: {_said(line)}" for line in lines)
    return _svg(axes, f"{axes.what}. {said}", parts)


def bars(axes: Axes, edges: Sequence[float], counts: Sequence[int], middle: float | None = None) -> Markup:
    """A histogram: counts[i] values lie between edges[i] and edges[i + 1]; those below `middle` in another colour."""
    y = Scale(0.0, max(*counts, 1) * 1.12, axes.height - _BOTTOM, _TOP)
    x = Scale(edges[0], edges[-1], _left(axes, y), axes.width - 10.0)
    frame = Frame(axes, x, y)
    parts = _grid(frame)
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        left, top = x.at(low), y.at(count)
        colour = 1 if middle is not None and (low + high) / 2 < middle else 0
        size = f'width="{max(x.at(high) - left - 1, 1):.1f}" height="{y.at(0) - top:.1f}"'
        parts.append(
            f'<rect class="f{colour}" x="{left}" y="{top}" {size}><title>{low:.3g} to {high:.3g}: {count}</title></rect>'
        )
        if count:
            parts.append(_text((left + x.at(high)) / 2, top - 3, str(count), "t m"))
    if middle is not None:
        parts.append(f'<path class="lv" d="M{x.at(middle)} {y.begin}V{_TOP}"/>')
    return _svg(axes, f"{axes.what}: {sum(counts)} values", parts)


def standalone(svg: Markup) -> str:
    """A plot as a file of its own, with its colours inside."""
    style = files("favor.report").joinpath("plot.css").read_text("utf-8")
    head = '<svg xmlns="http://www.w3.org/2000/svg" class="plot alone"'
    return str(svg).replace('<svg class="plot"', head, 1).replace(">", f"><style>{style}</style>", 1)


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers from low to high."""
    span = (high - low) or 1.0
    unit = 10 ** math.floor(math.log10(span / most))
    step = next((unit * t for t in _TICKS if span / (unit * t) <= most), unit * 10)
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _finite(line: Line) -> Line:
    kept = [i for i, pair in enumerate(zip(line.x, line.y, strict=True)) if all(map(math.isfinite, pair))]
    if len(kept) == len(line.x):
        return line
    parts = (line.x, line.y, line.behind, line.texts, line.across, line.up)
    x, y, behind, texts, across, up = ([part[i] for i in kept] if part else [] for part in parts)
    return replace(line, x=x, y=y, behind=behind, texts=texts, across=across, up=up)


def _frame(axes: Axes, lines: Sequence[Line]) -> Frame:
    xs = [x for line in lines for x in line.x] + [end for line in lines for ends in line.across for end in ends]
    ys = [y for line in lines for y in (*line.y, *line.behind)] + [level for level, _ in axes.levels]
    ys += [end for line in lines for ends in line.up for end in ends]
    low, high = axes.x_range or (min(xs), max(xs))
    right = 12.0 if axes.inside else min(14 + max(width_of(line.label) for line in lines), 0.42 * axes.width)
    y = Scale(*(axes.y_range or _padded(ys)), axes.height - _BOTTOM, _TOP)
    x = Scale(low, high if high > low else low + 1, _left(axes, y), axes.width - right, axes.scale == "sqrt")
    return Frame(axes, x, y)


def _heights(axes: Axes, y: Scale) -> list[float]:
    """The numbers that stand at the y axis."""
    return ticks(y.low, y.high, max(2, axes.height // 55))


def _left(axes: Axes, y: Scale) -> float:
    """Where the y axis stands: right of its numbers and of what they are."""
    return max(_LEFT, 24 + max((width_of(number(value)) for value in _heights(axes, y)), default=0.0))


def _padded(values: Sequence[float]) -> Span:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    # what is never negative begins at 0 rather than below it
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def _grid(frame: Frame) -> list[str]:
    axes, x, y = frame.axes, frame.x, frame.y
    parts = [
        f'<path class="g" d="M{x.begin} {y.at(v)}H{x.end}"/>{_text(x.begin - 5, y.at(v) + 4, number(v), "t e")}'
        for v in _heights(axes, y)
    ]
    if x.root:
        marks = _spread(x, [t * 10**k for k in range(-2, 6) for t in _TICKS[:3]])
    else:
        marks = [v for v in ticks(x.low, x.high, max(2, axes.width // 90)) if not axes.whole or v == round(v)]
    bottom = y.begin
    for value in marks:
        parts.append(f'<path class="a" d="M{x.at(value)} {bottom}v4"/>')
        parts.append(_text(x.at(value), bottom + 15, number(value), "t m"))
    parts.append(f'<path class="a" d="M{x.begin} {_TOP}V{bottom}H{x.end}"/>')
    parts.append(_text((x.begin + x.end) / 2, axes.height - 4, axes.x, "t m"))
    turned = f'transform="rotate(-90 11 {(bottom + _TOP) / 2:.0f})"'
    parts.append(_text(11, (bottom + _TOP) / 2, axes.y, "t m", turned))
    return parts


def _spread(x: Scale, candidates: Sequence[float]) -> list[float]:
    """0 and those of the candidates that stand far enough apart on a bent axis."""
    kept = [0.0] if x.low <= 0 else []
    for value in candidates:
        if x.low <= value <= x.high and (not kept or x.at(value) - x.at(kept[-1]) >= 34):
            kept.append(value)
    return kept


def _levels(frame: Frame) -> list[str]:
    parts: list[str] = []
    x, y = frame.x, frame.y
    for value, name in frame.axes.levels:
        if y.low <= value <= y.high:
            parts.append(f'<path class="lv" d="M{x.begin} {y.at(value)}H{x.end}"/>')
            # at the end, where curves that begin at a level have left it
            parts.append(_text(x.end - 4, y.at(value) - 4, name, "t lt e"))
            frame.taken.append(Box(x.end - 4 - width_of(name), y.at(value) - 14, width_of(name), 12))
    if frame.axes.diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        parts.append(f'<path class="lv" d="M{x.at(low)} {y.at(low)}L{x.at(high)} {y.at(high)}"/>')
    return parts


def _drawn(frame: Frame, line: Line) -> list[str]:
    colour = f"c{line.colour % COLOURS} d{(line.dash + line.colour // COLOURS) % 3}"
    spots = frame.spots(line, line.y)
    parts: list[str] = []
    if line.behind:
        parts.append(f'<polyline class="r {colour}" points="{_points(frame.spots(line, line.behind))}"/>')
    parts += [f'<path class="w {colour}" d="{bar}"/>' for bar in _whiskers(frame, line)]
    if line.joined and len(spots) > 1:
        parts.append(f'<polyline class="l {colour}" points="{_points(spots)}"/>')
    if leaving := _leaving(frame, line):
        (x, y), (to, height) = leaving
        path = f"M{x} {y}L{to - 3} {height}m-6 -4l7 4l-7 4"
        parts.append(f'<path class="l {colour}" d="{path}"/>')
        frame.taken.append(Box(to - 22, height - 6, 24, 12))
    if line.marks or len(spots) == 1:
        told = zip(spots, line.x, line.y, strict=False)
        parts += [
            f'<circle class="k c{line.colour % COLOURS}" cx="{a}" cy="{b}" r="3"><title>{x:g}: {y:.4g}</title></circle>'
            for (a, b), x, y in told
        ]
    frame.taken.extend(Box(a - 4, b - 4, 8, 8) for a, b in (spots if line.marks else ()))
    return parts


def _leaving(frame: Frame, line: Line) -> tuple[Spot, Spot] | None:
    """The last stretch of a line that goes on beyond the right end: from its last point to where it crosses."""
    x, inside = frame.x, [i for i, value in enumerate(line.x) if value <= frame.x.high]
    if not inside or len(inside) == len(line.x):
        return None
    last = inside[-1]
    here, there = (x.at(line.x[i]) for i in (last, last + 1))
    share = (x.end - here) / (there - here)
    height = line.y[last] + share * (line.y[last + 1] - line.y[last])
    return (here, frame.y.at(line.y[last])), (x.end, frame.y.at(height))


def _whiskers(frame: Frame, line: Line) -> list[str]:
    x, y = frame.x, frame.y
    shown = [i for i, value in enumerate(line.x) if value <= x.high]
    across = [(i, *line.across[i]) for i in shown if line.across]
    up = [(i, *line.up[i]) for i in shown if line.up]
    found = [f"M{x.at(max(a, x.low))} {y.at(line.y[i])}H{x.at(min(b, x.high))}" for i, a, b in across if a < b]
    return found + [f"M{x.at(line.x[i])} {y.at(a)}V{y.at(b)}" for i, a, b in up if a < b]


def _labels(frame: Frame, lines: Sequence[Line]) -> list[str]:
    """The label of each line at its end; in a column pushed apart, or inside where there is room; then those of points."""
    if not frame.axes.inside:
        return _column(frame, [line for line in lines if line.label])
    parts: list[str] = []
    for line in lines:
        spot = leaving[1] if (leaving := _leaving(frame, line)) else (frame.spots(line, line.y) or [None])[-1]
        if spot and line.label:
            parts.append(_placed(frame, spot, line.label, f"n s{line.colour % COLOURS}"))
    for line in lines:
        parts += [
            _placed(frame, spot, text, "t")
            for spot, text in zip(frame.spots(line, line.y), line.texts, strict=False)
            if text
        ]
    return parts


def _placed(frame: Frame, spot: Spot, text: str, kind: str) -> str:
    x, y = frame.x, frame.y
    box = free_place(spot, width_of(text), frame.taken, Box(x.begin, _TOP, x.end - x.begin, y.begin - _TOP))
    frame.taken.append(box)
    return _text(box.x, box.y + box.height - 3, text, kind)


def _column(frame: Frame, lines: Sequence[Line]) -> list[str]:
    ends = sorted(((frame.spots(line, line.y)[-1], line) for line in lines), key=lambda end: end[0][1])
    heights = [spot[1] for spot, _ in ends]
    # down where two would touch, then up from the bottom
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + _HEIGHT)
    lowest = frame.y.begin + 4
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], lowest - _HEIGHT * (len(heights) - 1 - i))
    room = frame.axes.width - frame.x.end - 12
    parts: list[str] = []
    for height, ((x, y), line) in zip(heights, ends, strict=True):
        parts.append(f'<path class="j c{line.colour % COLOURS}" d="M{x + 2} {y}L{frame.x.end + 8:.1f} {height:.1f}"/>')
        parts.append(_text(frame.x.end + 10, height + 4, _cut(line.label, room), "n"))
    return parts


def number(value: float) -> str:
    """A number on an axis: no more digits than it needs."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:.6g}"


def _cut(text: str, room: float) -> str:
    while len(text) > 2 and width_of(text) > room:
        text = text[:-2] + "…"
    return text


def _said(line: Line) -> str:
    return f"{line.y[0]:.4g}" if len(line.y) == 1 else f"from {line.y[0]:.4g} to {line.y[-1]:.4g}"


def _points(spots: Iterable[Spot]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in spots)


def _text(x: float, y: float, text: str, kind: str, more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def _svg(axes: Axes, said: str, parts: Sequence[str]) -> Markup:
    box = f'viewBox="0 0 {axes.width} {axes.height}"'
    # the words are escaped, the numbers are ours
    return Markup(f'<svg class="plot" role="img" aria-label="{escape(said)}" {box}>{"".join(parts)}</svg>')
