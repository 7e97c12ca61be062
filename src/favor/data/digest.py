"""One identity per content: hashes of token trees, the same whether they lie in memory or in a cache.

In: parts of a data set. Out: hex digests; the memory needed does not grow with the data. Next: cache.py.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from favor.data.cache import CachedTrees
from favor.data.columns import WINDOW, Columns, encode
from favor.data.types import TokenTree


def hash_ids(parts: Mapping[str, Sequence[TokenTree]]) -> str:
    """A hash of every token id of every part."""
    return _hash(parts, judgments=False)


def hash_all(parts: Mapping[str, Sequence[TokenTree]]) -> str:
    """A hash of every token id and comparison of every part."""
    return _hash(parts, judgments=True)


def _hash(parts: Mapping[str, Sequence[TokenTree]], *, judgments: bool) -> str:
    whole = hashlib.sha256()
    for name, trees in parts.items():
        # one stream a column, so that it does not matter where windows are cut
        streams = [hashlib.sha256() for _ in range(4)]
        for columns in _columns(trees):
            for stream, column in zip(streams, columns[:3], strict=False):
                stream.update(np.ascontiguousarray(column).tobytes())
            if judgments:
                streams[3].update("".join(text + "\n" for text in columns.judgments).encode())
        whole.update("\n".join([name, *(stream.hexdigest() for stream in streams), ""]).encode())
    return whole.hexdigest()


def _columns(trees: Sequence[TokenTree]) -> Iterator[Columns]:
    if isinstance(trees, CachedTrees):
        yield from trees.columns()
        return
    for start in range(0, len(trees), WINDOW):
        yield encode(trees[start : start + WINDOW])
