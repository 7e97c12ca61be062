"""Optimizer and learning rate.

In: section [optim] and named parameters. Out: a torch optimizer; the rate is a pure function of the step.
Next: step.py.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from favor.config import STRICT
from favor.ranks import World
from favor.train.step import Learner

# a share that a running mean keeps: at 1 it would never learn anything, and AdamW divides by 1 - beta^step
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(BaseModel):
    """Section [optim]. The paper's own setting is rmsprop, lr 1e-6, 150 warm-up steps, batch 64."""

    model_config = STRICT
    kind: Literal["adamw", "rmsprop"] = "adamw"
    """The optimizer."""
    lr: float = Field(default=5e-6, gt=0, le=1e3)
    """Learning rate after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the rate falls to zero over the run, if it does."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Pull of matrices to zero, times the rate."""
    betas: tuple[Beta, Beta] | None = None
    """What AdamW's running means of gradient and square keep of a step; (0.9, 0.999) by default."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the divisor."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; a larger one is scaled down."""

    @model_validator(mode="after")
    def _betas_are_read(self) -> "OptimConfig":
        if self.betas is not None and self.kind != "adamw":
            raise ValueError("optim.betas is read by optim.kind=adamw alone; remove it")
        return self


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up, then constant, linear or cosine to zero.

    The first step after the warm-up has the full rate; the step after the last would have zero.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * (1 - done)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    return config.lr


def make_optimizer(config: OptimConfig, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (fused) or RMSprop; weight decay reaches matrices only."""
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, alpha=0.99, eps=config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas or (0.9, 0.999), eps=config.eps, fused=True)


def make_learner(
    config: OptimConfig,
    parameters: Mapping[str, nn.Parameter],
    device: torch.device,
    world: World,
    moving: Mapping[str, Tensor] = MappingProxyType({}),
) -> Learner:
    """The parameters with their optimizer, ready for `step`."""
    return Learner(parameters, make_optimizer(config, parameters), config.clip, device, world, moving)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
