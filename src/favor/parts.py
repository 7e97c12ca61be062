"""Tensors split over ranks by their first dimension, as FSDP splits weights: put together, filled, clipped, cut into files.

In: tensors, split (DTensor) or not. Out: whole ones, or this rank's part of one. Nothing here is needed where every rank
holds all weights. Next: model/split.py.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# a file is put together in the memory of one process
_FILE_BYTES = 4 << 30


def clip_(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale gradients down to a global norm of at most `most`; returns the norm before, equal on all ranks."""
    parameters = list(parameters)
    # those that are split over ranks beside those that every rank holds, such as a critic's head
    split = [p for p in parameters if isinstance(p, DTensor) and p.grad is not None]
    rest = [p for p in parameters if not isinstance(p, DTensor) and p.grad is not None]
    norms = [nn.utils.get_total_norm([p.grad for p in some if p.grad is not None]) for some in (split, rest) if some]
    norm = torch.stack([whole(norm) for norm in norms]).norm()
    for some in (split, rest):
        nn.utils.clip_grads_with_norm_(some, most, norm)
    return norm


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is split over ranks, put together on every one of them (all must ask); another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collected(tensors: Mapping[str, Tensor], *, keep: bool, copy: bool = False) -> dict[str, Tensor]:
    """Whole tensors in the memory of the machine, for a rank that keeps them; all ranks must ask, and hold one at a time.

    copy: what is whole already is copied, too.
    """
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            held[name] = value.to("cpu", copy=copy).contiguous()
    return held


def num_here(tensor: Tensor) -> int:
    """How many of a tensor's numbers this rank holds."""
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


def assign_(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, equal on all ranks, into one that may be split over them: each rank takes its part."""
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(value[rows_of(tensor)])
        else:
            tensor.copy_(value)


def split_like(tensor: Tensor, value: Tensor) -> Tensor:
    """A new tensor of `value`, equal on all ranks, split over them as `tensor` is, if it is; on its device."""
    if not isinstance(tensor, DTensor):
        return value.to(tensor.device)
    local = value[rows_of(tensor)].to(tensor.device, copy=True)
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def rows_of(tensor: DTensor) -> slice:
    """The rows of a split tensor that this rank holds: tensors are cut along their first dimension."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape[1:]) == tuple(tensor.shape[1:]), "only the first dimension is cut"
    return slice(offset[0], offset[0] + shape[0])


def in_files(name: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, list[str]]]:
    """Safetensors files of a few GiB for tensors: (file, their names). One file keeps the plain name."""
    shares: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        here = tensor.numel() * tensor.element_size()
        if shares[-1] and size + here > _FILE_BYTES:
            shares.append([])
            size = 0
        shares[-1].append(key)
        size += here
    for number, share in enumerate(shares, 1):
        yield f"{name}{f'-{number:05d}-of-{len(shares):05d}' if len(shares) > 1 else ''}.safetensors", share
