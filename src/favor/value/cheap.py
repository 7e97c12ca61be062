"""Cheap models of what the labels favor: ridge Bradley-Terry heads on a model's features, asked only about prompts they never saw.

In: the difference of features of every pair. Out: margins by many heads. Next: noise.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from favor.value.features import NUMBERS

Array = NDArray[np.float64]
Places = NDArray[np.int64]
# inverse strengths of the ridge that are tried
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Cases(NamedTuple):
    """Pairs as numbers: features of the better response less those of the worse [P, F], how much each counts, its prompt."""

    gap_PF: Array
    weight_P: Array
    prompt_P: Places

    def some(self, which_P: NDArray[np.bool_] | Places) -> "Cases":
        """Those at these places."""
        return Cases(self.gap_PF[which_P], self.weight_P[which_P], self.prompt_P[which_P])


class Margins(NamedTuple):
    """r(chosen) - r(rejected) of every pair by M heads that never saw its prompt [M, P].

    other_HT: of other pairs, by every head of every fold, nan by those that saw its prompt where prompts were given. strength:
    the inverse strength of the ridge.
    """

    out_MP: Array
    other_HT: Array
    strength: float


def gaps(features_RF: NDArray[np.float32], chosen_P: Places, rejected_P: Places) -> Array:
    """Differences of features [P, F]; log-prob and length become that of a token and the log of the length."""
    states, (logp, length) = features_RF[:, :-NUMBERS].astype(np.float64), features_RF[:, -NUMBERS:].T
    known_RF = np.column_stack([states, logp, logp / np.maximum(length, 1), np.log(np.maximum(length, 1))])
    return known_RF[chosen_P] - known_RF[rejected_P]


def margins(
    found: Cases, others_TF: Array, models: int, folds: int, seed: int, prompt_T: Places | None = None
) -> Margins:
    """Heads of `models` bootstrap samples of the prompts, each in `folds` parts: a head is fitted to all parts but one.

    The strength is the one by which the pairs left out are likeliest. prompt_T: prompts of the others, where a head that saw
    one is not to be asked about it.
    """
    others = Cases(others_TF, np.ones(len(others_TF)), np.full(len(others_TF), -1) if prompt_T is None else prompt_T)
    counts = found.weight_P / found.weight_P.sum()

    def loss(strength: float) -> float:
        own_P, _ = _round(found, found.weight_P, others.some(np.arange(0)), folds, (strength, seed))
        return float(counts @ np.logaddexp(0.0, -own_P))

    strength = min(STRENGTHS, key=loss)
    rounds = [
        _round(found, _bootstrap(found, seed + 1 + turn), others, folds, (strength, seed + 1 + turn))
        for turn in range(models)
    ]
    return Margins(np.stack([own for own, _ in rounds]), np.concatenate([other for _, other in rounds]), strength)


def head(found: Cases, strength: float) -> Callable[[Array], Array]:
    """Bradley-Terry with a linear reward: gaps [T, F] -> margins [T].

    Minimises sum_p w_p ln(1 + exp(-theta . gap_p)) + |theta|^2 / 2C, features scaled to a mean square of 1 / F.
    """
    used = found.some(found.weight_P > 0)
    scale_F = np.sqrt((used.gap_PF**2).mean(0) * used.gap_PF.shape[1])
    scale_F[scale_F == 0] = 1.0
    # a pair turned round with its label is the same pair; the library wants both labels
    sign_P = np.where(np.arange(len(used.weight_P)) % 2, -1.0, 1.0)
    fit = LogisticRegression(C=strength, fit_intercept=False, max_iter=5000, tol=1e-6)
    theta_F: Array = fit.fit(used.gap_PF / scale_F * sign_P[:, None], sign_P > 0, used.weight_P).coef_[0] / scale_F

    def margin(gap_TF: Array) -> Array:
        return gap_TF @ theta_F

    return margin


def _round(found: Cases, weight_P: Array, asked: Cases, folds: int, how: tuple[float, int]) -> tuple[Array, Array]:
    """Margins of every pair by the head that its prompt was left out of [P]; of others by each head [folds, T]."""
    strength, seed = how
    names, place_P = np.unique(found.prompt_P, return_inverse=True)
    folds = min(folds, len(names))
    fold_P = (np.random.default_rng(seed).permutation(len(names)) % folds)[place_P]
    own_P, others = np.zeros(len(fold_P)), np.zeros((folds, len(asked.prompt_P)))
    for fold in range(folds):
        out = fold_P == fold
        margin = head(found._replace(weight_P=np.where(out, 0.0, weight_P)), strength)
        seen_T = np.isin(asked.prompt_P, found.prompt_P[~out])
        own_P[out], others[fold] = margin(found.gap_PF[out]), np.where(seen_T, np.nan, margin(asked.gap_PF))
    return own_P, others


def _bootstrap(found: Cases, seed: int) -> Array:
    """Weights of a sample of the prompts with replacement."""
    names, place_P = np.unique(found.prompt_P, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)))
    return found.weight_P * drawn[place_P]
