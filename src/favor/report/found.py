"""What the first screen of a page says, as a record, and the words that every kind of run has in common.

In: figures of eval.json, a RunRecord. Out: Found, Verdict. Next: held_out.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from favor.report.records import RunRecord
from favor.report.table import FEW
from favor.report.words import plural

Light: TypeAlias = Literal["good", "settled", "unsure", "bad", "none"]


class Found(NamedTuple):
    """What a kind of run has to say: its colour, one sentence, and sentences under each heading."""

    light: Light
    headline: str
    changed: Sequence[str] = ()
    sure: Sequence[str] = ()
    cost: Sequence[str] = ()
    wrong: Sequence[str] = ()
    # (command or "", what it is for)
    next: Sequence[tuple[str, str]] = ()


class Verdict(NamedTuple):
    """The card: its colour, one sentence, (heading, sentences) in order, what to do next, how much is wrong."""

    light: Light
    headline: str
    facts: Sequence[tuple[str, Sequence[str]]]
    next: Sequence[tuple[str, str]]
    warned: int


def card(found: Found) -> Verdict:
    """A card of what was found; headings without a sentence are left out."""
    headings = ("What changed", "How sure", "What it cost", "Is anything wrong")
    facts = zip(headings, (found.changed, found.sure, found.cost, found.wrong or ["Nothing was found."]), strict=True)
    return Verdict(
        found.light, found.headline, [(name, said) for name, said in facts if said], found.next, len(found.wrong)
    )


def side_of(ends: Sequence[float] | None, middle: float) -> int:
    """1 when an interval lies above the middle, -1 below, 0 when it holds it or is not known."""
    if ends is None:
        return 0
    return (ends[0] > middle) - (ends[1] < middle)


def count(share: float, pairs: int) -> str:
    """Pairs of a share; a tie counts one half."""
    return f"{round(2 * share * pairs) / 2:g}"


def sureness(e: Mapping[str, Any]) -> list[str]:
    """What the ranges count, and whether the prompts are few."""
    prompts = e.get("prompts", e["pairs"])
    answered = (e.get("score") or e.get("kl") or {}).get("num_prompts", prompts)
    of = f" ({answered} for its own answers)" if answered != prompts else ""
    said = [
        f"Ranges are 95 % intervals over {plural(prompts, 'prompt')}{of}; what another seed would give is not in them."
    ]
    if prompts < FEW:
        return [*said, f"That is few: with under {FEW} prompts little can be told. Hold out more."]
    few = f"{plural(answered, 'prompt')} for its own answers is few: take {FEW} or more (sample_prompts of favor eval)."
    return [*said, few] if answered < FEW else said


def place(run: RunRecord) -> str:
    """The run's folder as commands name it; of a record as others may see it (`anywhere`), never an absolute path."""
    told = run.settings.get("run")
    return told if isinstance(told, str) else run.name


def other(run: RunRecord) -> bool:
    """Whether it is no run of one training: a win rate, a loop, or what another package's section shows."""
    return bool(run.sections or run.winrate or run.rounds)
