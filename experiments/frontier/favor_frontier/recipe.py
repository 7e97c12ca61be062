"""The recipe of `favor frontier`, and the points it asks for.

In: TOML. Out: FrontierConfig and its list of Points. Next: prepare.py.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT, Seed
from favor.data.tokenize import TokensConfig
from favor.rewards.source import RewardConfig

# what the settings that a strength becomes take: loss.beta and ppo.kl.target, loss.alpha, train.epochs, N
Strengths = tuple[Annotated[float, Field(gt=0, le=1e6)], ...]
Shares = tuple[Annotated[float, Field(ge=0, le=1)], ...]
Counts = tuple[Annotated[float, Field(le=1000)], ...]


class TaskConfig(BaseModel):
    """Section [task]: your own model, prompts and ground-truth reward in place of the embedded task."""

    model_config = STRICT
    model: str
    """Where all methods start from."""
    prompts: str
    """A file whose prompts train."""
    eval_prompts: str
    """A file whose prompts test."""
    reward: RewardConfig
    sft: str | None = None
    """Rows to fine-tune the model on first; absent: the model is taken as it is."""
    tokens: TokensConfig = TokensConfig()


class SftSizes(BaseModel):
    """Section [sft]."""

    model_config = STRICT
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the rows."""
    batch_prompts: int = Field(default=3, ge=1)
    """Prompts a step."""
    max_rows: int | None = Field(default=None, ge=1)
    """Use only the first N rows."""


class OfflineSizes(BaseModel):
    """Section [offline]: preferences, the reward model and the methods that train on them.

    `prompts` get `answers` answers each from the SFT model; the ground truth ranks them (4 answers give 6 pairs).
    """

    model_config = STRICT
    prompts: int = Field(default=224, ge=2)
    """Prompts that get answers."""
    answers: int = Field(default=4, ge=2)
    """Answers a prompt, from the SFT model; 4 give 6 pairs."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the preferences."""
    lr: float = Field(default=2e-4, gt=0)
    """Learning rate of the methods."""
    reward_epochs: int = Field(default=2, ge=1)
    """Passes of the reward model over the preferences."""
    reward_lr: float = Field(default=3e-4, gt=0)
    """Learning rate of the reward model."""
    batch_prompts: int = Field(default=8, ge=2)
    """Prompts a step."""
    probe_every: int = Field(default=7, ge=0)
    """Steps between two measurements of DPO's KL; 0: none."""


class FreshSizes(BaseModel):
    """Section [fresh]: DPO on answers of the policy as it is (`favor loop`).

    Every round draws its share of `offline.prompts`, so the ground truth is asked as often as for the other methods. Learning
    rate, answers, epochs and batches are those of [offline].
    """

    model_config = STRICT
    rounds: int = Field(default=4, ge=1)
    """Rounds of sampling, ranking and training."""


class PpoSizes(BaseModel):
    """Section [ppo]: rollouts of batch_prompts x answers samples; kl_coef is the adaptive coefficient's start.

    Scores are brought to standard deviation 1 on the start's answers, so one coefficient suits either reward.
    """

    model_config = STRICT
    rollouts: int = Field(default=14, ge=1)
    """How many rollouts are trained on."""
    batch_prompts: int = Field(default=16, ge=1)
    """Prompts a rollout."""
    answers: int = Field(default=4, ge=1)
    """Answers a prompt."""
    updates: int = Field(default=2, ge=1)
    """Passes over a rollout."""
    lr: float = Field(default=2e-4, gt=0)
    """Learning rate."""
    kl_coef: float = Field(default=0.2, gt=0)
    """Where the adaptive coefficient of the KL starts."""
    kl_horizon: int = Field(default=64, ge=1)
    """Over how many samples the coefficient adapts."""
    explosion_kl: float = Field(default=100.0, gt=0)
    """A KL beyond which the run is stopped, in nats a response."""


class EvaluateSizes(BaseModel):
    """Section [evaluate]: every point is judged on the same held-out prompts by the ground-truth reward."""

    model_config = STRICT
    prompts: int = Field(default=64, ge=2)
    """Held-out prompts."""
    samples: int = Field(default=2, ge=1)
    """Answers a prompt."""
    max_new_tokens: int = Field(default=24, ge=1)
    """The longest answer, in tokens."""


class MethodStrengths(BaseModel):
    """Section [methods]: the strengths of each; an empty list leaves a method out."""

    model_config = STRICT
    dpo: Strengths = (0.03, 0.1, 0.5)
    """Values of beta."""
    dpo_fresh: Strengths = (0.1, 0.5, 2.0)
    """Values of beta, of DPO on fresh answers ranked by the ground truth: the equal of PPO on the ground truth."""
    ipo: Strengths = (0.03,)
    """Values of beta."""
    kto: Strengths = (0.1,)
    """Values of beta."""
    ppo: Strengths = (3.0, 6.0, 12.0)
    """Target KLs of PPO on the learnt reward, nats a response."""
    ppo_true: Strengths = (3.0, 8.0, 12.0)
    """The same on the ground truth."""
    unlikelihood: Shares = (0.5,)
    """Values of alpha."""
    preferred_ft: Counts = (3,)
    """Numbers of epochs."""
    best_of_n: Counts = (4, 16)
    """Values of N; the learnt reward chooses."""


class FrontierConfig(BaseModel):
    """A recipe for `favor frontier`. Without [task] it is the embedded one: film reviews, sentiment as ground truth."""

    model_config = STRICT
    run: str = "runs/frontier"
    """The folder this run writes into."""
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    """One whole experiment a seed."""
    embedded: Literal["sentiment", "format"] = "sentiment"
    """Which embedded task: reviews that a classifier takes for praise, or reviews of eight words that end in "!" (exact)."""
    budgets: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.25,)
    """DPO and PPO, each at its middle strength, with these shares of the calls of the ground truth too."""
    jobs: int = Field(default=2, ge=1, le=256)
    """Points computed at once, each with its share of the cores."""
    layers: tuple[int, ...] = (0, 1, 2)
    """Which of the embedded model's layers the small model of the embedded task keeps."""
    task: TaskConfig | None = None
    sft: SftSizes = SftSizes()
    offline: OfflineSizes = OfflineSizes()
    fresh: FreshSizes = FreshSizes()
    ppo: PpoSizes = PpoSizes()
    evaluate: EvaluateSizes = EvaluateSizes()
    methods: MethodStrengths = MethodStrengths()

    @model_validator(mode="after")
    def _whole(self) -> "FrontierConfig":
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be distinct, and at least one")
        if not points(self):
            raise ValueError("[methods] asks for no point at all")
        for name in ("preferred_ft", "best_of_n"):
            if any(s < 1 or s != int(s) for s in vars(self.methods)[name]):
                raise ValueError(f"methods.{name} are whole numbers from 1 up")
        if twice := [name for name, strengths in self.methods if len(set(strengths)) < len(strengths)]:
            raise ValueError(f"methods.{twice[0]} names a strength twice; name each once")
        # by value: the resolved recipe names every key
        for name in ("layers", "embedded"):
            if self.task is not None and vars(self)[name] != type(self).model_fields[name].default:
                raise ValueError(f"{name} is about the embedded task; with [task] it is not read, remove it")
        return self

    @model_validator(mode="after")
    def _budgets_hold_a_preference(self) -> "FrontierConfig":
        if len(set(self.budgets)) < len(self.budgets):
            raise ValueError("budgets names a share twice; name each once")
        least = min((*self.budgets, 1.0)) * self.offline.prompts
        if least < 2 or (self.methods.dpo_fresh and least < self.fresh.rounds):
            raise ValueError(
                f"budgets and fresh.rounds leave {least:g} of offline.prompts = {self.offline.prompts} to a method or "
                "less than one to a round; raise offline.prompts, or set fewer rounds and larger budgets"
            )
        return self


@dataclass(frozen=True)
class Point:
    """One trained (or sampled) policy of the picture."""

    method: str
    strength: float
    seed: int
    share: float = 1.0
    """Of the calls of the ground truth that the others have."""

    @property
    def name(self) -> str:
        """Folder name."""
        part = f"-share{self.share:g}" if self.share < 1 else ""
        return f"{self.method}-{self.strength:g}{part}-seed{self.seed}"


# methods that are also trained on less
BUDGETED = ("dpo", "dpo_fresh", "ppo", "ppo_true")


def points(config: FrontierConfig) -> list[Point]:
    """Every point but the start, seeds outermost so that an unfinished picture has whole seeds."""
    found: list[Point] = []
    for seed in config.seeds:
        for method, strengths in config.methods.model_dump().items():
            found += [Point(method, float(strength), seed) for strength in strengths]
            if method in BUDGETED and strengths:
                found += [Point(method, middle(strengths), seed, share) for share in config.budgets]
    return found


def middle(strengths: Sequence[float]) -> float:
    """The strength at which a method is shown where one must do."""
    return float(sorted(strengths)[len(strengths) // 2])


def num_prompts(config: FrontierConfig, share: float) -> int:
    """Prompts whose answers are labelled."""
    return max(2, int(config.offline.prompts * share))


def num_rollouts(config: FrontierConfig, share: float) -> int:
    """Rollouts of PPO on the ground truth."""
    return ceil(config.ppo.rollouts * share)


def calls(config: FrontierConfig, point: Point) -> int:
    """How often a point's method asks the ground truth about an answer."""
    if point.method == "start":
        return 0
    if point.method == "ppo_true":
        return num_rollouts(config, point.share) * config.ppo.batch_prompts * config.ppo.answers
    if point.method == "dpo_fresh":
        return config.fresh.rounds * (num_prompts(config, point.share) // config.fresh.rounds) * config.offline.answers
    return num_prompts(config, point.share) * config.offline.answers


def threads(config: FrontierConfig) -> int:
    """Threads of one job."""
    return max(1, (os.cpu_count() or 1) // config.jobs)
