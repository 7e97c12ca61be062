"""`favor init`: a commented recipe for a model and a file of preferences.

In: a model, a data file. Out: a recipe of `favor train` (or `favor sft`, for rows without preferences). Next: train/preference.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import tomli_w
from pydantic import BaseModel

from favor.config import checked, read
from favor.data.formats import RowError, recognise
from favor.data.formats.columns import named, proposed
from favor.data.read import judge
from favor.data.settings import DataConfig
from favor.data.sources import read_objects
from favor.errors import DataError
from favor.settings import Setting, settings
from favor.train.preference import TrainConfig
from favor.train.sft import SftConfig
from favor.words import expanded, whole


def recipe_for(model: str, data: str, name: Path, words: Sequence[str] = ()) -> tuple[str, str, str]:
    """The command that runs the recipe, the recipe, which will have this name, and what stands for which column, if not itself.

    words: settings that it shall have, `key=value`. Columns of other names are mapped by what they seem to mean. Raises
    DataError for data of no known format, ConfigError for a setting that the recipe cannot have.
    """
    typed = read(None, whole(TrainConfig, {}, expanded("train", words)))
    columns, kind = _format(data, typed.get("data", {}))
    command, schema = ("sft", SftConfig) if kind == "sft" else ("train", TrainConfig)
    given: dict[str, Any] = {"run": f"runs/{name.stem}", "model": {"path": model}, "data": {"train": data}}
    if kind != "sft":
        given |= {"loss": {"kind": "kto" if kind == "thumbs" else "dpo"}}
        # what favor eval measures on
        given["data"] |= {} if "eval" in typed.get("data", {}) else {"hold_out": {"share": 0.1}}
    given["data"] |= {"columns": columns} if columns else {}
    given = _merged(given, typed)
    checked(schema, given, "settings")
    mapped = _mapping(columns, typed.get("data", {}).get("columns", {}))
    lines = [
        f"# favor {command} {name}",
        f"# {data} holds rows of format {kind}. Lines with #: explain; lines with # show defaults: remove the # to change one.",
        *([f"# {mapped}"] if mapped else []),
        "",
    ]
    return command, "\n".join([*lines, *_body(schema, given)]) + "\n", mapped


def _mapping(columns: Mapping[str, str], typed: Mapping[str, str]) -> str:
    """Which of the file's columns are ours, where any was guessed or typed."""
    if not columns and not typed:
        return ""
    said = ", ".join(f"{ours} is '{theirs}'" for ours, theirs in {**typed, **columns}.items())
    guessed = "; guessed by the names, so look whether it is right" if columns.keys() - typed.keys() else ""
    return f"columns: {said}{guessed}"


def _format(data: str, settings: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Columns that had to be guessed, and the format of the first row under the settings' names."""
    config = DataConfig.model_validate(
        {"train": data} | {k: settings[k] for k in ("columns", "verdict") if k in settings}
    )
    for number, row in read_objects(data, "train"):
        try:
            ours = named(row, config.columns, config.verdict)
            columns = _guess(ours)
            ours = named(ours, columns, None)
            if error := _unreadable(ours):
                raise error
            return ({**config.columns, **columns} if columns else {}), recognise(ours)
        except RowError as error:
            raise DataError(f"{data}, row {number}: {error}") from None
    raise DataError(f"{data}: it holds no rows; name a file of preferences")


def _guess(row: Mapping[str, Any]) -> dict[str, str]:
    """data.columns as the row's own names propose it; nothing where the row can be read, or needs more than names."""
    found = read(None, proposed(row)) if _unreadable(row) else {}
    return found["columns"] if found.keys() == {"columns"} else {}


def _unreadable(row: Mapping[str, Any]) -> RowError | None:
    """Why the columns of a row are none that can be read; that this row is empty or says one thing twice is its own fault."""
    try:
        judge(dict(row), recognise(row), 1.0)
    except RowError as error:
        return error if error.kind == "malformed" else None
    return None


def _merged(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both, section by section; what is in both is as in `over`. Another kind of section takes nothing of the first."""
    found = dict(under)
    for key, value in over.items():
        below: Any = under.get(key)
        both = isinstance(value, dict) and isinstance(below, dict)
        found[key] = _merged(below, value) if both else value
    return found


def _toml(name: str, value: Any) -> str:
    """One line of TOML; a table stands inside of it."""
    if isinstance(value, dict):
        inside = ", ".join(_toml(f'"{key}"' if not key.isidentifier() else key, each) for key, each in value.items())
        return f"{name} = {{{inside}}}"
    return f"{name} = {tomli_w.dumps({'x': value}).strip().removeprefix('x = ')}"


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
        return [*comments, _toml(name, value)]
    return [*comments, f"# {name} = {setting.default}" if setting.default != "absent" else f"# {name} = ..."]


def _said(text: str) -> list[str]:
    return [f"#: {line}" for line in wrap(text, 110)]
