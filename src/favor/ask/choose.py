"""Which pairs to ask about: those the cheap models cannot decide, and among these ones that differ.

In: margins and features of unlabelled pairs. Out: their places. Next: ../eval/sequence.py.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# candidates for every pair that is asked: enough to choose different ones, few enough to be uncertain
_CANDIDATES = 4


def by_margin(margin_T: Array, gap_TF: Array, count: int) -> list[int]:
    """Of the 4 `count` pairs with the smallest |margin| those that differ most: each next one is the least like any before.

    Likeness is the |cosine| of feature differences, for a pair and its reverse ask the same. The first is the least certain.
    """
    candidates = np.argsort(np.abs(margin_T), kind="stable")[: _CANDIDATES * count]
    return [int(candidates[place]) for place in spread_out(gap_TF[candidates], count)]


def spread_out(gap_TF: Array, count: int) -> list[int]:
    """Places of `count` rows: the first row, then always the one whose largest |cosine| with those taken is smallest."""
    length_T = np.linalg.norm(gap_TF, axis=1)
    unit_TF = gap_TF / np.where(length_T > 0, length_T, 1.0)[:, None]
    taken = [0]
    likest_T = np.abs(unit_TF @ unit_TF[0])
    while len(taken) < min(count, len(unit_TF)):
        likest_T[taken[-1]] = np.inf
        taken.append(int(likest_T.argmin()))
        likest_T = np.maximum(likest_T, np.abs(unit_TF @ unit_TF[taken[-1]]))
    return taken
