"""What PPO learns from: responses sampled by the policy, with their scores, log-probs and values.

In: prompts and the policy as it is. Out: Rollout, equal on every rank. Next: ../losses/ppo.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from favor.data.prompts import sample_seeds
from favor.data.types import Batch, Text, TokenTree
from favor.model.batched import measured
from favor.model.heads import Critic, logps_and_values
from favor.model.load import Policy
from favor.model.logprobs import scored_logps
from favor.model.sample import SampleConfig, decode, sampled
from favor.ranks import World, sum_
from favor.rewards.source import Scorer
from favor.train.reference import frozen


@dataclass(frozen=True)
class Prompt:
    """A prompt as text (for the scorer) and as ids (for the policy); `index` is its place in the data."""

    text: Text
    ids: tuple[int, ...]
    index: int


@dataclass(frozen=True)
class Rollout:
    """Sampled responses: one tree per prompt; arrays on the CPU, [R] or [R, T], T the longest response.

    logp_RT, ref_RT: nats a token, of the policy that sampled and of the reference. value_RT: the critic's, or zeros.
    score_R: the scorer's. ended_R: whether the response came to its end token. group_R: its prompt.
    """

    trees: list[TokenTree]
    texts: list[str]
    mask_RT: Tensor
    logp_RT: Tensor
    ref_RT: Tensor
    value_RT: Tensor
    score_R: Tensor
    ended_R: Tensor
    group_R: Tensor


@dataclass(frozen=True)
class Models:
    """What a rollout needs: the policy, its critic (GAE), the reference, and what scores a response."""

    policy: Policy
    critic: Critic | None
    reference: Policy
    scorer: Scorer


def collect(
    models: Models, prompts: Sequence[Prompt], each: int, seed: int, config: SampleConfig, budget: int, world: World
) -> Rollout:
    """Sample `each` responses per prompt, split over ranks, and measure them. Seeds depend on prompt and `seed` alone."""
    repeated = [prompt for prompt in prompts for _ in range(each)]
    seeds = sample_seeds(seed, [prompt.index for prompt in prompts], each)
    responses = sampled(models.policy, [prompt.ids for prompt in repeated], seeds, config, world)
    trees = [
        TokenTree(prompt.ids, tuple(responses[i * each :][:each]), (True,) * each, (), first_response=i * each, row=i)
        for i, prompt in enumerate(prompts)
    ]
    texts = decode(models.policy.tokenizer, responses)
    length_R = torch.tensor([len(r) for r in responses])
    mask_RT = torch.arange(int(length_R.max()))[None] < length_R[:, None]
    logp_RT, ref_RT, value_RT = _measured(models, trees, mask_RT, budget, world)
    return Rollout(
        trees=trees,
        texts=texts,
        mask_RT=mask_RT,
        logp_RT=logp_RT,
        ref_RT=ref_RT,
        value_RT=value_RT,
        score_R=scores(models.scorer, [prompt.text for prompt in repeated], texts, world),
        ended_R=torch.tensor([r[-1] in models.policy.end_ids for r in responses]),
        group_R=torch.arange(len(prompts)).repeat_interleave(each),
    )


def scores(scorer: Scorer, prompts: Sequence[Text], responses: Sequence[str], world: World) -> Tensor:
    """The score of every response, each rank asking for its share; float64 [R], equal on all ranks."""
    mine = range(world.rank, len(responses), world.size)
    score_R = torch.zeros(len(responses), dtype=torch.float64)
    if mine:
        found = scorer([prompts[i] for i in mine], [responses[i] for i in mine])
        score_R[list(mine)] = torch.tensor(found, dtype=torch.float64)
    return sum_(score_R, world)


def _measured(models: Models, trees: Sequence[TokenTree], mask_RT: Tensor, budget: int, world: World) -> Tensor:
    """Log-probs of policy and reference, and values, of every sampled token: float32 [3, R, T], equal on all ranks."""

    def three(batch: Batch) -> Tensor:
        logp_E, value_E = logps_and_values(models.policy, models.critic, batch)
        with frozen(models.reference) as reference:
            ref_E = scored_logps(reference, batch)
        values = (logp_E, ref_E, torch.zeros_like(logp_E) if value_E is None else value_E)
        return torch.stack([value[batch.member_edge_M] for value in values])

    arrays = torch.zeros(3, *mask_RT.shape)
    arrays[:, mask_RT] = measured(models.policy, trees, three, budget, world, tokens=True).float()
    return arrays
