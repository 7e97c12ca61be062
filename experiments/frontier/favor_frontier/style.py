"""The ground truth of the embedded task "format": is a review eight words long, and does it end in an exclamation mark?

In: prompts and responses. Out: scores in [0, 1], exact: no model is asked. Next: prepare.py.
"""

from collections.abc import Sequence

WORDS = 8


def score(_prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Half for the length, less an eighth of it for every word too many or too few, and half for the mark."""
    return [_length(text) / 2 + text.rstrip().endswith("!") / 2 for text in responses]


def _length(text: str) -> float:
    return max(0.0, 1 - abs(len(text.split()) - WORDS) / WORDS)
