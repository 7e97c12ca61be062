"""The page of `favor lint`: each finding as a sentence, the rows with both answers side by side, why it matters, what fixes it.

In: rows, findings, what the settings name. Out: HTML that names no folder of this machine. Next: lint.html.jinja.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import NamedTuple

from favor.data.formats import RowError
from favor.data.types import Finding
from favor.errors import places_in, without_known_places
from favor.lint.advice import ADVICE, Advice
from favor.lint.cheap import Hit, Told, Where, place, shown
from favor.lint.rows import Row
from favor.lint.settings import KINDS, ORDER, LintConfig
from favor.report.frame import rendered
from favor.report.words import plural

# rows whose texts are never shown in full, whatever else is found in them
_PRIVATE = {"secret", "personal"}
# what --fix repairs rather than drops
REPAIRED = {"encoding", "invisible", "entities", "blanks"}
# letters of a text, and of all texts of a page; row numbers that are listed
_TEXT, _LETTERS, _LISTED = 700, 150_000, 200


class Example(NamedTuple):
    """A row on a page: where it is, what is said of it, its texts ("" where they are not to be shown)."""

    place: str
    said: str
    prompt: str
    chosen: str
    rejected: str


class Section(NamedTuple):
    """A finding on the page."""

    kind: str
    severity: str
    message: str
    advice: Advice
    fix: str
    examples: list[Example]
    rows: str


def page(
    config: LintConfig, rows: Sequence[Row], told: Sequence[Told], found: Sequence[Finding], recipe: Path | None
) -> str:
    """The whole page."""
    # a page may be handed on, so it names no folder of this machine
    places = {row.where[0] for row in rows}.union(places_in(config.model_dump(mode="json")))
    anywhere = partial(without_known_places, known=places)
    source = anywhere(config.data.training)
    command = f"favor lint {recipe.name if recipe else f'data.train={source}'} --fix clean.jsonl"
    of_row = _Rows(
        {row.where: row for row in rows}, {where for one in found if one.kind in _PRIVATE for where in one.rows}
    )
    said = {(hit.kind, hit.where): hit.said for hit in told if isinstance(hit, Hit)}
    sections: list[Section] = []
    room = _LETTERS
    for finding in found:
        shown_rows = finding.rows[: config.lint.examples]
        examples = [of_row.example(where, finding.kind, said.get((finding.kind, where), "")) for where in shown_rows]
        examples = [one for one in examples if (room := room - sum(map(len, one))) > 0]
        examples = [one._replace(place=anywhere(one.place), said=anywhere(one.said)) for one in examples]
        message, numbers = anywhere(_message(finding)), anywhere(_numbers(finding.rows))
        fix = command if finding.kind in REPAIRED or (finding.kind in KINDS and KINDS[finding.kind][2]) else ""
        sections.append(Section(finding.kind, finding.severity, message, ADVICE[finding.kind], fix, examples, numbers))
    counts = Counter(finding.severity for finding in found)
    values = {"source": source, "headline": _headline(counts), "command": command, "counts": counts}
    return rendered("favor.lint", "lint.html.jinja", order=ORDER, sections=sections, **values)


def _message(finding: Finding) -> str:
    """How many rows; of the whole file what was measured."""
    return (
        f"In {plural(len(finding.rows), 'row')}." if finding.rows and finding.kind != "truncation" else finding.message
    )


def _headline(counts: Mapping[str, int]) -> str:
    if counts["error"]:
        return f"{plural(counts['error'], 'kind')} of fault that would spoil training: fix the data first."
    if counts["warning"]:
        return f"It would train; {plural(counts['warning'], 'finding')} deserve{'s' * (counts['warning'] == 1)} a look first."
    return "Nothing was found that would spoil training."


class _Rows(NamedTuple):
    """The rows by their place, and those whose texts are not to be shown."""

    by_place: Mapping[Where, Row]
    private: Set[Where]

    def example(self, where: Where, kind: str, said: str) -> Example:
        """A row as an example; what other findings say of a private one would quote it."""
        row, at = self.by_place[where], place(where)
        if where in self.private:
            said = f"{said} " if kind in _PRIVATE else ""
            return Example(at, f"{said}(its texts are not shown: they hold what looks private)", "", "", "")
        if isinstance(row.said, RowError):
            return Example(at, said, *_unread(row))
        order = row.orders[0] if row.orders else tuple(range(len(row.responses)))
        best, worst = (row.responses[order[0]], row.responses[order[-1]]) if order else ("", "")
        return Example(at, said, cut(row.prompt), cut(best), cut(worst) if len(order) > 1 else "")


def _unread(row: Row) -> tuple[str, str, str]:
    """The three texts of a row that favor cannot use, or all of it as it is."""
    prompt, chosen, rejected = (row.raw.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return cut(prompt), cut(chosen), cut(rejected)
    return shown(json.dumps(row.raw, ensure_ascii=False, default=str), _TEXT), "", ""


def cut(text: str) -> str:
    """A text as a page shows it."""
    return text if len(text) <= _TEXT else f"{text[:_TEXT]} ... [{len(text) - _TEXT:,} more letters]"


def _numbers(rows: Sequence[Where]) -> str:
    several = len({source for source, _ in rows}) > 1
    listed = ", ".join(f"{source}: {number}" if several else str(number) for source, number in rows[:_LISTED])
    return listed + (f" and {len(rows) - _LISTED:,} more" if len(rows) > _LISTED else "")
