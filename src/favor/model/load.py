"""A model folder or hub id -> a Policy: weights, tokenizer, and how this model may be computed.

In: ModelConfig. Out: Policy. LoRA through peft; the policy stays in eval mode, so no dropout makes
its log-probs random. Next: attention.py.
"""

import contextlib
import ctypes
import platform
import re
from collections.abc import Generator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from pydantic import BaseModel, Field, model_validator
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from favor.config import STRICT
from favor.data.types import Layout
from favor.errors import CheckpointError, ConfigError


class LoraSettings(BaseModel):
    """Train low-rank adapters; the model without them is the reference."""

    model_config = STRICT
    rank: int = Field(default=16, ge=1, le=1 << 16)
    alpha: int = Field(default=32, ge=1)
    targets: str | tuple[str, ...] = "all-linear"


class ModelConfig(BaseModel):
    """Section [model]."""

    model_config = STRICT
    path: str
    revision: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    layout: Literal["auto", "tree", "rows"] = "auto"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    lora: LoraSettings | None = None

    @model_validator(mode="after")
    def _device_exists(self) -> "ModelConfig":
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("model.device is 'cuda' but torch sees no GPU; set model.device=auto")
        return self


@dataclass(frozen=True)
class Policy:
    """A causal LM ready to be scored or trained.

    `model` is what trains and saves (a PeftModel under LoRA); `backbone` ends before the LM head;
    `fast_head` is a plain linear head, or None when the model does more to its logits. Weights are
    float32; `compute_dtype` bfloat16 means autocast. `layout` says whether trees may be computed.
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

    @property
    def lora(self) -> bool:
        """Whether the policy is an adapter on a frozen model."""
        return isinstance(self.model, PeftModel)

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
    with readable(config.path):
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{config.path}: its tokenizer gives no character offsets; convert it to a fast tokenizer"
        )
    return tokenizer


def load_policy(config: ModelConfig, seed: int = 0) -> Policy:
    """Load weights and tokenizer; adds LoRA adapters when asked (their start depends on `seed`).

    Raises CheckpointError for a missing or unreadable model, ConfigError for settings that cannot work.
    """
    check_path(config.path)
    tokenizer = load_tokenizer(config)
    with readable(config.path):
        model = AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=torch.float32,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
    return make_policy(model, tokenizer, config, seed)


def make_policy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, seed: int = 0
) -> Policy:
    """Wrap a model already in memory (the tests' and notebooks' way in)."""
    model = merge_adapter(model, config.lora, config.path)
    device = torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else _plain(config.device))
    model.to(device).eval()  # pyright: ignore[reportArgumentType]
    plain_attention = _attention_name(model)
    trained = _with_lora(model, config.lora, seed) if config.lora else model
    head = model.get_output_embeddings()
    policy = Policy(
        model=trained,
        backbone=model.base_model,
        fast_head=head if type(head) is nn.Linear else None,
        tokenizer=tokenizer,
        device=device,
        compute_dtype=_compute_dtype(config.dtype, device),
        layout="rows",
        plain_attention=plain_attention,
        source=config.path,
    )
    if config.gradient_checkpointing:
        _checkpoint_layers(policy)
    return policy


def frozen_copy(policy: Policy) -> Policy:
    """The reference of a full fine-tune: a copy of the weights as they are now, that never trains."""
    model = deepcopy(policy.causal_lm).requires_grad_(False)
    head = model.get_output_embeddings()
    fast = head if policy.fast_head is not None and type(head) is nn.Linear else None
    return replace(policy, model=model, backbone=model.base_model, fast_head=fast)


@contextlib.contextmanager
def as_reference(policy: Policy) -> Generator[Policy]:
    """The same model with its adapters switched off: the reference of a LoRA policy."""
    assert policy.lora, "only adapters can be switched off"
    with policy.model.disable_adapter():
        yield policy


@contextlib.contextmanager
def plain_attention(policy: Policy) -> Generator[None]:
    """The model's own attention for the time of the block (generation, the self-check's plain path)."""
    model = policy.causal_lm
    before = _attention_name(model)
    model.set_attn_implementation(policy.plain_attention)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def memory_settings() -> None:
    """Let glibc keep freed memory (Linux): large CPU tensors are then not paged in again at every step."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are faster than float32 there (on a CPU: AMX or AVX512-BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo")
    text = flags.read_text("utf-8") if flags.exists() else ""
    return "amx_bf16" in text or "avx512_bf16" in text


def _attention_name(model: PreTrainedModel) -> str:
    # the only place where transformers keeps the name in force
    return model.config._attn_implementation or "eager"  # pyright: ignore[reportPrivateUsage]


def _compute_dtype(asked: str, device: torch.device) -> torch.dtype:
    if asked == "float32":
        return torch.float32
    if asked == "bfloat16" or fast_bfloat16(device):
        return torch.bfloat16
    return torch.float32


def _plain(device: str) -> str:
    return "cpu" if device == "auto" else device


def _with_lora(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    # SEQ_CLS also trains and saves the scalar head
    task = "SEQ_CLS" if "ForSequenceClassification" in type(model).__name__ else "CAUSAL_LM"
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0, task_type=task
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config).eval()
        except (ValueError, re.error) as error:
            raise ConfigError(f"model.lora.targets = {settings.targets!r}: {error}") from None


def merge_adapter(model: Any, lora: LoraSettings | None, path: str) -> PreTrainedModel:
    """A folder that held an adapter arrives with it injected: fold it in, so that it belongs to the reference."""
    if not model._hf_peft_config_loaded:
        return model
    if lora is not None:
        # peft would save the new adapter as one on the hub or base model, without the adapter in between
        raise ConfigError(
            f"{path}: holds an adapter, and new adapters on it could not be loaded without it; "
            "remove [model.lora] to train in full, or merge it into its model first (peft's merge_and_unload)"
        )
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLayer):
                child.merge()  # pyright: ignore[reportCallIssue]
                setattr(module, name, child.get_base_layer())
            elif isinstance(child, ModulesToSaveWrapper):
                setattr(module, name, child.modules_to_save[child.active_adapters[0]])
    del model.peft_config
    model._hf_peft_config_loaded = False
    return model.requires_grad_(True)


def _checkpoint_layers(policy: Policy) -> None:
    """Recompute layers in the backward. Only the layers' own flag says `training`: dropout stays off."""
    model = policy.causal_lm
    if model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"model.gradient_checkpointing: {type(model).__name__} has no layers that can be recomputed; set it to false"
        )
    for layer in layers:
        layer.training = True


def check_path(path: str) -> None:
    """Raises CheckpointError when `path` is a folder without a model, or no folder and no hub id."""
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if folder.is_dir() and not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{path}: no config.json or adapter_config.json in this folder; name a model folder")
    if (folder / "adapter_config.json").exists() and not (folder / "adapter_model.safetensors").exists():
        # transformers would fall back to adapter_model.bin, whatever it is asked for
        raise CheckpointError(f"{path}: no adapter_model.safetensors in this folder; save the adapter as safetensors")
    if not folder.exists() and looks_local:
        raise CheckpointError(f"{path}: no such model folder; give a local folder or a hub id like owner/name")


@contextlib.contextmanager
def readable(path: str) -> Generator[None]:
    """Turn what transformers raises for a missing or damaged model into a CheckpointError."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be loaded as a causal language model ({first}); check model.path, or download it first"
        ) from None
