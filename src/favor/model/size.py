"""How much memory training a model takes, before anything is loaded: an estimate.

In: a model's architecture, what is trained of it. Out: Sizes, bytes. Next: ../train/dryrun.py.
"""

from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from favor.model.load import ModelConfig
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


def parameters(architecture: PreTrainedConfig) -> int:
    """Numbers in its weights. Raises what transformers raises for an architecture that is no causal language model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    return sum(parameter.numel() for parameter in model.parameters())


def sizes(
    architecture: PreTrainedConfig, model: ModelConfig, tokens: int, *, states: int = 3, copies: int = 0
) -> Sizes:
    """Weights, gradients and optimizer state in float32, activations of a pack of `tokens`, its logits.

    states: numbers kept for each that is trained (its gradient, and two moments of AdamW); copies: frozen copies of the weights.
    Per token and layer a transformer block keeps about 14 vectors of the hidden and 4 of the MLP width for its backward
    (measured on Llama blocks, docs/log.md); recomputation keeps one hidden vector a layer.
    """
    total, text = parameters(architecture), architecture.get_text_config()
    trained = total if model.lora is None else 0
    hidden, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    width = text.to_dict().get("intermediate_size") or 4 * hidden
    a_layer = hidden if model.gradient_checkpointing else 14 * hidden + 4 * width
    state = 4 * total * (1 + copies) + 4 * trained * states
    return Sizes(state, 4 * tokens * layers * a_layer, min(4 * tokens * vocabulary, GIB))
