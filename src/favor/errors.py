"""The errors favor raises for people, and what the machine or a library refuses as one line; our own mistakes as such.

In: nothing, or an exception that no part of favor expected. Out: one base class and its kinds; a line for the user, or None.
Next: config.py.
"""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

# what `explained` may know a line for; what it knows none for is raised on
EXPECTED = (OSError, ValueError, RuntimeError, MemoryError, SafetensorError)
_MEMORY = (
    "lower train.batch_prompts, train.max_tokens_per_pack or sample.batch (engine.batch), shorten tokens.max_tokens or "
    "sample.max_new_tokens, or train adapters with model.lora.rank=16"
)
_ALLOCATOR = "DefaultCPUAllocator: "
_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some of your quota, or choose another place",
    errno.EFBIG: "the file system does not allow a file of this size; choose another place",
    errno.EROFS: "choose a place that can be written to",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check its rights, or choose another place"),
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EISDIR: "name a file, not a folder",
    errno.ELOOP: "the links form a circle; check the path",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.EIO: "the disk or its connection is failing; choose another place",
}
_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class FavorError(Exception):
    """A message for the user: what was found, where (file, row or key), and what to do. each: its parts, where it has several."""

    exit_code = 2
    each: tuple[str, ...] = ()


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


class LostError(FavorError):
    """Another process of the run ended, or cannot be reached."""


class StorageError(FavorError):
    """The operating system refuses a file: the disk is full, read-only, or the path cannot be."""


def explained(error: Exception) -> str | None:
    """One line for what the machine or a library's types say about the input; None for what must be our own mistake."""
    said, told = first_line(error), None
    if isinstance(error, UnicodeEncodeError | UnicodeDecodeError):
        told = f"text that cannot be written or read as {error.encoding} ({error.reason}); use UTF-8"
    elif isinstance(error, OSError):
        told = refused(error)
    elif out_of_memory(error):
        said = clipped(" ".join(str(error).rpartition(_ALLOCATOR)[2].split())) or said
        told = f"out of memory ({said}); {_MEMORY}"
    elif isinstance(error, RecursionError):
        told = f"nested too deeply ({said}); flatten what is nested in the recipe or the data"
    elif isinstance(error, SafetensorError):
        told = f"a safetensors file cannot be written or read ({said}); free space, or choose another place"
    # looked at only where it is imported already: `favor --help` does not need it
    elif "pydantic" in sys.modules and isinstance(error, sys.modules["pydantic"].ValidationError):
        told = _invalid(error)
    return told


def out_of_memory(error: Exception) -> bool:
    """Whether the memory of the machine or of a GPU has ended; for the first torch has no error of its own."""
    gpu = "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError)
    return gpu or isinstance(error, MemoryError) or _ALLOCATOR in str(error)


def _invalid(error: Any) -> str:
    wrong = (f"'{'.'.join(map(str, item['loc']))}': {item['msg']}" for item in error.errors(include_input=False))
    return f"settings of {error.title}: {'; '.join(wrong)}; fix the recipe they come from"


def our_mistake(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The last hook: a line before the traceback, for whoever meets a fault of favor itself."""
    said = f"{kind.__name__}: {without_secrets(first_line(error))}"
    print(
        f"favor: internal error, not caused by your input ({said}); please report it with the lines below",
        file=sys.stderr,
    )
    sys.__excepthook__(kind, error, trace)


def refused(error: OSError, path: Path | None = None) -> str:
    """What the operating system refused: `path`, or the file that the error names; its reason, and what to do."""
    where = clipped(str(path or error.filename or "a file"))
    verb = "written" if error.errno in _WRITING else "used"
    remedy = _REMEDIES.get(error.errno or 0, "check the path and its rights")
    return f"{where}: cannot be {verb} ({error.strerror or error}); {remedy}"


def first_line(error: BaseException) -> str:
    """What an exception says, in one short line; its kind where it says nothing."""
    said = " ".join(str(error).split())
    return clipped(said) if said else type(error).__name__


def clipped(text: str, longest: int = 120) -> str:
    """A path or a value at a length that a message can hold: its beginning and its end."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


# What must not be shown: secrets in messages, and the places of this machine on pages that are handed on.
_HIDDEN = "***"
# a shorter key protects nothing, and would be found in ordinary text
_SHORTEST = 8
_KEYS = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/\s'\"]+@")
_IN_QUERY = re.compile(r"(?<=[?&])([\w-]*(?:key|token|secret|password)[\w-]*=)[^&\s'\"]+", re.IGNORECASE)
_PATH = re.compile(r"(?<![\w.:/\\~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>,;:()\[\]]+[/\\])+(?=[^\s/\\'\"<>,;:()\[\]])")


def without_secrets(text: str, *secrets: str) -> str:
    """Replace the given secrets, credentials in URLs, and the values of environment variables that are named as keys."""
    found = {value for name, value in os.environ.items() if _KEYS.search(name)} | set(secrets)
    for secret in sorted((s for s in found if len(s) >= _SHORTEST), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return _IN_QUERY.sub(rf"\1{_HIDDEN}", _IN_URL.sub(f"{_HIDDEN}@", text))


def without_places(text: str, known: Iterable[str] = ()) -> str:
    """Every absolute path cut to its last name; `known` are paths that may hold blanks."""
    return _PATH.sub("", without_known_places(text, known))


def without_known_places(text: str, known: Iterable[str]) -> str:
    """The folders of these paths (or patterns) taken out; other text stays as it is, whatever it looks like."""
    # of a pattern, what stands before its first sign
    folders = {re.split(r"[*?[]", path)[0].rpartition("/")[0] for path in known if path.startswith("/")} - {""}
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(f"{folder}/", "")
    return text


def in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A nested record with every string changed."""
    if isinstance(value, dict):
        return {key: in_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [in_texts(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def places_in(value: Any) -> list[str]:
    """Every absolute path among the strings of a nested record."""
    found: list[str] = []
    in_texts(value, lambda text: found.append(text) or text if text.startswith("/") else text)
    return found
