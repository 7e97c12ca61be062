"""How far the policy has moved: sampled KL(policy || reference) over whole responses.

In: policy, reference and prompts. Out: the mean over samples y ~ policy of log pi(y|x) - log ref(y|x), nats,
with its standard error. Next: margins.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from favor.data import pack
from favor.data.types import Batch, TokenTree
from favor.model.load import Policy
from favor.model.logprobs import response_logps
from favor.model.sample import SampleConfig

# Tokens scored at once; without gradients this bounds nothing but the memory of one forward.
_BUDGET = 2048


@dataclass(frozen=True)
class Divergence:
    """Sampled KL in nats per response, of responses cut at `max_new_tokens`."""

    mean: float
    se: float
    num_samples: int
    max_new_tokens: int

    def as_json(self) -> dict[str, float]:
        """For eval.json and metrics."""
        return asdict(self)


def kl_of_samples(
    policy: Policy,
    reference: Callable[[Batch], Tensor],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[tuple[int, ...]],
    config: SampleConfig,
) -> Divergence:
    """KL(policy || reference) = E_{y~policy}[log pi(y|x) - log ref(y|x)], from responses the policy sampled.

    Unbiased for responses cut at max_new_tokens; the samples must be of the policy's own distribution
    (temperature 1). `reference` gives log ref(y|x) of a batch.
    """
    assert config.temperature == 1.0, "the estimator is of the policy's own distribution"
    trees = [
        TokenTree(tuple(prompt), (response,), (True,), (), first_response=i, row=0)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    ratio = log_ratios(policy, reference, trees)
    return Divergence(
        mean=float(ratio.mean()),
        se=float(ratio.std() / len(ratio) ** 0.5) if len(ratio) > 1 else float("nan"),
        num_samples=len(ratio),
        max_new_tokens=config.max_new_tokens,
    )


def log_ratios(policy: Policy, reference: Callable[[Batch], Tensor], trees: Sequence[TokenTree]) -> Tensor:
    """Log pi(y|x) - log ref(y|x) of every response: float64 [responses], CPU, without gradients."""
    ratio = torch.zeros(sum(len(tree.response_ids) for tree in trees), dtype=torch.float64)
    with torch.no_grad():
        for members in pack.plan([pack.computed_tokens(tree, policy.layout) for tree in trees], _BUDGET):
            batch = pack.build([trees[i] for i in members], policy.layout).to(policy.device)
            difference = response_logps(policy, batch) - reference(batch)
            ratio[batch.index_R.cpu() - trees[0].first_response] = difference.cpu()
    return ratio
