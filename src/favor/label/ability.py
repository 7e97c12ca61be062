"""Dawid and Skene's model of votes on pairs: how likely each answer is the better one, and how able each person is.

In: votes as numbers, known answers. Out: Fitted. Next: routing.py.

Every pair has a truth: the first answer is better, the second is, or neither. A person names the truth of a pair that has a
better answer with probability `right`, the wrong answer with `wrong`, and says "neither" else; of a pair without one they say
so with probability `even`, and each answer equally often else. Which answer is called first says nothing (the sides are
swapped at will), so both have the same prior and the same errors. Expectation-maximisation finds the parameters that
are likeliest under weak priors (counts added to each person's own), as in Dawid and Skene 1979, Applied Statistics 28.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
FIRST, SECOND, NEITHER, UNKNOWN = 0, 1, 2, -1

# counts added to what a person says of pairs with a better answer (right, wrong, neither), of pairs without (a side, neither)
DECIDED_PRIOR = np.array([3.0, 1.0, 1.0])
EVEN_PRIOR = np.array([1.0, 1.0])
# and to the pairs themselves: with a better answer, without
TRUTH_PRIOR = np.array([4.0, 1.0])
_ENOUGH = 1e-7


class Votes(NamedTuple):
    """pair, person, said: one entry a vote (said: FIRST, SECOND or NEITHER). known: of every pair its truth, or UNKNOWN."""

    pair: Ints
    person: Ints
    said: Ints
    known: Ints
    people: int


class Fitted(NamedTuple):
    """posterior [pairs, 3]: how likely each truth is. decided [people, 3]: right, wrong, neither. even [people, 2]. truth [2]."""

    posterior: Array
    decided: Array
    even: Array
    truth: Array

    @property
    def entropy(self) -> Array:
        """How uncertain the truth of each pair is, in nats; 0 where it is known."""
        return _entropy(self.posterior)

    @property
    def unvoted(self) -> float:
        """The same of a pair without votes, which is as uncertain as pairs are before anybody looks."""
        return float(_entropy(np.array([self.truth[0] / 2, self.truth[0] / 2, self.truth[1]])))


def fit(votes: Votes, rounds: int = 1000) -> Fitted:
    """The likeliest parameters after so many rounds, and every pair's posterior under them; known pairs keep their truth."""
    posterior = _pinned(_shares(votes), votes.known)
    parameters = _maximised(votes, posterior)
    for _ in range(rounds):
        before = posterior
        posterior = expected(votes, *parameters)
        parameters = _maximised(votes, posterior)
        if np.abs(posterior - before).max(initial=0.0) < _ENOUGH:
            break
    return Fitted(posterior, *parameters)


def expected(votes: Votes, decided: Array, even: Array, truth: Array) -> Array:
    """Every pair's posterior, given the parameters."""
    joint = _log_joint(votes, decided, even, truth)
    joint -= joint.max(1, keepdims=True)
    found = np.exp(joint)
    return _pinned(found / found.sum(1, keepdims=True), votes.known)


def objective(votes: Votes, decided: Array, even: Array, truth: Array) -> float:
    """What `fit` makes as large as it can: the log-likelihood of votes and known answers, and the log of the priors."""
    joint = _log_joint(votes, decided, even, truth)
    known = votes.known != UNKNOWN
    seen = joint[known, votes.known[known]].sum() + np.logaddexp.reduce(joint[~known], axis=1).sum()
    priors = (DECIDED_PRIOR * np.log(decided)).sum() + (EVEN_PRIOR * np.log(even)).sum()
    return float(seen + priors + (TRUTH_PRIOR * np.log(truth)).sum())


def _log_joint(votes: Votes, decided: Array, even: Array, truth: Array) -> Array:
    """[pairs, 3]: log of the probability of each truth together with the pair's votes."""
    right, wrong, neither = decided.T
    side, level = even.T
    # [truth, said, person]
    said = np.log(np.array([[right, wrong, neither], [wrong, right, neither], [side / 2, side / 2, level]]))
    found = np.tile(np.log([truth[0] / 2, truth[0] / 2, truth[1]]), (len(votes.known), 1))
    for k in range(3):
        found[:, k] += np.bincount(votes.pair, said[k, votes.said, votes.person], len(votes.known))
    return found


def _maximised(votes: Votes, posterior: Array) -> tuple[Array, Array, Array]:
    """The likeliest parameters, given every pair's posterior: shares of what was counted."""
    mine = posterior[votes.pair]
    place, size = votes.person * 3 + votes.said, votes.people * 3
    # [person, said, truth]
    count = np.stack([np.bincount(place, mine[:, k], size) for k in range(3)], 1).reshape(-1, 3, 3).astype(np.float64)
    right = count[:, FIRST, FIRST] + count[:, SECOND, SECOND]
    wrong = count[:, SECOND, FIRST] + count[:, FIRST, SECOND]
    neither = count[:, NEITHER, FIRST] + count[:, NEITHER, SECOND]
    sides = count[:, FIRST, NEITHER] + count[:, SECOND, NEITHER]
    decided = np.stack([right, wrong, neither], 1) + DECIDED_PRIOR
    even = np.stack([sides, count[:, NEITHER, NEITHER]], 1) + EVEN_PRIOR
    # pairs without a vote say nothing of how common ties are
    voted = posterior[np.bincount(votes.pair, minlength=len(posterior)) > 0]
    truth = np.array([voted[:, :2].sum(), voted[:, 2].sum()]) + TRUTH_PRIOR
    return _shared(decided), _shared(even), _shared(truth)


def _entropy(shares: Array) -> Array:
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(-1)


def _shared(counts: Array) -> Array:
    return counts / counts.sum(-1, keepdims=True)


def _shares(votes: Votes) -> Array:
    """Where the search begins: the shares of a pair's votes, and a little of everything."""
    found = np.full((len(votes.known), 3), 0.1)
    np.add.at(found, (votes.pair, votes.said), 1.0)
    return _shared(found)


def _pinned(posterior: Array, known: Ints) -> Array:
    sure = known != UNKNOWN
    posterior[sure] = np.eye(3)[known[sure]]
    return posterior
