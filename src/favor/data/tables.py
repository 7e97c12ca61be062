"""Rows of what is not read line by line: JSON lists, Parquet files, saved data sets, the hub.

In: a path, or the name of a data set. Out: rows as readers.py gives them. Next: sources.py.
"""

import contextlib
import datetime
import decimal
import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from favor.data import readers
from favor.data.readers import Numbered, RowError
from favor.errors import DataError

# pyarrow has no types
_Table: TypeAlias = Any
# Rows of a table held at once.
_BATCH = 1024
# texts, brackets, and all else that is not between values
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]|[^\s,:\[\]{}"]++', re.DOTALL)


def json_list(path: Path) -> Numbered:
    """The values of one list; it is read to its end first, as where a value that is not JSON ends cannot be known."""
    content = path.read_bytes()
    readers.refuse_other_kinds(path, content)
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
        at = readers.blanks(text, at)
        last = text.startswith("]", at)
        if not last and not text.startswith(",", at):
            raise DataError(f"{path}, row {len(found)}: not JSON (',' or ']' must follow); write a list of objects")
        at = at if last else readers.blanks(text, at + 1)
    if readers.blanks(text, at + 1) < len(text):
        raise DataError(f"{path}: not JSON (more text behind the list); write one list of objects")
    return found


def _open_list(path: Path, text: str) -> int:
    """Where the first value of the list may begin."""
    at = readers.blanks(text, 0)
    if text.startswith("[", at):
        return readers.blanks(text, at + 1)
    if text.startswith("{", at):
        raise DataError(
            f"{path}: holds an object, expected a list of objects; if it is one object a line, rename it so that it ends in .jsonl"
        )
    try:
        found = type(readers.value_at(text, at)[0]).__name__
    except ValueError:
        raise DataError(f"{path}: not JSON; write a list of objects") from None
    raise DataError(f"{path}: holds one {found}, expected a list of objects; write one")


def _element(path: Path, number: int, text: str, at: int) -> tuple[Any, int]:
    try:
        return readers.value_at(text, at)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, row {number}: not JSON ({readers.fault(error)}); write a list of objects") from None
    except ValueError as error:
        end = _end_at(text, at)
        if end is None:
            raise DataError(f"{path}, row {number}: {error}, and does not end; fix the file") from None
        return RowError(str(error)), end


def _end_at(text: str, start: int) -> int | None:
    """Where the value ends that begins at `start`, whatever `value_at` has against it; None when it does not end."""
    depth = 0
    for token in _TOKENS.finditer(text, start):
        depth += (token.group() in ("[", "{")) - (token.group() in ("]", "}"))
        if depth <= 0:
            return token.end()
    return None


def parquet(path: Path) -> Numbered:
    """The rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{path}: the column '{twice[0]}' appears twice; remove one")
            yield from enumerate((row for batch in file.iter_batches(_BATCH) for row in _values_of(batch)), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)}); write it again") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _values_of(table: _Table) -> Iterator[Any]:
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
            found = [row for i in range(table.num_rows) for row in _values_of(table.slice(i, 1))]
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


def data_set_rows(source: str, split: str, *, streaming: bool) -> Iterator[Any]:
    """The rows of a saved data set or a hub id."""
    import datasets

    found = load(source, split, streaming=streaming)
    if not isinstance(found, datasets.Dataset):
        yield from found
        return
    if not len(found):
        return  # which `datasets` itself cannot go through
    with _loading(source):
        # as Arrow holds them, so that one row that Python cannot hold spoils no other
        for table in found.with_format("arrow").iter(_BATCH):
            yield from _values_of(table)


def load(source: str, split: str, *, streaming: bool) -> Any:
    """A data set as `datasets` has it. Raises DataError when it cannot be loaded, or has no such split."""
    import datasets

    with _loading(source):
        if not Path(source).exists():
            return datasets.load_dataset(source, split=split, streaming=streaming)
        found = datasets.load_from_disk(source)
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise DataError(
            f"{source}: has no split '{split}' but {', '.join(map(str, found))}; name one with data.split or data.eval_split"
        )
    return found[split]


@contextlib.contextmanager
def _loading(source: str) -> Generator[None]:
    """Errors of `datasets`, as what they mean here."""
    import pyarrow
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    known = (OSError, ValueError, pyarrow.ArrowException, DatasetsError, HfHubHTTPError)
    # in a folder that was spoiled any of its JSON may have another shape, and one saved without rows has no table
    known += (KeyError, IndexError, TypeError, AttributeError) if Path(source).exists() else ()
    try:
        yield
    except known as error:
        first = _first_line(error)
        if Path(source).exists():
            raise DataError(
                f"{source}: not a readable saved data set ({first}); save it again with save_to_disk"
            ) from None
        raise DataError(
            f"{source}: no such file, and not found as a hub data set ({first}); check the name, "
            "the split and the network, or give a local file"
        ) from None


def revision(source: str) -> str:
    """The commit of a hub data set. Raises DataError when the hub does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().dataset_info(source).sha)
    except (OSError, HfHubHTTPError) as error:
        raise DataError(f"{source}: the hub does not say which revision it is ({error}); check the network") from None
