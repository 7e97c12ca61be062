"""The reference's log-probs: a checked artefact in a safetensors file, or a live model.

In: the policy as it starts and the token trees. Out: log ref(y|x) of every response. A store is
reused only when its fingerprint holds, and refused with what differs. Next: checkpoint.py.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from favor.config import STRICT
from favor.data.splits import hash_ids
from favor.data.tokenize import TokensConfig
from favor.data.types import Batch, TokenTree
from favor.errors import CheckpointError, NumericsError
from favor.guard import sha
from favor.model.load import Policy, frozen_copy, weights_hash
from favor.model.logprobs import response_logps, scored_logps
from favor.ranks import World, barrier, from_main
from favor.run import whole_file

# Raise when a change to favor can change log-probs beyond rounding: older stores are then refused.
_CODE = "2"
_HASH = "sha256"


class SyncConfig(BaseModel):
    """Section [reference.sync]: TR-DPO's reference, which follows the policy. Gorbatovski et al. 2024, arXiv 2404.09656."""

    model_config = STRICT
    every: int = Field(ge=1)
    """Steps after which the live reference moves to the policy."""
    weight: float = Field(default=1.0, gt=0, le=1)
    """By what share it moves; 1: it becomes the policy."""


class ReferenceConfig(BaseModel):
    """Section [reference]: what the policy is compared with, the model as it starts."""

    model_config = STRICT
    mode: Literal["stored", "live"] = "stored"
    """stored: log-probs computed once and kept in a file; live: computed beside every batch."""
    store: str | None = None
    """The file to build or reuse; by default it lies in the run folder."""
    sync: SyncConfig | None = None
    displacement_threshold: float = Field(default=0.75, gt=0, le=1)
    """Warn when this share of the last chosen responses has become less likely than under the reference."""

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "ReferenceConfig":
        if self.store is not None and self.mode == "live":
            raise ValueError("reference.store is set but reference.mode is 'live', which stores nothing; remove one")
        if self.sync is not None and self.mode != "live":
            raise ValueError("[reference.sync] moves the reference, so it cannot be stored; set reference.mode=live")
        return self


@dataclass(frozen=True)
class Reference:
    """`logps(batch)` -> log ref(y|x), float64 [R] on the batch's device. `identity` goes into every checkpoint.

    `tokens(batch)`, of a live one: the same per scored token, float32 [E]. `weights`: those of a frozen copy.
    """

    logps: Callable[[Batch], Tensor]
    identity: str
    tokens: Callable[[Batch], Tensor] | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def identity(policy: Policy, tokens: TokensConfig) -> dict[str, str]:
    """What a policy is before it trains, and how text becomes its tokens."""
    chat = policy.tokenizer.chat_template
    return {
        "weights": weights_hash(policy),
        "adapter": "switched off" if policy.lora else "none",
        "tokenizer": _tokenizer_hash(policy.tokenizer),
        "template": sha(f"{tokens.template}\n{chat}"),
        "truncation": f"{tokens.truncation} at {tokens.max_tokens}",
        "dtype": policy.products,
        "favor": _CODE,
        # what is not there has no name in older stores
        **({"pictures": policy.sight.identity} if policy.sight else {}),
    }


def stored(
    policy: Policy,
    splits: Mapping[str, Sequence[TokenTree]],
    identity: Mapping[str, str],
    path: Path,
    build: Callable[[Sequence[TokenTree]], Tensor],
    world: World,
) -> dict[str, Reference]:
    """One Reference per split from the store at `path`; built with `build` if there is none.

    identity: of the policy as it starts. Raises CheckpointError when the store was made from something else, naming what
    differs, or is damaged; NumericsError when a log-prob is not finite.
    """
    expected = {**identity, "token ids": hash_ids(splits)}
    if not from_main(int(path.exists()), world):
        tensors = {name: build(trees) for name, trees in splits.items()}
        if world.is_main:
            _write(path, tensors, expected)
        barrier(world)
    tensors = _read(path, expected, {name: sum(len(t.response_ids) for t in trees) for name, trees in splits.items()})
    whole = sha(json.dumps(expected, sort_keys=True))
    return {name: Reference(_lookup(tensors[name].to(policy.device)), whole) for name in splits}


def base_of(policy: Policy, *, moves: bool = False) -> Policy:
    """What a live reference computes with: the policy, whose adapters it switches off, or a frozen copy of its weights.

    moves: `sync` will move them.
    """
    return policy if policy.lora else frozen_copy(policy, moves=moves)


def live(base: Policy, identity: str) -> Reference:
    """The reference computed beside every batch, by what `base_of` gave."""

    def logps(batch: Batch) -> Tensor:
        with torch.no_grad(), frozen(base) as reference:
            return response_logps(reference, batch)

    def tokens(batch: Batch) -> Tensor:
        with torch.no_grad(), frozen(base) as reference:
            return scored_logps(reference, batch)

    return Reference(logps, identity, tokens, {} if base.lora else dict(base.model.named_parameters()))


def none() -> Reference:
    """For losses that read no reference: zeros."""
    return Reference(
        lambda batch: torch.zeros(batch.num_responses, dtype=torch.float64, device=batch.ids_BT.device), "none"
    )


def sync(reference: Reference, parameters: Mapping[str, Tensor], weight: float) -> None:
    """Move a frozen copy's weights to the policy's: ref <- weight pi + (1 - weight) ref."""
    with torch.no_grad():
        for name, mine in reference.weights.items():
            if name in parameters:
                mine.lerp_(parameters[name].to(mine.dtype), weight)


@contextmanager
def frozen(policy: Policy) -> Generator[Policy]:
    """The policy as its own reference, before it has trained: its adapters are switched off, if it has any."""
    with policy.model.disable_adapter() if policy.lora else nullcontext():
        yield policy


def _lookup(logps: Tensor) -> Callable[[Batch], Tensor]:
    return lambda batch: logps[batch.index_R]


def _write(path: Path, tensors: dict[str, Tensor], expected: Mapping[str, str]) -> None:
    for name, logps in tensors.items():
        if not logps.isfinite().all():
            bad = int((~logps.isfinite()).nonzero()[0])
            raise NumericsError(
                f"reference log-prob of response {bad} of '{name}' is {float(logps[bad])}; the model gives numbers that "
                "are not finite: try model.dtype=float32, or another model"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as aside:
        save_file(tensors, aside, metadata={**expected, _HASH: _content_hash(tensors, expected)})


def _content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of every tensor with its name, type and shape, and of what the store was made from."""
    digest = hashlib.sha256(json.dumps(sorted((k, v) for k, v in metadata.items() if k != _HASH)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, expected: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable reference store ({error}); delete it to build it again"
        ) from None
    stale = [name for name, value in expected.items() if found.get(name) != value]
    if stale:
        raise CheckpointError(
            f"{path}: this reference store belongs to another {', '.join(stale)}; delete it to build it again, "
            "or name another file with reference.store"
        )
    sound = found.get(_HASH) == _content_hash(tensors, found)
    fits = all(
        (t := tensors.get(name)) is not None and t.dtype == torch.float64 and t.shape == (size,) and t.isfinite().all()
        for name, size in sizes.items()
    )
    if not (sound and fits):
        raise CheckpointError(f"{path}: damaged reference store (not what was written); delete it to build it again")
    return tensors


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    return sha(json.dumps(sorted(tokenizer.get_vocab().items())))
