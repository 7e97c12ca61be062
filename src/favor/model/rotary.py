"""Rotary frequencies that depend on the longest row of a batch, made to depend on each row alone.

In: a model. Out: the same one. Next: load.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def length_dependent(config: dict[str, Any]) -> tuple[str, int] | None:
    """(rope_type, tokens): beyond so many tokens a row's length chooses its frequencies; None where it never does."""
    rope = config.get("rope_parameters") or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    found: list[tuple[str, int]] = []
    for kind in kinds:
        name = str(kind.get("rope_type"))
        if name == "longrope":
            found.append((name, int(kind["original_max_position_embeddings"])))
        elif "dynamic" in name:
            found.append((name, int(config["max_position_embeddings"])))
    return min(found, key=lambda item: item[1], default=None)


def row_by_row(model: PreTrainedModel) -> None:
    """Let every rotary embedding of this kind see one row at a time. Padding must repeat a row's last position."""
    for module in model.modules():
        kinds = vars(module).get("rope_type")
        names = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in names):
            # a partial of a bound method: a deep copy of the model then calls its own module
            module.forward = partial(_each_row, module.forward)


def _each_row(forward: Callable[..., Any], x: Tensor, position_ids: Tensor, *more: Any, **named: Any) -> Any:
    found: list[Any] = []
    for row in range(position_ids.shape[0]):
        # "dynamic" remembers the longest row it has met; position 0 makes it forget
        forward(x[:1], position_ids.new_zeros((1, 1)), *more, **named)
        found.append(forward(x[:1], position_ids[row : row + 1], *more, **named))
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
