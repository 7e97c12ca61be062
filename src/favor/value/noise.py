"""How many labels are wrong, with a 95 % interval, from margins of heads that never saw them; and how likely each is wrong.

In: margins of pairs by their labels. Out: Noise. Next: verdict.py.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit
from scipy.stats import chi2, entropy

from favor.eval.intervals import jackknife

Array = NDArray[np.float64]
Places = NDArray[np.int64]
# shares of wrong labels that are tried; one half says nothing about the labels
_SHARES = np.linspace(0.0, 0.495, 100)
# log of the factor between a head's margin and the logit of its being right
_SCALES = (-4.0, 5.0)
_UPPER = 1.959964
# |mean sign| of the heads, 1 where all agree, from which they are taken to know what they say
_STEADY = 0.95


class Noise(NamedTuple):
    """Share of wrong labels with its 95 % interval, and the factor that makes margins logits of being right.

    how: "mixture", or "trusted" where pairs with right labels were given.
    """

    share: float
    low: float
    high: float
    scale: float
    how: str

    @property
    def certain(self) -> float:
        """The share that single labels are judged by: none, where the interval holds none."""
        return self.share if self.low > 0 else 0.0

    def wrong(self, margin_P: Array) -> Array:
        """P(the label is wrong | margin), by Bayes' rule: e s(-a m) / (e s(-a m) + (1 - e) s(a m))."""
        against = self.certain * expit(-self.scale * margin_P)
        return against / (against + (1 - self.certain) * expit(self.scale * margin_P))


def mixture(margin_MP: Array, prompt_P: Places) -> Noise:
    """Maximum likelihood of labels that are turned round with probability e, whatever the pair.

    P(label) = (1 - e) s(a m) + e s(-a m), s the logistic function, m the margin by the label, a > 0 and e < 1/2 free. The two
    are told apart by pairs whose margins are large: there the share of disagreement no longer falls. The interval is
    that of the profile likelihood (chi^2 with one degree of freedom), widened by what pairs of one prompt have in common.
    Where a disagreement that does not depend on the margin is as likely, nothing was seen to fall: heads that are wrong as
    often would look alike. Unless all heads [M, P] say the same of nearly every pair, the interval then reaches down to 0.
    """
    margin_P = margin_MP.mean(0)
    likelihood_S, scale_S = np.array([_best_scale(margin_P, share) for share in _SHARES]).T
    best = int(likelihood_S.argmax())
    limit = chi2.ppf(0.95, 1) * _in_common(margin_P * scale_S[best], _SHARES[best], prompt_P)
    inside = 2 * (likelihood_S[best] - likelihood_S) <= limit
    ends = _SHARES[inside]
    # the last share tried stands for all up to one half
    high = 0.5 if inside[-1] else float(ends[-1])
    flat = 2 * (likelihood_S[best] - _flat(margin_P)) <= limit
    steady = len(margin_MP) > 1 and np.abs(np.sign(margin_MP).mean(0)).mean() >= _STEADY
    return Noise(
        float(_SHARES[best]), 0.0 if flat and not steady else float(ends[0]), high, float(scale_S[best]), "mixture"
    )


def beside_trusted(margin_MP: Array, prompt_P: Places, trusted_HT: Array, trusted_prompt_T: Places) -> Noise:
    """The share by which agreement falls short of that on pairs of the same kind whose labels are right.

    With g odd, E[g(m)] over labels that are turned round with probability e is (1 - 2e) times that over right ones, whatever
    the heads are worth: e = (1 - E[g(m)] / E_trusted[g(m)]) / 2, here g = tanh(a m / 2), a fitted to the trusted pairs. nan
    stands where a head saw the trusted pair's prompt. The interval is the jackknife's, leaving out a prompt of either kind
    at a time.
    """
    scale = _best_scale(trusted_HT[np.isfinite(trusted_HT)], 0.0)[1]
    sums = [
        _by_prompt(np.nanmean(np.tanh(scale * margin / 2), 0), prompt)
        for margin, prompt in ((margin_MP, prompt_P), (trusted_HT, trusted_prompt_T))
    ]
    (ours, theirs), (without_ours, without_theirs) = zip(*sums, strict=True)
    if not theirs > 0:
        # the heads know nothing about right labels either
        return Noise(0.0, 0.0, 0.5, scale, "trusted")
    share = (1 - ours / theirs) / 2
    error = np.hypot(
        jackknife((1 - without_ours / theirs) / 2 - share), jackknife((1 - ours / without_theirs) / 2 - share)
    )
    low, high = np.clip([share - _UPPER * error, share + _UPPER * error], 0.0, 0.5).tolist()
    return Noise(float(np.clip(share, 0.0, 0.5)), low, high, scale, "trusted")


def _best_scale(margin_P: Array, share: float) -> tuple[float, float]:
    """(log-likelihood, a) at the factor a by which the labels are likeliest when this share of them is turned round."""

    def loss(log_scale: float) -> float:
        return -float(np.log(_likely(np.exp(log_scale) * margin_P, share)).sum())

    found = minimize_scalar(loss, bounds=_SCALES, method="bounded", options={"xatol": 1e-4})
    return -float(found.fun), float(np.exp(found.x))


def _flat(margin_P: Array) -> float:
    """The log-likelihood of a disagreement that is as frequent at every margin."""
    against = float((margin_P < 0).mean())
    return len(margin_P) * float(-entropy([against, 1 - against]))


def _likely(logit_P: Array, share: float) -> Array:
    # no margin makes a label impossible
    return np.maximum((1 - share) * expit(logit_P) + share * expit(-logit_P), 1e-12)


def _in_common(logit_P: Array, share: float, prompt_P: Places) -> float:
    """By how much the variance of the score d ln L / d e is larger than that of independent pairs, at least 1."""
    score_P = (expit(-logit_P) - expit(logit_P)) / _likely(logit_P, share)
    score_P = score_P - score_P.mean()
    together = np.bincount(np.unique(prompt_P, return_inverse=True)[1], weights=score_P)
    alone = float((score_P**2).sum())
    return max(1.0, float((together**2).sum()) / alone) if alone > 0 else 1.0


def _by_prompt(value_P: Array, prompt_P: Places) -> tuple[float, Array]:
    """The mean, and the means [prompts] when one prompt is left out."""
    places = np.unique(prompt_P, return_inverse=True)[1]
    sums, counts = np.bincount(places, weights=value_P), np.bincount(places)
    rest = np.maximum(counts.sum() - counts, 1)
    return float(value_P.mean()), (sums.sum() - sums) / rest
