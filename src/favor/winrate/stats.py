"""Win rates from verdicts in both orders: position bias measured, response length controlled for.

In: pairs of responses with two verdicts each. Out: WinFigures. No torch here. Next: ../eval/intervals.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from favor.errors import DataError
from favor.eval.intervals import SHARE, Array, Interval, jackknife, mean_interval, t_quantile

# "A" is the response shown first, "B" the one shown second
Verdict: TypeAlias = Literal["A", "B", "tie", "invalid"]
_SCORE: dict[str, float] = {"A": 1.0, "tie": 0.5, "B": 0.0}
# inverse strength of the ridge, in pairs: it moves nothing but keeps a separable fit finite
_C = 100.0


class JudgedPair(NamedTuple):
    """Responses a and b to one prompt. `a_first` and `b_first` are the verdicts in the two orders; lengths in characters."""

    prompt: int
    a_first: Verdict
    b_first: Verdict
    length_a: int
    length_b: int

    @property
    def outcome(self) -> float | None:
        """1 when a wins in both orders, 0 when b does, the mean of the two orders between; None when a verdict is invalid."""
        if "invalid" in (self.a_first, self.b_first):
            return None
        return (_SCORE[self.a_first] + 1 - _SCORE[self.b_first]) / 2

    @property
    def consistent(self) -> bool:
        """Whether both orders say the same about a and b."""
        return _SCORE[self.a_first] == 1 - _SCORE[self.b_first]


@dataclass(frozen=True)
class WinFigures:
    """Win rate of a over b with what it rests on; intervals are 95 %, over prompts.

    Counts are of pairs: `pairs` = wins + ties + losses have a verdict in both orders; those `invalid` have not, and are left out.
    `position_bias` is None when no verdict was decisive; the length-controlled rate is None when all length differences
    are the same and not zero, because length and quality cannot be told apart then.
    """

    pairs: int
    prompts: int
    win_rate: float
    win_rate_interval: tuple[float, float]
    lc_win_rate: float | None
    lc_win_rate_interval: tuple[float, float] | None
    wins: int
    ties: int
    losses: int
    invalid: int
    invalid_verdicts: int
    consistency: float
    position_bias: float | None
    position_bias_interval: tuple[float, float] | None
    decisive_verdicts: int
    length_effect: float | None
    longer_a: float
    mean_length_a: float
    mean_length_b: float
    length_unit: str = "characters"


class LengthControlled(NamedTuple):
    """Win rate at equal lengths with its interval, and the coefficient of the length term."""

    rate: Interval
    effect: float


class Fitted(NamedTuple):
    """Coefficients [k] of a logistic regression, and what each moves by when a prompt is left out [prompts + 2, k]."""

    coefficients: Array
    moved: Array


def win_figures(pairs: Sequence[JudgedPair]) -> WinFigures:
    """All figures of the pairs judged in both orders. Raises DataError when there is none."""
    valid = [pair for pair in pairs if pair.outcome is not None]
    if not valid:
        raise DataError(
            f"no figures: none of the {len(pairs)} pairs has a usable verdict in both orders; see judge.kind"
        )
    outcome = np.array([pair.outcome for pair in valid], np.float64)
    prompt = np.array([pair.prompt for pair in valid], np.int64)
    length_a, length_b = (np.array([pair[i] for pair in valid], np.float64) for i in (3, 4))
    rate = mean_interval(outcome, clusters=prompt, bounds=SHARE)
    bias, decisive = position_bias(valid)
    controlled = length_controlled(outcome, length_a - length_b, prompt)
    return WinFigures(
        pairs=len(valid),
        prompts=len(np.unique(prompt)),
        win_rate=rate.mean,
        win_rate_interval=(rate.low, rate.high),
        lc_win_rate=controlled.rate.mean if controlled else None,
        lc_win_rate_interval=(controlled.rate.low, controlled.rate.high) if controlled else None,
        wins=int((outcome > 0.5).sum()),
        ties=int((outcome == 0.5).sum()),
        losses=int((outcome < 0.5).sum()),
        invalid=len(pairs) - len(valid),
        invalid_verdicts=sum((pair.a_first == "invalid") + (pair.b_first == "invalid") for pair in pairs),
        consistency=sum(pair.consistent for pair in valid) / len(valid),
        position_bias=bias.mean if bias else None,
        position_bias_interval=(bias.low, bias.high) if bias else None,
        decisive_verdicts=decisive,
        length_effect=controlled.effect if controlled else None,
        longer_a=float((np.sign(length_a - length_b) + 1).mean() / 2),
        mean_length_a=float(length_a.mean()),
        mean_length_b=float(length_b.mean()),
    )


def position_bias(pairs: Sequence[JudgedPair]) -> tuple[Interval | None, int]:
    """Share of decisive verdicts that go to the response shown first, minus 1/2, and how many verdicts were decisive.

    Every pair is judged in both orders, so a judge that looks at quality alone gives 0 whatever the responses.
    """
    decisive = [(v == "A", pair.prompt) for pair in pairs for v in (pair.a_first, pair.b_first) if v in ("A", "B")]
    if not decisive:
        return None, 0
    first, prompt = np.array(decisive).T
    share = mean_interval(first.astype(np.float64), clusters=prompt.astype(np.int64), bounds=SHARE)
    return Interval(share.mean - 0.5, share.low - 0.5, share.high - 0.5), len(decisive)


def length_controlled(outcome: Array, difference: Array, prompt: NDArray[np.int64]) -> LengthControlled | None:
    """Logistic regression of the outcome on tanh(difference / std), read off at difference 0; None when it says nothing.

    P(a wins) = sigmoid(quality + effect * tanh((len_a - len_b) / std)), std of the length differences; the rate is
    sigmoid(quality). Length-controlled AlpacaEval 2.0 for one pair of models: Dubois et al. 2024, arXiv 2404.04475.
    """
    spread = float(difference.std())
    if spread == 0 and difference.any():
        return None
    scaled = np.tanh(difference / spread) if spread else np.zeros_like(difference)
    features = np.stack([np.ones_like(scaled), scaled], axis=1)
    quality, effect = logistic(outcome, features, np.ones_like(outcome)).tolist()
    low, high = _rate_ends(outcome, features, np.unique(prompt, return_inverse=True)[1])
    return LengthControlled(Interval(_sigmoid(quality), low, high), effect)


def _rate_ends(outcome: Array, features: Array, group: NDArray[np.int64]) -> tuple[float, float]:
    """Ends of the rate's interval, from a fit with two more prompts.

    On the scale of the rate the interval is right near 0 and 1, on the scale of the quality where the rate is
    extrapolated; either end is the wider one of the two.
    """
    (quality, _), moved = fitted(outcome, features, group)
    reach = t_quantile(np.bincount(group).astype(np.float64)) * jackknife(moved[:, 0])
    rate = _sigmoid(quality)
    flat = reach * rate * (1 - rate)
    return max(min(rate - flat, _sigmoid(quality - reach)), 0.0), min(max(rate + flat, _sigmoid(quality + reach)), 1.0)


def fitted(outcome: Array, features: Array, group: NDArray[np.int64], strength: float = _C) -> Fitted:
    """Logistic regression [P] on features [P, k] with two more prompts, one won, one lost; a one-step jackknife over prompts.

    The two have the features of all pairs, each with the weight 1 / prompts (the idea is in intervals.mean_interval).
    group: the prompt of every pair, 0 to prompts - 1.
    """
    prompts, width = int(group.max()) + 1, features.shape[1]
    weight = 1 + 2 / prompts
    found = logistic((outcome + 1 / prompts) / weight, features, np.full_like(outcome, weight), strength)
    expected = 1 / (1 + np.exp(-(features @ found)))
    curve_Pkk = (expected * (1 - expected))[:, None, None] * features[:, :, None] * features[:, None, :]
    curve = np.zeros((prompts + 2, width, width))
    score = np.zeros((prompts + 2, width))
    np.add.at(curve, group, curve_Pkk)
    np.add.at(score, group, (outcome - expected)[:, None] * features)
    curve[prompts:] = curve_Pkk.sum(0) / prompts
    score[prompts] = (1 - expected) @ features / prompts
    score[prompts + 1] = -expected @ features / prompts
    # what the fit moves by when a prompt is left out: one Newton step
    without = curve.sum(0) + np.eye(width) / strength - curve
    return Fitted(found, np.linalg.solve(without, score[:, :, None])[:, :, 0])


def logistic(outcome: Array, features: Array, weight: Array, strength: float = _C) -> Array:
    """Coefficients [k] by maximum likelihood with a ridge; an outcome y is y of a win and 1 - y of a loss.

    strength: the inverse of the ridge, the variance of a normal prior of every coefficient.
    """
    slope = features.T @ (weight * (outcome - 0.5))
    if np.allclose(slope, 0, atol=1e-12 * len(outcome)):
        # the best is where the solver starts, and its search along no slope would warn
        return np.zeros(features.shape[1])
    model = LogisticRegression(C=strength, fit_intercept=False, solver="newton-cholesky", max_iter=1000, tol=1e-6)
    won = np.repeat([1, 0], len(outcome))
    model.fit(np.tile(features, (2, 1)), won, np.concatenate([weight * outcome, weight * (1 - outcome)]))
    return model.coef_[0].astype(np.float64)


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))
