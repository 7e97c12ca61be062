"""Confidence sequences: intervals that hold at all times together, so that one may look after every value and stop.

In: bounded values in the order they came. Out: the interval now. Next: intervals.py.
"""

import numpy as np

from favor.eval.intervals import Array

# the shares of a gambler's money that are bet: little against noise, much where values hardly spread
_BETS = np.array([[0.02], [0.06], [0.18], [0.45], [0.9]])
# how often [0, 1] is halved until an end is found
_HALVINGS = 24


def sequence(values: Array, low: float = 0.0, high: float = 1.0, error: float = 0.05) -> tuple[float, float]:
    """Ends of a 1 - `error` confidence sequence for the mean of values in [low, high], after all of them.

    Betting: were m the mean of x in [0, 1], the gambler with K_t = mean over c of prod (1 - c + c x_t / m) would not grow rich;
    Ville: P(K_t >= 2/error at any t) <= error / 2. So m is left out once K_t was as large, and by the same for 1 - x. The
    diversified Kelly bet of Waudby-Smith and Ramdas 2023 (JRSS B). Of a mean that drifts it holds an average.
    """
    scaled_N = (np.asarray(values, np.float64) - low) / (high - low)
    assert ((scaled_N > -1e-9) & (scaled_N < 1 + 1e-9)).all(), "a value lies outside of the bounds"
    scaled_N = scaled_N.clip(0, 1)
    rich = np.log(2 / error)
    first, last = _least(scaled_N, rich), 1 - _least(1 - scaled_N, rich)
    # what fails with probability `error` may leave nothing
    first, last = min(first, last), max(first, last)
    return low + (high - low) * first, low + (high - low) * last


def _least(scaled_N: Array, rich: float) -> float:
    """The least mean that the gambler has not refuted by now; K falls as m grows, so it is found by halving."""
    below, above = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        refuted = _wealth(scaled_N, middle).max(initial=0.0) >= rich
        below, above = (middle, above) if refuted else (below, middle)
    return below


def _wealth(scaled_N: Array, mean: float) -> Array:
    """Log K_t after every value, [N]."""
    log_CN = np.cumsum(np.log(1 - _BETS + _BETS / mean * scaled_N), axis=1)
    return np.logaddexp.reduce(log_CN, axis=0) - np.log(len(_BETS))
