"""What trained policies make of each pair: DPO's implicit margin, and how far runs of other seeds differ on it.

In: runs of `favor train`, pairs. Out: mean and spread of every pair. Next: run.py.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from favor.errors import ConfigError
from favor.eval.figures import pairs as places_of
from favor.model.batched import measured
from favor.model.layout import settle
from favor.model.load import ModelConfig, Policy, load_policy, precise, weights_hash
from favor.model.logprobs import response_logps
from favor.rewards.model import load_pair
from favor.value.pairs import Pair

Array = NDArray[np.float64]


def implicit_margins(
    model: ModelConfig, runs: Sequence[str], pairs: Sequence[Pair], budget: int, progress: Callable[[int, int], None]
) -> tuple[Array, Array]:
    """The gap log (pi/ref)(chosen) - log (pi/ref)(rejected) of every pair, nats [P]: mean over runs, spread.

    Rafailov et al. 2023, arXiv 2305.18290, eq. 5, without its factor beta. A run's own training pairs look better than others.
    Raises ConfigError for a run that began at another model, CheckpointError for one that is not finished.
    """
    trees = list({id(pair.ids): pair.ids for pair in pairs}.values())
    chosen_P, rejected_P, _ = places_of(trees)

    def gap(policy: Policy) -> Array:
        ready, _ = settle(policy, model.layout, trees)
        logp_R = measured(ready, trees, partial(response_logps, ready), budget).numpy()
        return logp_R[chosen_P] - logp_R[rejected_P]

    reference = load_policy(model.model_copy(update={"lora": None}), frozen=True)
    # the reference of every run: one pass serves all
    own, before_P = weights_hash(reference), gap(precise(reference))
    found: list[Array] = []
    for run in runs:
        policy, start = load_pair(run, None)
        if weights_hash(start) != own:
            raise ConfigError(
                f"value.policies: {run} began at another model than model.path={model.path}; name runs that began there"
            )
        found.append(gap(policy) - before_P)
        progress(1, len(runs))
    return np.mean(found, 0), np.std(found, 0)
