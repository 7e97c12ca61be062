"""What a command is, and where it runs; what several commands say and keep.

In: nothing. Out: Command, Terminal. Next: preferring.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from favor.closing import Done, Speech

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pydantic import BaseModel
    from rich.console import Console

    from favor.stop import StopRequest

KEPT = "what was made so far is kept; run the same command again"


@dataclass(frozen=True)
class Terminal:
    """Where a command runs. recipe: the file it was given; words: what was typed; overrides: the settings in it, whole keys."""

    recipe: Path | None
    console: "Console"
    progress: "Callable[[str, int, int], None]"
    speech: Speech
    words: tuple[str, ...]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """What a command is: its settings, and what it does with them."""

    config: "type[BaseModel]"
    run: Callable[[Any, Terminal], Done]


def continued() -> "AbstractContextManager[StopRequest]":
    """Signals in a command that keeps what it has made and takes it up again."""
    from favor.stop import stop_signals

    return stop_signals(f"{KEPT} to continue")


def say_precision(*dtypes: str) -> None:
    """What the command's models are computed in; training commands and eval say it themselves."""
    from favor.model.load import precision_of

    for dtype in dict.fromkeys(dtypes):
        print(f"precision: {precision_of(dtype)}")
