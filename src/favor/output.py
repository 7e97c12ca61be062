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
    """A file this process alone writes. `key` is the setting that names it; `also` are files written beside it.

    meanwhile: files that are there only until it is finished.
    """

    path: Path
    key: str
    overwrite: bool
    also: tuple[Path, ...] = ()
    settings: dict[str, str] = field(default_factory=dict[str, str])
    meanwhile: tuple[Path, ...] = ()

    @property
    def record(self) -> Path:
        """What favor remembers of the file."""
        return self.path.with_name(f".{self.path.name}.favor.json")

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that is written."""
        return (self.path, *self.also, *self.meanwhile, self.record)


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
    for name in filter(None, inputs):
        _refuse_input(output, name)
    with guard.held(path.with_name(f".{path.name}.lock"), str(path)):
        # also where the work turns out to be done, and nothing is written any more
        for written in output.files:
            guard.sweep_beside(written)
        yield output


@contextlib.contextmanager
def all_claimed(outputs: Iterable[Output], inputs: Iterable[str | None]) -> Generator[None]:
    """Hold several files at once, which may replace only what favor wrote there. Raises ConfigError as their parts do."""
    refuse_shared(outputs := list(outputs))
    inputs = list(inputs)
    with contextlib.ExitStack() as claims:
        for out in outputs:
            known(claims.enter_context(claimed(out, inputs)))
        yield


def finished(output: Output) -> Any:
    """The result of the same work done before; None when the file is to be made.

    Raises ConfigError when the file is not favor's, has been changed since, or was made from something else.
    """
    before = known(output)
    if before is None or not output.path.exists():
        return None
    then, now = before["settings"], output.settings
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if changed:
        raise _refusal(output, output.path, f"was made with another {', another '.join(changed)}")
    return before["result"] if _content(output) == before["files"] else None


def known(output: Output) -> dict[str, Any] | None:
    """What is remembered of files that are still what favor wrote; None when there are none, or they may be replaced.

    Raises ConfigError when there is a file that favor did not write, or that was changed since.
    """
    there = _content(output)
    if output.overwrite or not there:
        return None
    try:
        found = json.loads(output.record.read_bytes())
        sound = guard.is_sealed(found) and {"settings", "files", "before", "result"} <= found.keys()
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        sound, found = False, {}
    for name, hashed in there.items():
        written = [found[when][name] for when in ("files", "before") if sound and name in found[when]]
        if hashed not in written:
            unknown = "is there already, and this command is not known to have made it"
            raise _refusal(
                output, output.path.with_name(name), "was changed since favor wrote it" if written else unknown
            )
    return found


def write(output: Output, texts: Mapping[Path, str], result: Any) -> None:
    """Write the file and those beside it, each whole, and what is remembered of them; what has no text is removed.

    A kill leaves no file that nobody knows: the record comes first, with the hashes of what is replaced.
    """
    found = {"settings": output.settings, "files": {path.name: guard.sha(text) for path, text in texts.items()}}
    found |= {"before": _content(output), "result": result}
    write_json(output.record, guard.seal(found))
    for path in (*output.also, output.path):
        if path in texts:
            write_text(path, texts[path])
        else:
            path.unlink(missing_ok=True)
    write_json(output.record, guard.seal(found | {"before": {}}))


def _content(output: Output) -> dict[str, str]:
    return {path.name: guard.file_hash(path) for path in (output.path, *output.also) if path.exists()}


def refuse_shared(outputs: Iterable[Output]) -> None:
    """Raises ConfigError when two settings name one file, or a file that is written beside the other's."""
    taken: dict[Path, str] = {}
    for output in outputs:
        for path in output.files:
            if (other := taken.get(path.resolve())) is not None:
                raise ConfigError(f"{output.key}={output.path}: {path} is written for {other}; name another one")
        taken |= {path.resolve(): output.key for path in output.files}


def hashes(values: Mapping[str, Any]) -> dict[str, str]:
    """Settings by name as hashes: enough to say which differ, and nothing secret."""
    return {name: guard.sha(json.dumps(value, sort_keys=True)) for name, value in values.items()}


def _refusal(output: Output, path: Path, why: str) -> ConfigError:
    section = output.key.rpartition(".")[0]
    option = f"{section}.overwrite=true" if section else "overwrite=true"
    return ConfigError(f"{path}: {why}; choose another {output.key}=FILE, or replace it with {option}")


def _refuse_input(output: Output, name: str) -> None:
    place = guard.named_file(name)
    # a name may hold brackets, too
    files = [place, *(Path(found) for found in glob.glob(name, recursive=True))]  # noqa: PTH207
    for mine in output.files:
        # one file, through symbolic and hard links too
        if mine.exists() and any(file.exists() and mine.samefile(file) for file in files):
            raise ConfigError(f"{output.key}={mine}: is the file it reads ({name}); name another one")
        if place.is_dir() and mine.parent.resolve() == place.resolve():
            raise ConfigError(f"{output.key}={mine}: lies in the folder it reads ({name}); name another place")
