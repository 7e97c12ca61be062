"""A choice from a sequence of trees that copies nothing.

In: a sequence and the places chosen. Out: a sequence. Next: sft.py.
"""

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from favor.data.types import TokenTree


class View(Sequence[TokenTree]):
    """The trees at `places`; `change(tree, i)`, where given, is applied to the i-th when it is asked for."""

    def __init__(
        self,
        trees: Sequence[TokenTree],
        places: Sequence[int] | np.ndarray,
        change: Callable[[TokenTree, int], TokenTree] | None = None,
    ) -> None:
        self._trees, self._places, self._change = trees, np.asarray(places, np.int64), change

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> TokenTree: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenTree]: ...
    def __getitem__(self, index: int | slice) -> TokenTree | list[TokenTree]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        tree = self._trees[int(self._places[i])]
        return tree if self._change is None else self._change(tree, i)


def where(trees: Sequence[TokenTree], wanted: Callable[[TokenTree], bool]) -> View:
    """The trees for which `wanted` holds."""
    places = np.fromiter((i for i, tree in enumerate(trees) if wanted(tree)), np.int64)
    return View(trees, places)
