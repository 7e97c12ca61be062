"""The errors favor raises for people.

In: nothing. Out: one base class and its kinds, and what the operating system refuses as one line. Next: config.py.
"""

import contextlib
import errno
from collections.abc import Generator
from pathlib import Path

from safetensors import SafetensorError

_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some of your quota, or choose another place",
    errno.EFBIG: "the file system takes no file of this size; choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "check its rights, or choose another place",
    errno.EPERM: "check its rights, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EISDIR: "name a file, not a folder",
    errno.ELOOP: "the links lead in a circle; check the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk or its connection fails; choose another place",
}
_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class FavorError(Exception):
    """A message for the user: what was found, where (file, row or key), and what to do."""

    exit_code = 2


class ConfigError(FavorError):
    """A recipe, an override or a combination of options cannot work."""


class DataError(FavorError):
    """A preference file, a row or its tokens cannot be used as they are."""


class CheckpointError(FavorError):
    """A model, checkpoint or reference store is missing, damaged or stale."""


class NumericsError(FavorError):
    """A number that must hold does not: a failed self-check, a loss that is not finite."""


class ServerError(FavorError):
    """A model server refused a request, or gave no usable reply however often it was asked."""


class StorageError(FavorError):
    """The operating system refuses a file: the disk is full, read-only, or the path cannot be."""


def refused(error: OSError, path: Path | None = None) -> str:
    """What the operating system refused: `path`, or the file that the error names; its reason, and what to do."""
    where = clipped(str(path or error.filename or "a file"))
    verb = "written" if error.errno in _WRITING else "used"
    remedy = _REMEDIES.get(error.errno or 0, "check the path and its rights")
    return f"{where}: cannot be {verb} ({error.strerror or error}); {remedy}"


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """Name the file in what the operating system, or safetensors for it, refuses. Raises StorageError."""
    try:
        yield
    except OSError as error:
        # what is written aside has a name that nobody knows
        mine = not isinstance(error.filename, str) or error.filename.startswith(str(path.parent))
        raise StorageError(refused(error, path if mine else Path(error.filename))) from None
    except SafetensorError as error:
        said = " ".join(str(error).split())
        raise StorageError(f"{path}: cannot be written ({said}); free some space, or choose another place") from None


def clipped(text: str, longest: int = 120) -> str:
    """A path or a value at a length that a message can hold: its beginning and its end."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"
