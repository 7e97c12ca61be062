"""A file that the user named with `out=`: no input, nobody else's, and tried before the work.

In: a path, what is read, what it is made from. Out: the file, and beside it `.NAME.favor.json`, by which favor knows it
again: hashes of the settings and of the content. Next: guard.py.
"""

import contextlib
import glob
import json
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from favor import guard
from favor.errors import ConfigError
from favor.run import write_json, write_text


@dataclass(frozen=True)
class Output:
    """A file this process alone writes. `key` is the setting that names it; `also` are files written beside it."""

    path: Path
    key: str
    overwrite: bool
    also: tuple[Path, ...] = ()
    settings: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def record(self) -> Path:
        """What favor remembers of the file."""
        return self.path.with_name(f".{self.path.name}.favor.json")


@contextlib.contextmanager
def claimed(output: Output, inputs: Iterable[str | None]) -> Generator[Output]:
    """Hold the file for the time of the block.

    Raises ConfigError when it is a folder or one of the `inputs` (by whatever name), when it cannot be written there,
    or while another process writes it.
    """
    path = output.path
    if not path.name or path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file with {output.key}=FILE")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent}: no such folder; make it, or choose another {output.key}=FILE")
    for name in inputs:
        if name is not None:
            _refuse_input(output, name)
    with guard.held(path.with_name(f".{path.name}.lock"), str(path)):
        yield output


def finished(output: Output) -> Any:
    """The result of the same work done before; None when the file is to be made.

    Raises ConfigError when the file is not favor's, has been changed since, or was made from something else.
    """
    before = known(output)
    if before is None:
        return None
    then, now = before["settings"], output.settings
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if changed:
        raise _refusal(output, output.path, f"was made with another {', another '.join(changed)}")
    return before["result"]


def known(output: Output) -> dict[str, Any] | None:
    """What is remembered of a file that is still what favor wrote; None when there is none, or it may be replaced.

    Raises ConfigError when there is a file that favor did not write, or that was changed since.
    """
    there = [path for path in (output.path, *output.also) if path.exists()]
    if output.overwrite or not there:
        return None
    try:
        found = json.loads(output.record.read_text("utf-8"))
        expected, _, _ = found["sha256"], found["result"], found["settings"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _refusal(output, there[0], "is there already, and not known to be made by this command") from None
    if not output.path.exists():
        return None
    if expected is not None and expected != guard.file_hash(output.path):
        raise _refusal(output, output.path, "was changed since favor wrote it")
    return found


def write(output: Output, text: str, result: Any) -> None:
    """Write the file whole, and what is remembered of it."""
    found = {"settings": output.settings, "sha256": guard.sha(text), "result": result}
    # first, so that a kill in between leaves no file that nobody knows
    write_json(output.record, found)
    write_text(output.path, text)


def remember(output: Output, *, written: bool) -> None:
    """Remember a file of another writer, before it is written (so that a kill leaves no stranger) and once it is."""
    hashed = guard.file_hash(output.path) if written else None
    write_json(output.record, {"settings": output.settings, "sha256": hashed, "result": None})


def hashes(values: Mapping[str, Any]) -> dict[str, str]:
    """Settings by name as hashes: enough to say which differ, and nothing secret."""
    return {name: guard.sha(json.dumps(value, sort_keys=True)) for name, value in values.items()}


def _refusal(output: Output, path: Path, why: str) -> ConfigError:
    section = output.key.rpartition(".")[0]
    option = f"{section}.overwrite=true" if section else "overwrite=true"
    return ConfigError(f"{path}: {why}; choose another {output.key}=FILE, or replace it with {option}")


def _refuse_input(output: Output, name: str) -> None:
    place = Path(name)
    if not place.exists() and ".py:" in name:
        place = Path(name.rpartition(":")[0])
    files = [Path(found) for found in glob.glob(name, recursive=True)] if glob.has_magic(name) else [place]  # noqa: PTH207
    for mine in (output.path, *output.also):
        if any(_same(mine, file) for file in files):
            raise ConfigError(f"{output.key}={mine}: is the file it reads ({name}); name another one")
        if place.is_dir() and mine.parent.resolve() == place.resolve():
            raise ConfigError(f"{output.key}={mine}: lies in the folder it reads ({name}); name another place")


def _same(mine: Path, other: Path) -> bool:
    """One file, through symbolic and hard links too."""
    return mine.exists() and other.exists() and mine.samefile(other)
