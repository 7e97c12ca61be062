"""Soft labels from measured reliability: how likely a person prefers a, given what the judge said in both orders.

In: Judged. Out: Soft. Next: run.py.
"""

import math
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from favor.audit.figures import Judged
from favor.eval.figures import calibrate
from favor.eval.intervals import Array
from favor.winrate.stats import logistic

# prior variance of every coefficient, that of the logistic distribution: any probability is as likely before there are labels
_PRIOR = math.pi**2 / 3
_FOLDS = 5


class Soft(NamedTuple):
    """Probability that a is preferred, of every pair; how right it was on labelled pairs, none of which saw its own prompt.

    smoothing: the share of the judge's decided verdicts that people are against, for losses with one share for all.
    """

    chance_P: Array
    calibration: dict[str, Any] | None
    smoothing: float


def soft_labels(pairs: Judged, seed: int) -> Soft | None:
    """P(a) = sigmoid(b0 sure + b1 unsure + b2 longer + b3 own), fitted to people's verdicts; None for labels of under two prompts.

    sure: +1 or -1 where both orders prefer a or b; unsure: where one of them is a tie; both are 0 where the orders disagree.
    A normal prior of variance pi^2/3 shrinks all to 1/2 while labels are few. A labelled pair gets its probability from the
    labels of the other folds (of prompts), any other from all labels.
    """
    known = ~np.isnan(pairs.human_P)
    prompts = np.random.default_rng(seed).permutation(np.unique(pairs.prompt_P[known]))
    if len(prompts) < 2:
        return None
    fold_of = {prompt: place % _FOLDS for place, prompt in enumerate(prompts.tolist())}
    fold_P = np.array([fold_of.get(prompt, -1) for prompt in pairs.prompt_P.tolist()])
    side_P = np.nan_to_num(2 * pairs.judge_P - 1)
    sure = np.abs(side_P) == 1
    features = np.stack([side_P * sure, np.sign(side_P) * ~sure, pairs.longer_P, pairs.own_P], 1)
    logit_P = features @ _coefficients(features[known], pairs.human_P[known])
    for fold in range(min(_FOLDS, len(prompts))):
        rest, mine = known & (fold_P != fold), known & (fold_P == fold)
        logit_P[mine] = features[mine] @ _coefficients(features[rest], pairs.human_P[rest])
    decided = known & (pairs.human_P != 0.5)
    # seen from the answer that people prefer
    gap = logit_P[decided] * np.sign(2 * pairs.human_P[decided] - 1)
    calibration = asdict(calibrate(gap, pairs.prompt_P[decided])) if len(gap) else None
    return Soft(1 / (1 + np.exp(-logit_P)), calibration, _smoothing(side_P[known], pairs.human_P[known]))


def _coefficients(features: Array, human: Array) -> Array:
    return logistic(human, features, np.ones_like(human), _PRIOR)


def _smoothing(side: Array, human: Array) -> float:
    """(people against + 1) / (verdicts + 2), over decided verdicts; below one half, as losses want it."""
    decided = side != 0
    against = np.where(side[decided] > 0, 1 - human[decided], human[decided])
    return float(min((against.sum() + 1) / (len(against) + 2), 0.499))
