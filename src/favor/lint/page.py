"""Findings as one static HTML page.

In: Findings. Out: a file that opens anywhere. Next: lint.html.jinja.
"""

from collections import Counter
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from rich.table import Table
from rich.text import Text

from favor.hide import without_known_places
from favor.lint.settings import ORDER, Finding

_LISTED = 200
_COLOURED = {"error": "[red]error[/red]", "warning": "[yellow]warning[/yellow]", "note": "note"}


def page_of(findings: Sequence[Finding], source: str, places: Sequence[str] = ()) -> str:
    """The page as HTML; `places` are paths of this machine, which it does not name."""
    known = {path for finding in findings for path, _ in finding.rows} | set(places)
    source, findings = without_known_places(source, known), [_anywhere(finding, known) for finding in findings]
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(files("favor.lint").joinpath("lint.html.jinja").read_text("utf-8"))
    counts = Counter(finding.severity for finding in findings)
    return template.render(
        source=source,
        counts=[(severity, counts[severity]) for severity in ORDER],
        findings=[(finding, _numbers(finding)) for finding in findings],
    )


def findings_table(findings: Sequence[Finding]) -> Table:
    """The findings for a terminal, the first examples beneath each."""
    table = Table("severity", "finding", "what", show_lines=False)
    for finding in findings:
        lines = [finding.message, *(f"  {example}" for example in finding.examples)]
        table.add_row(_COLOURED[finding.severity], finding.name, Text("\n".join(lines)))
    return table


def _anywhere(finding: Finding, known: set[str]) -> Finding:
    def shown(text: str) -> str:
        return without_known_places(text, known)

    return finding._replace(
        message=shown(finding.message),
        rows=tuple((shown(path), number) for path, number in finding.rows),
        examples=tuple(map(shown, finding.examples)),
    )


def _numbers(finding: Finding) -> str:
    """Row numbers as text, by source."""
    if not finding.rows:
        return ""
    several = len({source for source, _ in finding.rows}) > 1
    listed = [f"{source}: {number}" if several else str(number) for source, number in finding.rows[:_LISTED]]
    return ", ".join(listed) + (f" and {len(finding.rows) - _LISTED} more" if len(finding.rows) > _LISTED else "")
