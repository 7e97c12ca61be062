"""Answers before and after: how much each prompt's changed, and word by word what.

In: records of samples.jsonl. Out: Shown, the most improved first. Next: page.py.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

# what all answers of a page may weigh, in letters, and the longest text that is compared word by word
_LETTERS, _COMPARED, _EACH = 110_000, 4000, 3
# a temperature this low takes the likeliest token
_GREEDY = 1e-3
# letters that a page shows of one text
_LONGEST = 6000
_WORD = re.compile(r"^\s+|\S+\s*")


class Side(NamedTuple):
    """One answer: its text with the changed words marked, its score, whether it was cut at the limit."""

    text: Markup
    score: float | None
    cut: bool


class Pair(NamedTuple):
    """An answer of either model by the same random numbers, and how they were drawn."""

    how: str
    before: Side
    after: Side


class Shown(NamedTuple):
    """A prompt with answers of both models; change: of the mean score, or the share of words that differ without scores."""

    prompt: str
    change: float
    scored: bool
    pairs: list[Pair]
    hidden: int


def shown(records: Sequence[dict[str, Any]]) -> tuple[list[Shown], int]:
    """The prompts with the largest change first, as many as a page can carry; and how many are left out."""
    ranked = sorted(records, key=lambda record: -_change(record))
    # both ends of the ranking are worth seeing
    order = [ranked[i // 2] if i % 2 == 0 else ranked[-1 - i // 2] for i in range(len(ranked))]
    found: list[Shown] = []
    letters = 0
    for record in order:
        letters += _weight(record)
        if found and letters > _LETTERS:
            break
        found.append(_shown(record))
    return sorted(found, key=lambda one: -one.change), len(records) - len(found)


def _weight(record: dict[str, Any]) -> int:
    answers = [text for side in ("reference", "policy") for text in record[side][:_EACH]]
    read = [text for one in record.get("read", ()) for text in one.values()]
    return sum(min(len(str(text)), _LONGEST) for text in (prompt_text(record["prompt"]), *answers, *read))


def within(text: str, most: int = _LONGEST) -> str:
    """A text as a page carries it: its beginning, and how much is left out."""
    return text if len(text) <= most else f"{text[:most]} ... [{len(text) - most:,} more letters]"


def prompt_text(prompt: Any) -> str:
    """A prompt as text: of a conversation every turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(turn.get("content") or "") for turn in prompt if isinstance(turn, dict))


def difference(before: str, after: str) -> tuple[Markup, Markup]:
    """Both texts, with <del> around words that are gone and <ins> around new ones."""
    a, b = _WORD.findall(before), _WORD.findall(after)
    if not a or not b or len(before) + len(after) > 2 * _COMPARED:
        return escape(before), escape(after)
    # blanks between words are shown, not compared
    words_a, words_b = ([word.strip() for word in side] for side in (a, b))
    sides: tuple[list[Markup], list[Markup]] = ([], [])
    for kind, i, j, k, n in difflib.SequenceMatcher(None, words_a, words_b, autojunk=False).get_opcodes():
        for side, words, tag in ((sides[0], a[i:j], "del"), (sides[1], b[k:n], "ins")):
            text = "".join(words)
            if text:
                side.append(escape(text) if kind == "equal" else Markup(f"<{tag}>{{}}</{tag}>").format(text))
    return Markup("").join(sides[0]), Markup("").join(sides[1])


def _shown(record: dict[str, Any]) -> Shown:
    measured = [
        _pair("", texts, record, place)
        for place, texts in enumerate(zip(record["reference"][:_EACH], record["policy"][:_EACH], strict=False))
    ]
    # answers that were drawn to be read come first
    read = [one for one in record.get("read", ()) if isinstance(one, dict) and {"reference", "policy"} <= one.keys()]
    pairs = [_pair(_how(one), (one["reference"], one["policy"]), one, 0) for one in read]
    pairs += [one._replace(how="as measured") for one in measured] if read else measured
    hidden = max(len(record["policy"]) - _EACH, 0)
    return Shown(within(prompt_text(record["prompt"])), _change(record), _scored(record), pairs, hidden)


def _how(answer: dict[str, Any]) -> str:
    temperature = answer.get("temperature", 1.0)
    return "always the likeliest word" if temperature <= _GREEDY else f"temperature {temperature:g}"


def _pair(how: str, texts: tuple[Any, Any], record: dict[str, Any], place: int) -> Pair:
    marked = difference(*(within(str(text)) for text in texts))
    before, after = (
        Side(text, _at(record, f"{side}_scores", place), bool(_at(record, f"{side}_cut", place)))
        for text, side in zip(marked, ("reference", "policy"), strict=True)
    )
    return Pair(how, before, after)


def _at(record: dict[str, Any], name: str, place: int) -> Any:
    values = record.get(name)
    if isinstance(values, bool):
        return values
    return values[place] if isinstance(values, list) and place < len(values) else None


def _scored(record: dict[str, Any]) -> bool:
    return all(record.get(f"{side}_scores") for side in ("reference", "policy"))


def _change(record: dict[str, Any]) -> float:
    if _scored(record):
        before, after = ([float(x) for x in record[f"{side}_scores"]] for side in ("reference", "policy"))
        return sum(after) / len(after) - sum(before) / len(before)
    pairs = list(zip(record["reference"], record["policy"], strict=False))
    alike = [_alike(str(before), str(after)) for before, after in pairs[:_EACH]]
    return 1 - sum(alike) / len(alike) if alike else 0.0


def _alike(before: str, after: str) -> float:
    a, b = before.split(), after.split()
    return 2 * len(set(a) & set(b)) / (len(set(a)) + len(set(b)) or 1) if a != b else 1.0
