"""The settings of `favor doctor`, and what it finds.

In: a recipe. Out: DoctorConfig, Sign. No torch here: it may be what is broken. Next: run.py.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel

from favor.config import STRICT

Level: TypeAlias = Literal["ok", "note", "broken"]
NONE: Mapping[str, Any] = {}


class DoctorConfig(BaseModel):
    """A recipe for `favor doctor`."""

    model_config = STRICT
    model: str | None = None
    """A model folder or hub id: whether it would train here."""
    run: str | None = None
    """A run folder: what it holds, and whether its model would train here."""
    hub: bool = False
    """Ask the hub whether it answers, and for files of model that are not here; nothing leaves the machine without it."""


class Sign(NamedTuple):
    """One finding in a line. todo: what to do, if anything; figures: what was measured, for programs."""

    level: Level
    topic: str
    said: str
    todo: str = ""
    figures: Mapping[str, Any] = NONE

    def line(self) -> str:
        """For people."""
        return f"{self.level:6} {self.topic}: {self.said}" + (f"; {self.todo}" if self.todo else "")


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
