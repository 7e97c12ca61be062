"""What PPO learns from: responses sampled by the policy, with their scores, log-probs and values.

In: prompts and the policy as it is. Out: Rollout, equal on every rank. Next: ../losses/ppo.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from favor.data.prompts import sample_seeds
from favor.data.types import Batch, Text, TokenTree
from favor.model.heads import Critic, logps_and_values
from favor.model.load import Policy
from favor.model.logprobs import scored_logps
from favor.model.sample import SampleConfig, decode, sample
from favor.ranks import World, sum_
from favor.rewards.source import Scorer
from favor.train.loop import micro_batches
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
class Actors:
    """Everyone a rollout needs: who acts, who judges, who it is compared with."""

    policy: Policy
    critic: Critic | None
    reference: Policy
    scorer: Scorer


def collect(
    actors: Actors, prompts: Sequence[Prompt], each: int, seed: int, config: SampleConfig, budget: int, world: World
) -> Rollout:
    """Sample `each` responses per prompt, split over ranks, and measure them. Seeds depend on prompt and `seed` alone."""
    trees = _sampled(actors.policy, prompts, each, seed, config, world)
    responses = [response for tree in trees for response in tree.response_ids]
    texts = decode(actors.policy, responses)
    length_R = torch.tensor([len(r) for r in responses])
    mask_RT = torch.arange(int(length_R.max()))[None] < length_R[:, None]
    arrays = _measured(actors, trees, mask_RT.shape, budget, world)
    return Rollout(
        trees=trees,
        texts=texts,
        mask_RT=mask_RT,
        logp_RT=arrays[0],
        ref_RT=arrays[1],
        value_RT=arrays[2],
        score_R=_scores(actors.scorer, prompts, texts, each, world),
        ended_R=torch.tensor([r[-1] in actors.policy.end_ids for r in responses]),
        group_R=torch.arange(len(prompts)).repeat_interleave(each),
    )


def position_M(batch: Batch) -> Tensor:
    """The place of every scored token within its response: int64 [M]."""
    start_R = batch.length_R.cumsum(0) - batch.length_R
    return torch.arange(batch.member_response_M.shape[0], device=start_R.device) - start_R[batch.member_response_M]


def _sampled(
    policy: Policy, prompts: Sequence[Prompt], each: int, seed: int, config: SampleConfig, world: World
) -> list[TokenTree]:
    mine = prompts[world.rank :: world.size]
    ids = [prompt.ids for prompt in mine for _ in range(each)]
    found = sample(policy, ids, sample_seeds(seed, [p.index for p in mine], each), config) if ids else []
    # token ids + 1, so that 0 marks what is not there; the sum over ranks puts every rank's rows together
    table = torch.zeros(len(prompts), each, config.max_new_tokens, dtype=torch.int64, device=policy.device)
    for row, start in enumerate(range(0, len(found), each)):
        for k, response in enumerate(found[start : start + each]):
            table[world.rank + row * world.size, k, : len(response)] = torch.tensor(response) + 1
    rows = [[tuple(t - 1 for t in r if t) for r in group] for group in sum_(table, world).tolist()]
    return [
        TokenTree(prompt.ids, tuple(group), (True,) * each, (), first_response=i * each, row=i)
        for i, (prompt, group) in enumerate(zip(prompts, rows, strict=True))
    ]


def _measured(
    actors: Actors, trees: Sequence[TokenTree], shape: torch.Size, budget: int, world: World
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of policy and reference, and values, of every sampled token: float32 [R, T], equal on all ranks."""
    device = actors.policy.device
    arrays = torch.zeros(3, *shape, device=device)
    with torch.no_grad():
        for cut in micro_batches(trees, actors.policy, budget, world):
            batch = cut.to(device)
            logp_E, value_E = logps_and_values(actors.policy, actors.critic, batch)
            with frozen(actors.reference) as reference:
                ref_E = scored_logps(reference, batch)
            place = (batch.index_R[batch.member_response_M], position_M(batch))
            arrays[0][place] = logp_E[batch.member_edge_M]
            arrays[1][place] = ref_E[batch.member_edge_M]
            if value_E is not None:
                arrays[2][place] = value_E[batch.member_edge_M]
    logp_RT, ref_RT, value_RT = sum_(arrays, world).cpu().unbind()
    return logp_RT, ref_RT, value_RT


def _scores(scorer: Scorer, prompts: Sequence[Prompt], texts: Sequence[str], each: int, world: World) -> Tensor:
    """This rank scores its own prompts' responses; float64 [R], equal on all ranks."""
    mine = [i for p in range(world.rank, len(prompts), world.size) for i in range(p * each, (p + 1) * each)]
    score_R = torch.zeros(len(texts), dtype=torch.float64)
    if mine:
        found = scorer([prompts[i // each].text for i in mine], [texts[i] for i in mine])
        score_R[mine] = torch.tensor(found, dtype=torch.float64)
    return sum_(score_R, world)
