"""What Python holds in memory -> files that a command reads: rows as JSON lines, a loaded model as a folder.

In: models, tokenizers, rows. Out: files in `RUN/given`, with their hashes, so that the run can be repeated on the command line.
Next: run.py.
"""

import contextlib
import copy
import datetime
import decimal
import hashlib
import json
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from favor import guard
from favor.api.run import Run
from favor.errors import CheckpointError, ConfigError, DataError
from favor.model.adapters import merged
from favor.model.load import ModelConfig, load_tokenizer
from favor.run import RunFolder, atomic_folder, holds_work, opened, read_json, refuse_changed, write_json

# a file of rows -> the argument that they were
_ARGUMENTS = MappingProxyType({"train.jsonl": "rows", "start": "model"})


@dataclass(frozen=True)
class Loaded:
    """A model in memory, which stays as it is, and its tokenizer."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Given:
    """Things in memory by the name of the file or folder that each becomes; `place` holds them."""

    place: Path
    things: dict[str, Any] = field(default_factory=dict[str, Any])

    def model(self, name: str, model: Any, tokenizer: Any = None) -> str:
        """The path of a model: a folder's or hub id as it is, a run's model, where a loaded one will lie."""
        if isinstance(model, PreTrainedModel | PeftModel):
            self.things[name] = Loaded(model, _tokenizer_of(model, tokenizer))
            return str(self.place / name)
        if tokenizer is not None:
            raise ConfigError("tokenizer= goes with a loaded model; a folder or hub id brings its own, so leave it out")
        if isinstance(model, Run):
            return str(model.folder.model)
        if isinstance(model, str | os.PathLike):
            return os.fspath(model)
        raise ConfigError(
            f"the model is a {type(model).__name__}; give a folder, a hub id, a run, or a loaded transformers or PEFT model"
        )

    def rows(self, name: str, rows: Any) -> str:
        """The source of rows: a file's name as it is, or where rows in memory will lie."""
        if isinstance(rows, str | os.PathLike):
            return os.fspath(rows)
        self.things[f"{name}.jsonl"] = _records(rows, name)
        return str(self.place / f"{name}.jsonl")

    def named(self, text: str) -> str:
        """A message in which what was in memory has the name of its argument, not of its file."""
        for name in self.things:
            said = _ARGUMENTS.get(name, name.removesuffix(".jsonl"))
            text = text.replace(str(self.place / name), said)
        return text.replace(f"{self.place}/", "")


def paths_of(rows: Any) -> list[str] | None:
    """The names of a list of several files; None for anything else."""
    if isinstance(rows, list | tuple) and rows and all(isinstance(row, str | os.PathLike) for row in rows):
        return [os.fspath(row) for row in rows]
    return None


def lay_in_run(root: Path, given: Given) -> dict[str, str]:
    """Write what was given into a run folder; returns the hashes. What is there already is the same, or nothing was made of it.

    Raises ConfigError when the folder is somebody else's, CheckpointError when its run began with something else.
    """
    folder = RunFolder(root)
    if not given.things:
        return {}
    mark = folder.given / folder.mark.name
    with contextlib.ExitStack() as held:
        held.enter_context(opened(folder))
        worked = holds_work(folder)
        aside = held.enter_context(_aside(root / "rows"))
        now = _write_rows(aside, given) | _digests(given)
        before = read_json(mark) if mark.exists() else {}
        if before == now:
            return now
        if worked:
            refuse_changed(str(root), before, now)
        if folder.given.exists() and not mark.exists():
            raise ConfigError(f"{folder.given}: is there already and not favor's; choose another out=")
        with atomic_folder(folder.given) as place:
            for file in aside.iterdir():
                file.replace(place / file.name)
            _save_models(place, given)
            write_json(place / folder.mark.name, now)
    return now


@contextlib.contextmanager
def _aside(path: Path) -> Generator[Path]:
    """A folder for the time of the block, beside where its content will be."""
    aside = guard.aside(path)
    guard.remove(aside)
    aside.mkdir()
    try:
        yield aside
    finally:
        guard.remove(aside)


def lay(given: Given) -> None:
    """Write what was given into its folder, which nobody else has."""
    _write_rows(given.place, given)
    _save_models(given.place, given)


def _write_rows(place: Path, given: Given) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for name, rows in given.things.items():
        if not isinstance(rows, Loaded):
            with (place / name).open("wb") as file:
                for number, row in enumerate(rows, 1):
                    file.write(_line(name, number, row))
            hashes[name] = guard.file_hash(place / name)
    return hashes


def _line(name: str, number: int, row: Any) -> bytes:
    where = f"{_ARGUMENTS.get(name, name.removesuffix('.jsonl'))}, row {number}"
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: is a {type(row).__name__}; give dicts, one a row")
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_json)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}; give text, finite numbers, lists and dicts") from None
    # half a character stays visible as such, and is refused with the number of its row when it is read
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _as_json(value: Any) -> Any:
    """What a data set, a table or numpy holds beside JSON's own, as files hold it: dates become text, decimals numbers."""
    if isinstance(value, np.generic | np.ndarray):
        return cast(Any, value).tolist()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    raise TypeError(f"holds a {type(value).__name__}")


def _records(rows: Any, name: str) -> Iterable[Any]:
    # looked at only where they are imported already: else it is none of theirs
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if pandas is not None and isinstance(rows, pandas.DataFrame):
        return _of_table(pandas, rows)
    if datasets is not None and isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = ", ".join(map(str, rows))
        raise ConfigError(f"{name}: is a data set of several splits ({splits}); give one of them, e.g. rows['train']")
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise ConfigError(
            f"{name}: is a {type(rows).__name__}; give a list of dicts, a Dataset, a DataFrame, or the name of a file"
        )
    return rows


def _of_table(pandas: Any, table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a DataFrame; what is missing there (NaN, None, NaT) is missing here."""
    names = [str(name) for name in table.columns]
    for values in table.itertuples(index=False, name=None):
        yield {
            n: v for n, v in zip(names, values, strict=True) if not (pandas.api.types.is_scalar(v) and pandas.isna(v))
        }


def _tokenizer_of(model: PreTrainedModel | PeftModel, tokenizer: Any) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer is not None:
        raise ConfigError(f"tokenizer= is a {type(tokenizer).__name__}; give a transformers tokenizer")
    name = _base(model).name_or_path
    if not name:
        raise ConfigError("the loaded model does not say where it comes from; give its tokenizer as tokenizer=")
    try:
        return load_tokenizer(ModelConfig(path=name))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or give the loaded model's tokenizer as tokenizer=") from None


def _base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def _digests(given: Given) -> dict[str, str]:
    return {name: _digest(thing) for name, thing in given.things.items() if isinstance(thing, Loaded)}


def _digest(loaded: Loaded) -> str:
    """SHA-256 of weights, configuration and tokenizer."""
    model, tokenizer = loaded.model, cast(Any, loaded.tokenizer)
    digest = hashlib.sha256(_base(model).config.to_json_string().encode())
    digest.update(json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]).encode())
    adapters = str([model.active_adapters, model.peft_config]) if isinstance(model, PeftModel) else ""
    digest.update(adapters.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _save_models(place: Path, given: Given) -> None:
    for name, thing in given.things.items():
        if isinstance(thing, Loaded):
            _savable(thing.model).save_pretrained(place / name)
            thing.tokenizer.save_pretrained(place / name)


def _savable(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """What is saved: the same weights in a shell of its own, as saving writes into the configuration; adapters folded into a copy.

    Raises ConfigError for what cannot be trained from.
    """
    base = _base(model)
    if "quantization_config" in base.config.to_dict():
        raise ConfigError(
            "the loaded model is quantized, and favor trains float weights; give the model it was made from"
        )
    if isinstance(model, PeftModel):
        base = merged(copy.deepcopy(model).float(), "the loaded model")
    elif base._hf_peft_config_loaded:  # pyright: ignore[reportPrivateUsage]
        raise ConfigError(
            "the loaded model has an adapter inside; give a PeftModel of it (peft), or the folder of the adapter"
        )
    shell = copy.copy(base)
    shell.config, shell.generation_config = copy.deepcopy((base.config, base.generation_config))
    return shell
