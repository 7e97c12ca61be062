"""What must not be shown: secrets in messages, and the places of this machine on pages that are handed on.

In: text. Out: the text without them. Next: edge.py.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_HIDDEN = "***"
# a shorter key protects nothing, and would be found in ordinary text
_SHORTEST = 8
_KEYS = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+@")
_IN_QUERY = re.compile(r"(?<=[?&])([\w-]*(?:key|token|secret|password)[\w-]*=)[^&\s'\"]+", re.IGNORECASE)
_PATH = re.compile(r"(?<![\w.:/\\~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>,;:()\[\]]+[/\\])+(?=[^\s/\\'\"<>,;:()\[\]])")


def without_secrets(text: str, *secrets: str) -> str:
    """Replace the given secrets, credentials in URLs, and the values of environment variables that are named as keys."""
    found = {value for name, value in os.environ.items() if _KEYS.search(name)} | set(secrets)
    for secret in sorted((s for s in found if len(s) >= _SHORTEST), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return _IN_QUERY.sub(rf"\1{_HIDDEN}", _IN_URL.sub(f"{_HIDDEN}@", text))


def without_places(text: str, known: Iterable[str] = ()) -> str:
    """Absolute paths cut to their last name; `known` are paths that may hold blanks."""
    parents = {str(Path(path).parent) for path in known if Path(path).is_absolute()} - {"/"}
    for parent in sorted(parents, key=len, reverse=True):
        text = text.replace(f"{parent}/", "")
    return _PATH.sub("", text)


def places_in(value: Any) -> list[str]:
    """Every absolute path among the strings of a nested record."""
    if isinstance(value, dict):
        return [path for inner in value.values() for path in places_in(inner)]
    if isinstance(value, list | tuple):
        return [path for inner in value for path in places_in(inner)]
    return [value] if isinstance(value, str) and Path(value).is_absolute() else []
