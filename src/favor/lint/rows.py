"""Checks of one row at a time: what training would refuse, broken text, secrets, leaked prompts.

In: Rows. Out: Findings, one for each kind of fault. Next: sets.py.
"""

import html
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Sequence

import ftfy

from favor.lint.settings import Finding, LintSettings, Row, Severity, shown, words_of

# only what changes the meaning of bytes: typographic quotes and ligatures are good text
REPAIR = ftfy.TextFixerConfig(
    uncurl_quotes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    fix_line_breaks=False,
    unescape_html=False,
    normalization=None,
    explain=False,
)
_SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}\b|\bsk-[A-Za-z0-9_-]{20,}\b|"
    r"\bxox[baprs]-[A-Za-z0-9-]{10,}\b|\bhf_[A-Za-z0-9]{30,}\b"
)
_PERSONAL = re.compile(r"\b[\w.+-]+@[\w-]+\.[a-z]{2,}\b|\b\d{3}-\d{2}-\d{4}\b|\b(?:\d[ -]?){15}\d\b", re.IGNORECASE)
_TAGS = re.compile(r"</?(?:p|br|div|span|script|a|b|i|li|ul)\b[^>]*>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d+|#x[0-9a-f]+);", re.IGNORECASE)
_REFUSAL = re.compile(r"^\W*(?:i'?m sorry|sorry,|i cannot|i can'?t|i am unable|as an ai)", re.IGNORECASE)
# zero-width and bidirectional control characters
_INVISIBLE = frozenset("\u200b\u200c\u200d\u2060\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u00ad")
_JOINER = "\u200d"

Check = Callable[[Row], str | None]


def row_findings(rows: Sequence[Row], settings: LintSettings) -> list[Finding]:
    """Every row check over all rows: one finding for each that says anything, with its rows and examples."""
    found: list[Finding] = []
    for name, (severity, sentence, check) in CHECKS.items():
        hits = [(row, said) for row in rows if (said := check(row)) is not None]
        if hits:
            examples = tuple(f"{row.source}, row {row.number}: {said}" for row, said in hits[: settings.examples])
            found.append(Finding(severity, name, f"{len(hits)} {sentence}", tuple(r.where for r, _ in hits), examples))
    return found


def texts(row: Row) -> list[str]:
    """Prompt and responses as plain text; of a refused row every string in it."""
    if row.judgment is None:
        return strings(row.raw)
    return [words_of(row.judgment.prompt), *map(words_of, row.judgment.responses)]


def strings(value: object) -> list[str]:
    """Every string inside a value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [found for inner in value.values() for found in strings(inner)]
    if isinstance(value, list | tuple):
        return [found for inner in value for found in strings(inner)]
    return []


def _refused(*marks: str) -> Check:
    return lambda row: row.refusal if row.refusal and any(mark in row.refusal for mark in marks) else None


def _malformed(row: Row) -> str | None:
    known = (*_IDENTICAL, *_EMPTY)
    return row.refusal if row.refusal and not any(mark in row.refusal for mark in known) else None


def _any_text(found: Callable[[str], str | None]) -> Check:
    return lambda row: next((said for text in texts(row) if (said := found(text)) is not None), None)


def _mojibake(text: str) -> str | None:
    # quick way out: broken decoding leaves characters beyond ASCII
    if text.isascii() or (repaired := ftfy.fix_text(text, REPAIR)) == text or visible(repaired) == visible(text):
        return None
    return f"{shown(text, 60)!r} is probably {shown(repaired, 60)!r}"


def visible(text: str) -> str:
    """A text without its invisible and control characters."""
    return "".join(c for i, c in enumerate(text) if not _is_invisible(c) or _joins(text, i))


def _is_invisible(character: str) -> bool:
    return character in _INVISIBLE or (unicodedata.category(character) == "Cc" and character not in "\t\n\r")


def _invisible(text: str) -> str | None:
    if text.isascii() and text.isprintable():
        return None
    # a zero-width joiner between two symbols makes one emoji of them
    found = next((c for i, c in enumerate(text) if _is_invisible(c) and not _joins(text, i)), None)
    return None if found is None else f"U+{ord(found):04X} in {shown(text, 60)!r}"


def _joins(text: str, i: int) -> bool:
    return text[i] == _JOINER and 0 < i < len(text) - 1 and ord(text[i + 1]) > 0x2000


def _replacement(text: str) -> str | None:
    return f"U+FFFD in {shown(text, 80)!r}: letters were lost in an earlier conversion" if "\ufffd" in text else None


def _searched(pattern: re.Pattern[str]) -> Check:
    def found(text: str) -> str | None:
        hit = pattern.search(text)
        return f"{hit.group()} in {shown(text[max(0, hit.start() - 30) :], 80)!r}" if hit else None

    return _any_text(found)


def mended(text: str) -> str:
    """A text with its encoding, entities, invisible characters and trailing blanks repaired."""
    text = visible(ftfy.fix_text(text, REPAIR))
    return (html.unescape(text) if _ENTITY.search(text) else text).rstrip()


def _secret(row: Row) -> str | None:
    for column, value in row.raw.items():
        for text in strings(value):
            if found := _SECRETS.search(text):
                return f"column '{column}' holds what looks like a key: {found.group()[:8]}..."
    return None


def _personal(row: Row) -> str | None:
    for column, value in row.raw.items():
        for text in strings(value):
            if found := _PERSONAL.search(text):
                return f"column '{column}' holds what looks like personal data: {found.group()[:3]}..."
    return None


def _echo(row: Row) -> str | None:
    if row.judgment is None:
        return None
    prompt = words_of(row.judgment.prompt).strip()
    answers = (words_of(response).strip() for response in row.judgment.responses)
    said = next((answer for answer in answers if len(prompt) >= 15 and answer.startswith(prompt)), None)
    return None if said is None else f"a response begins with the whole prompt: {shown(said, 80)!r}"


def _stub(row: Row) -> str | None:
    if row.judgment is None:
        return None
    said = next((r for r in map(words_of, row.judgment.responses) if len(r.split()) < 2), None)
    return None if said is None else f"a response is {said!r}"


def _blanks(row: Row) -> str | None:
    if row.judgment is None:
        return None
    said = next((r for r in map(words_of, row.judgment.responses) if r != r.rstrip()), None)
    return None if said is None else f"a response ends in blanks: {said[-20:]!r}"


def _repeated_turn(row: Row) -> str | None:
    if row.judgment is None or isinstance(row.judgment.prompt, str):
        return None
    turns = row.judgment.prompt
    same = next((b for a, b in itertools.pairwise(turns) if a == b and a.get("content")), None)
    return None if same is None else f"two turns are the same: {shown(json.dumps(same, ensure_ascii=False), 80)}"


def _chosen_refuses(row: Row) -> str | None:
    if row.judgment is None or not row.judgment.orders:
        return None
    best, *_, worst = row.judgment.orders[0]
    chosen, rejected = (words_of(row.judgment.responses[i]) for i in (best, worst))
    if _REFUSAL.search(chosen) and not _REFUSAL.search(rejected):
        return f"chosen refuses, rejected does not: {shown(chosen, 80)!r}"
    return None


_IDENTICAL = ("are the same", "responses are the same")
_EMPTY = ("is empty", "says nothing", "no text content", "is missing or null")
CHECKS: dict[str, tuple[Severity, str, Check]] = {
    "identical": ("error", "rows whose responses are the same", _refused(*_IDENTICAL)),
    "empty": ("error", "rows with an empty or missing side", _refused(*_EMPTY)),
    "malformed": ("error", "rows that cannot be read", _malformed),
    "encoding": ("warning", "rows with text that was decoded wrongly", _any_text(_mojibake)),
    "lost_characters": ("warning", "rows with replacement characters", _any_text(_replacement)),
    "invisible": ("warning", "rows with invisible or control characters", _any_text(_invisible)),
    "entities": ("warning", "rows with HTML entities", _searched(_ENTITY)),
    "markup": ("note", "rows with HTML tags", _searched(_TAGS)),
    "secret": ("error", "rows with what looks like a secret", _secret),
    "personal": ("warning", "rows with what looks like personal data", _personal),
    "echo": ("warning", "rows whose response repeats the prompt", _echo),
    "repeated_turn": ("warning", "rows with the same turn twice", _repeated_turn),
    "blanks": ("warning", "rows with a response that ends in blanks", _blanks),
    "stub": ("note", "rows with a response of a single word", _stub),
    "refusal": ("note", "rows whose preferred response is the refusal", _chosen_refuses),
}
