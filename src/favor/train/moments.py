"""What an optimizer remembers of every weight, as the tensors that a checkpoint keeps; and AdamW that remembers in 8 bits.

In: an optimizer and its parameters. Out: its state by name, and the state again from that. Next: checkpoint.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from favor.parts import split_like

# bitsandbytes keeps a largest size for every block of so many numbers, and one table of the 256 values for all of them
_BLOCK = 256
_SIZES = frozenset({"absmax1", "absmax2"})
_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}


def adamw_8bit(
    groups: Sequence[Mapping[str, Any]], lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes: both running means in 8 bits with a size for every 256 numbers; tensors under 4,096 in float32."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit([dict(group) for group in groups], lr=lr, betas=betas, eps=eps)


def kept(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of one parameter as tensors, without what is the same for all of them."""
    return {
        name: value if isinstance(value, Tensor) else torch.tensor(value)
        for name, value in state.items()
        if name not in _TABLES
    }


def restored(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, mine: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of one parameter from what `kept` gave."""
    found: dict[str, Any] = {name: v if v.dim() == 0 else split_like(parameter, v) for name, v in mine.items()}
    if "step" in mine and optimizer.defaults.get("fused"):
        # its kernel reads the number of steps on the weight's device
        found["step"] = mine["step"].to(parameter.device)
    if "state1" in mine:
        found["step"] = int(mine["step"])
    if _in_8_bits(mine):
        tables = cast(Any, optimizer).name2qmap
        found |= {name: tables[table].to(parameter.device) for name, table in _TABLES.items()}
    return found


def fits(name: str, value: Tensor, parameter: nn.Parameter) -> bool:
    """Whether this can be a parameter's state of that name: its shape, and finite numbers."""
    shape = (-(-parameter.numel() // _BLOCK),) if name in _SIZES else parameter.shape
    return (value.dim() == 0 or value.shape == shape) and bool(value.isfinite().all())


def names(mine: Mapping[str, Tensor]) -> frozenset[str]:
    """What of a parameter's state must be there for every other one too; what lies beside 8 bits counts where they are."""
    return frozenset(mine) ^ _SIZES if _in_8_bits(mine) else frozenset(mine)


def _in_8_bits(mine: Mapping[str, Tensor]) -> bool:
    return "state1" in mine and mine["state1"].dtype == torch.uint8
