"""Does a predicted preference of 80 % hold in 80 % of cases? Accuracy, calibration curve and ECE of a reward.

In: reward gaps of labelled pairs. Out: Calibration. Next: ../train/reward.py.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from favor.eval.intervals import SHARE, Array, mean_interval, sign_share


@dataclass(frozen=True)
class Bin:
    """Pairs whose predicted p*(winner) falls into one bin: how many, mean prediction, share predicted rightly."""

    num_pairs: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Calibration:
    """Accuracy with its interval over prompts, mean loss (nats a pair), ECE and the curve."""

    pairs: int
    prompts: int
    accuracy: float
    accuracy_interval: tuple[float, float] | None
    loss: float
    ece: float
    curve: tuple[Bin, ...]

    def as_json(self) -> dict[str, Any]:
        """For eval.json."""
        return asdict(self)


def calibrate(gap_P: Array, prompt_P: NDArray[np.int64], *, num_bins: int = 10) -> Calibration:
    """Bradley-Terry says p* = sigmoid(gap), gap = r(chosen) - r(rejected).

    Each pair is seen from the side of the predicted winner, so predictions lie in [0.5, 1]; a gap of 0 is
    half right. ECE = sum_b n_b / n |observed_b - predicted_b| over equal-width bins. Guo et al. 2017, arXiv 1706.04599.
    """
    gap_P = np.asarray(gap_P, np.float64)
    right_P = sign_share(gap_P)
    predicted_P = 1 / (1 + np.exp(-np.abs(gap_P)))
    bin_P = np.minimum(((predicted_P - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    curve = tuple(
        Bin(int(inside.sum()), float(predicted_P[inside].mean()), float(right_P[inside].mean()))
        for inside in (bin_P == index for index in range(num_bins))
        if inside.any()
    )
    accuracy = mean_interval(right_P, clusters=prompt_P, bounds=SHARE)
    return Calibration(
        pairs=len(gap_P),
        prompts=len(np.unique(prompt_P)),
        accuracy=accuracy.mean,
        accuracy_interval=accuracy.ends,
        loss=float(np.logaddexp(0.0, -gap_P).mean()),
        ece=sum(part.num_pairs * abs(part.observed - part.predicted) for part in curve) / len(gap_P),
        curve=curve,
    )
