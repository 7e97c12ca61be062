"""Optimizer and learning rate.

In: section [optim] and named parameters. Out: a torch optimizer; the rate is a pure function of the step.
Next: step.py.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field
from torch import nn

from favor.config import STRICT

# a share that a running mean keeps: at 1 it would never learn anything, and AdamW divides by 1 - beta^step
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(BaseModel):
    """Section [optim]. The paper's own setting is rmsprop, lr 1e-6, 150 warm-up steps, batch 64."""

    model_config = STRICT
    name: Literal["adamw", "rmsprop"] = "adamw"
    lr: float = Field(default=5e-6, gt=0, le=1e3)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, gt=0)


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
    if config.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, alpha=0.99, eps=config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
