"""Weights kept in bfloat16 and computed as the float32 numbers that they are: half the memory, and no other figure.

In: a model whose weights do not train. Out: the same one; its linear layers and embeddings are kept in bfloat16 and widened
where they are read. With "nf4" the linear layers are rounded to 4 bits first (four_bits.py). Of a model that trains the
weights are float32, the optimizer's master copies, and its layers read them rounded to bfloat16. Next: load.py.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from favor.errors import CheckpointError, ConfigError
from favor.model.four_bits import TRAINS, pack, widened


def keep(model: PreTrainedModel, source: str, weights: str, *, all_of_them: bool = True) -> int:
    """Keep the matrices of linear layers and embeddings in bfloat16, in place; all else is float32, and nothing trains.

    A shared matrix is kept where all that share it can read it. Returns the bytes so kept. Raises CheckpointError where a
    matrix holds numbers that bfloat16 does not have. Without all_of_them, and with weights "nf4", whose layers are rounded to
    4 bits, such matrices are float32.
    """
    model.requires_grad_(False)
    kept = pack(model) if weights == "nf4" else 0
    matrices, lossy = keepable(model), list[str]()
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.uint8:
            continue
        if parameter not in matrices or not _exact(parameter):
            lossy += [name] if parameter in matrices else []
            parameter.data = parameter.data.float()
            continue
        parameter.data = parameter.data.bfloat16()
        kept += parameter.nbytes
        for module in matrices[parameter]:
            module.forward = partial(_READ[type(module)], module)
    if lossy and weights == "bfloat16" and all_of_them:
        raise CheckpointError(
            f"{source}: weights = 'bfloat16' keeps what the files hold, but {len(lossy)} matrices ({lossy[0]}) hold numbers "
            "that bfloat16 does not have, so it would be another model; leave it at float32, or name a copy in bfloat16, "
            "as favor export run=RUN out=FOLDER writes it of a run, and transformers' save_pretrained of a model loaded with "
            "dtype=torch.bfloat16"
        )
    return kept


def untrainable(weights: str, dtype: str) -> str | None:
    """Why a model cannot train in full with such model.weights and model.dtype, if it cannot."""
    if weights == "nf4":
        return (
            "model.weights = 'nf4' is how weights that do not train are kept, and without [model.lora] all of them train; "
            "add [model.lora], or leave model.weights at float32"
        )
    if weights == "bfloat16" and dtype != "bfloat16":
        return (
            f"model.weights = 'bfloat16' lets products read 8 bits of weights that train, and model.dtype = {dtype!r} reads more; "
            "set model.dtype=bfloat16, add [model.lora], or leave model.weights at float32"
        )
    return None


def read_rounded(model: PreTrainedModel) -> int:
    """Let linear layers that train read their weights, where autocast is on, as bfloat16 numbers made for one product.

    Autocast computes the same numbers and keeps a copy of every weight for the backward; here the backward makes it again. So
    the weights are the float32 masters of bfloat16 ones that take no memory. Returns the bytes that copies would take, the
    head left out, which gives float32 logits.
    """
    read, head = set[nn.Parameter](), model.get_output_embeddings()
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D):
            # a partial of the module: a deep copy of the model then calls its own
            module.forward = partial(_rounded, module, module.forward)
            read |= {cast(nn.Parameter, module.weight)} if module is not head else set()
    return 2 * sum(weight.numel() for weight in read)


def keepable(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """The matrices of linear layers and embeddings that can be kept in bfloat16, each with the modules that read it."""
    places: dict[nn.Parameter, list[nn.Module]] = defaultdict(list)
    others = set[nn.Parameter]()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and path.rpartition(".")[2] not in TRAINS and _reads(module):
                places[parameter].append(module)
            else:
                others.add(parameter)
    return {parameter: modules for parameter, modules in places.items() if parameter not in others}


def _reads(module: nn.Module) -> bool:
    # a class made from these may do something else with its weight
    return type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)


def _exact(parameter: Tensor) -> bool:
    """Whether bfloat16 has every number of it."""
    return parameter.dtype == torch.bfloat16 or bool((parameter == parameter.bfloat16()).all())


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        return functional.linear(x, module.weight, module.bias)
    if x.dtype != torch.float32:
        raise ConfigError(
            "its layers compute in the format of their weights, so weights kept in bfloat16 would round; set weights=float32"
        )
    return widened(x, Tensor.to, torch.float32, module.bias, module.weight)


def _rounded(module: nn.Module, otherwise: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(x.device.type):
        return otherwise(x)
    weight, bias = cast(tuple[Tensor, Tensor | None], (module.weight, module.bias))
    weight_OI = weight.t() if type(module) is Conv1D else weight
    bias = None if bias is None else bias.bfloat16()
    return widened(x.bfloat16(), Tensor.to, torch.bfloat16, bias, weight_OI)


def _embedding(module: nn.Embedding, ids: Tensor) -> Tensor:
    # rows are picked first: never a float32 copy of the table
    return functional.embedding(ids, module.weight, module.padding_idx).float()


_READ: dict[type[nn.Module], Any] = {nn.Linear: _linear, nn.Embedding: _embedding}
