"""How much memory training a model takes, before anything is loaded: an estimate.

In: a model's architecture, what is trained of it. Out: Sizes, bytes. Next: ../train/dryrun.py.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from favor.model.adapters import LoraSettings, with_lora
from favor.model.four_bits import layers
from favor.model.kept import keepable
from favor.model.load import ModelConfig
from favor.model.vision import SEES
from favor.model.weights import readable

GIB = 1 << 30


class Sizes(NamedTuple):
    """Bytes of weights with gradients and the optimizer's state, of the activations of a pack, and of its logits."""

    state: int
    activations: int
    logits: int

    def __str__(self) -> str:
        names = ("weights, gradients, optimizer", "activations", "logits")
        shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in zip(names, self, strict=True))
        return f"{sum(self) / GIB:.2f} GiB ({shown})"


def architecture_of(model: ModelConfig) -> PreTrainedConfig:
    """Its config.json. Raises CheckpointError when it cannot be read."""
    with readable(model.path):
        return AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )


def described_ends(model: ModelConfig) -> int | list[int] | None:
    """The ids that end a turn by its generation_config.json; None where it has none."""
    try:
        return GenerationConfig.from_pretrained(model.path, revision=model.revision or "main").eos_token_id
    except OSError:
        return None


def parameters(architecture: PreTrainedConfig) -> int:
    """Numbers in its weights. Raises what transformers raises for an architecture that is no causal language model."""
    return _numbers(_shapes(architecture).parameters())


def trained(architecture: PreTrainedConfig, lora: LoraSettings | None) -> int:
    """Numbers that train: all of a model, or its adapters. Raises ConfigError for adapters that it cannot have."""
    shapes = _shapes(architecture)
    return _numbers(p for p in (with_lora(shapes, lora, 0) if lora else shapes).parameters() if p.requires_grad)


def _shapes(architecture: PreTrainedConfig) -> PreTrainedModel:
    loader = AutoModelForImageTextToText if architecture.model_type in SEES else AutoModelForCausalLM
    with torch.device("meta"):
        return loader.from_config(architecture)


def _numbers(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def sizes(
    architecture: PreTrainedConfig,
    model: ModelConfig,
    tokens: int,
    *,
    trained_bytes: int = 12,
    copies: int = 0,
    moving: bool = False,
) -> Sizes:
    """Weights (as model.weights keeps them), gradients and optimizer state, activations of a pack of `tokens`, its logits.

    trained_bytes: bytes for each number that is trained beside it (its gradient, and two moments of AdamW); copies: frozen
    copies of the weights; moving: or copies that follow the policy, which stay float32.
    Per token and layer a transformer block keeps about 14 vectors of the hidden and 4 of the MLP width for its backward
    (measured on Llama blocks, docs/log.md); recomputation keeps one hidden vector a layer.
    """
    shapes, text = _shapes(architecture), architecture.get_text_config()
    total, matrices = _numbers(shapes.parameters()), _numbers(keepable(shapes))
    num_trained = trained(architecture, model.lora) if model.lora else total
    hidden, depth, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    width = text.to_dict().get("intermediate_size") or 4 * hidden
    every = int(model.gradient_checkpointing)
    recomputed = depth // every if every else 0
    kept = recomputed * hidden + (depth - recomputed) * (14 * hidden + 4 * width)
    # adapters stand beside the weights
    state = 4 * (total * (1 + copies) + (num_trained if model.lora else 0)) + num_trained * trained_bytes
    if model.weights != "float32":
        # of a model that trains in full its frozen copies are kept so; its layers leave nothing for the backward
        state -= 2 * matrices * (1 if model.lora else 0 if moving else copies)
        # from 2 bytes a number to 4 bits and a float32 for every 64
        state -= round(1.4375 * _numbers(m.weight for m in layers(shapes))) if model.weights == "nf4" else 0
    elif model.dtype == "bfloat16":
        # float32 weights are rounded for every product, and the backward reads the copies
        state += 2 * matrices
    return Sizes(state, 4 * tokens * kept, min(4 * tokens * vocabulary, GIB))
