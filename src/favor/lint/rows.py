"""Checks of one row at a time: what training would refuse, broken text, secrets, repeated prompts; and text repaired.

In: Rows. Out: Hits. Next: sets.py.
"""

import html
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import ftfy

from favor.data.formats import Judgment, RowError
from favor.data.schema import holds
from favor.data.turns import as_object, calls_of, parameters_of
from favor.data.types import words_of
from favor.errors import in_texts
from favor.lint.cheap import RESPONSE_CHECKS, Hit, Where, shown

# only what changes the meaning of bytes: typographic quotes and ligatures are good text
_GOOD = ("uncurl_quotes", "fix_latin_ligatures", "fix_character_width", "fix_line_breaks", "unescape_html")
_REPAIR = ftfy.TextFixerConfig(normalization=None, **dict.fromkeys(_GOOD, False))
_SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}\b|\bsk-[A-Za-z0-9_-]{20,}\b|"
    r"\bxox[baprs]-[A-Za-z0-9-]{10,}\b|\bhf_[A-Za-z0-9]{30,}\b"
)
_PERSONAL = re.compile(r"\b[\w.+-]+@[\w-]+\.[a-z]{2,}\b|\b\d{3}-\d{2}-\d{4}\b|\b(?:\d[ -]?){15}\d\b", re.IGNORECASE)
# kind, pattern, what it looks like, letters that are shown of it
_PRIVATE = (("secret", _SECRET, "a key", 8), ("personal", _PERSONAL, "personal data", 3))
_TAGS = re.compile(r"</?(?:p|br|div|span|script|a|b|i|li|ul)\b[^>]*>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d+|#x[0-9a-f]+);", re.IGNORECASE)
_REFUSAL = re.compile(r"^\W*(?:i'?m sorry|sorry,|i cannot|i can'?t|i am unable|as an ai)", re.IGNORECASE)
# zero-width and bidirectional control characters
_INVISIBLE = frozenset("\u200b\u200c\u200d\u2060\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u00ad")
_JOINER = "\u200d"


class Row(NamedTuple):
    """One row: as the file has it, and what it says or why it cannot be used. A row that cannot be used has no texts."""

    part: str
    where: Where
    raw: dict[str, Any]
    said: Judgment | RowError
    # as plain text, the prompt without the blanks around it; orders are indices of responses, best first
    prompt: str = ""
    responses: tuple[str, ...] = ()
    orders: tuple[tuple[int, ...], ...] = ()

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """(better, worse) of every pair that the orders imply."""
        texts = self.responses
        return ((texts[a], texts[b]) for order in self.orders for a, b in combinations(order, 2))


def row_of(part: str, where: Where, raw: dict[str, Any], said: Judgment | RowError) -> Row:
    """A row with its texts."""
    if isinstance(said, RowError):
        return Row(part, where, raw, said)
    return Row(part, where, raw, said, words_of(said.prompt).strip(), tuple(map(words_of, said.responses)), said.orders)


def row_checks(row: Row) -> Iterator[Hit]:
    """Every fault that a row shows by itself."""
    if isinstance(row.said, RowError):
        yield Hit(row.said.kind, row.where, str(row.said))
    yield from _broken_texts(row)
    for name, text in ((name, text) for name, value in row.raw.items() for text in _strings(value)):
        for kind, pattern, what, letters in _PRIVATE:
            if hit := pattern.search(text):
                said = f"column '{name}' holds what looks like {what}: {hit.group()[:letters]}..."
                yield Hit(kind, row.where, said)
    yield from _odd_responses(row)
    yield from _broken_calls(row)
    prompt = row.said.prompt if isinstance(row.said, Judgment) else ""
    for before, turn in pairwise(() if isinstance(prompt, str) else prompt):
        if before == turn and turn.get("content"):
            said = f"two turns are the same: {shown(json.dumps(turn, ensure_ascii=False), 80)}"
            yield Hit("repeated_turn", row.where, said)


def repaired(text: str) -> str:
    """A text with its encoding, entities, invisible characters and trailing blanks repaired."""
    text = _visible(ftfy.fix_text(text, _REPAIR))
    return (html.unescape(text) if _ENTITY.search(text) else text).rstrip()


def _broken_texts(row: Row) -> Iterator[Hit]:
    # of a row that cannot be used, every string in it
    for text in [words_of(row.said.prompt), *row.responses] if isinstance(row.said, Judgment) else _strings(row.raw):
        # quick way out: broken decoding leaves characters beyond ASCII
        if not text.isascii() and _visible(better := ftfy.fix_text(text, _REPAIR)) != _visible(text):
            yield Hit("encoding", row.where, f"{shown(text, 60)!r} is probably {shown(better, 60)!r}")
        if "\ufffd" in text:
            said = f"U+FFFD in {shown(text, 80)!r}: letters were lost in an earlier conversion"
            yield Hit("lost_characters", row.where, said)
        if not (text.isascii() and text.isprintable()):
            for letter in [c for i, c in enumerate(text) if _is_invisible(text, i)][:1]:
                yield Hit("invisible", row.where, f"U+{ord(letter):04X} in {shown(text, 60)!r}")
        for kind, pattern in (("entities", _ENTITY), ("markup", _TAGS)):
            if hit := pattern.search(text):
                yield Hit(kind, row.where, f"{hit.group()} in {shown(text[max(0, hit.start() - 30) :], 80)!r}")


def _odd_responses(row: Row) -> Iterator[Hit]:
    for text in row.responses:
        for kind, is_odd in RESPONSE_CHECKS.items():
            if is_odd(text):
                yield Hit(kind, row.where, f"a response is {text[-40:]!r}")
        if len(row.prompt) >= 15 and text.strip().startswith(row.prompt):
            yield Hit("echo", row.where, f"a response begins with the whole prompt: {shown(text, 80)!r}")
    for best, *_, worst in row.orders[:1]:
        chosen, rejected = row.responses[best], row.responses[worst]
        if _REFUSAL.search(chosen) and not _REFUSAL.search(rejected):
            yield Hit("refusal", row.where, f"chosen refuses, rejected does not: {shown(chosen, 80)!r}")


def _broken_calls(row: Row) -> Iterator[Hit]:
    """Calls of preferred responses; one that is worse than all others may well be broken, and is mostly worse for it."""
    if isinstance(row.said, RowError):
        return
    tools = None if row.said.tools is None else parameters_of(row.said.tools)
    for place in sorted({place for order in row.orders for place in order[:-1]}):
        response = row.said.responses[place]
        for turn in () if isinstance(response, str) else response:
            for said in filter(None, (_wrong_call(call, tools) for call in calls_of(turn))):
                yield Hit("calls", row.where, said)


def _wrong_call(call: Mapping[str, Any], tools: Mapping[str, Any] | None) -> str | None:
    """What is wrong with a call, in words; without tools its arguments must be an object."""
    name, arguments = str(call.get("name")), as_object(call.get("arguments", {}))
    if not isinstance(arguments, dict):
        return f"the arguments of {name} are no JSON object: {shown(str(arguments), 80)!r}"
    if tools is not None and name not in tools:
        return f"{name} is not among the row's tools ({', '.join(tools)})"
    if tools is not None and not holds(arguments, tools[name]):
        return f"the arguments of {name} do not fit its schema: {shown(json.dumps(arguments, ensure_ascii=False), 80)}"
    return None


def _strings(value: object) -> list[str]:
    found: list[str] = []
    in_texts(value, lambda text: found.append(text) or text)
    return found


def _visible(text: str) -> str:
    return "".join(c for i, c in enumerate(text) if not _is_invisible(text, i))


def _is_invisible(text: str, i: int) -> bool:
    c = text[i]
    # a zero-width joiner between two symbols makes one emoji of them
    joins = c == _JOINER and 0 < i < len(text) - 1 and ord(text[i + 1]) > 0x2000
    return not joins and (c in _INVISIBLE or (unicodedata.category(c) == "Cc" and c not in "\t\n\r"))
