"""Products that read weights to 16 bits or more, with activations in bfloat16: model.dtype = "bfloat16x2".

In: a model. Out: the same one, whose linear layers, where autocast is on, take a weight as hi + lo, both bfloat16, and round
the sum of both products once. bfloat16 alone reads 8 bits of a weight and passes over the small updates of DPO. Next: load.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from favor.errors import ConfigError

_PLAIN = (nn.Linear, Conv1D)


def read_in_two_parts(model: PreTrainedModel, trained: nn.Module) -> None:
    """Let every linear layer of `trained` (the model, adapters around it too) compute so wherever autocast is on.

    The model's own head gives float32 logits. Raises ConfigError for a model that multiplies by other weights.
    """
    head = model.get_output_embeddings()
    for path, module in trained.named_modules():
        matrices = [name for name, p in module.named_parameters(recurse=False) if p.dim() > 1]
        # rows of an embedding are picked, not multiplied
        if not matrices or isinstance(module, nn.Embedding):
            continue
        if type(module) not in _PLAIN:
            raise ConfigError(
                f"model.dtype = 'bfloat16x2' splits the weights of linear layers, and {type(model).__name__} multiplies by "
                f"others ({path}.{matrices[0]}, of a {type(module).__name__}); set model.dtype=float32 or bfloat16"
            )
        gives = torch.float32 if module is head else torch.bfloat16
        # a weight kept in bfloat16 has no second part: its own way of being read rounds only what comes out
        if module is head or module.weight.dtype == torch.float32:
            # a partial of the module: a deep copy of the model then calls its own
            module.forward = partial(_linear, module, module.forward, gives)


def parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Tensors that add up to a weight: two in bfloat16 where `multiply` takes those as they are, else itself."""
    if weight.dtype == torch.bfloat16 or weight.device.type == "cpu":
        return (weight,)
    return split(weight)


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(hi, lo), both bfloat16: hi + lo is the weight to 16 bits and more."""
    high = weight.bfloat16()
    return high, (weight - high.float()).bfloat16()


def product(a: Tensor, b: tuple[Tensor, ...]) -> Tensor:
    """The matrix a (b1 + b2 + ...) in float32; nothing is rounded before all is added up."""
    total = multiply(a, b[0])
    for part in b[1:]:
        total += multiply(a, part)
    return total


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices, bfloat16 or float32, in float32. CPUs have none of bfloat16: both are widened there."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def narrowed(gradient: Tensor) -> Tensor:
    """The gradient of float32 results as `multiply` is fastest with it: on a GPU in bfloat16, as all activations are."""
    return gradient if gradient.device.type == "cpu" else gradient.bfloat16()


def _linear(module: nn.Module, otherwise: Callable[[Tensor], Tensor], gives: torch.dtype, x: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(x.device.type):
        return otherwise(x)
    weight, bias = cast(tuple[Tensor, Tensor | None], (module.weight, module.bias))
    with torch.autocast(x.device.type, enabled=False):
        weight_OI = weight.t() if type(module) is Conv1D else weight
        y = cast(Tensor, _TwoParts.apply(x.flatten(0, -2), weight_OI, bias, gives))
    return y.unflatten(0, x.shape[:-1])


class _TwoParts(torch.autograd.Function):
    """y = x (hi + lo)^T + b, x and (but for the head) y in bfloat16.

    Backward, with g = dL/dy: dx = g (hi + lo), rounded to bfloat16; dW = g^T x and db = sum g in float32.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, gives: torch.dtype) -> Tensor:
        # what is kept for the backward: half of what float32 keeps
        x_NI = x_NI.bfloat16()
        ctx.save_for_backward(x_NI, weight_OI)
        if gives == torch.bfloat16 and _joins(x_NI.device):
            return _joined(x_NI, weight_OI, bias_O)
        y_NO = product(x_NI, tuple(part.t() for part in parts(weight_OI)))
        return (y_NO if bias_O is None else y_NO.add_(bias_O)).to(gives)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        (g_NO,) = grads
        dx = dweight = None
        if wants_x:
            joins = g_NO.dtype == torch.bfloat16 and _joins(g_NO.device)
            dx = _joined(g_NO, weight_OI.t(), None) if joins else product(narrowed(g_NO), parts(weight_OI)).bfloat16()
        if wants_weight:
            dweight = multiply(narrowed(g_NO).t(), x_NI)
        return dx, dweight, g_NO.float().sum(0) if wants_bias else None, None


def _joined(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The rounded x (hi + lo)^T + b as one bfloat16 product over [x x 1 1] and [hi lo b_hi b_lo], added up in float32.

    For CPUs that multiply bfloat16: their products accumulate in float32 but give bfloat16 alone.
    """
    left, right = [x_NI, x_NI], list(split(weight_OI))
    if bias_O is not None:
        left.append(x_NI.new_ones((x_NI.shape[0], 2)))
        right.append(torch.stack(split(bias_O), 1))
    return functional.linear(torch.cat(left, 1), torch.cat(right, 1))


def _joins(device: torch.device) -> bool:
    """Whether it is a CPU that multiplies bfloat16 by an instruction of its own, faster than float32."""
    known = torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported  # pyright: ignore[reportPrivateUsage]
    return device.type == "cpu" and any(has() for has in known)
