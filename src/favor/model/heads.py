"""Scalar heads: a reward model's score of a response, and a value of every position for PPO.

In: a Policy and a Batch. Out: score_R at each response's last token; value_E where each token was chosen.
Next: ../losses/pairwise.py.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from favor.data.types import Batch, TokenTree
from favor.errors import CheckpointError, ConfigError
from favor.model.layout import Method, settle
from favor.model.load import ModelConfig, Policy, load_parts, make_policy, sharded, splits
from favor.model.logprobs import edge_logps, head_states, logps_of_states, scored_logps, within
from favor.parts import assign_, whole
from favor.ranks import Shard

# names under which a causal LM keeps the head that a reward model replaces
_LM_HEAD = frozenset({"lm_head.weight", "lm_head.bias", "embed_out.weight", "output.weight"})


def load_scalar_model(
    config: ModelConfig, seed: int = 0, shard: Shard = "none", *, fresh: bool = False, frozen: bool = False
) -> Policy:
    """A causal LM with a scalar head, as transformers' sequence classifier with one output.

    shard: as ranks.shard.
    fresh: the start of a reward model, whose folder may be a plain LM: a head that it does not have begins at zero, so
    every first score is 0. frozen: none of it will train.
    Raises CheckpointError for a model that is missing or incomplete, gives more than one number, or (unless fresh) has no
    trained head.
    """
    model, tokenizer, found = load_parts(AutoModelForSequenceClassification, config, frozen=frozen, num_labels=1)
    headless = "score.weight" in found.missing
    if headless and not fresh:
        raise CheckpointError(
            f"{config.path}: a language model without a trained score (score.weight), not a reward model: it would score "
            "everything 0; train one from it with favor reward"
        )
    if "score.weight" in found.mismatched:
        labels = found.mismatched["score.weight"][0][0]
        raise CheckpointError(
            f"{config.path}: a classifier of {labels} labels; a reward model gives one number; name another model"
        )
    # the head of the plain LM it was made from has no place here
    found.without(_LM_HEAD | ({"score.weight"} if headless else frozenset())).refuse(config.path)
    if not isinstance(dict(model.named_children()).get("score"), nn.Linear):
        raise CheckpointError(
            f"{config.path}: {type(model).__name__} keeps no linear layer named 'score'; choose another"
        )
    if headless:
        nn.init.zeros_(model.get_submodule("score").weight)
    policy = make_policy(model, tokenizer, config, seed, frozen=frozen, place=not splits(shard))
    _pad_without_end(policy, tokenizer)
    return sharded(policy, shard)


def _pad_without_end(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad with a token that ends no turn: transformers reads the score at the last token that is not padding."""
    config = policy.causal_lm.config
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    # some tokenizers bring a padding token that the model has no embedding for
    fitting = [i for i in candidates if isinstance(i, int) and i < config.get_text_config().vocab_size]
    pad = next((i for i in fitting if i not in policy.end_ids), None)
    if pad is None:
        raise ConfigError(
            f"{policy.source}: every special token of its tokenizer ends a turn, so none can pad; add a pad token"
        )
    tokenizer.pad_token_id = config.get_text_config().pad_token_id = config.pad_token_id = pad


def response_scores(policy: Policy, batch: Batch) -> Tensor:
    """The scalar at the last token of every response, its end-of-turn token included: float64 [R], differentiable."""

    def forward() -> Tensor:
        hidden_RH = head_states(policy, batch, batch.last_R)
        return policy.causal_lm.score(hidden_RH.float()).squeeze(-1).double()  # pyright: ignore[reportCallIssue]

    return within(policy, forward)


def plain_score(policy: Policy, ids_1T: Tensor, _start: int) -> Tensor:
    """The score of one unpadded row by plain transformers, wherever its response begins: float64 scalar."""
    return within(policy, lambda: policy.model(input_ids=ids_1T, use_cache=False).logits[0, 0].double())


SCORES = Method(response_scores, plain_score, causal=False)


def settle_scores(
    policy: Policy, asked: str, trees: Sequence[TokenTree], *, also: Iterable[TokenTree] = (), train: bool = False
) -> tuple[Policy, str]:
    """`settle` by scores. A head that starts at zero is random meanwhile, or every way of computing would agree."""
    weight = policy.causal_lm.get_submodule("score").weight
    assert isinstance(weight, Tensor)
    before = whole(weight.detach()).clone()
    try:
        generator = torch.Generator(weight.device).manual_seed(0)
        assign_(weight, torch.empty_like(before).normal_(0, weight.shape[1] ** -0.5, generator=generator))
        return settle(policy, asked, trees, SCORES, also=also, train=train)
    finally:
        assign_(weight, before)


@dataclass(frozen=True)
class Critic:
    """PPO's value function: a scalar head on the policy's states, or on a trunk of its own."""

    head: nn.Linear
    mode: Literal["shared", "detached", "separate"]
    trunk: Policy | None

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of head and own trunk."""
        found = {f"critic.head.{name}": p for name, p in self.head.named_parameters()}
        if self.trunk is not None:
            found |= {f"critic.trunk.{name}": p for name, p in self.trunk.backbone.named_parameters()}
        return found


def make_critic(policy: Policy, mode: Literal["shared", "detached", "separate"]) -> Critic:
    """A head that starts at zero. Raises ConfigError for a trunk of its own beside LoRA, which would train in full."""
    width = policy.causal_lm.config.get_text_config().hidden_size
    head = nn.Linear(width, 1).to(policy.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if mode != "separate":
        return Critic(head, mode, None)
    if policy.lora:
        raise ConfigError(
            "ppo.advantage.value = 'separate' would train a second full model beside LoRA; use shared or detached"
        )
    model = deepcopy(policy.causal_lm)
    return Critic(head, mode, replace(policy, model=model, backbone=model.base_model, fast_head=None))


def logps_and_values(policy: Policy, critic: Critic | None, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Log-prob of every scored token (float32 [E], nats) and the value of the state it was chosen in (float32 [E]).

    One forward serves both when the critic lives on the policy's states.
    """
    if critic is None:
        return scored_logps(policy, batch), None

    def forward() -> tuple[Tensor, Tensor]:
        states_NH = head_states(critic.trunk or policy, batch, batch.head_N)
        shared = critic.trunk is None and policy.fast_head is not None
        return logps_of_states(policy, batch, states_NH) if shared else edge_logps(policy, batch), states_NH

    logp_E, states_NH = within(policy, forward)
    seen_NH = states_NH.detach() if critic.mode == "detached" else states_NH
    return logp_E, critic.head(seen_NH.float()).squeeze(-1)[batch.edge_head_E]
