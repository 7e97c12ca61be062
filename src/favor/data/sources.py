"""Where rows come from: local files, globs and folders of them, saved data sets, hub ids.

In: the name of a source. Out: numbered rows, each an object with named fields. Rows of several files are numbered
through; `where` says which row of which file a number is. Next: formats/__init__.py.
"""

import contextlib
import errno
import glob
import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from favor.data import readers, tables
from favor.data.readers import Numbered, RowError
from favor.errors import DataError

Stamp = tuple[str, int, int, int, int, int]

# Files that say that a folder is a data set saved by `datasets`.
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
_READERS = {
    ".jsonl": readers.json_lines,
    ".jsonl.gz": readers.gzip_lines,
    ".json": tables.json_list,
    ".csv": tables.csv_rows,
    ".tsv": tables.csv_rows,
    ".parquet": tables.parquet,
}
_KINDS = "{}, {}, {}, {}, {} or {}".format(*_READERS)


def read_objects(source: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row) of a source whose rows need not be preferences. Raises DataError as `read` does."""
    for number, row in rows(source, split):
        try:
            yield number, as_object(row)
        except RowError as error:
            raise DataError(f"{where(source, number)}: {error}; fix the row") from None


def as_object(row: Any) -> dict[str, Any]:
    """The row without its empty columns. Raises RowError when it is not an object, or cannot be read."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(f"expected an object with named fields, found {type(row).__name__}")
    return {str(key): value for key, value in row.items() if value is not None}


def rows(source: str, split: str, *, streaming: bool = False) -> Numbered:
    """(1-based row number, parsed value or RowError) of every row; lines of a text file are its rows.

    Raises DataError when a file cannot be opened, is damaged, or changes while it is read.
    """
    found = check(source)
    if found is not None:
        for _, _, number, row in _numbered_through(found):
            yield number, row
        return
    yield from enumerate(tables.data_set_rows(source, split, streaming=streaming), 1)


def _reader_of(path: Path) -> Callable[[Path], Numbered] | None:
    """How a file is read, by the ending of its name; None for other endings."""
    return next((reader for ending, reader in _READERS.items() if path.name.endswith(ending)), None)


def check(source: str) -> list[Path] | None:
    """`files`, and DataError also for what is not a file and cannot be a hub id; nothing is read and no network tried."""
    found = files(source)
    if found is None and _kind(Path(source)) is None and not _looks_like_hub_id(source):
        raise DataError(f"{source}: no such file or folder; check the path")
    return found


def where(source: str, number: int) -> str:
    """File and row for messages; which file of a glob or folder it is, is found by reading once more."""
    try:
        found = files(source)
        if found is not None and found != [Path(source)]:
            for path, row, through, _ in _numbered_through(found):
                if through == number:
                    return f"{path}, row {row}"
    except DataError:
        pass  # what is to be told is the first error, not that the files have changed since
    return f"{source}, row {number}"


def files(source: str) -> list[Path] | None:
    """The local files that a source names, sorted; None for a saved data set or a hub id.

    Raises DataError for a glob that matches nothing, a folder without data files, what is not a regular file, and a file
    that is there under two names.
    """
    if not source.strip():
        raise DataError("data.train (or what names the file) is empty; name a file, a folder, a pattern or a hub id")
    path = Path(source)
    pattern = glob.has_magic(source) and not os.path.lexists(path)
    kind = None if pattern else _kind(path)
    if kind == "file":
        return [path]
    if kind == "folder":
        return None if any((path / name).exists() for name in _SAVED) else _in_folder(path)
    if not pattern:
        return None
    found = [Path(name) for name in glob.glob(source, recursive=True)]  # noqa: PTH207 (absolute patterns too)
    found = [match for match in found if _kind(match) == "file"]
    if not found:
        raise DataError(f"{source}: no file matches; check the pattern")
    return _once(found)


def size(source: str) -> int | None:
    """Bytes of a local source on disk; None for a hub id."""
    found = local_files(source)
    return None if found is None else sum(stamp[3] for stamp in stamps(found))


def local_files(source: str) -> list[Path] | None:
    """Every file that a local source consists of, those of a saved data set too; None for a hub id."""
    found = files(source)
    if found is None and Path(source).is_dir():
        found = sorted(path for path in Path(source).rglob("*") if path.is_file())
    return found


def stamps(found: Iterable[Path]) -> list[Stamp]:
    """(name, device, inode, bytes, when its content and when anything of it was changed) of files: all change with them."""
    listed: list[Stamp] = []
    for path in found:
        with readable(path):
            now = path.stat()
        listed.append((str(path), now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns))
    return listed


def changed(what: object) -> DataError:
    """What is said of files that do not stay as they are."""
    return DataError(f"{what}: changed while it was read; start again when nothing writes to it any more")


@contextlib.contextmanager
def readable(path: Path) -> Generator[None]:
    """Raises DataError, naming the file, for what the operating system refuses in the block."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None


def _kind(path: Path) -> Literal["file", "folder"] | None:
    """What is there, links followed; None for nothing. Raises DataError for what cannot be a source."""
    try:
        str(path).encode()
        mode = path.stat().st_mode
    except UnicodeEncodeError:
        raise DataError(f"{str(path)!a}: the name is not UTF-8; rename it") from None
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise DataError(f"{path}: a link to something that does not exist; remove or repair the link") from None
        return None
    except OSError as error:
        reasons = {errno.ELOOP: "a link that leads back to itself", errno.ENAMETOOLONG: "the name is too long"}
        reason = reasons.get(error.errno or 0, f"cannot be opened ({error.strerror})")
        raise DataError(f"{str(path)[:200]}: {reason}; name another file") from None
    except ValueError as error:
        raise DataError(f"{str(path)!a}: not the name of a file ({error}); name another file") from None
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: not a regular file but a pipe, socket or device; write its rows to a file first")
    return "file"


def _in_folder(folder: Path) -> list[Path]:
    with readable(folder):
        inside = sorted(folder.iterdir())
    found = [path for path in inside if _reader_of(path) is not None and _kind(path) == "file"]
    if not found:
        names = ", ".join(path.name for path in inside[:3]) or "nothing"
        raise DataError(f"{folder}: no data file in this folder ({names}); it needs {_KINDS} files")
    return _once(found)


def _once(found: Iterable[Path]) -> list[Path]:
    """The files, sorted. Raises DataError when links make the same one come twice."""
    ordered = sorted(found)
    first: dict[tuple[int, ...], Path] = {}
    for path, stamp in zip(ordered, stamps(ordered), strict=True):
        if (other := first.setdefault(stamp[1:3], path)) != path:
            raise DataError(f"{path}: is the same file as {other}, and would count twice; remove the link")
    return ordered


def _numbered_through(found: Sequence[Path]) -> Iterator[tuple[Path, int, int, Any]]:
    """(file, row in it, row of the whole source, value) of every row of the files, one after the other."""
    before = 0
    for path in found:
        reader, last = _reader_of(path), 0
        if reader is None:
            raise DataError(f"{path}: unknown kind of file; name a {_KINDS} file")
        stamp = stamps([path])
        with readable(path):
            for row, value in reader(path):
                yield path, row, before + row, value
                last = row
        if stamps([path]) != stamp:
            raise changed(path)
        before += last


def _looks_like_hub_id(source: str) -> bool:
    known_ending = source.endswith((".jsonl", ".gz", ".json", ".parquet", ".csv", ".tsv", ".txt"))
    return source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not known_ending
