"""What a curve says that a newcomer would not see: one line each, with what to do.

In: the schedule; the steps of metrics.jsonl. Out: notes, which the loop records as events. Next: loop.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Step = Mapping[str, Any]
# a loss below this, with every pair right, has nothing left to teach
_NEAR_ZERO = 0.05
# a loss that changed by less than this share of itself has not moved
_UNMOVED = 0.01
# fewer steps cannot say whether a loss moves
_FEWEST = 5
# a note when more samples than this were cut
_CUT = 0.25


def warmup(rising: int, total: int) -> str | None:
    """A warm-up that the run does not get to the end of: steps over which the rate rises, steps of the run."""
    if rising < total:
        return None
    return (
        f"note: the warm-up ({rising} steps) is as long as the run ({total} steps) or longer, so the learning rate never "
        f"exceeds {total}/{rising + 1} of optim.lr; set optim.warmup=0.1 (a tenth of the run), or train longer"
    )


def unreached(asked: int | None, total: int, epochs: int) -> str | None:
    """More steps asked for than the epochs have: optimizer steps asked for, steps of the run."""
    if asked is None or asked <= total:
        return None
    return (
        f"note: train.max_steps={asked} is not reached: train.epochs={epochs} over this data is {total} steps; "
        "raise train.epochs for more"
    )


def at_the_end(steps: Sequence[Step], *, moving: bool) -> Iterator[tuple[str, str]]:
    """(name, note) for what the steps of a run show. moving: its reference follows the policy, so its loss must not fall."""
    if not steps:
        return
    # the loss of an update on one's own samples says nothing by its height
    on_samples = "objective" in steps[-1]
    if not on_samples and (said := _saturated(steps)):
        yield "saturated", said
    if not on_samples and not moving and (said := _unmoved(steps)):
        yield "unmoved", said
    key = "sample.max_new_tokens" if on_samples else "watch.kl.tokens"
    if said := cut([step["ended"] for step in _last(steps) if "ended" in step], key):
        yield "cut", f"note: {said}"


def cut(ended: Sequence[float], key: str) -> str | None:
    """Samples that came to no end of their own. ended: shares, or truth values; key: the setting that bounds them."""
    share = 1 - sum(ended) / len(ended) if ended else 0.0
    if share <= _CUT:
        return None
    return (
        f"{share:.0%} of the samples were cut at the token limit, so they are judged by their beginnings; "
        f"raise {key}, or train on shorter answers"
    )


def _saturated(steps: Sequence[Step]) -> str | None:
    """Every pair right and the loss near 0, over the last tenth of the run at least."""
    since = len(steps)
    while since and steps[since - 1].get("accuracy") == 1.0 and 0 <= steps[since - 1]["loss"] < _NEAR_ZERO:
        since -= 1
    if len(steps) - since < len(_last(steps)):
        return None
    return (
        f"note: the loss is saturated: since step {steps[since]['step']} of {steps[-1]['step']} every pair is right "
        f"(accuracy 1.00) and the loss is below {_NEAR_ZERO}; fewer steps (train.epochs, train.max_steps) or more data "
        "would do as well"
    )


def _unmoved(steps: Sequence[Step]) -> str | None:
    if len(steps) < _FEWEST:
        return None
    width = max(1, len(steps) // 5)
    before, after = (sum(step["loss"] for step in part) / width for part in (steps[:width], steps[-width:]))
    if abs(after - before) > _UNMOVED * abs(before):
        return None
    rate = max(step["lr"] for step in steps)
    return (
        f"note: the loss has not moved ({before:.4f} -> {after:.4f} in {len(steps)} steps at a learning rate of at most "
        f"{rate:.2g}); raise optim.lr, or train longer"
    )


def _last(steps: Sequence[Step]) -> Sequence[Step]:
    """The last tenth of the steps, three at least."""
    return steps[-max(3, len(steps) // 10) :]


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.8 s, 42 s, 5 min 12 s, 2 h 3 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
