"""Weights split over ranks by decoder layer (PyTorch FSDP2): every rank holds its part, and collects a layer while it is computed.

In: a Policy, from pieces.py or read whole. Out: the Policy whose forwards run within `root`, and whose parameters, gradients
and optimizer state are parts.
Gradients are sums over ranks, as everywhere in favor: the loss was divided by the global count. Next: logprobs.py.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer

from favor.errors import ConfigError
from favor.model.load import Policy
from favor.model.room import give_back_freed
from favor.model.rotary import row_by_row
from favor.model.two_parts import read_in_two_parts
from favor.parts import collected, in_files
from favor.ranks import Shard, World


class Root(nn.Module):
    """Holds the model. What is not in a layer (embedding, last norm, head) is collected while `forward` runs a function."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        """What `work` returns."""
        return work()


def split(policy: Policy, how: Shard, members: World) -> Policy:
    """The policy with its weights split over ranks. Raises ConfigError for a model without layers, and as `mesh` does."""
    root = Root(policy.model)
    cut(root, policy, mesh(how, policy.device, members))
    return replace(policy, root=root)


def cut(root: Root, policy: Policy, over: DeviceMesh) -> None:
    """Split the weights that `root` holds, layer by layer; the rest of them together."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if policy.device.type == "cpu":
        give_back_freed()
    layers = [module for module in policy.causal_lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"ranks.shard: {type(policy.causal_lm).__name__} has no decoder layers by which it could be split; set ranks.shard=none"
        )
    for module in (*layers, root):
        # the root too gives its weights back after a forward: what changes them in between is then seen by the next one
        fully_shard(module, mesh=over, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        # sums, by a reduction that gloo knows too
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        # a weight that one rank did not touch counts as zero
        module.set_reduce_scatter_unused_params(True, recurse=False)


def mesh(how: Shard, device: torch.device, members: World) -> DeviceMesh:
    """Over which ranks weights are split: all of them, or those of a machine, repeated on every machine.

    Raises ConfigError when machines do not hold equally many ranks.
    """
    if how == "full":
        return init_device_mesh(device.type, (members.size,))
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    here = int(text) if text.isdecimal() else 0
    if here < 1 or members.size % here:
        raise ConfigError(
            f"ranks.shard=hybrid splits the weights over the ranks of one machine, but LOCAL_WORLD_SIZE is {text!r} of "
            f"{members.size} ranks in all; start equally many on every machine with torchrun, or set ranks.shard=full"
        )
    return init_device_mesh(device.type, (members.size // here, here), mesh_dim_names=("machines", "ranks"))


def gradient(parameters: Mapping[str, nn.Parameter], value: Tensor) -> dict[str, Tensor]:
    """The gradient of a value on all ranks by parameter, summed over them, each rank holding its part."""
    # FSDP gathers and sums in a backward pass; torch.autograd.grad would go around it
    torch.autograd.backward(value)
    found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def copied(policy: Policy) -> Policy:
    """A second model with the weights of the first as they are now, split alike, that never trains."""
    parameters = dict(policy.causal_lm.named_parameters())
    model = bare(policy.causal_lm).requires_grad_(False)
    head = model.get_output_embeddings()
    fast = head if policy.fast_head is not None and type(head) is nn.Linear else None
    if policy.two_parts:
        read_in_two_parts(model, model)
    root = Root(model)
    copy = replace(policy, model=model, backbone=model.base_model, fast_head=fast, root=root)
    cut(root, copy, _device_mesh(parameters.values()))
    filled(model, policy.device)
    with torch.no_grad():
        for name, mine in model.named_parameters():
            mine.copy_(parameters[name])
    return copy


def _device_mesh(parameters: Iterable[Tensor]) -> DeviceMesh:
    parameter = next(iter(parameters))
    assert isinstance(parameter, DTensor), "its weights are split"
    return parameter.device_mesh


def bare(model: PreTrainedModel) -> PreTrainedModel:
    """A model like another, whose weights take no memory yet (they are on the meta device); its buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        made = type(model)(deepcopy(model.config)).eval()
    made.tie_weights()
    row_by_row(made)
    return made


def filled(model: nn.Module, device: torch.device) -> None:
    """Give every rank memory for its part of the weights, whatever is in it; buffers keep their values."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def save(policy: Policy, folder: Path | None) -> None:
    """The model's files, as its own save_pretrained writes them: every rank must ask, one gives the folder.

    Tensors are put together one after the other; the one that writes keeps a file's worth at a time. Adapters, and models
    whose files name their weights in another way than the model itself does, are put together whole in the writer's memory.
    """
    writes = folder is not None
    if policy.lora:
        held = collected(policy.trainable(), keep=writes)
        if writes:
            policy.model.save_pretrained(folder, state_dict=held)
        return
    model = policy.causal_lm
    tensors = _saved(model)
    here = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    if set(revert_weight_conversion(model, here)) != set(tensors):
        held = collected(tensors, keep=writes)
        if writes:
            model.save_pretrained(folder, state_dict=held)
        return
    files = dict(in_files("model", tensors))
    if writes:
        _describe(model, folder, files, sum(t.numel() * t.element_size() for t in tensors.values()))
    for file, names in files.items():
        held = collected({name: tensors[name] for name in names}, keep=writes)
        if writes:
            save_file(held, folder / file, metadata={"format": "pt"})


def _saved(model: PreTrainedModel) -> dict[str, Tensor]:
    """What belongs into a model's files: every weight once, though two layers share it, and buffers that are kept."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in every}
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    return tensors | buffers


def _describe(model: PreTrainedModel, folder: Path, files: Mapping[str, list[str]], size: int) -> None:
    """config.json and what else save_pretrained writes beside the weights; an index where they are in several files."""
    model.save_pretrained(folder, state_dict={})
    # what it wrote of no weights
    (folder / "model.safetensors").unlink(missing_ok=True)
    if len(files) > 1:
        places = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
