"""How sure a mean is: bootstrap intervals that resample prompts, and standard errors.

In: values, and which prompt each belongs to. Out: Interval. Next: margins.py.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean with the bounds of its percentile bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Array, seed: int, *, clusters: NDArray[np.int64] | None = None, num: int = 2000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap of the mean of `values` [n]; whole clusters are drawn, so values of one prompt stay together."""
    values = np.asarray(values, np.float64)
    groups = np.arange(len(values)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(groups, weights=values)
    counts = np.bincount(groups).astype(np.float64)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(num, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_difference(a: Array, b: Array, seed: int, *, clusters: NDArray[np.int64]) -> Interval:
    """Interval of mean(a) - mean(b), paired: a[i] and b[i] belong to the same prompt and are drawn together."""
    return bootstrap_mean(np.asarray(a) - np.asarray(b), seed, clusters=clusters)
