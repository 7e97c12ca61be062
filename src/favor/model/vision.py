"""Models that read pictures: which ones, what of them trains, and the features that stand in the place of picture tokens.

In: a model folder; a model's backbone, pictures. Out: its processor as a Sight; features of every picture, each computed once.
Next: load.py.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from favor.data.sight import Sight
from favor.data.types import Picture
from favor.errors import CheckpointError, ConfigError
from favor.model.weights import readable

# model_type of those whose pictures take whole places in the prompt, at ordinary positions, and see nothing behind them
SEES = frozenset({"idefics3"})
# what is not their language model: no adapter goes there
OUTSIDE = r"(.*\.)?(vision_model|connector)(\..*)?"


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The language model of one that reads pictures: the part whose attention trees replace."""
    part = model.base_model.get_submodule("text_model")
    assert isinstance(part, PreTrainedModel)
    return part


def load_sight(path: str, revision: str | None, *, trust: bool) -> Sight:
    """The processor of a model. Raises ConfigError where the extra is not installed, CheckpointError for one without it."""
    if find_spec("PIL") is None:
        raise ConfigError(f"{path} reads pictures, which needs pillow; run: pip install 'favor[vision]'")
    with readable(path, "processor"):
        processor: Any = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=trust)
        sight = Sight(processor, processor.image_token, processor.image_token_id)
    # some keep the template that knows pictures beside the tokenizer's own
    if processor.chat_template is not None:
        processor.tokenizer.chat_template = processor.chat_template
    return sight


def freeze(model: PreTrainedModel, how: str) -> None:
    """Let the vision tower train ("train") or not ("frozen"); the connector and the language model train."""
    model.base_model.get_submodule("vision_model").requires_grad_(how == "train")


def refuse(settings: Any, shard: str) -> None:
    """Raises ConfigError for settings of [model] and [ranks] that were not tried with pictures. settings: a ModelConfig."""
    odd = {
        "model.dtype": settings.dtype == "bfloat16x2",
        "model.weights": settings.weights != "float32",
        "model.template_kwargs": bool(settings.template_kwargs),
        "ranks.shard": shard != "none",
    }
    if asked := [name for name, is_odd in odd.items() if is_odd]:
        raise ConfigError(f"{asked[0]} was not tried with a model that reads pictures ({settings.path}); leave it out")


def features(backbone: nn.Module, sight: Sight, pictures: Sequence[Picture]) -> Tensor:
    """The features of pictures, one behind the other, from tower and connector: [sum of their tokens, hidden]; differentiable.

    A picture at a time, so that no other changes its numbers. Raises CheckpointError when there are not as many as tokens.
    """
    found: list[Tensor] = []
    device = next(backbone.parameters()).device
    see: Any = backbone.get_image_features
    for picture in pictures:
        values, mask = (numbers.to(device) for numbers in sight.pixels(picture))
        one = torch.cat(list(see(pixel_values=values, pixel_attention_mask=mask).pooler_output))
        if one.shape[0] != picture.tokens:
            raise CheckpointError(
                f"{picture.path}: {one.shape[0]} features and {picture.tokens} tokens; processor and weights do not belong together"
            )
        found.append(one)
    return torch.cat(found)


def seen(feature_FH: Tensor, order_J: Tensor) -> dict[str, Any]:
    """What the model is called with beside ids: the feature of every place of a picture, in the order of its places."""
    # the model itself puts them where the ids say; pooler_output is where its own tower leaves them
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=feature_FH[order_J])}}


def plain(sight: Sight, pictures: Sequence[Picture], device: torch.device) -> dict[str, Tensor]:
    """Pictures of one row as plain transformers takes them: all their tiles."""
    if not pictures:
        return {}
    values, masks = zip(*map(sight.pixels, pictures), strict=True)
    return {
        "pixel_values": torch.cat(values, 1).to(device),
        "pixel_attention_mask": torch.cat(masks, 1).to(device),
    }
