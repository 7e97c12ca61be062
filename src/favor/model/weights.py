"""The files of a model -> a transformers model whose every weight came from them, or a clear refusal.

In: a folder or hub id. Out: the model, float32, and the names that files and model do not have in common. Only safetensors
are read. Next: load.py.
"""

import contextlib
import json
from collections.abc import Generator, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, cached_file

from favor.errors import CheckpointError, first_line, out_of_memory
from favor.ranks import lost

# what transformers, tokenizers, peft and torch raise for folders that are not what they should be
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError, StrictDataclassError),
    *(RuntimeError, ImportError, AssertionError, ZeroDivisionError),
)
# files of a model folder that must hold one JSON object each
_OBJECTS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("adapter_config.json", "model.safetensors.index.json"),
)
_ADAPTER = "adapter_config.json"
_IF_THERE: Mapping[str, bool] = {"_raise_exceptions_for_missing_entries": False}
_FLOATS = ("F16", "BF16", "F32", "F64")
_KINDS = {"I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool"}


@dataclass(frozen=True)
class Unmatched:
    """Names of tensors that model and files do not have in common, tied weights left out.

    mismatched: those of another shape, with the shape in the files and in the model.
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: Mapping[str, tuple[Any, Any]]

    def refuse(self, path: str) -> None:
        """Raise CheckpointError when there are any: what is missing would be random, what is left over ignored."""
        shapes = {f"{n} ({_shape(here)}, not {_shape(there)})" for n, (here, there) in self.mismatched.items()}
        problems = {
            "lack": self.missing,
            "hold, but the model has no place for": self.unexpected,
            "hold in another shape": shapes,
        }
        said = [f"{verb} {_few(names)}" for verb, names in problems.items() if names]
        if said:
            raise CheckpointError(
                f"{path}: weights and config.json do not belong together: the files {'; they '.join(said)}; "
                "fetch the model again, or correct its config.json"
            )

    def without(self, names: frozenset[str]) -> "Unmatched":
        """The same, those names left out."""
        return replace(self, missing=self.missing - names, unexpected=self.unexpected - names)


def check_there(path: str) -> None:
    """Raises CheckpointError for what is no folder and cannot be a hub id."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if not Path(path).exists() and looks_local:
        raise CheckpointError(f"{path}: no such model folder; give a local folder or a hub id like owner/name")


def model_type(path: str, revision: str | None) -> str:
    """What config.json says the model is, of an adapter its base's; "" where nothing says it."""
    with contextlib.suppress(*_UNREADABLE):
        for _ in range(2):
            found = {name: cached_file(path, name, revision=revision, **_IF_THERE) for name in (CONFIG_NAME, _ADAPTER)}
            if (config := found[CONFIG_NAME]) is not None:
                return str(json.loads(Path(config).read_text("utf-8")).get("model_type", ""))
            path, revision = json.loads(Path(str(found[_ADAPTER])).read_text("utf-8"))["base_model_name_or_path"], None
    return ""


def check_path(path: str) -> None:
    """Raises CheckpointError when `path` is a folder without a sound model, or no folder and no hub id."""
    check_there(path)
    folder = Path(path)
    adapter = (folder / "adapter_config.json").exists()
    if folder.is_dir() and not (adapter or (folder / "config.json").exists()):
        raise CheckpointError(f"{path}: no config.json or adapter_config.json in this folder; name a model folder")
    if adapter and not (folder / "adapter_model.safetensors").exists():
        # peft would fall back to adapter_model.bin
        raise CheckpointError(f"{path}: no adapter_model.safetensors in this folder; save the adapter as safetensors")
    check_objects(folder)


@contextlib.contextmanager
def readable(path: str, what: str = "language model") -> Generator[None]:
    """Turn what transformers raises for a missing or damaged model into a CheckpointError."""
    try:
        yield
    except _UNREADABLE as error:
        if out_of_memory(error):
            raise
        said = " ".join(str(error).split())
        # the beginning says what, the end what to do
        said = said if len(said) <= 330 else f"{said[:200]} ... {said[-120:]}"
        raise CheckpointError(
            f"{path}: its {what} cannot be loaded ({type(error).__name__}: {said}); check the path and its files, "
            "or download it first"
        ) from None


def fault_of(error: Exception) -> str:
    """What is wrong with a model that does not run. Raises the error itself where memory ended or a process was lost."""
    if out_of_memory(error) or lost(error):
        raise error
    return first_line(error)


def load_weights(
    loader: Any, path: str, revision: str | None, trust: bool, *, kept: bool = False, **more: Any
) -> tuple[Any, Unmatched]:
    """A model by one of transformers' Auto classes, float32, from safetensors only.

    kept: bfloat16 where the files are, so that no float32 copy of them is ever held. Raises CheckpointError for what
    cannot be loaded, for numbers that are no floats, and for quantized weights.
    """
    with readable(path):
        load = partial(
            loader.from_pretrained,
            path,
            revision=revision,
            trust_remote_code=trust,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **more,
        )
        model, info = load(dtype=torch.bfloat16 if kept else torch.float32)
        tensors = tensors_of(Path(str(cached_file(path, CONFIG_NAME, revision=revision))).parent)
        if kept and not _is_bfloat16(model, tensors):
            model, info = load(dtype=torch.float32)
    check_kinds(path, model, tensors)
    missing, unexpected = frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"])
    leftover = frozenset(name for name in unexpected if is_mask(name, tensors))
    mismatched = {str(name): (here, there) for name, here, there in info["mismatched_keys"]}
    return model, Unmatched(missing, unexpected - leftover, mismatched)


def _is_bfloat16(model: Any, tensors: Mapping[str, tuple[str, list[int]]]) -> bool:
    """Whether it is in bfloat16 what it would be in float32: no number in its files, and none that it made up, was rounded."""
    made_up = any(value.dtype == torch.bfloat16 for value in model.buffers())
    return not made_up and all(kind not in _FLOATS or kind == "BF16" for kind, _ in tensors.values())


def tensors_of(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> (number format, shape) of every tensor in the folder's safetensors files."""
    found: dict[str, tuple[str, list[int]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                found[name] = (str(part.get_dtype()), list(part.get_shape()))
    return found


def check_kinds(path: str, model: Any, tensors: Mapping[str, tuple[str, list[int]]]) -> None:
    """Raises CheckpointError for weights that would be read as other numbers than they stand for."""
    quantized = model.config.to_dict().get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise CheckpointError(
            f"{path}: its weights are quantized (quantization_config: {method}), which favor cannot train or score exactly; "
            "name the model it was made from"
        )
    floats = [name for name, value in model.state_dict().items() if value.is_floating_point() and name in tensors]
    for name in floats:
        if (kind := tensors[name][0]) not in _FLOATS:
            raise CheckpointError(
                f"{path}: holds {name} as {_KINDS.get(kind, kind)} numbers, not floats: quantized or damaged; "
                "name the model it was made from"
            )
    ends = model.generation_config.eos_token_id if model.can_generate() else None
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends]) if end is not None):
        raise CheckpointError(
            f"{path}: generation_config.json: eos_token_id is {ends!r}, expected token ids; correct it"
        )


def is_mask(name: str, tensors: Mapping[str, tuple[str, list[int]]]) -> bool:
    """Causal masks and their fill value, which old files keep beside the weights and no model reads any more."""
    kind, shape = tensors.get(name, ("", [0]))
    square = len(shape) == 4 and shape[:2] == [1, 1] and shape[2] == shape[3]
    return kind in ("BOOL", "U8") or square or (name.endswith("masked_bias") and shape in ([], [1]))


def check_objects(folder: Path) -> None:
    """Raises CheckpointError for a JSON file of a model folder that is damaged: transformers passes over some of them."""
    for path in (folder / name for name in _OBJECTS if (folder / name).exists()):
        try:
            value = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON ({error}); fetch the file again") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected an object; fetch the file again")
        if path.name.endswith("index.json") and not isinstance(value.get("weight_map"), dict):
            raise CheckpointError(f"{path}: has no weight_map; fetch the file again")


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _few(names: Set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
