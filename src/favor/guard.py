"""What guards stored things: hashes of content, locks that say who holds them, the removal of half-written files.

In: paths. Out: SHA-256, a block in which nobody else writes, or one clear error. No torch here. Next: run.py.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from favor.errors import ConfigError

_TEMPORARY = re.compile(r"\..*\.(\d+)\.tmp", re.DOTALL)
# what decides the behaviour of a model folder or a judge's file
_ENDINGS = (".safetensors", ".bin", ".json", ".jinja", ".toml", ".txt", ".model", ".py")


def aside(path: Path) -> Path:
    """Where this process writes what is to become `path`; what a killed process left of it is removed."""
    sweep_beside(path)
    return path.with_name(f".{_short(path)}.{os.getpid()}.tmp")


def sweep_beside(path: Path) -> None:
    """Remove what killed processes left of a file that they were writing."""
    sweep(path.parent, f".{glob.escape(_short(path))}.*.tmp")


def _short(path: Path) -> str:
    # a name may have 255 bytes
    return path.name.encode()[:200].decode(errors="ignore")


def temporary(path: Path) -> bool:
    """Whether a name is one that is written aside."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: Path, pattern: str = "**/*") -> None:
    """Remove what killed processes left half-written in a folder."""
    for path in list(folder.glob(pattern)):
        found = _TEMPORARY.fullmatch(path.name)
        if found and not _alive(int(found[1])):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Whether another process has this number; of this one's own, nothing half-written is under way."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return process != os.getpid()


@contextlib.contextmanager
def held(lock: Path, what: str) -> Generator[None]:
    """Hold a lock file for the time of the block; the operating system lets go of it when the process dies.

    Raises ConfigError, naming the holder, while another process has it, and when the file cannot be written.
    """
    guard = FileLock(lock, timeout=0)
    try:
        guard.acquire()
    except Timeout:
        raise ConfigError(
            f"{what}: in use by {_holder(lock)}; wait until it has ended, or choose another place"
        ) from None
    except OSError as error:
        raise ConfigError(f"{what}: cannot be written ({error.strerror}); choose another place") from None
    # a soft lock (a file system without flock) keeps its own marks in the file, and removes it
    soft = isinstance(cast(BaseFileLock, guard), SoftFileLock)
    command, since = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]), time.strftime("%Y-%m-%d %H:%M:%S")
    me = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}
    try:
        if not soft:
            lock.write_text(json.dumps(me), "utf-8")
        yield
    finally:
        if not soft:
            # whoever opened the removed file sees that it has no name left, and tries again
            lock.unlink(missing_ok=True)
        guard.release()


def _holder(lock: Path) -> str:
    try:
        found = json.loads(lock.read_text("utf-8"))
        return f"process {found['pid']} on {found['host']} ({found['command']}, since {found['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def named_file(path: str) -> Path:
    """The file or folder that a setting names, which may be `file.py:function`."""
    place = Path(path)
    return place if place.exists() or ".py:" not in path else Path(path.rpartition(":")[0])


def content(path: str) -> str | None:
    """SHA-256 of what a path names: a file, `file.py:function`, a model or run folder; None for what is not here (a hub id).

    Of a run folder its recipe and its model count, of an adapter its base too.
    """
    place = named_file(path)
    if not place.is_dir():
        return file_hash(place) if place.is_file() else None
    recipe, model = place / "config.toml", place / "model"
    named = [recipe, *sorted(model.glob("*"))] if recipe.exists() and model.is_dir() else sorted(place.glob("*"))
    files = [file for file in named if file.is_file() and file.name.endswith(_ENDINGS)]
    found: list[Any] = [[str(file.relative_to(place)), file_hash(file)] for file in files]
    found += [[content(_base(file))] for file in files if file.name == "adapter_config.json"]
    return sha(json.dumps(found))


def _base(adapter: Path) -> str:
    try:
        return str(json.loads(adapter.read_text("utf-8")).get("base_model_name_or_path"))
    except (ValueError, AttributeError):
        return ""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def length_and_hash(path: Path, length: int | None = None) -> tuple[int, str]:
    """The length of a file, or of its beginning of that length, in bytes, and the beginning's SHA-256."""
    raw = path.read_bytes()[:length] if path.exists() else b""
    return len(raw), hashlib.sha256(raw).hexdigest()


def sha(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a hash of itself, for one line of a file that grows."""
    return {**record, "check": sha(json.dumps(record, sort_keys=True))[:16]}


def is_sealed(record: Mapping[str, Any]) -> bool:
    """Whether a record is what `seal` gave."""
    return seal({name: value for name, value in record.items() if name != "check"}) == record
