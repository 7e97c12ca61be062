"""QLoRA: linear layers that do not train, rounded to 4 bits and computed as the float32 numbers that they then are.

NF4 in blocks of 64 (Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes: 0.56 bytes a number. The rounded model is another
model; policy and reference both stand on it, and a file beside the adapter says so. The head and embeddings are left alone, as
transformers leaves them. In: a model. Out: the same one, packed or rounded. Next: load.py.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import cached_file

from favor.errors import CheckpointError

# beside an adapter: how the base that it was trained on was rounded
MARK = "favor.json"
_ROUNDED = {"base_weights": "nf4"}
_CARD = """
## The base is rounded

This adapter was trained on its base rounded to 4 bits (NF4, blocks of 64) and belongs on that: `from_pretrained(base,
quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32))`.
favor does so by itself.
"""
_BLOCK = 64
# heads that adapters train beside them, as peft's modules_to_save
TRAINS = ("score",)


def layers(model: PreTrainedModel) -> Iterator[nn.Linear]:
    """The linear layers that are rounded."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if type(module) is nn.Linear and module is not head and path.rpartition(".")[2] not in TRAINS:
            yield module


def pack(model: PreTrainedModel) -> int:
    """Round the layers and keep them in 4 bits, in place; returns the bytes that they take."""
    total = 0
    for module in layers(model):
        packed, absmax = _packed(module.weight)
        module.weight = nn.Parameter(packed, requires_grad=False)
        # not persistent: the names of a model's tensors stay what they are
        module.register_buffer("absmax", absmax, persistent=False)
        forward: Any = partial(_linear, module)
        module.forward = forward
        total += packed.nbytes + absmax.nbytes
    return total


def round_(model: PreTrainedModel) -> None:
    """Give the layers the float32 numbers that packed ones compute with, in place."""
    with torch.no_grad():
        for module in layers(model):
            packed, absmax = _packed(module.weight)
            module.weight.copy_(_values(packed, absmax, torch.float32, module.weight.shape))


def numbers(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A packed tensor of a state dict as the float32 numbers that are computed with."""
    module = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(module, nn.Linear)
    return _values(tensor, cast(Tensor, module.absmax), torch.float32, _shape(module))


def write_mark(folder: Path) -> None:
    """Say beside an adapter that its base was rounded, and in its card how it is loaded elsewhere."""
    (folder / MARK).write_text(json.dumps(_ROUNDED) + "\n", "utf-8")
    if (card := folder / "README.md").exists():
        card.write_text(card.read_text("utf-8") + _CARD, "utf-8")


def is_marked(path: str, revision: str | None) -> bool:
    """Whether an adapter's base must be rounded before the adapter is put on it. Raises CheckpointError for another mark."""
    found = cached_file(path, MARK, revision=revision, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return False
    try:
        said = json.loads(Path(found).read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{found}: damaged ({error}); fetch the adapter again") from None
    if said != _ROUNDED:
        raise CheckpointError(
            f"{found}: says {said!r:.80} of the adapter's base, which this version of favor does not know"
        )
    return True


def _packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers a byte, and the largest of every block."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.detach(), blocksize=_BLOCK, quant_type="nf4")
    assert state.absmax is not None
    return packed, state.absmax


def _values(packed: Tensor, absmax: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    code = get_4bit_type("nf4", device=packed.device)
    state = QuantState(absmax, shape=shape, code=code, blocksize=_BLOCK, quant_type="nf4", dtype=dtype)
    return dequantize_4bit(packed, state)


def _shape(module: nn.Linear) -> torch.Size:
    return torch.Size((module.out_features, module.in_features))


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    widen = partial(_values, shape=_shape(module))
    return widened(x, widen, dtype, module.bias, module.weight, cast(Tensor, module.absmax))


def widened(
    x: Tensor, widen: Callable[..., Tensor], dtype: torch.dtype, bias: Tensor | None, *stored: Tensor
) -> Tensor:
    """X W^T + b where `widen` makes W of what is stored, for this one product; the backward makes it again rather than keep it.

    What is stored first may train: its gradient is that of W, in the format of x.
    """
    return cast(Tensor, _Widened.apply(x, widen, dtype, bias, *stored))


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, widen: Callable[..., Tensor], dtype: torch.dtype, bias: Tensor | None, *stored: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[4] else None, *stored)
        ctx.widen = widen
        return functional.linear(x, widen(*stored, dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *stored = ctx.saved_tensors
        wants_x, _, _, wants_bias, wants_weight, *_ = ctx.needs_input_grad
        (grad,) = grads
        dx = grad @ ctx.widen(*stored, grad.dtype) if wants_x else None
        dbias = grad.flatten(0, -2).sum(0) if wants_bias else None
        dweight = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(stored[0].dtype) if wants_weight else None
        return dx, None, None, dbias, dweight, *(None for _ in stored[1:])
