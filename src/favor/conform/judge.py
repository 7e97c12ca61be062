"""What came of a run against what is right.

In: what a trainer left behind. Out: Results. A fault in what is scored is counted once, by its own case: what follows is
judged as if that were meant. Next: oracle.py.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol, TypeAlias

from favor.conform.oracle import RIGHT, Expected, Scored, Weights, gap
from favor.errors import clipped

Status: TypeAlias = Literal["holds", "fails", "refused", "not tried"]
# of the norm of the right change: AdamW turns a sign where a gradient is nothing but rounding, a fault turns many
TOLERANCE = 0.02
# what a resumed run, or two processes, may differ by: the order of sums
_CLOSE = 2e-3
_LN_2, _FIRST = math.log(2), 1e-6
_WAYS = [Scored(skipped, ends) for skipped, ends in product((0, 1), (0, 1, 2))] + [Scored(shifted=True)]
# what a line must hold to speak of lengths, or of the boundary
_OF_LENGTH = re.compile(r"truncat|\bcut\b|too long|longer|exceed|max[_ ](length|tokens)|dropp|left out", re.IGNORECASE)
_OF_BOUNDARY = re.compile(r"prompt|boundary|prefix|merge", re.IGNORECASE)
_BAR = re.compile(r"^.*\d/\d+ \[[^\]]*\]")
# letters of a line that is shown
_LONGEST = 300
# an error of these kinds is no refusal but a mistake of the program
_MISTAKES = (
    "TypeError",
    "AttributeError",
    "KeyError",
    "IndexError",
    "NameError",
    "AssertionError",
    "ImportError",
    "ModuleNotFoundError",
)


class Result(NamedTuple):
    """Of one case. found, right: as people read them; tolerance: by how much they may differ, in the unit of both."""

    status: Status
    found: str
    right: str = ""
    tolerance: str = ""


class Seen(NamedTuple):
    """What a run left behind. change: of every weight, none without a model; error, said: kind and words of what was raised."""

    change: Weights | None
    losses: Sequence[float]
    log: str
    error: str = ""
    said: str = ""


class Right(Protocol):
    """What is right for a job, as a trainer that scores in a certain way would have it."""

    def __call__(self, job: str, scored: Scored) -> Expected:
        """The losses and the change."""
        ...


@dataclass(frozen=True)
class Bench:
    """All runs of a trainer by their job, the oracle, and what the trainer scores; way is None where no known way fits."""

    seen: Mapping[str, Seen]
    right: Right
    way: Scored | None = field(default=None)

    @property
    def scored(self) -> Scored:
        """How to judge what follows."""
        return self.way or RIGHT


Judge: TypeAlias = Callable[[Bench, Sequence[str]], Result]


def way_of(seen: Seen, right: Right) -> Scored | None:
    """How the trainer scores, by the one step that fits best; None where none does."""
    if seen.change is None:
        return None
    gaps = {way: gap(seen.change, right("step", way).change) for way in _WAYS}
    best = min(gaps, key=lambda way: gaps[way])
    return best if gaps[best] <= TOLERANCE else None


def result_of(bench: Bench, jobs: Sequence[str], judged: Judge, *, refusal: bool) -> Result:
    """A case's result: not tried, refused or failed where a run ended in an error, else what its judge says."""
    for job in jobs:
        seen = bench.seen[job]
        if seen.error == "NotImplementedError":
            return Result("not tried", seen.said)
        if seen.error and refusal and seen.error not in (*_MISTAKES, "Ended"):
            return Result("refused", seen.said)
        if seen.error:
            return Result("fails", seen.said if seen.error == "Ended" else f"{seen.error}: {seen.said}", "no error")
    return judged(bench, jobs)


def first_loss(bench: Bench, jobs: Sequence[str]) -> Result:
    """Ln 2 at the first step."""
    losses = bench.seen[jobs[0]].losses
    if not losses:
        return Result("not tried", "the adapter gives no losses")
    off = abs(losses[0] - _LN_2)
    return Result("holds" if off <= _FIRST else "fails", f"{losses[0]:.9f}", f"{_LN_2:.9f}", f"{_FIRST:g} nats")


def _way(part: str, names: Mapping[int, str]) -> Judge:
    """By the way of scoring that fits the step; names: of each value of a part of it, the right one under its default."""

    def judged(bench: Bench, _: Sequence[str]) -> Result:
        if bench.way is None:
            return Result("not tried", "the step fits no way of scoring that is known: see the case 'step'")
        found, right = (names[way._asdict()[part]] for way in (bench.way, RIGHT))
        return Result("holds" if found == right else "fails", found, right, "exact")

    return judged


def behind_end(bench: Bench, jobs: Sequence[str]) -> Result:
    """The step fits the one without, not the one with it."""
    if (missing := _without_model(bench, jobs[:1])) is not None:
        return missing
    off = {behind: _gap(bench, jobs[0], bench.scored._replace(behind=behind)) for behind in (False, True)}
    if off[True] <= TOLERANCE < off[False]:
        return Result("fails", "the line break behind the end token is scored", "it is not", "exact")
    return _by_gap(off[False])


def update(bench: Bench, jobs: Sequence[str]) -> Result:
    """The change of every weight in all runs."""
    if (missing := _without_model(bench, jobs)) is not None:
        return missing
    return _by_gap(max(_gap(bench, job, bench.scored) for job in jobs))


def curve(bench: Bench, jobs: Sequence[str]) -> Result:
    """The last loss, where there is one, and the change."""
    losses, right = bench.seen[jobs[0]].losses, bench.right(jobs[0], bench.scored).losses
    least = TOLERANCE * abs(_LN_2 - right[-1])
    if losses and (len(losses) != len(right) or not abs(losses[-1] - right[-1]) <= least):
        shown = ["; ".join(f"{loss:.4f}" for loss in some) for some in (losses, right)]
        return Result("fails", f"losses {shown[0]}", f"losses {shown[1]}", f"{least:.4f} nats")
    return update(bench, jobs)


def still(bench: Bench, jobs: Sequence[str]) -> Result:
    """The first loss where there is one, and the change."""
    found = first_loss(bench, jobs)
    return found if found.status == "fails" else update(bench, jobs)


def update_or_said(bench: Bench, jobs: Sequence[str]) -> Result:
    """The change of the first run; where it is another, a line that the second run did not have."""
    found, told = update(bench, jobs[:1]), _told(bench, jobs, _OF_BOUNDARY)
    return Result("holds", f"trained otherwise, and said so: {told}") if found.status == "fails" and told else found


def said(bench: Bench, jobs: Sequence[str]) -> Result:
    """A line about lengths in the first run that the second did not have."""
    told = _told(bench, jobs, _OF_LENGTH)
    return Result("holds", told) if told else Result("fails", "trained without a word", "a refusal, or a line about it")


def same_as_second(bench: Bench, jobs: Sequence[str]) -> Result:
    """The first run's change against the second's."""
    if (missing := _without_model(bench, jobs)) is not None:
        return missing
    first, second = (bench.seen[job].change for job in jobs)
    assert first is not None
    assert second is not None
    return _by_gap(gap(first, second), _CLOSE, "the other run's change")


def _gap(bench: Bench, job: str, scored: Scored) -> float:
    change = bench.seen[job].change
    assert change is not None
    return gap(change, bench.right(job, scored).change)


def _without_model(bench: Bench, jobs: Sequence[str]) -> Result | None:
    lacking = [job for job in jobs if bench.seen[job].change is None]
    return Result("fails", "no model was left behind", "a folder that transformers can load") if lacking else None


def _by_gap(off: float, tolerance: float = TOLERANCE, right: str = "the oracle's change") -> Result:
    # not a number fails, too
    status: Status = "holds" if off <= tolerance else "fails"
    return Result(status, f"{off:.2g} of the change off", right, f"{tolerance:g} of its norm")


def _told(bench: Bench, jobs: Sequence[str], topic: re.Pattern[str]) -> str:
    """The first line on a topic in the first run's log that is not in the second's, numbers aside; "" for none."""
    logs = [re.split(r"[\r\n]+", bench.seen[job].log) for job in jobs]
    known = {re.sub(r"[\W\d]+", " ", line) for line in logs[1]}
    new = [line for line in logs[0] if topic.search(line) and re.sub(r"[\W\d]+", " ", line) not in known]
    # what a progress bar wrote before it in the same line is no part of it
    return clipped(_BAR.sub("", new[0]).strip(), _LONGEST) if new else ""


JUDGES: Mapping[str, Judge] = MappingProxyType(
    {
        "first_loss": first_loss,
        "first_token": _way("skipped", {0: "scored", 1: "left out"}),
        "shift": _way("shifted", {0: "at its place", 1: "looked up one place too late"}),
        "end_token": _way("ends", {0: "never", 1: "once", 2: "twice"}),
        "behind_end": behind_end,
        "update": update,
        "curve": curve,
        "still": still,
        "update_or_said": update_or_said,
        "said": said,
        "same_as_second": same_as_second,
    }
)
