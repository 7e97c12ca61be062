"""One file of rows, whatever its kind: its rows with their numbers, bad ones among them.

In: a path. Out: (1-based row number, value); a RowError in place of a row that cannot be read. A file that is damaged
as a whole is a DataError. Next: strict.py.
"""

import datetime
import decimal
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from favor.data import strict
from favor.data.formats import RowError
from favor.errors import DataError

# A row that cannot be read is a RowError: whether that stops the work is for the reader of the rows to say.
Numbered = Iterator[tuple[int, Any]]
# pyarrow has no types
_Table: TypeAlias = Any

# Rows of a table held at once.
BATCH = 1024
# first bytes of what is often taken for UTF-8 text
_TELLTALES = {
    b"\xff\xfe": "is UTF-16 text; convert the file to UTF-8",
    b"\xfe\xff": "is UTF-16 text; convert the file to UTF-8",
    b"\x1f\x8b": "is a gzip file; let its name end in .jsonl.gz",
    b"PAR1": "is a Parquet file; let its name end in .parquet",
}


def reader_of(path: Path) -> Callable[[Path], Numbered] | None:
    """How a file is read, by the ending of its name; None for other endings."""
    endings = {".jsonl": _jsonl, ".jsonl.gz": _jsonl_gz, ".json": _json, ".parquet": _parquet}
    return next((reader for ending, reader in endings.items() if path.name.endswith(ending)), None)


def values_of(table: _Table) -> Iterator[Any]:
    """The rows of a piece of an Arrow table as dicts; a RowError where one holds what Python has no value for.

    Dates and times become text and decimals numbers, as they are in JSON.
    """
    import pyarrow

    # text that is not UTF-8, dates beyond the year 9999
    errors = (ValueError, OverflowError, pyarrow.ArrowException)
    try:
        found = table.to_pylist()
    except errors as error:
        if table.num_rows == 1:
            found = [RowError(f"a column cannot be read: {_unread(table, errors) or error}")]
        else:
            found = [row for i in range(table.num_rows) for row in values_of(table.slice(i, 1))]
    odd = any(name in str(table.schema) for name in ("date", "time", "duration", "decimal"))
    yield from map(_plain, found) if odd else found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, decimal.Decimal):
        return float(value)
    return str(value) if isinstance(value, datetime.date | datetime.time | datetime.timedelta) else value


def _unread(row: _Table, errors: tuple[type[Exception], ...]) -> str:
    for name in row.schema.names:
        try:
            row.column(name).to_pylist()
        except UnicodeDecodeError:
            return f"'{name}' is not UTF-8 text"
        except errors as error:
            return f"'{name}' ({error})"
    return ""


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
        if number == 1:
            _refuse_other_kinds(path, line)
        if not line.strip():
            continue
        try:
            # the end of the line is not part of the row
            text = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            value = strict.parse(text)
        except UnicodeDecodeError as error:
            value = RowError(f"not UTF-8 text ({error.reason} at byte {error.start + 1})")
        except ValueError as error:
            value = RowError(str(error))
        yield number, value


def _json(path: Path) -> Numbered:
    """The values of one list; it is read to its end first, as where a value that is not JSON ends cannot be known."""
    content = path.read_bytes()
    _refuse_other_kinds(path, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None
    yield from enumerate(_elements(path, text), 1)


def _elements(path: Path, text: str) -> list[Any]:
    found: list[Any] = []
    at = _open_list(path, text)
    last = text.startswith("]", at)
    while not last:
        value, at = _element(path, len(found) + 1, text, at)
        found.append(value)
        at = strict.blanks(text, at)
        last = text.startswith("]", at)
        if not last and not text.startswith(",", at):
            raise DataError(f"{path}, row {len(found)}: not JSON (',' or ']' must follow); write a list of objects")
        at = at if last else strict.blanks(text, at + 1)
    if strict.blanks(text, at + 1) < len(text):
        raise DataError(f"{path}: not JSON (more text behind the list); write one list of objects")
    return found


def _open_list(path: Path, text: str) -> int:
    """Where the first value of the list may begin."""
    at = strict.blanks(text, 0)
    if text.startswith("[", at):
        return strict.blanks(text, at + 1)
    if text.startswith("{", at):
        raise DataError(
            f"{path}: holds an object, expected a list of objects; if it is one object a line, let its name end in .jsonl"
        )
    try:
        found = type(strict.value_at(text, at)[0]).__name__
    except ValueError:
        raise DataError(f"{path}: not JSON; write a list of objects") from None
    raise DataError(f"{path}: holds one {found}, expected a list of objects; write one")


def _element(path: Path, number: int, text: str, at: int) -> tuple[Any, int]:
    try:
        return strict.value_at(text, at)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, row {number}: not JSON ({strict.fault(error)}); write a list of objects") from None
    except ValueError as error:
        end = strict.end_at(text, at)
        if end is None:
            raise DataError(f"{path}, row {number}: {error}, and does not end; fix the file") from None
        return RowError(str(error)), end


def _parquet(path: Path) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{path}: the column '{twice[0]}' is there twice; remove one")
            yield from enumerate((row for batch in file.iter_batches(BATCH) for row in values_of(batch)), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)}); write it again") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    kind = next((said for mark, said in _TELLTALES.items() if start.startswith(mark)), None)
    if kind is not None:
        raise DataError(f"{path}: {kind}")
