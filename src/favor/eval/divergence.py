"""How far the policy has moved: sampled KL(policy || reference) over whole responses.

In: policy, reference and prompts. Out: the mean over samples y ~ policy of log pi(y|x) - log ref(y|x), nats,
with its standard error. Next: margins.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

from favor.data.types import Batch, TokenTree
from favor.eval.intervals import standard_error
from favor.model.batched import measured
from favor.model.load import Policy
from favor.model.logprobs import response_logps
from favor.model.sample import SampleConfig
from favor.ranks import World

# Tokens scored at once; without gradients this bounds nothing but the memory of one forward.
_BUDGET = 2048
_ALONE = World()


@dataclass(frozen=True)
class Divergence:
    """Sampled KL in nats per response, of responses cut at `max_new_tokens`; se over prompts, None for a single prompt."""

    mean: float
    se: float | None
    num_samples: int
    num_prompts: int
    max_new_tokens: int

    def as_json(self) -> dict[str, float | None]:
        """For eval.json and metrics."""
        return asdict(self)


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
    error is over prompts.
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
