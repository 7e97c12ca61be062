"""Layers that are computed again in the backward pass, so that the forward keeps less (model.gradient_checkpointing).

In: a model. Out: the same one, its layers marked. Next: load.py.
"""

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from favor.errors import ConfigError


def recompute_layers(model: PreTrainedModel, every: int) -> None:
    """Recompute every so many-th layer in the backward. Only the layers' own flag says `training`: dropout stays off.

    Raises ConfigError where there are none, or fewer.
    """
    if model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"model.gradient_checkpointing: {type(model).__name__} has no layers that can be recomputed; set it to false"
        )
    if every > len(layers):
        raise ConfigError(
            f"model.gradient_checkpointing: every {every}th layer of {len(layers)} is none; set a smaller number, or false"
        )
    for layer in layers[every - 1 :: every]:
        layer.training = True
