"""What must not be shown: secrets in messages, and the places of this machine on pages that are handed on.

In: text. Out: the text without them. Next: errors.py.
"""

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

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
