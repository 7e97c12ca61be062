"""PPO, the system DPO is compared with: sample, score, penalise KL, estimate advantages, clipped updates. RLOO and GRPO too.

In: PpoConfig (a recipe with a [reward]). Out: a run folder with the trained policy and its KL and reward over
training. Equations: ../losses/ppo.py; rollouts: rollout.py. Next: step.py.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, Tag, model_validator
from torch import Tensor

from favor.config import STRICT, Resume, Run, Seed, by_kind, dump
from favor.data import sources
from favor.data.prompts import PromptTokens, encode_prompts, read_prompts
from favor.data.settings import Columns, kwargs_are_read
from favor.data.types import Batch, sampled_tree
from favor.errors import NumericsError
from favor.guard import sha
from favor.losses import ppo
from favor.model.heads import Critic, logps_and_values, make_critic
from favor.model.layout import settle
from favor.model.load import Policy, TrainedModel, load_policy
from favor.model.logprobs import position_M
from favor.model.sample import SampleConfig
from favor.ranks import RanksConfig
from favor.rewards.source import RewardConfig, check_scorer, make_scorer
from favor.rewards.source import identity as reward_identity
from favor.train import checkpoint
from favor.train.loggers import LoggedConfig
from favor.train.loop import LoopConfig, SaveConfig, Training, can_be_split, finish, make_training, turns
from favor.train.optim import AdamW, OptimConfig
from favor.train.packs import looked_at, settled
from favor.train.reference import base_of, identity
from favor.train.rollout import Models, Prompt, Rollout, collect
from favor.train.session import OpenSession, Session, TrainingState, recipe_hash, resumes, running
from favor.train.step import Objective, step

# sums over the response tokens of a batch
_STATS = ("tokens", "policy_loss", "value_loss", "clipped", "update_kl")


Estimator = Annotated[Literal["k1", "k2", "k3"], Field(description="How the KL of a token is estimated.")]


class PromptsConfig(BaseModel):
    """Section [data] of `favor ppo`: any file favor reads; its prompts count."""

    model_config = STRICT
    train: str
    """A source whose prompts are answered."""
    split: str = "train"
    """The split to read, of a source that has several."""
    columns: Columns = {}
    max_prompts: int | None = Field(default=None, ge=1)
    """Use only the first N prompts."""


class Gae(BaseModel):
    """Advantages by a value function (generalised advantage estimation)."""

    model_config = STRICT
    kind: Literal["gae"] = "gae"
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of later rewards."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """How far to trust the value function: 0 one step ahead, 1 not at all."""
    value: Literal["shared", "detached", "separate"] = "shared"
    """The value function's body: the policy's, the same without its gradient, or a model of its own."""
    value_clip: float = Field(default=0.2, gt=0)
    """How far an update may move a value."""
    value_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation."""
    whiten: bool = True
    """Give advantages mean 0 and standard deviation 1."""


class Rloo(BaseModel):
    """Advantages against the mean of the prompt's other samples."""

    model_config = STRICT
    kind: Literal["rloo"] = "rloo"
    whiten: bool = True
    """Give advantages standard deviation 1."""


class Grpo(BaseModel):
    """Advantages against the prompt's samples, over their standard deviation."""

    model_config = STRICT
    kind: Literal["grpo"] = "grpo"


class FixedKl(BaseModel):
    """The KL penalty keeps its weight."""

    model_config = STRICT
    kind: Literal["fixed"] = "fixed"
    coef: float = Field(default=0.05, ge=0)
    """Weight of the KL in the reward."""
    estimator: Estimator = "k1"


class AdaptiveKl(BaseModel):
    """The KL penalty's weight steers the KL to a target."""

    model_config = STRICT
    kind: Literal["adaptive"] = "adaptive"
    coef: float = Field(default=0.05, gt=0)
    """Weight of the KL in the reward at the start."""
    estimator: Estimator = "k1"
    target: float = Field(default=6.0, gt=0)
    """KL to steer to, nats a response."""
    horizon: int = Field(default=1000, ge=1)
    """Samples over which the weight may change by a fifth of its value."""


Advantage = Annotated[
    Annotated[Gae, Tag("gae")] | Annotated[Rloo, Tag("rloo")] | Annotated[Grpo, Tag("grpo")],
    by_kind("gae"),
    Field(description="How advantages are estimated."),
]
KlControl = Annotated[
    Annotated[FixedKl, Tag("fixed")] | Annotated[AdaptiveKl, Tag("adaptive")],
    by_kind("adaptive"),
    Field(description="How the weight of the KL penalty is controlled."),
]


class PpoSettings(BaseModel):
    """Section [ppo]."""

    model_config = STRICT
    advantage: Advantage = Gae()
    kl: KlControl = AdaptiveKl()
    samples_per_prompt: int = Field(default=4, ge=1, le=1000)
    """Responses sampled for each prompt of a rollout."""
    updates: int = Field(default=2, ge=1)
    """Passes over each rollout."""
    minibatch_prompts: int | None = Field(default=None, ge=1)
    """Prompts of a rollout in one optimizer step; all of them by default."""
    clip: float = Field(default=0.2, gt=0)
    """How far a token's probability ratio may move before its gradient stops."""
    reward_scale: float = Field(default=1.0, gt=0)
    """Factor of every score."""
    reward_clip: float | None = Field(default=None, gt=0)
    """Largest size of a scaled score."""
    missing_end_penalty: float = Field(default=0.0, ge=0)
    """Taken from the score of a response without an end token."""
    stop_update_kl: float | None = Field(default=0.05, gt=0)
    """End the passes once the policy is so far from the one that sampled, nats a token."""
    explosion_kl: float = Field(default=200.0, gt=0)
    """End the run at this KL, nats a response, with the last good checkpoint."""

    @model_validator(mode="after")
    def _samples_to_compare(self) -> "PpoSettings":
        if self.samples_per_prompt < 2 and not isinstance(self.advantage, Gae):
            raise ValueError(f"ppo.advantage '{self.advantage.kind}' compares samples of a prompt; take at least 2")
        return self


class PpoConfig(BaseModel):
    """A recipe for `favor ppo`. train.batch_prompts prompts form one rollout; train.max_steps counts rollouts."""

    model_config = STRICT
    _kwargs = model_validator(mode="after")(kwargs_are_read)
    _split = model_validator(mode="after")(can_be_split)
    run: Run
    seed: Seed = 0
    resume: Resume = False
    model: TrainedModel
    data: PromptsConfig
    tokens: PromptTokens = PromptTokens()
    reward: RewardConfig
    ppo: PpoSettings = PpoSettings()
    sample: SampleConfig = SampleConfig()
    optim: OptimConfig = AdamW(lr=1e-5, schedule="constant")
    train: LoopConfig = LoopConfig()
    ranks: RanksConfig = RanksConfig()
    save: SaveConfig = SaveConfig(every=10)
    watch: LoggedConfig = LoggedConfig()

    @model_validator(mode="after")
    def _one_model_is_split(self) -> "PpoConfig":
        gae = self.ppo.advantage
        if self.ranks.shard != "none" and isinstance(gae, Gae) and gae.value == "separate":
            raise ValueError(
                "ppo.advantage.value = 'separate' is a second model, which ranks.shard does not split; use shared or detached"
            )
        return self

    @model_validator(mode="after")
    def _own_distribution(self) -> "PpoConfig":
        if self.sample.temperature != 1.0:
            raise ValueError("sample.temperature must be 1: the ratio and the KL are of the policy's own distribution")
        return self


def train_ppo(config: PpoConfig, open_session: OpenSession) -> None:
    """Train a policy on a reward. Raises the errors of every part; NumericsError when the KL explodes."""
    sources.check(config.data.train)
    check_scorer(config.reward)
    config = config.model_copy(update={"resume": resumes(config.run, config.resume)})
    logger, recipe = config.watch.logger, dump(config)
    with running(config.run, recipe, resume=config.resume, open_session=open_session, logger=logger) as session:
        _improve(config, session)


def _improve(config: PpoConfig, session: Session) -> None:
    policy = load_policy(config.model, config.seed, config.ranks.shard)
    numbered = read_prompts(config.data.train, config.data.split, config.data.max_prompts, config.data.columns)
    ids = encode_prompts(config.data.train, numbered, policy.tokenizer, config.tokens.full)
    prompts = [Prompt(text, i, index) for index, ((_, text), i) in enumerate(zip(numbered, ids, strict=True))]
    session.say(f"{len(prompts)} prompts")
    probe = [sampled_tree(prompt.ids, config.sample.max_new_tokens) for prompt in prompts]
    policy, why = settle(policy, config.model.layout, probe, train=True)
    session.self_check(policy, why)
    few = [[probe[i] for i in some] for some in looked_at(config.train, range(len(probe)))]
    packs = settled(config.train, config.model, policy, few, session, resume=config.resume)
    config = config.model_copy(update={"train": packs})
    critic = make_critic(policy, gae.value) if isinstance(gae := config.ppo.advantage, Gae) else None
    _loop(config, prompts, Models(policy, critic, base_of(policy), make_scorer(config.reward)), session)


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
    advantage = settings.advantage
    kl_RT = ppo.KL_ESTIMATORS[settings.kl.estimator](ratio_RT).masked_fill(~mask_RT, 0.0)
    score_R = rollout.score_R * settings.reward_scale
    if settings.reward_clip is not None:
        score_R = score_R.clamp(-settings.reward_clip, settings.reward_clip)
    score_R = score_R - settings.missing_end_penalty * (~rollout.ended_R)
    reward_RT = ppo.token_rewards(score_R, kl_RT, mask_RT, kl_coef)
    if isinstance(advantage, Gae):
        if advantage.whiten_rewards:
            reward_RT = ppo.whiten(reward_RT, mask_RT, shift=False)
        advantage_RT, return_RT = ppo.gae(reward_RT, rollout.value_RT, mask_RT, advantage.gamma, advantage.lam)
    else:
        group_R = ppo.group_advantage(reward_RT.sum(1), rollout.group_R, advantage.kind)
        advantage_RT, return_RT = group_R[:, None] * mask_RT, torch.zeros_like(reward_RT)
    if not isinstance(advantage, Grpo) and advantage.whiten:
        advantage_RT = ppo.whiten(advantage_RT, mask_RT, shift=isinstance(advantage, Gae))
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
        if value_E is not None and isinstance(gae := settings.advantage, Gae):
            value_M = value_E[batch.member_edge_M]
            value_sum = ppo.value_loss(value_M, value_RT[place], return_RT[place], gae.value_clip).sum()
            total = total + gae.value_coef * value_sum
        moved_M = logp_M.detach() - old_RT[place]
        return total, {
            "tokens": torch.ones_like(moved_M).sum(),
            "policy_loss": policy_M.detach().sum(),
            "value_loss": value_sum.detach(),
            "clipped": ((moved_M.exp() - 1).abs() > settings.clip).double().sum(),
            "update_kl": ppo.k3(-moved_M).sum(),
        }

    return Objective(loss, lambda batch: (float(batch.length_R.sum()),), _STATS)


def _loop(config: PpoConfig, prompts: Sequence[Prompt], models: Models, session: Session) -> None:
    """Rollout, targets, updates, until the last rollout; checkpoints are of states whose KL has been seen to be sound."""
    settings, policy, budget = config.ppo, models.policy, config.train.budget
    inputs = recipe_hash(config) | identity(models.reference, config.tokens.full)
    inputs["prompts"] = sha(json.dumps([(prompt.text, prompt.ids) for prompt in prompts]))
    inputs["reward"] = reward_identity(config.reward)
    beside = models.critic.trainable() if models.critic else {}
    training = make_training(config, policy, range(len(prompts)), session, beside=beside)
    start = TrainingState(inputs=inputs, kl_coef=settings.kl.coef)
    with contextlib.closing(turns(training, "ppo", start)) as steps:
        for turn in steps:
            seed = config.seed * 1_000_003 + turn.state.step
            chosen, coef = [prompts[i] for i in turn.indices], turn.state.kl_coef
            assert coef is not None
            rollout = collect(models, chosen, settings.samples_per_prompt, seed, config.sample, budget, session.world)
            targets = make_targets(settings, rollout, coef)
            kl = targets.figures["kl"]
            if kl > settings.explosion_kl:
                _stop_on_explosion(training, turn.state, kl, settings.explosion_kl)
            turn.save_or_stop()
            sampled_s = time.monotonic() - turn.began
            done = _update(
                training, settings, make_objective(settings, policy, models.critic, rollout, targets), rollout
            )
            turn.done()
            if isinstance(control := settings.kl, AdaptiveKl):
                turn.keep(kl_coef=ppo.adapted_kl_coef(coef, kl, control.target, len(rollout.texts), control.horizon))
            record = targets.figures | done | {"sampling_s": sampled_s}
            record["unique_tokens"] = sum(tree.num_tokens for tree in rollout.trees)
            turn.record(record, f"reward {record['reward']:.3f}  KL {kl:.2f}  coef {coef:.3f}")


def _update(training: Training, settings: PpoSettings, objective: Objective, rollout: Rollout) -> dict[str, float]:
    """The passes over one rollout; means per token of the last update. A pass ends early once the policy has moved too far."""
    trees = rollout.trees
    size = settings.minibatch_prompts or len(trees)
    figures: dict[str, float] = {}
    updates = [trees[i : i + size] for _ in range(settings.updates) for i in range(0, len(trees), size)]
    for number, minibatch in enumerate(updates, 1):
        done = step(training.learner, training.micro_batches(minibatch), objective)
        figures = {name: done.sums[name] / done.sums["tokens"] for name in _STATS[1:]}
        figures |= {"grad_norm": done.grad_norm, "loss": done.sums["loss"], "num_updates": number}
        if settings.stop_update_kl is not None and figures["update_kl"] > settings.stop_update_kl:
            break
    return figures


def _stop_on_explosion(training: Training, state: TrainingState, kl: float, limit: float) -> None:
    """Put the last good checkpoint back, write it as the final model, and say so with an error."""
    session = training.session
    what = f"KL explosion: {kl:.0f} nats a response after rollout {state.step} (ppo.explosion_kl = {limit:.0f})"
    remedy = "lower optim.lr, raise ppo.kl.coef or lower ppo.kl.target"
    found = checkpoint.newest_sound(session)
    if found is None:
        session.event(state.step, "kl_explosion", f"warning: {what}; there is no checkpoint yet")
        raise NumericsError(f"{what} before the first checkpoint; {remedy}, or save earlier (save.every)")
    good = checkpoint.restore(found, training.learner, state)
    session.event(state.step, "kl_explosion", f"warning: {what}; back to rollout {good.step}")
    finish(training.policy, good, session)
    raise NumericsError(f"{what}; the model in {session.folder.model} is that of rollout {good.step}; {remedy}")
