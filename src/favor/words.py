"""One vocabulary over commands: run=, model=, data=, out= mean the same everywhere, and a plain name its one setting (lr).

In: a command's name and its words. Out: the words with its own, whole keys. Next: config.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from favor.config import read
from favor.errors import CheckpointError, ConfigError
from favor.run import RunFolder
from favor.settings import kind_of, models

_TRAINING = MappingProxyType({"out": "run", "model": "model.path", "data": "data.train"})
_SAMPLING = MappingProxyType({"model": "engine.model.path", "data": "prompts"})
# command -> short name -> its own key; a name that is a key of the command already stands in no row
SHORT: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("train", "sft", "reward", "ppo"), _TRAINING),
    "loop": {"out": "run", "model": "model.path", "data": "prompts"},
    **dict.fromkeys(("lint", "value", "ask"), MappingProxyType({"model": "model.path", "data": "data.train"})),
    **dict.fromkeys(("sample", "prefer"), _SAMPLING),
    "winrate": {"out": "run", "data": "prompts"},
    "diff": {"data": "prompts"},
    "audit": {"out": "run"},
    "frontier": {"out": "run"},
    "demo": {"out": "run"},
}
# what says how rows are read is a section, and lies below [data] where a command has one; its keys may be given alone
_READING = MappingProxyType({"columns": "data.columns", "verdict": "data.verdict"})
_WITH_DATA = ("train", "sft", "reward", "ppo", "lint", "value", "ask")
# commands that take a finished run where they need a model or a reward
OF_A_RUN = ("sample", "prefer", "score")


def expanded(command: str, words: Sequence[str]) -> list[str]:
    """The words with the command's own keys in place of the short ones.

    Of model, data and out only text is a short form: `model={path="x"}` is the section. Raises CheckpointError for a run=
    that is no finished run.
    """
    placed = _sides(words) if command == "diff" else words
    return [word for given in placed for word in _own(command, given)]


def _sides(words: Sequence[str]) -> list[str]:
    """`favor diff A B` for a=A b=B; a run folder stands for its model."""
    names = iter(("a", "b"))
    found: list[str] = []
    for word in words:
        plain = "=" not in word and not word.endswith(".toml")
        word = f"{name}={word}" if plain and (name := next(names, None)) else word
        key, _, value = word.partition("=")
        found.append(f"{key}={model_of(value)}" if key in ("a", "b") else word)
    return found


def model_of(path: str) -> str:
    """The model of a run folder; any other path as it is."""
    folder = RunFolder(Path(path))
    return str(folder.model) if folder.config.exists() and folder.model.exists() else path


def _own(command: str, word: str) -> Iterator[str]:
    key, equals, value = word.partition("=")
    section, dot, rest = key.partition(".")
    if equals and command in _WITH_DATA and section in _READING:
        yield f"{_READING[section]}{dot}{rest}={value}"
    elif not equals or not isinstance(read(None, [f"x={value}"])["x"], str):
        yield word
    elif key == "run" and command in OF_A_RUN:
        yield from _of_run(command, value)
    elif command == "score" and key == "model":
        yield from ("reward.kind=model", f"reward.path={value}")
    else:
        yield f"{SHORT.get(command, {}).get(key, key)}={value}"


def _of_run(command: str, run: str) -> Iterator[str]:
    folder = RunFolder(Path(run))
    if not folder.config.exists() or not folder.model.exists():
        raise CheckpointError(f"run={run}: no finished run here (config.toml and model/); train first, or name another")
    if command != "score":
        yield f"engine.model.path={folder.model}"
    elif "bradley_terry" in read(folder.config):
        yield from ("reward.kind=model", f"reward.path={folder.model}")
    else:
        yield from ("reward.kind=implicit", f"reward.path={run}")


def whole(schema: type[BaseModel], recipe: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """Words `name=value` with the key of each plain name; one that no setting has stays, for whoever checks the recipe.

    Raises ConfigError for a name that several settings have.
    """

    def known(word: str) -> bool:
        key = word.partition("=")[0].strip()
        return "." in key or key in schema.model_fields

    # a plain name may depend on the kinds that are chosen by whole keys
    said = {**recipe, **read(None, [word for word in words if known(word)])}
    return [word if known(word) else _whole(schema, said, word) for word in words]


def _whole(schema: type[BaseModel], said: Mapping[str, Any], word: str) -> str:
    name, _, value = word.partition("=")
    found = meant(schema, name.strip(), said)
    if len(found) > 1:
        raise ConfigError(f"settings: '{name}' could be {', '.join(found)}; say which, as in {found[0]}={value}")
    return f"{found[0]}={value}" if found else word


def meant(schema: type[BaseModel], name: str, said: Mapping[str, Any]) -> list[str]:
    """The keys that a plain name could mean: one where that is clear."""
    found = {key: state for key, state in keys(schema, said).items() if key.rpartition(".")[2] == name}
    read_now = [key for key, state in found.items() if state == "read"]
    # what another kind reads is no rival, but a section that is off might be meant
    return read_now if len(read_now) == 1 and "off" not in found.values() else list(found)


def keys(schema: type[BaseModel], given: Any, prefix: str = "", state: str = "read") -> dict[str, str]:
    """Dotted keys below a section, each with its state: read, off (its section is not written), other (another kind reads it).

    A choice that is off is left out: its settings are those of another command.
    """
    here = given if isinstance(given, Mapping) else {}
    found: dict[str, str] = {}
    for name, field in schema.model_fields.items():
        key, inner = prefix + name, here.get(name)
        found.setdefault(key, state)
        sections = list(models(field.annotation, lists=False))
        off = field.default is None and inner is None
        if len(sections) > 1 and off:
            continue
        default = kind_of(type(field.default)) if isinstance(field.default, BaseModel) else None
        chosen = inner.get("kind", default) if isinstance(inner, Mapping) else default
        several = len(sections) > 1
        of_kind = [section for section in sections if not several or kind_of(section) == chosen]
        # those that are read first, so that a key that several kinds have counts as read
        for section in dict.fromkeys([*of_kind, *sections]):
            below = "off" if off else state if section in of_kind else "other"
            for inner_key, its in keys(section, inner, f"{key}.", below).items():
                found.setdefault(inner_key, its)
    return found
