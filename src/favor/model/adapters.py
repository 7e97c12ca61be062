"""Low-rank adapters: new ones on a model, and those of a folder folded into the model they were trained on.

In: [model.lora], or an adapter's folder. Out: a model, and what the files of a folder do not share with it. Next: load.py.
"""

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import PreTrainedModel

from favor.config import STRICT
from favor.errors import CheckpointError, ConfigError
from favor.model.four_bits import is_marked, round_
from favor.model.vision import OUTSIDE, SEES
from favor.model.weights import Unmatched, check_objects, check_path, load_weights, readable, tensors_of

if TYPE_CHECKING:
    # it takes seconds to import, and bitsandbytes with it where that is installed: runs without adapters need neither
    from peft import PeftModel


class LoraSettings(BaseModel):
    """Section [model.lora]: train low-rank adapters; the model without them is the reference."""

    model_config = STRICT
    rank: int = Field(default=16, ge=1, le=1 << 16)
    """Rank of every adapter."""
    alpha: int = Field(default=32, ge=1)
    """An adapter's product is multiplied by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Which layers get one, as peft names them."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that a larger rank learns no slower (rsLoRA)."""
    dora: bool = False
    """Let the length of every column of a weight train apart from its direction (DoRA); products in float32 only."""


def with_lora(model: PreTrainedModel, settings: LoraSettings, seed: int) -> "PeftModel":
    """The model with new adapters, whose start depends on `seed`. Raises ConfigError for targets that it does not have."""
    from peft import LoraConfig, get_peft_model

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    # SEQ_CLS also trains and saves the scalar head
    task = "SEQ_CLS" if "ForSequenceClassification" in type(model).__name__ else "CAUSAL_LM"
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        task_type=task,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        exclude_modules=OUTSIDE if model.config.model_type in SEES else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config).eval()
        except (ValueError, re.error) as error:
            raise ConfigError(f"model.lora.targets = {settings.targets!r}: {error}") from None
    if settings.dora:
        _lengths_in_float32(adapted)
    base = Path(model.name_or_path or "")
    if model.name_or_path and base.exists():
        # a relative path would name another folder for whoever loads the adapter from elsewhere
        adapted.peft_config["default"].base_model_name_or_path = str(base.resolve())
    return adapted


def _lengths_in_float32(adapted: "PeftModel") -> None:
    """Where peft measures columns in the format that the weights are kept in: rounded, policy and reference would differ."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.dora import DoraLinearLayer

    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            for length in layer.lora_magnitude_vector.values():
                assert isinstance(length, DoraLinearLayer)
                weight = layer.get_base_layer().weight
                assert isinstance(weight, Tensor)
                length.weight.data = length.get_weight_norm(weight.detach().float(), weight.new_zeros(()), 1.0)


def load_adapted(
    loader: Any, path: str, revision: str | None, trust: bool, file: str, **more: Any
) -> tuple[Any, Unmatched]:
    """`load_weights` of the base that the adapter_config.json `file` names, with the adapter folded in."""
    from peft import PeftModel, get_peft_model_state_dict

    folder = Path(file).parent
    check_objects(folder)
    base = str(json.loads(Path(file).read_text("utf-8")).get("base_model_name_or_path"))
    try:
        check_path(base)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: an adapter whose base model cannot be loaded: {error}") from None
    model, found = load_weights(loader, base, None, trust, **more)
    if is_marked(path, revision):
        round_(model)
    with readable(path, "adapter"):
        adapted = PeftModel.from_pretrained(model, path, revision=revision)
        wanted = frozenset(get_peft_model_state_dict(adapted))
    here = frozenset(tensors_of(folder))
    # what the adapter brings whole, such as a reward model's head, its base need not have
    brought = frozenset(name.removeprefix("base_model.model.") for name in here)
    mismatched = {name: shapes for name, shapes in found.mismatched.items() if name not in brought}
    missing, unexpected = (found.missing - brought) | (wanted - here), found.unexpected | (here - wanted)
    return merged(adapted, path), Unmatched(missing, unexpected, mismatched)


def merged(adapted: "PeftModel", path: str) -> Any:
    """The base with its adapter folded in. Raises CheckpointError where that changes what the model says."""
    ids = torch.arange(1, 9, device=next(adapted.parameters()).device)[None]
    with readable(path, "adapter"), warnings.catch_warnings(), torch.no_grad():
        # peft warns of tied weights; whether they matter is seen below
        warnings.simplefilter("ignore")
        before = adapted.eval()(input_ids=ids, use_cache=False).logits
        folded: Any = adapted.merge_and_unload()
        after = folded(input_ids=ids, use_cache=False).logits
    if not bool(torch.isfinite(after).all()):
        raise CheckpointError(f"{path}: its outputs are not finite; the adapter is damaged, fetch it again")
    worst = float((after - before).abs().max())
    if not worst <= 1e-3 * (1 + float(before.abs().max())):
        raise CheckpointError(
            f"{path}: its adapter cannot be merged into the base exactly (outputs change by {worst:.2g}; tied weights?); "
            "name a model that it has been merged into"
        )
    head, table = folded.get_output_embeddings(), folded.get_input_embeddings()
    if head is not None and folded.config.tie_word_embeddings and head.weight is not table.weight:
        # else saving would leave the head out
        folded.config.tie_word_embeddings = False
    return folded.requires_grad_(True)
