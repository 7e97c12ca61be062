"""PPO, the system DPO is compared with: sample, score, penalise KL, estimate advantages, clipped updates. RLOO and GRPO too.

In: PpoConfig (a recipe with a [reward]). Out: a run folder with the trained policy and its KL and reward over
training. Equations: ../losses/ppo.py; rollouts: rollout.py. Next: step.py.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from favor.config import STRICT, Seed, dump
from favor.data import sources
from favor.data.batches import LoaderState, Order
from favor.data.prompts import encode_prompts, read_prompts
from favor.data.tokenize import TokensConfig
from favor.data.types import Batch
from favor.errors import NumericsError
from favor.guard import sha
from favor.losses import ppo
from favor.model.heads import Critic, logps_and_values, make_critic
from favor.model.layout import sampled_tree, settle
from favor.model.load import ModelConfig, Policy, frozen_copy, load_policy, precision_of
from favor.model.sample import SampleConfig
from favor.rewards.source import RewardConfig, check_scorer, make_scorer
from favor.rewards.source import identity as reward_identity
from favor.train import checkpoint
from favor.train.checkpoint import TrainingState
from favor.train.loop import LoopConfig, finish, micro_batches, newest_sound, num_steps, resume, save_or_stop
from favor.train.optim import OptimConfig, learning_rate, make_optimizer, set_learning_rate
from favor.train.reference import identity
from favor.train.rollout import Actors, Prompt, Rollout, collect, position_M
from favor.train.session import Bar, Session, recipe_hash, running
from favor.train.step import Machine, Objective, step

STATS = ("tokens", "policy_loss", "value_loss", "clipped", "update_kl")


class PromptsConfig(BaseModel):
    """Section [data] of `favor ppo`: any file favor reads; its prompts count."""

    model_config = STRICT
    train: str
    split: str = "train"
    max_prompts: int | None = Field(default=None, ge=1)


class PpoSettings(BaseModel):
    """Section [ppo].

    advantage: gae (with a value function), rloo or grpo (against the prompt's other samples). kl: `fixed` keeps
    kl_coef; `adaptive` steers it to target_kl (nats a response) over kl_horizon samples. updates: passes over each
    rollout in minibatch_prompts at a time; a pass stops once the policy is stop_update_kl (nats a token) from the one
    that sampled. missing_end_penalty is taken from the score of a response without an end token. explosion_kl (nats
    a response) ends the run with the last good checkpoint.
    """

    model_config = STRICT
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    samples_per_prompt: int = Field(default=4, ge=1, le=1000)
    updates: int = Field(default=2, ge=1)
    minibatch_prompts: int | None = Field(default=None, ge=1)
    gamma: float = Field(default=1.0, gt=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    clip: float = Field(default=0.2, gt=0)
    value: Literal["shared", "detached", "separate"] = "shared"
    value_clip: float = Field(default=0.2, gt=0)
    value_coef: float = Field(default=0.1, gt=0)
    kl: Literal["fixed", "adaptive"] = "adaptive"
    kl_coef: float = Field(default=0.05, ge=0)
    target_kl: float = Field(default=6.0, gt=0)
    kl_horizon: int = Field(default=1000, ge=1)
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    reward_scale: float = Field(default=1.0, gt=0)
    reward_clip: float | None = Field(default=None, gt=0)
    missing_end_penalty: float = Field(default=0.0, ge=0)
    stop_update_kl: float | None = Field(default=0.05, gt=0)
    explosion_kl: float = Field(default=200.0, gt=0)

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "PpoSettings":
        unread: set[str] = set()
        if self.advantage != "gae":
            unread |= {"gamma", "lam", "value", "value_clip", "value_coef", "whiten_rewards"}
            if self.samples_per_prompt < 2:
                raise ValueError(f"ppo.advantage = '{self.advantage}' compares samples of a prompt; take at least 2")
        if self.kl == "fixed":
            unread |= {"target_kl", "kl_horizon"}
        for name in sorted(unread & self.model_fields_set):
            raise ValueError(f"ppo.{name} is not read with advantage '{self.advantage}' and kl '{self.kl}'; remove it")
        return self


class PpoConfig(BaseModel):
    """A recipe for `favor ppo`. train.batch_prompts prompts form one rollout; train.max_steps counts rollouts."""

    model_config = STRICT
    run: str
    seed: Seed = 0
    resume: bool = False
    model: ModelConfig
    data: PromptsConfig
    tokens: TokensConfig = TokensConfig()
    reward: RewardConfig
    ppo: PpoSettings = PpoSettings()
    sample: SampleConfig = SampleConfig()
    optim: OptimConfig = OptimConfig(lr=1e-5, schedule="constant")
    train: LoopConfig = LoopConfig(save_every=10)

    @model_validator(mode="after")
    def _own_distribution(self) -> "PpoConfig":
        if self.sample.temperature != 1.0:
            raise ValueError("sample.temperature must be 1: the ratio and the KL are of the policy's own distribution")
        return self


def train_ppo(config: PpoConfig, open_session: Callable[[Path], Session]) -> None:
    """Train a policy on a reward. Raises the errors of every part; NumericsError when the KL explodes."""
    sources.check(config.data.train)
    check_scorer(config.reward)
    with running(config.run, dump(config), resume=config.resume, open_session=open_session) as session:
        _improve(config, session)


def _improve(config: PpoConfig, session: Session) -> None:
    policy = load_policy(config.model, config.seed)
    numbered = read_prompts(config.data.train, config.data.split, config.data.max_prompts)
    ids = encode_prompts(config.data.train, numbered, policy.tokenizer, config.tokens)
    prompts = [Prompt(text, i, index) for index, ((_, text), i) in enumerate(zip(numbered, ids, strict=True))]
    session.say(f"{len(prompts)} prompts")
    probe = [sampled_tree(prompt.ids, config.sample.max_new_tokens) for prompt in prompts]
    policy, why = settle(policy, config.model.layout, probe, train=True)
    session.event(0, "self_check", f"precision: {precision_of(policy.compute_dtype)}; layout: {why}")
    critic = make_critic(policy, config.ppo.value) if config.ppo.advantage == "gae" else None
    reference = policy if policy.lora else frozen_copy(policy)
    _loop(config, prompts, Actors(policy, critic, reference, make_scorer(config.reward)), session)


@dataclass(frozen=True)
class Targets:
    """What the updates of one rollout aim at: advantage and return per token [R, T], and figures for the record."""

    advantage_RT: Tensor
    return_RT: Tensor
    figures: dict[str, float]


def make_targets(settings: PpoSettings, rollout: Rollout, kl_coef: float) -> Targets:
    """KL-penalised rewards -> advantages. Scores are scaled, clipped, then penalised where no end token came."""
    mask_RT = rollout.mask_RT
    ratio_RT = rollout.logp_RT - rollout.ref_RT
    kl_RT = ppo.KL_ESTIMATORS[settings.kl_estimator](ratio_RT).masked_fill(~mask_RT, 0.0)
    score_R = rollout.score_R * settings.reward_scale
    if settings.reward_clip is not None:
        score_R = score_R.clamp(-settings.reward_clip, settings.reward_clip)
    score_R = score_R - settings.missing_end_penalty * (~rollout.ended_R)
    reward_RT = ppo.token_rewards(score_R, kl_RT, mask_RT, kl_coef)
    if settings.advantage == "gae":
        if settings.whiten_rewards:
            reward_RT = ppo.whiten(reward_RT, mask_RT, shift=False)
        advantage_RT, return_RT = ppo.gae(reward_RT, rollout.value_RT, mask_RT, settings.gamma, settings.lam)
    else:
        group_R = ppo.group_advantage(reward_RT.sum(1), rollout.group_R, settings.advantage)
        advantage_RT, return_RT = group_R[:, None] * mask_RT, torch.zeros_like(reward_RT)
    if settings.whiten_advantages and settings.advantage != "grpo":
        advantage_RT = ppo.whiten(advantage_RT, mask_RT, shift=settings.advantage == "gae")
    kl = float(ratio_RT.masked_fill(~mask_RT, 0.0).sum(1).mean())
    return Targets(
        advantage_RT,
        return_RT,
        {
            "reward": float(rollout.score_R.mean()),
            "kl": kl,
            "objective": float(score_R.mean()) - kl_coef * kl,
            "kl_coef": kl_coef,
            "entropy": -float(rollout.logp_RT[mask_RT].mean()),
            "length": float(mask_RT.sum(1).double().mean()),
            "ended": float(rollout.ended_R.double().mean()),
        },
    )


def make_objective(
    settings: PpoSettings, policy: Policy, critic: Critic | None, rollout: Rollout, targets: Targets
) -> Objective:
    """Clipped policy loss plus value_coef times the clipped value loss, summed over response tokens."""
    device = policy.device
    old_RT, advantage_RT = rollout.logp_RT.to(device), targets.advantage_RT.to(device)
    value_RT, return_RT = rollout.value_RT.to(device), targets.return_RT.to(device)

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        logp_E, value_E = logps_and_values(policy, critic, batch)
        logp_M = logp_E[batch.member_edge_M]
        place = (batch.index_R[batch.member_response_M], position_M(batch))
        policy_M = ppo.policy_loss(logp_M, old_RT[place], advantage_RT[place], settings.clip)
        total, value_sum = policy_M.sum(), torch.zeros((), device=device)
        if value_E is not None:
            value_M = value_E[batch.member_edge_M]
            value_sum = ppo.value_loss(value_M, value_RT[place], return_RT[place], settings.value_clip).sum()
            total = total + settings.value_coef * value_sum
        moved_M = logp_M.detach() - old_RT[place]
        return total, {
            "tokens": torch.full_like(moved_M, 1.0).sum(),
            "policy_loss": policy_M.detach().sum(),
            "value_loss": value_sum.detach(),
            "clipped": ((moved_M.exp() - 1).abs() > settings.clip).double().sum(),
            "update_kl": ppo.k3(-moved_M).sum(),
        }

    return Objective(loss, lambda batch: (float(batch.length_R.sum()),), STATS)


def _loop(config: PpoConfig, prompts: Sequence[Prompt], actors: Actors, session: Session) -> None:
    """Rollout, targets, updates, until the last rollout; checkpoints are of states whose KL has been seen to be sound."""
    loop, settings, policy = config.train, config.ppo, actors.policy
    parameters = policy.trainable() | (actors.critic.trainable() if actors.critic else {})
    optimizer = make_optimizer(config.optim, parameters)
    machine = Machine(parameters, optimizer, config.optim.clip, policy.device, session.world)
    inputs = (
        recipe_hash(config)
        | identity(actors.reference, config.tokens)
        | {
            "prompts": sha(json.dumps([(prompt.text, prompt.ids) for prompt in prompts])),
            "reward": reward_identity(config.reward),
        }
    )
    state = TrainingState(inputs=inputs, kl_coef=settings.kl_coef)
    expected = state
    if config.resume:
        state = resume(machine, state, session, len(prompts))
    total = num_steps(loop, len(prompts))
    order = Order(len(prompts), loop.batch_prompts, config.seed, loop.shuffle)
    began = time.monotonic() - state.seconds
    with session.stop.looked_at(), Bar(session, "ppo", total, state.step) as bar:
        for indices, place in order.batches(LoaderState(state.epoch, state.position)):
            if state.step >= total:
                break
            step_began = time.monotonic()
            set_learning_rate(optimizer, rate := learning_rate(config.optim, state.step, total))
            chosen = [prompts[i] for i in indices]
            each, seed = settings.samples_per_prompt, config.seed * 1_000_003 + state.step
            budget = loop.max_tokens_per_pack
            rollout = collect(actors, chosen, each, seed, config.sample, budget, session.world)
            assert state.kl_coef is not None
            targets = make_targets(settings, rollout, state.kl_coef)
            kl = targets.figures["kl"]
            if kl > settings.explosion_kl:
                _stop_on_explosion(config, policy, machine, state, expected, kl, session)
            save_or_stop(loop, machine, state, total, session)
            sampled_s = time.monotonic() - step_began
            objective = make_objective(settings, policy, actors.critic, rollout, targets)
            done = _update(config, machine, objective, rollout, policy)
            now = time.monotonic()
            state = state.after_step(place, now - began)
            if settings.kl == "adaptive":
                coef = ppo.adapted_kl_coef(
                    targets.figures["kl_coef"], kl, settings.target_kl, len(rollout.texts), settings.kl_horizon
                )
                state = state.model_copy(update={"kl_coef": coef})
            record = targets.figures | done | {"lr": rate, "seconds": state.seconds, "sampling_s": sampled_s}
            tokens = sum(tree.num_tokens for tree in rollout.trees)
            session.record({"kind": "step", "step": state.step, "unique_tokens": tokens, **record})
            bar.advance(1, f"reward {record['reward']:.3f}  KL {kl:.2f}  coef {record['kl_coef']:.3f}")
    finish(policy, state, session)


def _update(
    config: PpoConfig, machine: Machine, objective: Objective, rollout: Rollout, policy: Policy
) -> dict[str, float]:
    """The passes over one rollout; means per token of the last update. A pass ends early once the policy has moved too far."""
    settings, trees = config.ppo, rollout.trees
    size = settings.minibatch_prompts or len(trees)
    figures: dict[str, float] = {}
    num_updates = 0
    for _ in range(settings.updates):
        for first in range(0, len(trees), size):
            cut = micro_batches(trees[first : first + size], policy, config.train.max_tokens_per_pack, machine.world)
            done = step(machine, cut, objective)
            num_updates += 1
            figures = {name: done.sums[name] / done.sums["tokens"] for name in STATS[1:]}
            figures |= {"grad_norm": done.grad_norm, "loss": done.sums["loss"]}
            if settings.stop_update_kl is not None and figures["update_kl"] > settings.stop_update_kl:
                return figures | {"num_updates": num_updates}
    return figures | {"num_updates": num_updates}


def _stop_on_explosion(
    config: PpoConfig,
    policy: Policy,
    machine: Machine,
    state: TrainingState,
    expected: TrainingState,
    kl: float,
    session: Session,
) -> None:
    """Put the last good checkpoint back, write it as the final model, and say so with an error."""
    what = f"KL explosion: {kl:.0f} nats a response after rollout {state.step} (ppo.explosion_kl = {config.ppo.explosion_kl:.0f})"
    remedy = "lower optim.lr, raise ppo.kl_coef or lower ppo.target_kl"
    found = newest_sound(session)
    if found is None:
        session.event(state.step, "kl_explosion", f"warning: {what}; there is no checkpoint yet")
        raise NumericsError(f"{what} before the first checkpoint; {remedy}, or save sooner (train.save_every)")
    good = checkpoint.restore(found, machine.parameters, machine.optimizer, expected, machine.beside)
    session.event(state.step, "kl_explosion", f"warning: {what}; back to rollout {good.step}")
    finish(policy, good, session)
    raise NumericsError(f"{what}; the model in {session.folder.model} is that of rollout {good.step}; {remedy}")
