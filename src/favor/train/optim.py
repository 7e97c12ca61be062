"""Section [optim]: the optimizer, its rate at every step, what it does to which weights.

In: the recipe's section, parameters. Out: an optimizer; the rate of a step. Next: loop.py.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import AfterValidator, BaseModel, Field, Tag, model_validator
from torch import nn
from torch.distributed.tensor import DTensor

from favor.config import STRICT, by_kind
from favor.train.moments import adamw_8bit


def _whole_from_one(warmup: float) -> float:
    if warmup >= 1 and not warmup.is_integer():
        raise ValueError("from 1 on it counts steps, so it must be a whole number; a share is below 1")
    return warmup


# a share that a running mean keeps: at 1 it would never learn anything, and AdamW divides by 1 - beta^step
Beta = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1e3, description="Learning rate after the warm-up.")]
Schedule = Annotated[
    Literal["constant", "linear", "cosine"], Field(description="How the rate falls to zero over the run, if it does.")
]
Warmup = Annotated[
    float,
    Field(
        ge=0, description="Steps over which the rate rises from zero; a number below 1 is a share of the run's steps."
    ),
    AfterValidator(_whole_from_one),
]
Decay = Annotated[float, Field(ge=0, description="Decay of weight matrices, times the learning rate.")]
Eps = Annotated[float, Field(gt=0, description="Added to the denominator of the update (epsilon).")]
Clip = Annotated[float, Field(gt=0, description="Largest norm of the gradient; a larger one is scaled down.")]


class AdamW(BaseModel):
    """Section [optim], kind "adamw"."""

    model_config = STRICT
    kind: Literal["adamw"] = "adamw"
    lr: Rate = 5e-6
    schedule: Schedule = "linear"
    warmup: Warmup = 0
    weight_decay: Decay = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """What the running means of gradient and square keep of a step."""
    eps: Eps = 1e-8
    clip: Clip = 1.0


class AdamW8bit(BaseModel):
    """Section [optim], kind "adamw8bit": AdamW whose running means take 2 bytes a number, not 8; by bitsandbytes."""

    model_config = STRICT
    kind: Literal["adamw8bit"] = "adamw8bit"
    lr: Rate = 5e-6
    schedule: Schedule = "linear"
    warmup: Warmup = 0
    weight_decay: Decay = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """What the running means of gradient and square keep of a step."""
    eps: Eps = 1e-8
    clip: Clip = 1.0

    @model_validator(mode="after")
    def _is_installed(self) -> "AdamW8bit":
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                "optim.kind = 'adamw8bit' needs bitsandbytes, not installed here; run: pip install 'favor[bitsandbytes]', or "
                "set optim.kind=adamw"
            )
        return self


class Rmsprop(BaseModel):
    """Section [optim], kind "rmsprop": the paper's, with lr 1e-6, 150 warm-up steps and batches of 64."""

    model_config = STRICT
    kind: Literal["rmsprop"] = "rmsprop"
    lr: Rate = 5e-6
    schedule: Schedule = "linear"
    warmup: Warmup = 0
    weight_decay: Decay = 0.0
    eps: Eps = 1e-8
    clip: Clip = 1.0


OptimConfig: TypeAlias = Annotated[
    Annotated[AdamW, Tag("adamw")] | Annotated[AdamW8bit, Tag("adamw8bit")] | Annotated[Rmsprop, Tag("rmsprop")],
    by_kind("adamw"),
    Field(description="The optimizer."),
]
# what an optimizer remembers, bytes for each number that it trains
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "rmsprop": 4}


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up, then constant, linear or cosine to zero.

    The first step after the warm-up has the full rate; the step after the last would have zero.
    """
    rising = warmup(config, num_steps)
    if step < rising:
        return config.lr * (step + 1) / (rising + 1)
    done = (step - rising) / max(1, num_steps - rising)
    if config.schedule == "linear":
        return config.lr * (1 - done)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    return config.lr


def warmup(config: OptimConfig, num_steps: int) -> int:
    """Steps over which the rate rises; of a share they are rounded up."""
    return math.ceil(config.warmup * num_steps) if config.warmup < 1 else int(config.warmup)


def make_optimizer(config: OptimConfig, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (fused, or in 8 bits) or RMSprop; weight decay reaches matrices only."""
    groups = [
        {"params": some, "weight_decay": decay}
        # parameters that are split over ranks are not updated in one call with those that are not
        for split in (True, False)
        for matrices, decay in ((True, config.weight_decay), (False, 0.0))
        if (some := [p for p in parameters.values() if (p.dim() >= 2, isinstance(p, DTensor)) == (matrices, split)])
    ]
    if config.kind == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, alpha=0.99, eps=config.eps)
    if config.kind == "adamw8bit":
        return adamw_8bit(groups, config.lr, config.betas, config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
