"""Whether a model would train here: its files, size, layout, tokenizer; loads no weights.

In: a model folder or hub id, or a run folder. Out: Signs, the last being what stops it, if anything does. Next: run.py.
"""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from favor.config import read
from favor.data.tokenize import TokensConfig
from favor.doctor.settings import Sign, size
from favor.errors import CheckpointError, ConfigError
from favor.model.adapters import LoraSettings
from favor.model.layout import config_obstacle
from favor.model.load import ModelConfig, load_tokenizer
from favor.model.room import Room
from favor.model.size import architecture_of, parameters, sizes
from favor.model.weights import check_path, readable, tensors_of
from favor.run import RunFolder, read_json
from favor.train.packs import LEAST

_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


def run_signs(run: str, room: Room, *, hub: bool) -> Iterator[Sign]:
    """How far a run is, then its model, or the one that it begins from."""
    folder = RunFolder(Path(run))
    if not folder.config.exists():
        yield Sign("broken", "run", f"{run} holds no run (no config.toml)", "name a folder that favor wrote")
        return
    try:
        start = read(folder.config).get("model", {}).get("path")
    except ConfigError as error:
        yield Sign("broken", "run", str(error), "put back the config.toml that favor wrote")
        return
    if folder.model.exists():
        yield Sign("ok", "run", f"{run} is finished; its model is in {folder.model}")
        yield from model_signs(str(folder.model), room, hub=hub)
        return
    saved = sorted(path.name for path in folder.checkpoints.glob("step-*"))
    kept = f"its newest checkpoint is {saved[-1]}" if saved else "it has no checkpoint"
    yield Sign("note", "run", f"{run} is not finished; {kept}", "the same command with resume=true goes on")
    if isinstance(start, str):
        yield from model_signs(start, room, hub=hub)


def model_signs(path: str, room: Room, *, hub: bool) -> Iterator[Sign]:
    """The files, what they hold, whether it fits, how it would be computed, and its tokenizer."""
    place = _place(path)
    if place is None and not hub:
        said = f"{path} is not in the cache, and the hub is not asked"
        yield Sign(
            "note",
            "model",
            said,
            "with --hub its settings and tokenizer are fetched and looked at, its weights are not",
        )
        return
    try:
        yield from _looked_at(path, place or path, room)
    except CheckpointError as error:
        yield Sign("broken", "model", str(error))


def _place(path: str) -> str | None:
    """Its folder: the one that is named, or that of a hub id in the cache; None where the hub would be asked."""
    if Path(path).exists() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        return path
    kept = try_to_load_from_cache(path, "config.json")
    return str(Path(kept).parent) if isinstance(kept, str) else None


def _looked_at(path: str, place: str, room: Room) -> Iterator[Sign]:
    check_path(place)
    config = ModelConfig(path=place)
    folder, base = Path(place), None
    if (folder / "adapter_config.json").exists():
        base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
        yield Sign("ok", "model", f"{path} is an adapter of {base}; training begins from both, merged")
        check_path(base)
        config = ModelConfig(path=_place(base) or base)
    architecture = architecture_of(config)
    with readable(config.path):
        count = parameters(architecture)
    text = architecture.get_text_config()
    kind = (architecture.architectures or [architecture.model_type])[0]
    yield Sign("ok", "model", f"{base or path}: {kind}, {count:,} parameters, {text.num_hidden_layers} layers")
    yield _weights(Path(config.path), architecture.to_dict().get("quantization_config") is not None)
    pack = LEAST
    full = sum(sizes(architecture, config, pack))
    lora = sum(sizes(architecture, config.model_copy(update={"lora": LoraSettings()}), pack))
    yield _fits(full, lora, room)
    yield _layout(text.to_dict())
    yield from _tokenizer(config if base is None else ModelConfig(path=place), text.vocab_size)


def _weights(folder: Path, quantized: bool) -> Sign:
    if not folder.is_dir():
        return Sign("note", "weights", "they are not here", "the first command that needs them fetches them")
    with readable(str(folder)):
        tensors = tensors_of(folder)
    kinds = sorted({kind for kind, _ in tensors.values()})
    if not tensors:
        return Sign(
            "broken", "weights", f"{folder} has no safetensors file", "fetch one, or save the model as safetensors"
        )
    index = folder / "model.safetensors.index.json"
    named = set(read_json(index).get("weight_map", {}).values()) if index.exists() else set[str]()
    if missing := sorted(name for name in named if not (folder / name).exists()):
        return Sign("broken", "weights", f"{folder} lacks {', '.join(missing[:3])}", "fetch the model again")
    if quantized or not _FLOATS & set(kinds):
        said = f"quantized ({', '.join(kinds)}), which favor cannot train or score exactly"
        return Sign("broken", "weights", said, "name the model it was made from")
    return Sign("ok", "weights", f"{len(tensors)} tensors in {', '.join(kinds)}; favor computes with them in float32")


def _fits(full: int, lora: int, room: Room) -> Sign:
    said = f"about {size(full)} in full, {size(lora)} with LoRA, of {size(room.free)} free {room.name} (estimate)"
    figures = {"full": full, "lora": lora, "free": room.free}
    if full <= room.free:
        return Sign("ok", "fits", f"training takes {said}", figures=figures)
    if lora <= room.free:
        return Sign("note", "fits", f"training takes {said}", "train adapters: model.lora.rank=16", figures)
    less = "model.gradient_checkpointing=true and a smaller train.max_tokens_per_pack take less; else a smaller model"
    return Sign("note", "fits", f"it does not: training takes {said}", less, figures)


def _layout(config: dict[str, object]) -> Sign:
    longest = TokensConfig().max_tokens
    obstacle = config_obstacle(config, longest)
    if obstacle is None:
        return Sign(
            "ok", "layout", "prompt trees: shared text is computed once (every run checks that on its own data)"
        )
    return Sign("note", "layout", f"one row an answer, which is slower: {obstacle}", "nothing to do")


def _tokenizer(config: ModelConfig, rows: int) -> Iterator[Sign]:
    tokenizer = load_tokenizer(config)
    if len(tokenizer) > rows:
        said = f"it gives ids up to {len(tokenizer) - 1}, the model knows {rows}: they do not belong together"
        yield Sign("broken", "tokenizer", said, "fetch the model again")
    elif tokenizer.eos_token_id is None:
        yield Sign("note", "tokenizer", f"{len(tokenizer)} tokens, none of which ends an answer", "set its eos_token")
    elif tokenizer.chat_template is None:
        yield Sign("ok", "tokenizer", f"{len(tokenizer)} tokens; no chat template, so prompts are plain text")
    else:
        yield Sign("ok", "tokenizer", f"{len(tokenizer)} tokens; prompts go through its chat template")
