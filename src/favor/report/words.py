"""The words of a page that not everybody knows, each explained where it stands; shares and intervals as people say them.

In: plain text, numbers. Out: Markup and text. Next: verdict.py.
"""

import re
from collections.abc import Sequence

from markupsafe import Markup, escape

# how a term is written -> what it means
TERMS: dict[str, str] = {
    "held-out": "Examples that the model was not trained on.",
    "before (reference)": "The model that training started from, called the reference.",
    "after (policy)": "The trained model, called the policy.",
    "implicit reward": "beta times the log of how much likelier an answer became by training; DPO raises it for preferred answers.",
    "margin": "How much more the preferred answer gained than the other: the difference of their implicit rewards, in beta x nats.",
    "KL": "How far the model has moved from where it started, measured on its own answers: the mean log of how much likelier "
    "they are after training than before. 0 is not at all.",
    "nats": "Units of the natural logarithm: 1 nat is a factor of 2.7, 5 nats one of 148.",
    "95 %": "An interval made this way holds the true value 19 times of 20. It counts the choice of prompts, not other seeds.",
    "ECE": "Expected calibration error: how far, on average, the predicted chance of being right is from the share that was right.",
    "SFT": "Supervised fine-tuning: imitating the preferred answers, usually the step before DPO.",
    "position bias": "How often the judge prefers the answer it is shown first, whatever it says.",
}
_FIND = re.compile("|".join(rf"(?<![\w-]){re.escape(term)}(?!\w)" for term in TERMS))


def explained(text: str) -> Markup:
    """The text with each term that it holds explained, the first time."""
    seen: set[str] = set()
    parts: list[Markup] = []
    end = 0
    for hit in _FIND.finditer(text):
        parts.append(escape(text[end : hit.start()]))
        end, term = hit.end(), hit.group()
        told = Markup('<abbr title="{}" tabindex="0">{}</abbr>')
        parts.append(escape(term) if term in seen else told.format(TERMS[term], term))
        seen.add(term)
    return Markup("").join([*parts, escape(text[end:])])


def rounded(first: float, last: float) -> tuple[str, str]:
    """Two values of a figure with four digits; one that is nothing beside the other is 0."""
    least = 1e-6 * max(abs(first), abs(last))
    start, end = ("0" if abs(value) < least else f"{value:.4g}" for value in (first, last))
    return start, end


def percent(share: float) -> str:
    """A share as people say it."""
    return f"{100 * share:.0f} %"


def between(ends: Sequence[float] | None, spec: str = "") -> str:
    """The ends of an interval: of shares in per cent, of numbers by their format."""
    if ends is None:
        return "no interval: all alike"
    low, high = (f"{end:{spec}}" if spec else f"{100 * end:.0f}" for end in ends)
    return f"{low} to {high}" + ("" if spec else " %")


def plural(count: int, word: str) -> str:
    """A number with its noun."""
    return f"{count:,} {word}{'s' * (count != 1)}"
