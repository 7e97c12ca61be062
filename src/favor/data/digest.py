"""One identity per content: token trees as flat columns, and hashes of these, the same in memory and in a cache.

In: splits of a data set. Out: hex digests; the memory needed does not grow with the data. Next: store.py.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from favor.data.types import TokenTree

# Trees turned into columns at once.
WINDOW = 1024
# of some trees: all their ids int32 [tokens], the lengths of prompt and responses int32 [paths], paths of each tree
# int32 [trees] (1 + responses), and what is said of the responses as JSON [trees]
Columns: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]


@runtime_checkable
class Digested(Protocol):
    """Trees whose digests were taken when they were written."""

    digests: list[str]


class Streams:
    """A running hash of each column, so that it does not matter where windows are cut."""

    def __init__(self) -> None:
        self._hashes = [hashlib.sha256() for _ in range(4)]

    def add(self, columns: Columns) -> None:
        """Take in some trees."""
        for stream, column in zip(self._hashes, columns[:3], strict=False):
            stream.update(np.ascontiguousarray(column).tobytes())
        self._hashes[3].update("".join(text + "\n" for text in columns[3]).encode())

    def digests(self) -> list[str]:
        """Of ids, lengths, paths and comparisons."""
        return [stream.hexdigest() for stream in self._hashes]


def hash_ids(splits: Mapping[str, Sequence[TokenTree]]) -> str:
    """A hash of every token id of every split."""
    nothing = hashlib.sha256().hexdigest()
    return _whole({name: [*_digests(trees)[:3], nothing] for name, trees in splits.items()})


def hash_all(splits: Mapping[str, Sequence[TokenTree]]) -> str:
    """A hash of every token id and comparison of every split."""
    return _whole({name: _digests(trees) for name, trees in splits.items()})


def _whole(digests: Mapping[str, list[str]]) -> str:
    lines = "".join("\n".join([name, *found, ""]) for name, found in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def _digests(trees: Sequence[TokenTree]) -> list[str]:
    if isinstance(trees, Digested):
        return trees.digests
    streams = Streams()
    for start in range(0, len(trees), WINDOW):
        streams.add(encode(trees[start : start + WINDOW]))
    return streams.digests()


def encode(trees: Sequence[TokenTree]) -> Columns:
    """Trees -> columns."""
    paths = [path for tree in trees for path in (tree.prompt_ids, *tree.response_ids)]
    return (
        np.fromiter((i for path in paths for i in path), np.int32, sum(map(len, paths))),
        np.fromiter(map(len, paths), np.int32, len(paths)),
        np.fromiter((1 + len(tree.response_ids) for tree in trees), np.int32, len(trees)),
        [json.dumps([tree.complete, tree.comparisons, tree.ties, tree.thumbs]) for tree in trees],
    )
