"""JSON text -> values, or the reason why it is not taken: nothing is read otherwise than it was written.

In: text of a data file. Out: a value, or a ValueError that says what is wrong. Next: formats/common.py.
"""

import json
import re
from typing import Any

# More brackets than a chat with tool schemas has, and less than Python's stack bears.
_DEEPEST = 100
# An integer of more digits is beyond the largest float.
_DIGITS = 300
_TOO_DEEP = f"it is nested more than {_DEEPEST} levels deep"
_BLANKS = re.compile(r"[ \t\n\r]*")
# texts, brackets, and all else that is not between values
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]|[^\s,:\[\]{}"]++', re.DOTALL)


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
        raise ValueError(_TOO_DEEP) from None
    written = text[start:end]
    if written.count("[") + written.count("{") > _DEEPEST and _is_deep(value):
        raise ValueError(_TOO_DEEP)
    if "\\ud" in written or "\\uD" in written:
        _check_pairs(value)
    return value, end


def end_at(text: str, start: int) -> int | None:
    """Where the value ends that begins at `start`, whatever `value_at` has against it; None when it does not end."""
    depth = 0
    for token in _TOKENS.finditer(text, start):
        depth += (token.group() in ("[", "{")) - (token.group() in ("]", "}"))
        if depth <= 0:
            return token.end()
    return None


def blanks(text: str, start: int) -> int:
    """Where the blanks that begin at `start` end."""
    found = _BLANKS.match(text, start)
    return found.end() if found else start


def fault(error: json.JSONDecodeError) -> str:
    """What is wrong with JSON text, and at which line and column."""
    line = f"line {error.lineno}, " if "\n" in error.doc else ""
    return f"{error.msg.removesuffix(' at')} at {line}column {error.colno}"


def _check_pairs(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(str(error.object)[error.start])
        raise ValueError(f"it holds half a character (U+{half:04X}, a lone surrogate), which is not text") from None


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [inner for item in level for inner in _inside(item)]
    return bool(level)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {ascii(twice)[:80]} is there twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"it holds an integer of {len(digits):,} digits")
    return int(digits)


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
