"""Scalar heads: a reward model's score of a response, and a value of every position for PPO.

In: a Policy and a Batch. Out: score_R at each response's last token; value_E where each token was chosen.
Next: ../losses/reward.py.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from favor.data.types import Batch
from favor.errors import CheckpointError, ConfigError
from favor.model.load import ModelConfig, Policy, check_path, load_tokenizer, make_policy, merge_adapter, readable
from favor.model.logprobs import head_states, logps_of_states, scored_logps


def load_scalar_model(config: ModelConfig, seed: int = 0) -> Policy:
    """Any causal LM with a scalar head, as transformers' sequence classifier with one output.

    A head that the folder does not have starts at zero, so every first score is 0. The padding id is set to
    one that ends no turn: transformers reads the score at the last token that is not padding, and that must be the
    end-of-turn token. Raises CheckpointError for a model that is missing, or classifies into more than one class.
    """
    check_path(config.path)
    tokenizer = load_tokenizer(config)
    with readable(config.path):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=torch.float32,
            num_labels=1,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    fresh = "score.weight" in info["missing_keys"]
    plain = merge_adapter(model, config.lora, config.path)
    if not isinstance(dict(plain.named_children()).get("score"), nn.Linear):
        raise CheckpointError(f"{config.path}: {type(model).__name__} keeps no linear layer named 'score'")
    if fresh:
        nn.init.zeros_(plain.get_submodule("score").weight)  # pyright: ignore[reportArgumentType]
    policy = make_policy(plain, tokenizer, config, seed)
    _pad_without_end(policy, tokenizer)
    return policy


def response_scores(policy: Policy, batch: Batch) -> Tensor:
    """The scalar at the last token of every response, its end-of-turn token included: float64 [R], differentiable."""
    hidden_RH = head_states(policy, batch, batch.last_R)
    return policy.causal_lm.score(hidden_RH.float()).squeeze(-1).double()  # pyright: ignore[reportCallIssue]


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
        raise ConfigError("ppo.value = 'separate' would train a second full model beside LoRA; use shared or detached")
    model = deepcopy(policy.causal_lm)
    return Critic(head, mode, replace(policy, model=model, backbone=model.base_model, fast_head=None))


def logps_and_values(policy: Policy, critic: Critic | None, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Log-prob of every scored token (float32 [E], nats) and the value of the state it was chosen in (float32 [E]).

    One forward serves both when the critic lives on the policy's states.
    """
    if critic is None:
        return scored_logps(policy, batch), None
    if critic.trunk is not None:
        return scored_logps(policy, batch), _values(critic, head_states(critic.trunk, batch, batch.head_N), batch)
    states_NH = head_states(policy, batch, batch.head_N)
    logp_E = logps_of_states(policy, batch, states_NH) if policy.fast_head is not None else scored_logps(policy, batch)
    return logp_E, _values(critic, states_NH.detach() if critic.mode == "detached" else states_NH, batch)


def _values(critic: Critic, states_NH: Tensor, batch: Batch) -> Tensor:
    return critic.head(states_NH.float()).squeeze(-1)[batch.edge_head_E]


def _pad_without_end(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    config = policy.causal_lm.config
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    # some tokenizers bring a padding token that the model has no embedding for
    fitting = [i for i in candidates if isinstance(i, int) and i < config.get_text_config().vocab_size]
    pad = next((i for i in fitting if i not in policy.end_ids), None)
    if pad is None:
        raise ConfigError(
            f"{policy.source}: every special token of its tokenizer ends a turn, so none can pad; add a pad token"
        )
    tokenizer.pad_token_id = pad
    config.get_text_config().pad_token_id = pad
    config.pad_token_id = pad
