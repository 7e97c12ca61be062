"""`favor init`: a commented recipe for a model and a file of preferences.

In: a model, a data file. Out: a recipe of `favor train` (or `favor sft`, for rows without preferences). Next: train/preference.py.
"""

from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

import tomli_w
from pydantic import BaseModel

from favor.data.formats import RowError, recognise
from favor.data.sources import read_objects
from favor.errors import ConfigError, DataError
from favor.settings import Setting, settings
from favor.train.preference import TrainConfig
from favor.train.sft import SftConfig


def recipe_for(model: str, data: str, name: Path) -> tuple[str, str]:
    """The command that runs the recipe, and the recipe, which will have this name. Raises DataError for data of no known format."""
    kind = _format(data)
    command, schema = ("sft", SftConfig) if kind == "sft" else ("train", TrainConfig)
    given: dict[str, Any] = {"run": f"runs/{name.stem}", "model": {"path": model}, "data": {"train": data}}
    if kind != "sft":
        given |= {"loss": {"kind": "kto" if kind == "thumbs" else "dpo"}}
        # what favor eval measures on
        given["data"]["hold_out"] = {"share": 0.1}
    lines = [
        f"# favor {command} {name}",
        f"# {data} holds rows of format {kind}. Lines with #: explain; lines with # show defaults: remove the # to change one.",
        "",
    ]
    return command, "\n".join([*lines, *_body(schema, given)]) + "\n"


def write_new(out: Path, text: str) -> None:
    """Write a file that is not there yet. Raises ConfigError when it is, or cannot be written."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{out}: it is there already, and was left unchanged; name another file with --out") from None
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from None


def _format(data: str) -> str:
    for number, row in read_objects(data, "train"):
        try:
            return recognise(row)
        except RowError as error:
            raise DataError(f"{data}, row {number}: {error}") from None
    raise DataError(f"{data}: it holds no rows; name a file of preferences")


def _body(schema: type[BaseModel], given: dict[str, Any]) -> Iterator[str]:
    section = ""
    for setting in sorted(settings(schema, given), key=lambda s: s.key.rpartition(".")[0]):
        here, _, name = setting.key.rpartition(".")
        if name == "*":
            yield from ("", *_said(f"[{here}]: {setting.sentence}"), f"# [{here}]")
            section = here
            continue
        if here != section:
            yield from ("", f"[{here}]")
            section = here
        yield from _lines(setting, name, given)


def _lines(setting: Setting, name: str, given: dict[str, Any]) -> list[str]:
    value: Any = given
    for part in setting.key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    comments = _said(f"{setting.sentence} ({setting.allowed})" if setting.allowed else setting.sentence)
    if value is not None:
        return [*comments, tomli_w.dumps({name: value}).strip()]
    return [*comments, f"# {name} = {setting.default}" if setting.default != "absent" else f"# {name} = ..."]


def _said(text: str) -> list[str]:
    return [f"#: {line}" for line in wrap(text, 110)]
