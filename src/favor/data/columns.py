"""Token trees as flat columns and back.

In: TokenTrees. Out: columns of integers and texts that a file can hold and a hash can take in. Next: cache.py.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from favor.data.types import Comparison, Thumb, TokenTree

# Trees turned into columns at once.
WINDOW = 1024


class Columns(NamedTuple):
    """Some trees: all their ids, the lengths of prompt and responses, paths a tree, and the rest as JSON.

    ids int32 [tokens], lengths int32 [paths], paths int32 [trees] (1 + responses), judgments [trees].
    """

    ids: np.ndarray
    lengths: np.ndarray
    paths: np.ndarray
    judgments: list[str]


class Judged(NamedTuple):
    """What a tree holds beside its ids."""

    complete: tuple[bool, ...]
    comparisons: tuple[Comparison, ...]
    ties: tuple[Comparison, ...]
    thumbs: tuple[Thumb, ...]


def encode(trees: Sequence[TokenTree]) -> Columns:
    """Trees -> columns."""
    parts = [part for tree in trees for part in (tree.prompt_ids, *tree.response_ids)]
    count = sum(map(len, parts))
    return Columns(
        np.fromiter((i for part in parts for i in part), np.int32, count),
        np.fromiter(map(len, parts), np.int32, len(parts)),
        np.fromiter((1 + len(tree.response_ids) for tree in trees), np.int32, len(trees)),
        [json.dumps([tree.complete, tree.comparisons, tree.ties, tree.thumbs]) for tree in trees],
    )


def decode(
    ids: Sequence[int], lengths: Sequence[int], judgments: str, place: tuple[str, int], first_response: int
) -> TokenTree:
    """One tree back from its share of the columns; place: its source and row."""
    parts: list[tuple[int, ...]] = []
    start = 0
    for length in lengths:
        parts.append(tuple(ids[start : start + length]))
        start += length
    judged = _judged(judgments)
    return TokenTree(
        prompt_ids=parts[0],
        response_ids=tuple(parts[1:]),
        complete=judged.complete,
        comparisons=judged.comparisons,
        first_response=first_response,
        row=place[1],
        source=place[0],
        ties=judged.ties,
        thumbs=judged.thumbs,
    )


@lru_cache(4096)
def _judged(text: str) -> Judged:
    """Most trees are judged alike (one pair), so few texts are parsed."""
    complete, comparisons, ties, thumbs = json.loads(text)
    return Judged(
        tuple(complete),
        tuple(Comparison(*_tuples(values)) for values in comparisons),
        tuple(Comparison(*_tuples(values)) for values in ties),
        tuple(Thumb(*values) for values in thumbs),
    )


def _tuples(values: Sequence[Any]) -> list[Any]:
    return [tuple(value) if isinstance(value, list) else value for value in values]
