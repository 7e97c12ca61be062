"""The files of a model -> a policy whose weights are split over ranks, of which no rank ever holds the whole.

In: ModelConfig. Out: a Policy, each of whose ranks has read its own rows of every tensor; or None where the files do not hold
the weights as the model names them. Next: split.py.
"""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, find_adapter_config_file
from transformers.utils.hub import get_checkpoint_shard_files

from favor.model.kept import keepable
from favor.model.load import ModelConfig, Policy, keeps, load_tokenizer, make_policy
from favor.model.split import filled, split
from favor.model.weights import check_kinds, check_path, is_mask, readable
from favor.parts import assign_, rows_of
from favor.ranks import Shard, World


class Place(NamedTuple):
    """Where a tensor lies, its number format and its shape."""

    file: str
    kind: str
    shape: list[int]


def load(config: ModelConfig, seed: int, how: Shard, members: World, *, frozen: bool) -> Policy | None:
    """A causal LM split over ranks, read by each where its rows lie. None: it must be read whole, then split.

    Raises CheckpointError for a model that cannot be read, ConfigError as `split` and `make_policy` do.
    """
    # blocks of 64 numbers do not end where rows do; DoRA measures the weights when it is made
    if config.weights == "nf4" or (config.lora is not None and config.lora.dora):
        return None
    check_path(config.path)
    tokenizer = load_tokenizer(config)
    with readable(config.path):
        if find_adapter_config_file(config.path, revision=config.revision) is not None:
            return None
        found, model = _places(config), _empty(config)
    if not _fits(model, found):
        return None
    check_kinds(config.path, model, {name: (place.kind, place.shape) for name, place in found.items()})
    narrow = keepable(model) if keeps(config, frozen=frozen) else {}
    if any(found[name].kind != "BF16" for name, parameter in model.named_parameters() if parameter in narrow):
        # whether bfloat16 holds their numbers is known when all of them are read
        return None
    # adapters are made on the device of the weights they adapt
    _stand_in(model, set(narrow))
    model.tie_weights()
    policy = make_policy(model, tokenizer, config, seed, frozen=frozen, place=False)
    _stand_down(policy.model)
    policy.causal_lm.tie_weights()
    adapters = {name: p.detach().clone() for name, p in policy.model.named_parameters() if not p.is_meta}
    policy = split(policy, how, members)
    filled(policy.root, policy.device)
    parameters = dict(policy.model.named_parameters())
    for name, value in adapters.items():
        assign_(parameters[name], value)
    _read(policy, found)
    return policy


def _places(config: ModelConfig) -> dict[str, Place]:
    """Every tensor in the model's files, fetched from the hub where they are not here."""
    missing: dict[str, Any] = {"revision": config.revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(config.path, SAFE_WEIGHTS_INDEX_NAME, **missing)
    files: list[Any] = [index or cached_file(config.path, SAFE_WEIGHTS_NAME, revision=config.revision)]
    if index is not None:
        files = get_checkpoint_shard_files(config.path, index, revision=config.revision)[0] or []
    found: dict[str, Place] = {}
    for path in map(str, files):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                found[name] = Place(path, str(part.get_dtype()), list(part.get_shape()))
    return found


def _empty(config: ModelConfig) -> Any:
    """The model as its config.json describes it, its weights without memory, its buffers real."""
    where = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    architecture = AutoConfig.from_pretrained(config.path, **where)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=torch.float32, trust_remote_code=config.trust_remote_code
        )
    model.tie_weights()
    if model.can_generate() and (file := _generation(config)):
        model.generation_config = GenerationConfig.from_pretrained(Path(file).parent)
    return model.eval()


def _generation(config: ModelConfig) -> str | None:
    return cached_file(
        config.path, "generation_config.json", revision=config.revision, _raise_exceptions_for_missing_entries=False
    )


def _fits(model: Any, found: Mapping[str, Place]) -> bool:
    """Whether the files hold every weight by the name and in the shape that the model has it, and nothing else that counts."""
    if model.config.to_dict().get("quantization_config"):
        return False
    every = model.state_dict()
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    kinds = {name: (place.kind, place.shape) for name, place in found.items()}
    left = [name for name in found.keys() - every.keys() if not is_mask(name, kinds)]
    return not left and all(
        name in found and found[name].shape == list(every[name].shape) for name in every.keys() - tied
    )


def _stand_in(model: nn.Module, narrow: Set[nn.Parameter]) -> None:
    """Put a tensor of one number, seen in the weight's shape, in the place of every weight without memory; narrow: in bfloat16."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                seen = torch.zeros((), dtype=torch.bfloat16 if parameter in narrow else torch.float32)
                setattr(module, name, nn.Parameter(seen.expand(parameter.shape), requires_grad=parameter.requires_grad))


def _stand_down(model: nn.Module) -> None:
    """Take those tensors away again."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.untyped_storage().nbytes() < parameter.nbytes:
                empty = torch.empty_like(parameter, device="meta")
                setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def _read(policy: Policy, found: Mapping[str, Place]) -> None:
    """Read this rank's rows of every weight, in the format it is held in, and the buffers that files hold."""
    # adapters have wrapped some layers since
    tensors = {name.replace(".base_layer", ""): tensor for name, tensor in policy.causal_lm.state_dict().items()}
    for path in sorted({place.file for place in found.values()}):
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name in sorted(name for name, place in found.items() if place.file == path and name in tensors):
                tensor = tensors[name]
                if not isinstance(tensor, DTensor):
                    tensor.copy_(file.get_tensor(name))
                elif tensor.to_local().numel():
                    tensor.to_local().copy_(file.get_slice(name)[rows_of(tensor)])
