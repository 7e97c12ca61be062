"""Confidence sequences: intervals that hold at all times together, so that one may look after every value and stop.

In: bounded values in the order they came. Out: the interval now. Next: intervals.py.
"""

import numpy as np

from favor.eval.intervals import Array

# a bet risks at most this share of what is left; halvings of [0, 1] until an end is found
_MOST, _HALVINGS = 0.75, 24


def sequence(values: Array, low: float = 0.0, high: float = 1.0, error: float = 0.05) -> tuple[float, float]:
    """Ends of a 1 - `error` confidence sequence for the mean of values in [low, high], after all of them.

    Betting, Waudby-Smith and Ramdas 2023 (JRSS B), theorem 3 and section 4.1: were m the mean of x in [0, 1], nobody could grow
    rich by K_t = prod (1 + l_t (x_t - m)) with 0 <= l_t <= 3/4 / m known before x_t; Ville: P(any K_t >= 2/error) <= error / 2.
    So m is left out once K_t was as large, and the same for 1 - x. The bets are l_t = sqrt(2 ln(2/error) / (s_t-1 t ln(1 + t))),
    s the variance so far. Of a mean that drifts it holds an average.
    """
    scaled_N = (np.asarray(values, np.float64) - low) / (high - low)
    log, bet_N = np.log(2 / error), _bets(scaled_N, error)
    first, last = _least(scaled_N, bet_N, log), 1 - _least(1 - scaled_N, bet_N, log)
    # what fails with probability `error` may leave nothing
    first, last = min(first, last), max(first, last)
    return low + (high - low) * first, low + (high - low) * last


def _bets(scaled_N: Array, error: float) -> Array:
    """What to bet on each value from those before it: less where they spread."""
    count = np.arange(1, len(scaled_N) + 1)
    mean_N = (0.5 + np.cumsum(scaled_N)) / (count + 1)
    variance_N = (0.25 + np.cumsum((scaled_N - mean_N) ** 2)) / (count + 1)
    spread_N = np.append(0.25, variance_N)[:-1]
    return np.sqrt(2 * np.log(2 / error) / (spread_N * count * np.log(1 + count)))


def _least(scaled_N: Array, bet_N: Array, log: float) -> float:
    """The least mean that no bet on more has refuted by now; log K falls as m grows, so it is found by halving."""

    def refuted(mean: float) -> bool:
        wealth_N = np.cumsum(np.log1p(np.minimum(bet_N, _MOST / mean) * (scaled_N - mean)))
        return float(wealth_N.max(initial=0.0)) >= log

    below, above = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        below, above = (middle, above) if refuted(middle) else (below, middle)
    return below
