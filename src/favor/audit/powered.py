"""A handful of human labels stretched by many verdicts: prediction-powered inference for the win rate of a side.

In: verdicts on all pairs, people's on some. Out: Powered. Angelopoulos et al. 2023, arXiv 2301.09633; the weight of the judge
as in PPI++, 2311.01453. Next: soft.py.
"""

from typing import NamedTuple

import numpy as np

from favor.audit.figures import Ints
from favor.eval.intervals import SHARE, Array, Interval, jackknife, mean_interval, t_quantile


class Powered(NamedTuple):
    """Win rate of a: by the labels alone, by the judge alone (whose bias it has), by both; the weight of the judge, 0 to 1.

    labels: pairs with one. worth: how many labels alone would tell as much as both do.
    """

    human: Interval
    judge: Interval
    both: Interval
    weight: float
    labels: int
    pairs: int
    worth: float


def powered(judge_P: Array, human_P: Array, prompt_P: Ints) -> Powered:
    """The win rate that people would give: mean human + weight (mean judge elsewhere - mean judge where people were asked).

    judge_P: verdicts in [0, 1] on all pairs, whatever they are worth; human_P in [0, 1], nan where nobody was asked. The labelled
    pairs must be a random sample. The weight is the one with the least variance, within 0 and 1 (0: the labels alone). Interval:
    each prompt is left out, the weight found anew; two more labelled prompts, a win and a loss that the judge calls ties,
    keep few labels that all agree with it from being certain; t with the labelled prompts' degrees of freedom.
    """
    known = ~np.isnan(human_P)
    group = np.unique(prompt_P, return_inverse=True)[1]
    columns = (known, np.where(known, human_P, 0.0), known * judge_P, ~known, ~known * judge_P)
    sums = np.stack([np.bincount(group, values, group.max() + 1) for values in columns], 1).astype(np.float64)
    labelled = sums[sums[:, 0] > 0, 0]
    size = labelled.mean()
    more = np.concatenate([sums, size * np.array([[1.0, 1.0, 0.5, 0.0, 0.0], [1.0, 0.0, 0.5, 0.0, 0.0]])])
    rate, weight = _estimate(sums.sum(0), sums.T @ sums)
    # a judge without weight gets none from the two
    weigh = float(weight > 0)
    centre, error = _jackknife(more, weigh)
    reach = t_quantile(labelled) * error
    return Powered(
        human=mean_interval(human_P[known], clusters=prompt_P[known], bounds=SHARE),
        judge=mean_interval(judge_P, clusters=prompt_P, bounds=SHARE),
        both=Interval(float(np.clip(rate, 0, 1)), max(float(centre - reach), 0.0), min(float(centre + reach), 1.0)),
        weight=float(weight),
        labels=int(known.sum()),
        pairs=len(judge_P),
        worth=float(known.sum() * (_jackknife(more, weigh=0.0)[1] / error) ** 2),
    )


def _jackknife(sums: Array, weigh: float) -> tuple[float, float]:
    """The estimate and its standard error, by leaving out one prompt [G, 5] at a time."""
    total, moments = sums.sum(0), sums.T @ sums
    without, _ = _estimate(total - sums, moments - sums[:, :, None] * sums[:, None, :], weigh)
    centre, _ = _estimate(total, moments, weigh)
    return float(centre), jackknife(without - centre)


def _estimate(total: Array, moments: Array, weigh: float = 1.0) -> tuple[Array, Array]:
    """The rate and the judge's weight, from sums over prompts [..., 5] and the sums of their products [..., 5, 5].

    The five: labels, wins by people, wins by the judge on the same pairs, pairs without a label, the judge's wins on those. A
    prompt moves the labels' mean by u and the correction by v; of u + w v the least variance is at w = -sum u v / sum v^2,
    for prompts of one pair Cov(h, f) / ((1 + n/N) Var f).
    """
    n, h, f, rest, g = np.moveaxis(total, -1, 0)
    # without a pair that nobody labelled there is nothing to learn from the judge
    there, rest = rest > 0, np.maximum(rest, 1e-9)
    zero = np.zeros_like(n)
    u = np.stack([-h / n**2, 1 / n, zero, zero, zero], -1)
    v = np.stack([f / n**2, zero, -1 / n, -g / rest**2, 1 / rest], -1)
    moved = np.einsum("...ij,...j->...i", moments, v)
    against, spread = (u * moved).sum(-1), (v * moved).sum(-1)
    weight = weigh * there * np.clip(-against / np.maximum(spread, 1e-300), 0.0, 1.0)
    return h / n + weight * (g / rest - f / n), weight
