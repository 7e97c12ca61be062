"""The page of a run or of several, and pages that are served until a signal comes; for every command that has one.

In: run folders; what serves. Out: report.html or compare.html with what it says first; last lines. Next: report/page.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from favor.closing import Done, Speech
from favor.run import RunFolder

if TYPE_CHECKING:
    from favor.report.found import Found


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of these runs, into the first one's folder without `out`; returns its path.

    Raises CheckpointError where there is no run, ConfigError when `out` holds anything but such a page.
    """
    return reported(runs, out)[0]


def reported(runs: Sequence[Path], out: Path | None) -> "tuple[Path, Found]":
    """Write the page; its path, and what its first screen says of these runs, by the names they were given."""
    from favor_frontier.page import SECTIONS

    from favor.report.compare import differences, verdict_of, write_comparison
    from favor.report.frame import replaceable
    from favor.report.page import write_page
    from favor.report.records import collect
    from favor.report.verdict import found_of

    found = [collect(run, SECTIONS) for run in runs]
    folder, several = RunFolder(runs[0]), len(runs) > 1
    path = out or (folder.comparison if several else folder.report)
    replaceable(path, "comparison" if several else "run")
    if several:
        write_comparison(found, path)
    else:
        write_page(found[0], path)
    here = [replace(one, settings=one.settings | {"run": str(run)}) for one, run in zip(found, runs, strict=True)]
    return path, verdict_of(here, differences(here)) if several else found_of(here[0])


def served(serve: Callable[[], None], kept: str, speech: Speech, done: Callable[[], Done]) -> Done:
    """Serve a page until a signal comes, which is how it ends: with its last lines and the signal's exit code."""
    from favor.stop import StoppedAtOnceError, stop_signals

    try:
        with stop_signals(kept):
            serve()
    except StoppedAtOnceError:
        speech.end(done())
        raise
    return done()
