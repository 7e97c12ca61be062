"""Rows of what is not read line by line: JSON lists, CSV and Parquet files, saved data sets, the hub.

In: a path, or the name of a data set. Out: rows as readers.py gives them. Next: sources.py.
"""

import contextlib
import csv
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
# Columns of a CSV file that hold no text: their cells are numbers, truth values or lists, as JSON writes them.
NOT_TEXT = frozenset(
    (
        *(
            "weight",
            "margin",
            "tie",
            "label",
            "kto_tag",
            "labels",
            "choice",
            "tools",
            "chat_template_kwargs",
            "messages",
            "conversations",
            "context",
            "images",
        ),
        *("responses", "ranking", "scores", "votes", "choices", "verdict", "ended", "answers", "completions"),
        *("score_chosen", "score_rejected", "score_A", "score_B", "score_ratio", "preference_strength"),
        *("overall_preference", "helpfulness", "correctness", "coherence", "complexity", "verbosity"),
    )
)
_TRUTHS = {"true": True, "false": False}
# characters of a cell: more than any text has, and less than fills the memory
_LARGEST_CELL = 1 << 28
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


def csv_rows(path: Path) -> Numbered:
    """The rows of a CSV or TSV file whose first line names the columns; a row's number is the line on which it begins.

    A cell is text, but for columns of NOT_TEXT and for chat messages as JSON; an empty cell is a missing value.
    Raises DataError for a header that names a column twice, and where quotes do not match.
    """
    with path.open("rb") as start:
        readers.refuse_other_kinds(path, start.read(4))
    csv.field_size_limit(_LARGEST_CELL)
    # what is not UTF-8 spoils its own row alone
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline()
        file.seek(0)
        lines = csv.reader(file, delimiter=_separator(path, header), strict=True)
        try:
            names = _column_names(path, next(lines, []))
            last = lines.line_num
            for cells in lines:
                number, last = last + 1, lines.line_num
                if cells:
                    yield number, _csv_row(names, cells)
        except csv.Error as error:
            advice = "put a text that holds a quote or the separator between quotes, and double each quote in it"
            raise DataError(f"{path}, line {lines.line_num}: not CSV ({error}); {advice}") from None


def _separator(path: Path, header: str) -> str:
    """A tab in .tsv; in .csv the first of comma, semicolon and tab that the header holds (some spreadsheets write semicolons)."""
    return "\t" if path.suffix == ".tsv" else next((sign for sign in ",;\t" if sign in header), ",")


def _column_names(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}, line 1: the column '{twice}' appears twice; remove one")
    return names


def _csv_row(names: list[str], cells: list[str]) -> Any:
    """A row by its columns; columns without a name (an index that pandas wrote) are left out."""
    if len(cells) != len(names):
        return RowError(f"it has {len(cells)} cells, and the header names {len(names)} columns")
    try:
        return {name: _cell(name, text) for name, text in zip(names, cells, strict=True) if name}
    except RowError as error:
        return error


def _cell(name: str, text: str) -> Any:
    if not text:
        return None
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RowError(f"{name} is not UTF-8 text; save the file as UTF-8")
    word = text.strip()
    if word.startswith("[{'") and "'role'" in word:
        raise RowError(f"{name} holds messages as Python writes them; write them as JSON (json.dumps)")
    if name not in NOT_TEXT and not word.startswith("[{"):
        return text
    if word.lower() in _TRUTHS:
        return _TRUTHS[word.lower()]
    try:
        value = readers.parse(word)
    except ValueError:
        return text
    is_chat = isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value)
    return value if name in NOT_TEXT or is_chat else text


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

    Dates and times become text and decimals numbers, as they are in JSON. Fields that are null inside a column's values go:
    Arrow gives every call of a tool the arguments of all.
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
    odd = any(name in str(table.schema) for name in ("date", "time", "duration", "decimal", "struct"))
    yield from map(_plain_row, found) if odd else found


def _plain_row(row: Any) -> Any:
    return {name: _plain(value) for name, value in row.items()} if isinstance(row, dict) else row


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items() if inner is not None}
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
        yield from map(_plain_row, found)
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
