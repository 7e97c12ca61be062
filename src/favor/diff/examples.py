"""The prompts whose answers changed most: one of each kind of turn, then those by the log-ratio of a token.

In: pairs of answers. Out: records for JSON and page. Next: page.py.
"""

from collections.abc import Sequence
from typing import Any

from favor.data.types import words_of
from favor.diff.measure import Pair, per_token

# figure -> what is said where b's answer has it and a's has not, and the other way round
_TURNS = {
    "refused": ("refuses now", "refuses no longer"),
    "ended": ("ends now", "does not end now"),
    "language": ("another language or script now", "the prompt's language now"),
    "json": ("is JSON now", "is no JSON now"),
    "open_fence": ("leaves a block of code open now", "closes its block of code now"),
    "called": ("calls a tool now", "calls no tool now"),
    "bad_call": ("makes a call that is not valid now", "makes no bad call now"),
}


def most_changed(pairs: Sequence[Pair], count: int) -> list[dict[str, Any]]:
    """So many prompts, each with one pair of its answers; two answers that are the same never."""
    differ = (pair for pair in pairs if pair.a.text != pair.b.text or _turns(pair))
    found = sorted(differ, key=lambda pair: -_change(pair))
    first = {turn: pair for pair in reversed(found) for turn in _turns(pair)}
    ranked = [*sorted(first.values(), key=lambda pair: -_change(pair)), *found]
    by_prompt: dict[int, Pair] = {}
    for pair in ranked:
        by_prompt.setdefault(pair.asked.place, pair)
    return [_record(pair) for pair in list(by_prompt.values())[:count]]


def _change(pair: Pair) -> float:
    """The larger |log b - log a| a token, nats; without it how many figures moved, and how far the length did."""
    ratios = per_token(pair)
    if ratios is not None:
        return max(map(abs, ratios))
    moved = sum(abs(pair.b.signs[name] - value) for name, value in pair.a.signs.items() if name != "length")
    longest = max(len(pair.a.ids), len(pair.b.ids))
    return moved + abs(len(pair.a.ids) - len(pair.b.ids)) / longest


def _turns(pair: Pair) -> list[str]:
    a, b = pair.a.signs, pair.b.signs
    return [said[a[name] > b[name]] for name, said in _TURNS.items() if name in a and name in b and a[name] != b[name]]


def _record(pair: Pair) -> dict[str, Any]:
    ratios = per_token(pair)
    return {
        "row": pair.asked.row,
        "prompt": words_of(pair.asked.prompt),
        "turns": _turns(pair),
        "log_ratio": None if ratios is None else max(ratios, key=abs),
        **{name: {"text": one.text, "ended": bool(one.signs["ended"])} for name, one in (("a", pair.a), ("b", pair.b))},
    }
