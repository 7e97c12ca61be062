"""Where rows come from: local files, globs and folders of them, saved data sets, hub ids.

In: the name of a source. Out: numbered rows, each an object with named fields. Rows of several files are numbered
through; `where` says which row of which file a number is. Next: read.py.
"""

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from favor.data.formats import RowError
from favor.errors import DataError

Numbered = Iterator[tuple[int, Any]]

# Rows of a Parquet file held at once.
_BATCH = 1024
# Files that say that a folder is a data set saved by `datasets`.
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")


def read_objects(source: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row) of a source whose rows need not be preferences. Raises DataError as `read` does."""
    for number, row in rows(source, split):
        try:
            yield number, as_object(row)
        except RowError as error:
            raise DataError(f"{where(source, number)}: {error}; mend the row") from None


def as_object(row: Any) -> dict[str, Any]:
    """The row without its empty columns. Raises RowError when it is no object."""
    if not isinstance(row, dict):
        raise RowError(f"expected an object with named fields, found {type(row).__name__}")
    return {str(key): value for key, value in row.items() if value is not None}


def limited(items: Numbered, limit: int | None) -> Numbered:
    """The first `limit` items."""
    for count, item in enumerate(items, 1):
        yield item
        if limit is not None and count >= limit:
            return


def rows(source: str, split: str, *, streaming: bool = False) -> Numbered:
    """(1-based row number, parsed value) of every row; lines of a text file are its rows."""
    found = files(source)
    if found is not None:
        for _, _, number, row in _numbered_through(found):
            yield number, row
        return
    if not Path(source).exists() and not _looks_like_hub_id(source):
        raise DataError(f"{source}: no such file or folder; check the path")
    yield from enumerate(_load_dataset(source, split, streaming=streaming), 1)


def where(source: str, number: int) -> str:
    """File and row for messages; which file of a glob or folder it is, is found by reading once more."""
    found = files(source)
    if found is None or found == [Path(source)]:
        return f"{source}, row {number}"
    for path, row, through, _ in _numbered_through(found):
        if through == number:
            return f"{path}, row {row}"
    return f"{source}, row {number}"


def files(source: str) -> list[Path] | None:
    """The local files that a source names, sorted; None for a saved data set or a hub id.

    Raises DataError for a glob that matches nothing and for a folder without data files.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        return None if any((path / name).exists() for name in _SAVED) else _in_folder(path)
    if not glob.has_magic(source):
        return None
    matches = sorted(Path(name) for name in glob.glob(source, recursive=True))  # noqa: PTH207 (absolute patterns too)
    found = [match for match in matches if match.is_file()]
    if not found:
        raise DataError(f"{source}: no file matches; check the pattern")
    return found


def size(source: str) -> int | None:
    """Bytes of a local source on disk; None for a hub id."""
    found = files(source)
    if found is None and Path(source).is_dir():
        found = [path for path in Path(source).rglob("*") if path.is_file()]
    return None if found is None else sum(path.stat().st_size for path in found)


def identity(source: str, split: str, *, streaming: bool) -> list[list[str]]:
    """What the rows of a source depend on: name and SHA-256 of every file, or the revision of a streamed hub id."""
    found = files(source)
    if found is None and streaming and not Path(source).exists():
        return [[source, _revision(source)]]
    if found is None and Path(source).is_dir():
        found = sorted(path for path in Path(source).rglob("*") if path.is_file())
    if found is None:
        found = [Path(item["filename"]) for item in _load_dataset(source, split, streaming=False).cache_files]
    return [[str(path), _file_hash(path)] for path in found]


def _revision(source: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().dataset_info(source).sha)
    except (OSError, HfHubHTTPError) as error:
        raise DataError(f"{source}: the hub does not say which revision it is ({error}); check the network") from None


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_folder(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.is_file() and _reader(path) is not None)
    if not found:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:3]) or "nothing"
        raise DataError(
            f"{folder}: no data file in this folder ({inside}); it needs .jsonl, .jsonl.gz, .json or .parquet files"
        )
    return found


def _numbered_through(found: Sequence[Path]) -> Iterator[tuple[Path, int, int, Any]]:
    """(file, row in it, row of the whole source, value) of every row of the files, one after the other."""
    before = 0
    for path in found:
        reader, last = _reader(path), 0
        if reader is None:
            raise DataError(f"{path}: unknown kind of file; name a .jsonl, .jsonl.gz, .json or .parquet file")
        for row, value in reader(path):
            yield path, row, before + row, value
            last = row
        before += last


def _looks_like_hub_id(source: str) -> bool:
    known_ending = source.endswith((".jsonl", ".gz", ".json", ".parquet", ".csv", ".txt"))
    return source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not known_ending


def _reader(path: Path) -> Callable[[Path], Numbered] | None:
    endings = {".jsonl": _jsonl, ".jsonl.gz": _jsonl_gz, ".json": _json, ".parquet": _parquet}
    return next((reader for ending, reader in endings.items() if path.name.endswith(ending)), None)


def _jsonl(path: Path) -> Numbered:
    with path.open("rb") as file:
        yield from _json_lines(path, file)


def _jsonl_gz(path: Path) -> Numbered:
    try:
        with gzip.open(path, "rb") as file:
            yield from _json_lines(path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch or write it again") from None


def _json_lines(path: Path, lines: Iterable[bytes]) -> Numbered:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            yield number, json.loads(text)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, row {number}: not UTF-8 text ({error.reason}); convert the file to UTF-8"
            ) from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, row {number}: not JSON ({error.msg} at column {error.colno}); one object a line"
            ) from None


def _json(path: Path) -> Numbered:
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); write a list of objects") from None
    if not isinstance(value, list):
        raise DataError(f"{path}: holds one {type(value).__name__}, expected a list of objects")
    yield from enumerate(value, 1)


def _parquet(path: Path) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        batches = (row for batch in table.iter_batches(_BATCH) for row in batch.to_pylist())
        yield from enumerate(batches, 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from None


def _load_dataset(source: str, split: str, *, streaming: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if Path(source).exists():
            found = datasets.load_from_disk(source)
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(source, split=split, streaming=streaming)
    except KeyError:
        raise DataError(f"{source}: has no split '{split}'; name one with data.split or data.eval_split") from None
    except (OSError, ValueError, DatasetsError, HfHubHTTPError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source}: no such file, and not to be had as a hub data set ({first}); check the name, "
            "the split and the network, or give a local file"
        ) from None
