"""Around every call from Python: what is printed, how it moves, and what is raised.

In: whether to be quiet. Out: a console; a way to say how far work is; errors as FavorError. Next: calls.py.
"""

import contextlib
from collections.abc import Generator
from typing import TypeAlias

from rich.console import Console
from rich.progress import Progress, TaskID
from transformers.utils import logging as library

from favor.closing import speaks
from favor.errors import EXPECTED, FavorError, explained, without_secrets
from favor.generate.samples import Progress as Advance
from favor.stop import StoppedAtOnceError
from favor.train.session import moves

Said: TypeAlias = Generator[tuple[Console, Advance]]


@contextlib.contextmanager
def calling(*, quiet: bool) -> Said:
    """The console and the progress of a call. What the machine or a library refuses becomes a FavorError of one line.

    Raises KeyboardInterrupt for a signal that comes where no loop looks.
    """
    console = Console(highlight=False, quiet=quiet or not speaks())
    try:
        with _without_bars(), _advancing(console) as advance:
            yield console, advance
    except StoppedAtOnceError as error:
        raise KeyboardInterrupt(str(error)) from None
    except EXPECTED as error:
        said = explained(error)
        if said is None:
            raise
        raise FavorError(without_secrets(said)) from error


@contextlib.contextmanager
def _without_bars() -> Generator[None]:
    """Bars of transformers, of loading and saving, would stand between our lines; they come back afterwards."""
    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()


@contextlib.contextmanager
def _advancing(console: Console) -> Generator[Advance]:
    """A line per kind of work: it moves where lines can, else it is printed when the work is done."""
    bars: dict[str, tuple[Progress, TaskID]] = {}
    done_of: dict[str, int] = {}

    def advance(label: str, done: int, total: int) -> None:
        done_of[label] = done_of.get(label, 0) + done
        whole = done_of[label] >= total
        if not moves(console):
            if whole:
                console.print(f"{label} {done_of[label]}/{total}", markup=False)
            return
        if label not in bars:
            # one at a time, as a training's bar may be drawn in between
            bar = Progress(console=console)
            bars[label] = bar, bar.add_task(label, total=total)
            bar.start()
        bar, task = bars[label]
        bar.update(task, completed=done_of[label])
        if whole:
            # a notebook would keep the state of the last refresh
            bar.refresh()
            bar.stop()

    try:
        yield advance
    finally:
        for bar, _ in bars.values():
            bar.stop()
