"""Confidence sequences: intervals that hold at all times together, so that one may look after every label and stop.

In: bounded values in the order they came. Out: the interval now. Next: run.py.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# bets are at most this share of what cannot be lost
_MOST = 0.5


def sequence(values: Array, low: float = 0.0, high: float = 1.0, error: float = 0.05) -> tuple[float, float]:
    """Ends of a 1 - `error` confidence sequence for the mean of values in [low, high], after all of them.

    Predictable plug-in empirical Bernstein, intersected over time; Waudby-Smith and Ramdas 2023 (JRSS B), theorem 2. With
    x in [0, 1], l_t = min(sqrt(2 ln(2/error) / (s_t-1 t ln(1 + t))), 1/2), v_t = 4 (x_t - m_t-1)^2 and
    psi(l) = (-ln(1 - l) - l) / 4 the mean lies within (sum l x +- (ln(2/error) + sum v psi(l))) / sum l at all t with
    probability 1 - error. Of a mean that drifts it holds the average weighted by l.
    """
    scaled_N = (np.asarray(values, np.float64) - low) / (high - low)
    log, count = np.log(2 / error), np.arange(1, len(scaled_N) + 1)
    mean_N = (0.5 + np.cumsum(scaled_N)) / (count + 1)
    variance_N = (0.25 + np.cumsum((scaled_N - mean_N) ** 2)) / (count + 1)
    # what was known before each value
    before_N, spread_N = np.append(0.5, mean_N)[:-1], np.append(0.25, variance_N)[:-1]
    bet_N = np.minimum(np.sqrt(2 * log / (spread_N * count * np.log(1 + count))), _MOST)
    penalty_N = 4 * (scaled_N - before_N) ** 2 * (-np.log1p(-bet_N) - bet_N) / 4
    total_N = np.cumsum(bet_N)
    centre_N, reach_N = np.cumsum(bet_N * scaled_N) / total_N, (log + np.cumsum(penalty_N)) / total_N
    ends = np.max(centre_N - reach_N, initial=0.0), np.min(centre_N + reach_N, initial=1.0)
    # what holds with probability `error` may leave nothing
    first, last = (low + (high - low) * float(np.clip(end, 0, 1)) for end in ends)
    return min(first, last), max(first, last)
