"""A model folder or hub id -> a Policy: weights, tokenizer, and how this model may be computed.

In: ModelConfig. Out: Policy. LoRA through peft; the policy stays in eval mode, so no dropout makes its log-probs random.
Rotary frequencies that depend on the longest row of a batch are made to depend on each row alone. Next: attention.py.
"""

import hashlib
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, Field, model_validator
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from favor.config import STRICT, TemplateKwargs
from favor.data.sight import Sight
from favor.data.types import Layout
from favor.errors import CheckpointError, ConfigError
from favor.model.adapters import LoraSettings, load_adapted, with_lora
from favor.model.four_bits import numbers
from favor.model.kept import keep, read_rounded, untrainable
from favor.model.rotary import row_by_row
from favor.model.template import with_defaults
from favor.model.vision import SEES, text_part
from favor.model.weights import Unmatched, check_path, check_there, load_weights, model_type, readable
from favor.ranks import Shard, current


class ModelConfig(BaseModel):
    """Section [model]. What favor measures (evaluation, probes, rewards) is float32 whatever training used."""

    model_config = STRICT
    path: str
    """A model folder or a hub id; safetensors only."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it is computed; auto takes the GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "bfloat16x2"] = "float32"
    """What products are computed in while training: bfloat16 reads 8 bits of every weight, bfloat16x2 16 or more, in two parts."""
    weights: Literal["float32", "bfloat16", "nf4"] = "float32"
    """bfloat16: less memory and the same numbers, weights that train have float32 masters; nf4 (QLoRA) rounds LoRA's base."""
    layout: Literal["auto", "tree", "rows", "fa2", "fa3", "fa4", "flex"] = "auto"
    """Prompt trees where they are exact (auto), or one padded row per response; on a GPU a name chooses the trees' attention."""
    gradient_checkpointing: bool | Annotated[int, Field(ge=2)] = False
    """Recompute layers in the backward pass: less memory, more time; a number k: every k-th layer alone."""
    trust_remote_code: bool = False
    """Run the code that comes with the model."""
    template_kwargs: TemplateKwargs = {}
    """What variables of its chat template are unless a row says otherwise: {enable_thinking=false}; saved with the model."""
    vision: Literal["frozen", "train"] = "frozen"
    """Of a model that reads pictures: whether its vision tower trains as well; the connector does, without LoRA."""
    lora: LoraSettings | None = None
    """Train adapters rather than all weights."""

    @property
    def on_gpu(self) -> bool:
        """Whether it is computed on a GPU here."""
        return self.device != "cpu" and torch.cuda.is_available()

    @model_validator(mode="after")
    def _runs_here(self) -> "ModelConfig":
        if self.device == "cuda" and not self.on_gpu:
            raise ValueError("model.device is 'cuda' but torch sees no GPU; set model.device=auto")
        if self.layout not in ("auto", "tree", "rows"):
            if not self.on_gpu:
                raise ValueError(f"model.layout = {self.layout!r} is for GPUs alone; set model.layout=auto")
            if self.layout != "flex" and self.dtype == "float32":
                raise ValueError(
                    f"model.layout = {self.layout!r} computes in bfloat16 alone; set model.dtype=bfloat16, or model.layout=auto"
                )
        return self

    @model_validator(mode="after")
    def _starts_at_its_reference(self) -> "ModelConfig":
        if self.vision == "train" and self.lora is not None:
            raise ValueError("model.vision = 'train' trains weights, and adapters go on the language model; drop one")
        if self.lora is not None and self.lora.dora and self.dtype != "float32":
            raise ValueError(
                f"model.lora.dora measures weights in the format of products, so with model.dtype = {self.dtype!r} the policy "
                "would not start as its reference; set model.dtype=float32, or model.lora.dora=false"
            )
        if self.lora is not None and self.lora.dora and self.weights == "nf4":
            raise ValueError(
                "model.lora.dora measures weights, and those in 4 bits cannot be; set model.lora.dora=false"
            )
        return self

    @model_validator(mode="after")
    def _two_parts_can_be_read(self) -> "ModelConfig":
        if self.dtype == "bfloat16x2" and self.weights == "nf4":
            raise ValueError(
                "model.weights = 'nf4' has weights of 4 bits, of which model.dtype = 'bfloat16x2' would read one part; "
                "set model.dtype=float32 or bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _four_bits_can_be_read(self) -> "ModelConfig":
        if self.weights == "nf4" and find_spec("bitsandbytes") is None:
            raise ValueError(
                "model.weights = 'nf4' needs bitsandbytes, not installed here; run: pip install 'favor[bitsandbytes]', or set "
                "model.weights=bfloat16"
            )
        return self


def _can_train(config: ModelConfig) -> ModelConfig:
    narrow = config.weights != "float32"
    if narrow and config.lora is None and (reason := untrainable(config.weights, config.dtype)):
        raise ValueError(reason)
    return config


# [model] of a command that trains it
TrainedModel = Annotated[ModelConfig, AfterValidator(_can_train)]


@dataclass(frozen=True)
class Policy:
    """A causal LM ready to be scored or trained.

    `model` is what trains and saves (a PeftModel under LoRA); `backbone` ends before the LM head;
    `fast_head` is a plain linear head, or None when the model does more to its logits. Weights are float32 but for
    `kept_bytes` in the format `weights` (in full training: what they would take that are read in it); `compute_dtype` bfloat16
    means autocast (`two_parts`: two_parts.py). `layout` says whether trees may be computed, `attention` how (engines.py; "parts"
    is attention.py's own), `exact_attention` how in float32. `root`: what forwards run within when weights are split over
    ranks (split.py), else None. sight: of a model that reads pictures, what its processor makes of them.
    """

    model: Any
    backbone: nn.Module
    fast_head: nn.Linear | None
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    compute_dtype: torch.dtype
    layout: Layout
    plain_attention: str
    source: str
    kept_bytes: int = 0
    weights: str = "float32"
    root: Any = None
    attention: str = "parts"
    exact_attention: str = "parts"
    two_parts: bool = False
    sight: Sight | None = None

    @property
    def products(self) -> str:
        """What products are computed in, as model.dtype has it."""
        if self.compute_dtype == torch.float32:
            return "float32"
        return "bfloat16x2" if self.two_parts else "bfloat16"

    @property
    def lora(self) -> bool:
        """Whether the policy is an adapter on a frozen model."""
        # a PeftModel is none of transformers' models; asking for its class would import peft
        return not isinstance(self.model, PreTrainedModel)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, adapters inside."""
        model: Any = self.model
        return model.get_base_model() if self.lora else model

    @property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a turn."""
        model = self.causal_lm
        # a reward model keeps its base's ends in its config
        described = model.generation_config if model.can_generate() else model.config.get_text_config()
        return end_ids(self.tokenizer, described.eos_token_id)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, of those that train."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def end_ids(tokenizer: PreTrainedTokenizerBase, ends: int | list[int] | None) -> frozenset[int]:
    """Token ids that end a turn: the tokenizer's end of sequence and those of the generation config."""
    found = ends if isinstance(ends, list) else [ends]
    return frozenset(x for x in [*found, tokenizer.eos_token_id] if isinstance(x, int))


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer alone (fast). Raises CheckpointError when the folder or id has none."""
    check_there(config.path)
    with readable(config.path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if not tokenizer.is_fast:
        raise CheckpointError(f"{config.path}: its tokenizer gives no character offsets; convert it to a fast one")
    return with_defaults(tokenizer, config.template_kwargs, config.path) if config.template_kwargs else tokenizer


def load_policy(
    config: ModelConfig, seed: int = 0, shard: Shard = "none", *, frozen: bool = False, sees: bool = False
) -> Policy:
    """Weights and tokenizer, and LoRA adapters when asked (their start depends on `seed`).

    shard: as ranks.shard. frozen: none of it will train. sees: the caller can give it pictures.
    Raises CheckpointError for a missing, unreadable or incomplete model, ConfigError for settings that cannot work.
    """
    if model_type(config.path, config.revision) in SEES:
        from favor.model import seeing

        return seeing.load(config, seed, shard, frozen=frozen, sees=sees)
    if config.vision == "train":
        raise ConfigError(f"model.vision = 'train', but {config.path} reads no pictures; remove it")
    if splits(shard):
        from favor.model.pieces import load

        policy = load(config, seed, shard, current(), frozen=frozen)
        if policy is not None:
            return policy
    model, tokenizer, found = load_parts(AutoModelForCausalLM, config, frozen=frozen)
    found.refuse(config.path)
    return sharded(make_policy(model, tokenizer, config, seed, frozen=frozen, place=not splits(shard)), shard)


def splits(shard: Shard) -> bool:
    """Whether weights are split over ranks: that is asked and there are several. Splitting moves a layer at a time to its GPU."""
    return shard != "none" and current().size > 1


def sharded(policy: Policy, shard: Shard) -> Policy:
    """The policy with its weights split over ranks, where it `splits`. Raises what `split` raises."""
    if not splits(shard):
        return policy
    from favor.model.split import split

    return split(policy, shard, current())


def keeps(config: ModelConfig, *, frozen: bool) -> bool:
    """Whether weights are kept in less than float32; those that train are not. Raises ConfigError where they cannot train."""
    if config.weights == "float32":
        return False
    trained = config.lora is None and not frozen
    if trained and (reason := untrainable(config.weights, config.dtype)):
        raise ConfigError(reason)
    return not trained


def load_parts(
    loader: Any, config: ModelConfig, *, frozen: bool = False, **more: Any
) -> tuple[Any, PreTrainedTokenizerBase, Unmatched]:
    """Model, tokenizer, and the weights that files and model do not share. Raises also for new adapters on an adapter."""
    check_path(config.path)
    tokenizer = load_tokenizer(config)
    with readable(config.path):
        adapter = find_adapter_config_file(config.path, revision=config.revision)
    where = (config.path, config.revision, config.trust_remote_code)
    if config.lora is not None and adapter is not None:
        # peft would save the new adapter as one on the hub or base model, without the adapter in between
        raise ConfigError(
            f"{config.path}: holds an adapter, and new adapters on it could not be loaded without it; "
            "remove [model.lora] to train in full, or merge it into its model first (peft's merge_and_unload)"
        )
    kept = keeps(config, frozen=frozen)
    if adapter is None:
        model, found = load_weights(loader, *where, kept=kept, **more)
        return model, tokenizer, found
    if kept:
        raise ConfigError(
            f"{config.path}: holds an adapter, which is folded into its base in float32, so weights = '{config.weights}' would "
            "round it; leave it at float32, or name a merged copy (favor export run=RUN out=FOLDER)"
        )
    model, found = load_adapted(loader, *where, adapter, **more)
    return model, tokenizer, found


def check_ids(policy: "Policy", largest: int) -> None:
    """Raises CheckpointError for a token id that the model has no embedding for."""
    table = policy.causal_lm.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    rows = table.weight.shape[0]
    if largest >= rows:
        raise CheckpointError(
            f"{policy.source}: its tokenizer gives the id {largest} ({policy.tokenizer.convert_ids_to_tokens(largest)}), but its "
            f"embedding has {rows} rows; tokenizer and weights do not belong together, fetch the model again"
        )


def make_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    seed: int = 0,
    *,
    frozen: bool = False,
    place: bool = True,
) -> Policy:
    """Wrap a model already in memory (the tests' and notebooks' way in). place: move it to its device, whole."""
    if model._hf_peft_config_loaded:  # pyright: ignore[reportPrivateUsage]
        raise ConfigError(f"{config.path}: has an adapter inside; give peft's merge_and_unload() of it, or its folder")
    device = torch.device("cuda" if config.on_gpu else "cpu")
    # before it moves: a GPU never holds the float32 ones
    held = keeps(config, frozen=frozen)
    kept = (
        keep(model, config.path, config.weights) if held else read_rounded(model) if config.weights != "float32" else 0
    )
    if place:
        model.to(device)  # pyright: ignore[reportArgumentType]
    model.eval()
    row_by_row(model)
    head = model.get_output_embeddings()
    policy = Policy(
        plain_attention=attention_name(model),
        model=with_lora(model, config.lora, seed) if config.lora else model,
        backbone=model.base_model,
        fast_head=head if type(head) is nn.Linear else None,
        tokenizer=with_defaults(tokenizer, config.template_kwargs, config.path)
        if config.template_kwargs
        else tokenizer,
        device=device,
        compute_dtype=torch.float32 if config.dtype == "float32" else torch.bfloat16,
        layout="rows",
        source=config.path,
        kept_bytes=kept,
        weights=config.weights,
        two_parts=config.dtype == "bfloat16x2",
    )
    if policy.two_parts:
        from favor.model.two_parts import read_in_two_parts  # which no other precision needs

        read_in_two_parts(model, policy.model)
    if config.gradient_checkpointing:
        from favor.model.recompute import recompute_layers

        recompute_layers(policy.causal_lm, int(config.gradient_checkpointing))
    return policy


def precise(policy: Policy) -> Policy:
    """The same policy with float32 products: how everything is measured."""
    return replace(policy, compute_dtype=torch.float32, attention=policy.exact_attention)


def precision_of(products: str) -> str:
    """The number format of products, for people; as a policy or section [model] has it."""
    if products == "float32":
        return "float32"
    read = {"bfloat16": "bfloat16 products on", "bfloat16x2": "bfloat16 products, in two parts, on"}[products]
    return f"{read} float32 weights (what is measured is float32)"


def frozen_copy(policy: Policy, *, moves: bool = False) -> Policy:
    """The reference of a full fine-tune: a copy of the weights as they are now, that never trains.

    Where model.weights is bfloat16 it is kept so, but for matrices that would be rounded, and if its weights will move.
    """
    if policy.root is not None:
        from favor.model.split import copied

        return copied(policy)
    model = deepcopy(policy.causal_lm).requires_grad_(False)
    if policy.weights == "bfloat16" and not moves:
        keep(model, policy.source, policy.weights, all_of_them=False)
    head = model.get_output_embeddings()
    fast = head if policy.fast_head is not None and type(head) is nn.Linear else None
    return replace(policy, model=model, backbone=model.base_model, fast_head=fast)


def weights_hash(policy: Policy) -> str:
    """SHA-256 of the reference's weights, adapters left out."""
    digest = hashlib.sha256()
    for name, tensor in policy.causal_lm.state_dict().items():
        if ".lora_" not in name:
            digest.update(name.replace(".base_layer", "").encode())
            held: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            # kept in bfloat16 it is the same reference; in 4 bits, that of the rounded numbers
            if held.dtype == torch.uint8:
                held = numbers(policy.causal_lm, name, held)
            values = held.detach().float() if held.dtype == torch.bfloat16 else held.detach()
            digest.update(values.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def use_attention(policy: Policy, name: str) -> None:
    """Let the model compute attention by the function of this name. Raises what transformers raises when it cannot."""
    part = policy.causal_lm if policy.sight is None else text_part(policy.causal_lm)
    # models of several parts refuse the very name they came with, as one part does not know it
    if attention_name(part) != name:
        part.set_attn_implementation(name)


def attention_name(model: PreTrainedModel) -> str:
    """The name of the function that computes its attention."""
    # the only place where transformers keeps the name in force
    return model.config._attn_implementation or "eager"  # pyright: ignore[reportPrivateUsage]
