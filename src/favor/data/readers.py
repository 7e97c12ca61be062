"""Text of a data file -> rows: JSON that is taken as it was written or not at all, and files with a row a line.

In: a path, or JSON text. Out: (1-based row number, value), a RowError in place of a row that cannot be read; a DataError for
a file that is damaged as a whole. Next: formats/fields.py; files that are not lines: tables.py.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from favor.errors import DataError

# A row that cannot be read is a RowError: whether that stops the work is for the reader of the rows to say.
Numbered: TypeAlias = Iterator[tuple[int, Any]]
Kind: TypeAlias = Literal["malformed", "empty", "identical", "special_text", "equal_ids", "round_trip", "truncation"]

# More brackets than a chat with tool schemas has, and less than Python's stack bears.
DEEPEST = 100
TOO_DEEP = f"it is nested more than {DEEPEST} levels deep"
# An integer of more digits is beyond the largest float.
_DIGITS = 300
_BLANKS = re.compile(r"[ \t\n\r]*")
# first bytes of what is often taken for UTF-8 text
_TELLTALES = {
    b"\xff\xfe": "is UTF-16 text; convert the file to UTF-8",
    b"\xfe\xff": "is UTF-16 text; convert the file to UTF-8",
    b"\x1f\x8b": "is a gzip file; rename it so that it ends in .jsonl.gz",
    b"PAR1": "is a Parquet file; rename it so that it ends in .parquet",
}


class RowError(Exception):
    """Why a row cannot be used, in one printable line; read.py adds file and row number.

    kind: reading gives malformed, empty (a side or a column is missing or says nothing), identical (two responses are
    the same); tokenising gives special_text (text of a control token), equal_ids (responses become the same tokens),
    round_trip (text that template or tokenizer change), truncation. place: the response it is about, or 0. of_names: it is
    about the names of columns, which every row has, rather than about this row.
    """

    def __init__(self, reason: str, kind: Kind = "malformed", place: int = 0, *, of_names: bool = False) -> None:
        line = " ".join(reason.split())
        # a file's own names may hold what a terminal would obey
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))
        self.kind: Kind = kind
        self.place = place
        self.of_names = of_names


def json_lines(path: Path) -> Numbered:
    """The rows of a file with a JSON value a line."""
    with path.open("rb") as file:
        yield from _values(path, file)


def gzip_lines(path: Path) -> Numbered:
    """As `json_lines`, of a packed file."""
    try:
        with gzip.open(path, "rb") as file:
            yield from _values(path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch or write it again") from None


def _values(path: Path, lines: Iterable[bytes]) -> Numbered:
    for number, line in enumerate(lines, 1):
        if number == 1:
            refuse_other_kinds(path, line)
        if not line.strip():
            continue
        try:
            # the end of the line is not part of the row
            text = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            value = parse(text)
        except UnicodeDecodeError as error:
            value = RowError(f"not UTF-8 text ({error.reason} at byte {error.start + 1})")
        except ValueError as error:
            value = RowError(str(error))
        yield number, value


def refuse_other_kinds(path: Path, start: bytes) -> None:
    """Raises DataError for a file whose first bytes are not those of UTF-8 text."""
    kind = next((said for mark, said in _TELLTALES.items() if start.startswith(mark)), None)
    if kind is not None:
        raise DataError(f"{path}: {kind}")


def parse(text: str) -> Any:
    """The one JSON value that a text holds.

    Raises ValueError for what is not JSON, and for JSON that could be misread: a field that is there twice, half a surrogate
    pair, an integer beyond any float, nesting beyond 100 levels.
    """
    try:
        value, end = value_at(text, blanks(text, 0))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({fault(error)})") from None
    if (rest := blanks(text, end)) < len(text):
        raise ValueError(f"not JSON (more text behind the value, from column {rest + 1} on)")
    return value


def value_at(text: str, start: int) -> tuple[Any, int]:
    """(value that begins at `start`, where it ends). Raises JSONDecodeError, and ValueError as `parse` does."""
    try:
        value, end = _STRICT.raw_decode(text, start)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    written = text[start:end]
    if written.count("[") + written.count("{") > DEEPEST and _is_deep(value):
        raise ValueError(TOO_DEEP)
    escaped = "\\ud" in written or "\\uD" in written
    if escaped and (half := half_character(json.dumps(value, ensure_ascii=False))):
        raise ValueError(half)
    return value, end


def blanks(text: str, start: int) -> int:
    """Where the blanks that begin at `start` end."""
    found = _BLANKS.match(text, start)
    return found.end() if found else start


def fault(error: json.JSONDecodeError) -> str:
    """What is wrong with JSON text, and at which line and column."""
    line = f"line {error.lineno}, " if "\n" in error.doc else ""
    return f"{error.msg.removesuffix(' at')} at {line}column {error.colno}"


def half_character(text: str) -> str | None:
    """What is wrong with a text that holds half a character (a lone surrogate), which no tokenizer or file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        return f"it holds half a character (U+{half:04X}, a lone surrogate), which is not text"
    return None


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        nested = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [inner for items in nested for inner in items]
    return bool(level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {ascii(twice)[:80]} appears twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"it holds an integer of {len(digits):,} digits")
    return int(digits)


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
