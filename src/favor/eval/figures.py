"""Held-out figures: accuracy and margins of a policy, calibration of a reward, sampled KL.

In: a policy, its reference's log-probs and token trees; or reward gaps of labelled pairs. Out: PairFigures, Calibration,
Divergence. A further figure is one function here and one line where `eval.json` is written (evaluate.py). Next: evaluate.py.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from favor.data.types import Batch, TokenTree
from favor.eval.intervals import SHARE, Array, mean_interval, sign_share, standard_error
from favor.guard import sha
from favor.losses.pairwise import sigmoid
from favor.model.batched import measured
from favor.model.load import Policy
from favor.model.logprobs import response_logps
from favor.model.sample import SampleConfig
from favor.ranks import World

# Tokens of samples computed at once; without gradients this bounds nothing but the memory of one forward.
_BUDGET = 2048
_ALONE = World()


@dataclass(frozen=True)
class PairFigures:
    """Arrays over pairs: implicit-reward margin (nats x beta), each model's own log-prob gap (nats), prompt index."""

    margin_P: Array
    policy_gap_P: Array
    reference_gap_P: Array
    prompt_P: NDArray[np.int64]
    loss: float
    names: list[str]

    def each(self) -> list[dict[str, object]]:
        """A record a pair, for eval-pairs.jsonl: its name, prompt, margin and both models' own gaps."""
        gaps = zip(self.policy_gap_P.tolist(), self.reference_gap_P.tolist(), strict=True)
        records = pair_records(self.names, self.prompt_P, self.margin_P)
        return [
            record | {"policy_gap": after, "reference_gap": before}
            for record, (after, before) in zip(records, gaps, strict=True)
        ]

    def as_json(self) -> dict[str, object]:
        """Means with 95 % intervals over prompts."""
        accuracy = mean_interval(sign_share(self.margin_P), clusters=self.prompt_P, bounds=SHARE)
        gaps = {"policy": self.policy_gap_P, "reference": self.reference_gap_P}
        own = {
            name: mean_interval(sign_share(gap_P), clusters=self.prompt_P, bounds=SHARE) for name, gap_P in gaps.items()
        }
        margin = mean_interval(self.margin_P, clusters=self.prompt_P)
        return {
            "pairs": len(self.margin_P),
            "prompts": len(np.unique(self.prompt_P)),
            **accuracy.named("accuracy"),
            **own["policy"].named("policy_accuracy"),
            **own["reference"].named("reference_accuracy"),
            **margin.named("margin"),
            "loss": self.loss,
        }


@dataclass(frozen=True)
class Bin:
    """Pairs whose predicted p*(winner) falls into one bin: how many, mean prediction, share predicted rightly."""

    num_pairs: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Calibration:
    """Accuracy with its interval over prompts, mean loss (nats a pair), ECE and the curve."""

    pairs: int
    prompts: int
    accuracy: float
    accuracy_interval: tuple[float, float] | None
    loss: float
    ece: float
    curve: tuple[Bin, ...]


@dataclass(frozen=True)
class Divergence:
    """Sampled KL in nats per response, of responses cut at `max_new_tokens`; se over prompts, None for a single prompt."""

    mean: float
    se: float | None
    num_samples: int
    num_prompts: int
    max_new_tokens: int


def pair_figures(
    policy: Policy,
    reference: Callable[[Batch], Tensor],
    trees: Sequence[TokenTree],
    beta: float,
    budget: int,
    progress: Callable[[int], None],
    world: World = _ALONE,
) -> PairFigures:
    """Implicit reward r = beta log(pi/ref) on every pair; `loss` is the mean DPO loss, nats a pair. Ranks share the work."""

    def both(batch: Batch) -> Tensor:
        return torch.stack([response_logps(policy, batch), reference(batch)])

    policy_R, ref_R = measured(policy, trees, both, budget, world, progress)
    chosen_P, rejected_P, prompt_P = pairs(trees)
    reward_R = beta * (policy_R - ref_R)
    margin_P = reward_R[chosen_P] - reward_R[rejected_P]
    policy_P, ref_P = ((logp_R[chosen_P] - logp_R[rejected_P]).numpy() for logp_R in (policy_R, ref_R))
    loss = float(sigmoid(margin_P, 1.0).mean())
    return PairFigures(margin_P.numpy(), policy_P, ref_P, prompt_P, loss, pair_names(trees))


def pairs(trees: Sequence[TokenTree]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair the trees' comparisons imply, as a Batch lists them: (chosen, rejected, tree), int64 [P] each.

    chosen and rejected are places among the responses as `measured` orders them.
    """
    found: list[tuple[int, int, int]] = []
    begin = 0
    for index, tree in enumerate(trees):
        for order in (comparison.order for comparison in tree.comparisons):
            found += [(begin + a, begin + b, index) for a, b in combinations(order, 2)]
        begin += len(tree.response_ids)
    chosen_P, rejected_P, tree_P = np.array(found, np.int64).reshape(-1, 3).T
    return chosen_P, rejected_P, tree_P


def pair_names(trees: Sequence[TokenTree]) -> list[str]:
    """A name of every pair, in the order of `pairs`: the same for the same token ids in any run."""
    return [
        sha(json.dumps([tree.prompt_ids, tree.response_ids[a], tree.response_ids[b]]))[:16]
        for tree in trees
        for comparison in tree.comparisons
        for a, b in combinations(comparison.order, 2)
    ]


def pair_records(names: Sequence[str], prompt_P: NDArray[np.int64], margin_P: Array) -> list[dict[str, object]]:
    """What eval-pairs.jsonl says of every pair; margin: of implicit rewards, or the gap of a reward model's scores."""
    rows = zip(names, prompt_P.tolist(), margin_P.tolist(), strict=True)
    return [{"pair": name, "prompt": prompt, "margin": margin} for name, prompt, margin in rows]


def calibrate(gap_P: Array, prompt_P: NDArray[np.int64], *, num_bins: int = 10) -> Calibration:
    """Does a predicted preference of 80 % hold in 80 % of cases? p* = sigmoid(gap), gap = r(chosen) - r(rejected).

    Each pair is seen from the side of the predicted winner, so predictions lie in [0.5, 1]; a gap of 0 is
    half right. ECE = sum_b n_b / n |observed_b - predicted_b| over equal-width bins. Guo et al. 2017, arXiv 1706.04599.
    """
    gap_P = np.asarray(gap_P, np.float64)
    right_P = sign_share(gap_P)
    predicted_P = 1 / (1 + np.exp(-np.abs(gap_P)))
    bin_P = np.minimum(((predicted_P - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    curve = tuple(
        Bin(int(inside.sum()), float(predicted_P[inside].mean()), float(right_P[inside].mean()))
        for inside in (bin_P == index for index in range(num_bins))
        if inside.any()
    )
    accuracy = mean_interval(right_P, clusters=prompt_P, bounds=SHARE)
    return Calibration(
        pairs=len(gap_P),
        prompts=len(np.unique(prompt_P)),
        accuracy=accuracy.mean,
        accuracy_interval=accuracy.ends,
        loss=float(np.logaddexp(0.0, -gap_P).mean()),
        ece=sum(part.num_pairs * abs(part.observed - part.predicted) for part in curve) / len(gap_P),
        curve=curve,
    )


def kl_of_samples(
    policy: Policy,
    reference: Callable[[Batch], Tensor],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[tuple[int, ...]],
    config: SampleConfig,
    world: World = _ALONE,
) -> Divergence:
    """KL(policy || reference) = E_{y~policy}[log pi(y|x) - log ref(y|x)], from responses the policy sampled.

    Unbiased for responses cut at max_new_tokens; the samples must be of the policy's own distribution
    (temperature 1). `reference` gives log ref(y|x) of a batch. Samples of one prompt are not independent: the standard
    error is over prompts. Ranks share the work, all with the same prompts and responses.
    """
    assert config.temperature == 1.0, "the estimator is of the policy's own distribution"
    trees = [
        TokenTree(tuple(prompt), (response,), (True,), (), first_response=i, row=0)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    ratio = log_ratios(policy, reference, trees, world)
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    error = standard_error(ratio.numpy(), np.array([places[tuple(prompt)] for prompt in prompts]))
    return Divergence(
        mean=float(ratio.mean()),
        se=error if len(places) > 1 else None,
        num_samples=len(ratio),
        num_prompts=len(places),
        max_new_tokens=config.max_new_tokens,
    )


def log_ratios(
    policy: Policy, reference: Callable[[Batch], Tensor], trees: Sequence[TokenTree], world: World = _ALONE
) -> Tensor:
    """Log pi(y|x) - log ref(y|x) of every response: float64 [responses], CPU, without gradients."""
    return measured(policy, trees, lambda batch: response_logps(policy, batch) - reference(batch), _BUDGET, world)
