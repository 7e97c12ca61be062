"""Recipes: TOML plus `key=value` overrides -> one frozen pydantic model.

In: a recipe path, override strings and a model class. Out: a validated, frozen record. This module
knows nobody's fields: every section is declared beside the code that reads it. Next: run.py.
"""

import difflib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from favor.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def _named(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError(f"is {value!r}, which names nothing; give a path")
    # zsh leaves run=~/x as it is
    return str(Path(value).expanduser()) if value.startswith("~") else value


# a file or folder that a recipe names
Place = Annotated[str, AfterValidator(_named)]


def load(schema: type[M], recipe: Path | None, overrides: Sequence[str] = ()) -> M:
    """Read a recipe and apply `section.key=value` overrides.

    Raises ConfigError: no such file, broken TOML, a malformed override, an unknown key (the nearest
    valid name is offered), a value of the wrong type or outside its range.
    """
    tree = _read_toml(recipe) if recipe is not None else {}
    for override in overrides:
        _apply(tree, override)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, schema, recipe)) from None


def dump(config: BaseModel) -> str:
    """The resolved recipe as TOML; `load` of this text gives an equal record (None is left out)."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def split_arguments(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """CLI words -> (recipe, overrides): a word with `=` is an override, at most one other a recipe."""
    overrides = [word for word in arguments if "=" in word]
    recipes = [word for word in arguments if "=" not in word]
    if len(recipes) > 1:
        raise ConfigError(f"two recipes given ({recipes[0]}, {recipes[1]}): name one; settings are key=value")
    return (Path(recipes[0]) if recipes else None), overrides


def _read_toml(recipe: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(recipe.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{recipe}: no such recipe file; check the path, or start from one in recipes/") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"{recipe}: cannot be read as a recipe ({error.strerror}); name a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{recipe}: not UTF-8 text (byte {error.start}); a recipe is a TOML text file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{recipe}: not valid TOML: {error}; mend that line") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key in place. The value is read as TOML; what is not TOML is taken as a string."""
    key, _, text = override.partition("=")
    parts = key.strip().split(".")
    if not all(parts):
        raise ConfigError(f"override '{override}': expected section.key=value")
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override '{override}': '{part}' is a single value, it has no keys below it")
    try:
        node[parts[-1]] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        node[parts[-1]] = text


def _explain(error: ValidationError, schema: type[BaseModel], recipe: Path | None) -> str:
    where = str(recipe) if recipe else "settings"
    return "; ".join(_explain_one(item, schema, where) for item in error.errors())


def _explain_one(item: Any, schema: type[BaseModel], where: str) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'{_nearest(key, schema)}"
    if item["type"] == "missing":
        return f"{where}: '{key}' is not set; add it to the recipe or give {key}=..."
    if item["type"] == "model_type":
        inside = [name for name in _keys(schema) if name.rpartition(".")[0] == key]
        return f"{where}: '{key}' is a section, found {item['input']!r}; set {key}.KEY=..., one of {', '.join(inside)}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{where}: {key + ': ' if key else ''}{message}"
    return f"{where}: '{key}' is {item['input']!r}: {message[0].lower() + message[1:]}"


def _nearest(key: str, schema: type[BaseModel]) -> str:
    valid = list(_keys(schema))
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.75)
    if not close:
        leaf = key.rsplit(".", 1)[-1]
        close = [name for name in valid if name.rsplit(".", 1)[-1] == leaf][:1]
    if close:
        return f"; did you mean '{close[0]}'?"
    parent = key.rpartition(".")[0]
    siblings = [name for name in valid if name.rpartition(".")[0] == parent]
    return f"; known here: {', '.join(siblings or valid)}"


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        # a section may hold further ones of its own kind
        for section in _sections(field.annotation):
            if section is not schema:
                yield from _keys(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation: `Section` or `Section | None`."""
    options = getattr(annotation, "__args__", (annotation,))
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
