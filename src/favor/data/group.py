"""Rows of one prompt merged without holding the text of all rows: what `read` gives, for data larger than memory.

In: a source and an empty folder. Out: PromptTrees that lie in a file there, in the order of their first rows, and
a ReadReport, both equal to read()'s. Next: tokenize.py.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np

from favor.data.grow import Growing, Grown
from favor.data.read import Half, Seen, judge, judged, tree_key
from favor.data.settings import DataConfig, SourceConfig
from favor.data.types import PromptTree

# Files that rows are spread over; the rows of one of them are held at once.
_BUCKETS = 128
_KEY_BYTES = 32
# Trees made at once when all are gone through.
_WINDOW = 256


def group(source: SourceConfig, config: DataConfig, half: Half, folder: Path) -> tuple["GroupedTrees", Seen]:
    """Read a source into a file of `folder`, one line a prompt. Raises DataError as `read` does."""
    seen = Seen(config.format_of(source))
    with ExitStack() as stack:
        buckets: dict[int, BinaryIO] = {}
        for number, row, judgment in judged(source, config, half, seen):
            key = hashlib.sha256(tree_key(judgment).encode("utf-8", "surrogatepass")).hexdigest()[:_KEY_BYTES]
            bucket = int(key[:8], 16) % _BUCKETS
            if bucket not in buckets:
                buckets[bucket] = stack.enter_context((folder / f"bucket-{bucket}").open("wb"))
            buckets[bucket].write(f"{key}[{number},{json.dumps(row, default=str)}]\n".encode())
    path, how = folder / "grouped.jsonl", How(source, config, seen.format)
    index = _gather([folder / f"bucket-{bucket}" for bucket in sorted(buckets)], path, how, seen)
    return GroupedTrees(path, index, how), seen


class How(NamedTuple):
    """What is needed to make a tree from its rows again."""

    source: SourceConfig
    config: DataConfig
    format: str


class Index(NamedTuple):
    """Where each tree's line lies in the file, in the order of first rows."""

    start: np.ndarray
    length: np.ndarray


class GroupedTrees(Sequence[PromptTree]):
    """Prompt trees in a file, made from their rows whenever they are asked for."""

    def __init__(self, path: Path, index: Index, how: How) -> None:
        self._path, self._index, self._how = path, index, how

    def __len__(self) -> int:
        return len(self._index.start)

    def __iter__(self) -> Iterator[PromptTree]:
        for start in range(0, len(self), _WINDOW):
            yield from self[start : start + _WINDOW]

    @overload
    def __getitem__(self, index: int) -> PromptTree: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptTree]: ...
    def __getitem__(self, index: int | slice) -> PromptTree | list[PromptTree]:
        if not isinstance(index, slice):
            place = range(len(self))[index]
            return self[place : place + 1][0]
        with self._path.open("rb") as file:
            return [self._tree(file, i) for i in range(*index.indices(len(self)))]

    def _tree(self, file: BinaryIO, i: int) -> PromptTree:
        line = os.pread(file.fileno(), int(self._index.length[i]), int(self._index.start[i]))
        return _grown(line, self._how).tree


def _gather(buckets: Sequence[Path], path: Path, how: How, seen: Seen) -> Index:
    """Bring the rows of each prompt together, bucket by bucket; the buckets are removed."""
    first: list[np.ndarray] = []
    length: list[np.ndarray] = []
    with path.open("wb") as out:
        for bucket in buckets:
            lines = _by_prompt(bucket)
            bucket.unlink()
            for line in lines.values():
                seen.count(_grown(line, how))
                out.write(line)
            first.append(np.array([_first_row(line) for line in lines.values()], np.int64))
            length.append(np.array([len(line) for line in lines.values()], np.int64))
    if not first:
        return Index(np.empty(0, np.int64), np.empty(0, np.int64))
    all_lengths = np.concatenate(length)
    starts = np.concatenate([[0], np.cumsum(all_lengths)[:-1]])
    order = np.argsort(np.concatenate(first))
    return Index(starts[order], all_lengths[order])


def _by_prompt(bucket: Path) -> Mapping[bytes, bytes]:
    """Key -> one line with all its (row number, row), as JSON."""
    rows: dict[bytes, list[bytes]] = {}
    with bucket.open("rb") as file:
        for line in file:
            rows.setdefault(line[:_KEY_BYTES], []).append(line[_KEY_BYTES:-1])
    return {key: b"[" + b",".join(items) + b"]\n" for key, items in rows.items()}


def _first_row(line: bytes) -> int:
    return int(line[2 : line.index(b",")])


def _grown(line: bytes, how: How) -> Grown:
    rows: list[tuple[int, dict[str, Any]]] = json.loads(line)
    judgments = [(number, judge(row, how.format, how.source)) for number, row in rows]
    tree = Growing(judgments[0][1].prompt, judgments[0][1].tools, how.config.rules)
    for number, judgment in judgments:
        tree.add(number, judgment)
    return tree.finish(how.source.path)


class Joined(Sequence[PromptTree]):
    """The trees of several sources, one source after the other."""

    def __init__(self, members: Sequence[Sequence[PromptTree]]) -> None:
        self._members, self._ends = members, np.cumsum([len(member) for member in members])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[PromptTree]:
        for member in self._members:
            yield from member

    @overload
    def __getitem__(self, index: int) -> PromptTree: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptTree]: ...
    def __getitem__(self, index: int | slice) -> PromptTree | list[PromptTree]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        member = int(np.searchsorted(self._ends, place, side="right"))
        return self._members[member][place - int(self._ends[member]) + len(self._members[member])]
