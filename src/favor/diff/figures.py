"""THE table of figures; each from its values prompt by prompt, with intervals that hold at all times, and the gates on them.

In: arrays of values. Out: Figure records, verdicts. Pure. Next: ../eval/sequence.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT
from favor.eval.intervals import Array
from favor.eval.sequence import sequence

Verdict: TypeAlias = Literal["passes", "fails", "not settled"]
Bounds: TypeAlias = tuple[float, float]
# what all intervals of a family may miss together
ERROR = 0.05


class Kind(NamedTuple):
    """A figure: what it is, its format, whether it is b less a (else one figure of both), and what no change would be."""

    what: str
    spec: str = ".3f"
    paired: bool = True
    same: float = 0.0


FIGURES: Mapping[str, Kind] = {
    "length": Kind("length, tokens", ".1f"),
    "ended": Kind("answers that come to their end"),
    "refused": Kind("answers that begin as a refusal"),
    "repetition": Kind("repeated 4-grams within an answer"),
    "distinct": Kind("distinct 2-grams within an answer"),
    "language": Kind("answers in another language or script than the prompt"),
    "json": Kind("valid JSON where it is asked for"),
    "lists": Kind("answers with a list"),
    "headers": Kind("answers with a header"),
    "code": Kind("answers with a code fence"),
    "open_fence": Kind("answers with a code fence that is not closed"),
    "called": Kind("answers that call a tool, where there are tools"),
    "bad_call": Kind("answers with a call that is not valid"),
    "checks": Kind("fixed checks that are right"),
    "win": Kind("b's answer has the higher reward", ".3f", paired=False, same=0.5),
    "kl": Kind("KL(b || a), nats a token of b's answers", ".4f", paired=False),
    "reverse_kl": Kind("KL(a || b), nats a token of a's answers", ".4f", paired=False),
}


class Limits(BaseModel):
    """A table [gate.FIGURE]: what it may do."""

    model_config = STRICT
    max_rise: float | None = Field(default=None, ge=0)
    """b less a may be this much."""
    max_fall: float | None = Field(default=None, ge=0)
    """a less b may be this much."""
    min: float | None = None
    """b must be at least this."""
    max: float | None = None
    """b may be at most this."""

    @model_validator(mode="after")
    def _says_something(self) -> "Limits":
        if not self.model_dump(exclude_none=True):
            raise ValueError("no limit is set; give max_rise, max_fall, min or max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min is {self.min:g} and max {self.max:g}, which nothing is between; change one")
        return self

    @property
    def of_change(self) -> bool:
        """Whether the difference is limited."""
        return self.max_rise is not None or self.max_fall is not None

    @property
    def of_level(self) -> bool:
        """Whether b itself is."""
        return self.min is not None or self.max is not None


class Values(NamedTuple):
    """A figure's values by prompt, in the order in which they were measured: of a and of b, or (a empty) of both together."""

    a: Array
    b: Array


class Figure(NamedTuple):
    """A figure measured on so many prompts; change: b less a, or the value itself of what is one figure of both.

    interval: of the change; b_interval: of b, where a gate reads it. Both hold at all times; sure: each with this probability.
    """

    a: float | None
    b: float
    change: float
    interval: Bounds
    b_interval: Bounds | None
    prompts: int
    sure: float


class Gate(NamedTuple):
    """A limit, the ends that it was held against, and what came of it."""

    figure: str
    limit: str
    value: float
    interval: Bounds
    verdict: Verdict


def of_range(limits: Limits, bounds: Bounds) -> str:
    """Why a limit can never decide anything, "" where each can. bounds: of the figure's values."""
    low, high = bounds
    spans = {"max_rise": (0.0, high - low), "max_fall": (0.0, high - low), "min": bounds, "max": bounds}
    for name, limit in limits.model_dump(exclude_none=True).items():
        least, most = spans[name]
        if not least <= limit <= most:
            return f"{name} is {limit:g}, and it is always between {least:g} and {most:g}; change it"
    return ""


def measured(name: str, values: Values, bounds: Bounds, limits: Limits | None, error: float) -> Figure:
    """A figure with its intervals, each of which misses with probability `error` at any time."""
    low, high = bounds
    level = limits is not None and limits.of_level
    ends = sequence(values.b, low, high, error) if level or not FIGURES[name].paired else None
    if not FIGURES[name].paired:
        assert ends is not None
        mean = _mean(values.b)
        return Figure(None, mean, mean, ends, ends, len(values.b), 1 - error)
    change = values.b - values.a
    interval = sequence(change, low - high, high - low, error)
    return Figure(_mean(values.a), _mean(values.b), _mean(change), interval, ends, len(change), 1 - error)


def all_measured(
    values: Mapping[str, Values], bounds: Mapping[str, Bounds], gates: Mapping[str, Limits]
) -> dict[str, Figure]:
    """All figures: intervals that gates read hold together with 95 % (Bonferroni), and so do those of all others."""
    read = sum(1 + (FIGURES[name].paired and limits.of_level) for name, limits in gates.items())
    others = len(values.keys() - gates.keys())
    return {
        name: measured(name, values[name], bounds[name], gates.get(name), ERROR / (read if name in gates else others))
        for name in FIGURES
        if name in values and (name in gates or len(values[name].b))
    }


def judged(found: Mapping[str, Figure], gates: Mapping[str, Limits]) -> list[Gate]:
    """Every limit: it passes, or fails, once the whole interval lies on one side of it."""
    said: list[Gate] = []
    for name, limits in gates.items():
        for limit, most in limits.model_dump(exclude_none=True).items():
            one = found[name]
            value, ends = (one.change, one.interval) if limit.startswith("max_") else (one.b, one.b_interval)
            assert ends is not None
            said.append(Gate(name, f"{limit} = {most:g}", value, ends, _verdict(limit, most, ends)))
    return said


def _verdict(limit: str, most: float, ends: Bounds) -> Verdict:
    low, high = ends
    if limit in ("max_fall", "min"):
        # a lower bound is an upper one of the negative
        low, high, most = -high, -low, most if limit == "max_fall" else -most
    return "passes" if high <= most else "fails" if low > most else "not settled"


def verdict_of(gates: Sequence[Gate], unsettled: str) -> str:
    """Of all gates together: passes, fails, not settled; "" without any."""
    said = {gate.verdict for gate in gates}
    if "fails" in said:
        return "fails"
    return "not settled" if "not settled" in said and unsettled == "fail" else "passes" if said else ""


def side_of_same(name: str, found: Figure) -> int:
    """1 where the interval says that a figure rose, -1 that it fell, 0 that it may be the same."""
    same = FIGURES[name].same
    return (found.interval[0] > same) - (found.interval[1] < same)


def as_json(found: Mapping[str, Figure]) -> dict[str, Any]:
    """Figures by name."""
    return {
        name: {"what": FIGURES[name].what, "spec": FIGURES[name].spec, "side": side_of_same(name, one), **one._asdict()}
        for name, one in found.items()
    }


def _mean(values: Array) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
