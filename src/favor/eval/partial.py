"""The unfinished part of a long job, so that a killed one continues: `<out>.partial`, JSON lines.

In: a path and a fingerprint of everything that determines the texts. Out: what was kept, and a way to keep more.
The first line is the fingerprint; every other is [index, text, ended, hash of these]. Next: samples.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from favor.errors import ConfigError, writing
from favor.guard import sha
from favor.run import append_text, write_text


class Sampled(NamedTuple):
    """One sample; `ended` says that it came to its end token rather than to the length limit."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Partial:
    """Texts kept so far lie in `path`; `found` are those of earlier runs."""

    path: Path
    found: dict[int, Sampled]

    def keep(self, texts: Mapping[int, Sampled]) -> None:
        """Append texts in one write, so that a kill loses at most what was not handed over yet."""
        with writing(self.path):
            append_text(self.path, "".join(_sample(index, one) for index, one in texts.items()))


def partial_of(out: Path) -> Path:
    """Where the unfinished part of a file lies."""
    return out.parent / f"{out.name}.partial"


def open_partial(out: Path, fingerprint: str, *, overwrite: bool = False) -> Partial:
    """Continue the partial file of `out`, or start one; with `overwrite` also in place of another's.

    Raises ConfigError when there is one with another fingerprint, when it is no such file, or cannot be written.
    """
    path = partial_of(out)
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        found: dict[int, Sampled] = {}
        if any(lines):
            try:
                found = _texts(path, lines, fingerprint)
            except ConfigError:
                if not overwrite:
                    raise
        # written anew, because a kill may have torn the last line
        write_text(path, _line({"fingerprint": fingerprint}) + "".join(_sample(i, one) for i, one in found.items()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another out=FILE") from None
    return Partial(path, found)


def _texts(path: Path, lines: list[bytes], fingerprint: str) -> dict[int, Sampled]:
    try:
        first = json.loads(lines[0])
        # what follows the last line break is torn, or nothing
        kept = [json.loads(line) for line in lines[1:-1]]
        found = {int(index): Sampled(str(text), bool(ended)) for index, text, ended, _ in kept}
        if any(_sample(index, one) != _line(row) for (index, one), row in zip(found.items(), kept, strict=True)):
            raise ValueError("a line is not what was written")
        same = first["fingerprint"] == fingerprint
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path}: damaged, or no partial file of ours; delete it or choose another out=FILE"
        ) from None
    if not same:
        raise ConfigError(
            f"{path}: was begun with other settings, prompts or weights; run with those again to continue, "
            "or delete it, or choose another out=FILE"
        )
    return found


def _sample(index: int, one: Sampled) -> str:
    return _line([index, *one, sha(json.dumps([index, *one]))[:16]])


def _line(value: object) -> str:
    # ASCII only: no line break inside a text can be taken for the end of a line
    return json.dumps(value) + "\n"
