"""The page of `favor conform`: a row for every case.

In: results by the case's name. Out: HTML that needs nothing else. Next: ../report/frame.py.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from favor.conform.cases import cases
from favor.conform.judge import Result
from favor.errors import without_places
from favor.report.frame import rendered

_ORDER = ("holds", "fails", "refused", "not tried")


def page(adapter: str, found: Mapping[str, Result]) -> str:
    """The whole page; a page may be handed on, so it names no folder of this machine."""
    rows = [(case, found[case.name]) for case in cases() if case.name in found]
    rows = [(case, result._replace(found=without_places(result.found))) for case, result in rows]
    counts = Counter(result.status for result in found.values())
    return rendered(
        "favor.conform", "conform.html.jinja", name=Path(adapter).name, rows=rows, counts=counts, order=_ORDER
    )
