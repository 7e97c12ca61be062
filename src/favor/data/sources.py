"""Where rows come from: local files, saved folders, hub ids.

In: the name of a source. Out: numbered rows, each an object with named fields. Next: read.py.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from favor.data.formats import RowError
from favor.errors import DataError

Numbered = Iterator[tuple[int, Any]]


def read_objects(source: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row) of a source whose rows need not be preferences. Raises DataError as `read` does."""
    for number, row in rows(source, split):
        try:
            yield number, as_object(row)
        except RowError as error:
            raise DataError(f"{source}, row {number}: {error}; mend the row") from None


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


def rows(source: str, split: str) -> Numbered:
    """(1-based row number, parsed value) of every row; lines of a text file are its rows."""
    path = Path(source)
    if path.is_file():
        reader = _reader(path)
        if reader is not None:
            yield from reader(path)
            return
        raise DataError(f"{source}: unknown kind of file; name a .jsonl, .jsonl.gz, .json or .parquet file")
    if not path.exists() and not _looks_like_hub_id(source):
        raise DataError(f"{source}: no such file or folder; check the path")
    yield from enumerate(_load_dataset(source, split), 1)


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
        batches = (row for batch in table.iter_batches() for row in batch.to_pylist())
        yield from enumerate(batches, 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from None


def _load_dataset(source: str, split: str) -> Iterable[Any]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if Path(source).exists():
            found = datasets.load_from_disk(source)
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(source, split=split)
    except KeyError:
        raise DataError(f"{source}: has no split '{split}'; name one with data.split or data.eval_split") from None
    except (OSError, ValueError, DatasetsError, HfHubHTTPError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source}: no such file, and not to be had as a hub data set ({first}); check the name, "
            "the split and the network, or give a local file"
        ) from None
