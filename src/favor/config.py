"""Recipes: TOML plus `key=value` overrides -> one frozen pydantic model.

In: a recipe path, override strings and a model class. Out: a validated, frozen record. This module
knows nobody's fields: every section is declared beside the code that reads it; what is said of a refused one is in
settings.py. Next: run.py.
"""

import inspect
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from keyword import iskeyword
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, Union, get_origin, get_type_hints

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, create_model

from favor import settings
from favor.errors import ConfigError, clipped

M = TypeVar("M", bound=BaseModel)
STRICT = ConfigDict(
    frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
)
# what favor says to a chat template, or does with the text that it makes
_SAID = frozenset(
    (
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens", "self"),
        # and what templates have without being given it
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "loop", "range"),
        *(
            "namespace",
            "dict",
            "lipsum",
            "cycler",
            "joiner",
            "raise_exception",
            "strftime_now",
            "true",
            "false",
            "none",
        ),
    )
)


def check_variables(given: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a chat template without those that are null. Raises ValueError for what cannot be one."""
    for name in given:
        if not name.isidentifier() or iskeyword(name) or name in _SAID:
            raise ValueError(f"{name!r} is no variable of a chat template that can be set")
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a variable of a chat template is no JSON ({error}); a date is text, in quotes") from None
    # columns of a table hold null where a row has nothing
    return {name: value for name, value in given.items() if value is not None}


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(check_variables)]
# what every generator of random numbers here takes (scikit-learn's is the narrowest)
Seed = Annotated[
    int, Field(ge=0, lt=1 << 32, description="Where random numbers start: the same seed, the same result.")
]
# settings that many commands have
Run = Annotated[str, Field(description="The folder this run writes into.")]
Resume = Annotated[bool, Field(description="Continue from the newest checkpoint of the run folder.")]
Overwrite = Annotated[bool, Field(description="Replace the output file if it is there.")]
# endings of files that hold rows, and are no recipes
_DATA = {".csv", ".tsv", ".json", ".jsonl", ".gz", ".parquet"}
# bytes of a recipe: more must be another kind of file
_LARGEST = 1 << 20


def load(schema: type[M], recipe: Path | None, overrides: Sequence[str] = ()) -> M:
    """Read a recipe and apply `section.key=value` overrides.

    Raises ConfigError: no such file, broken TOML, a malformed override, an unknown key (its new name or the nearest valid one
    is offered), a value of the wrong type or outside its range.
    """
    tree, words = _tree(recipe, overrides)
    return checked(schema, tree, str(recipe) if recipe else "settings", words)


def checked(
    schema: type[M], tree: dict[str, Any], where: str, words: Mapping[tuple[str, ...], str] = MappingProxyType({})
) -> M:
    """A recipe given as nested dicts; `where` names it in messages. words: overrides by path, as they were typed.

    Raises ConfigError as `load` does.
    """
    tree = _at_home(tree)
    try:
        try:
            found = schema.model_validate(_with_own(schema, tree))
        except ValidationError as error:
            # run=2024-11-24 and run=7 are TOML of other types, and meant as text
            asked = [settings.place(e["loc"], schema)[0] for e in error.errors() if e["type"] == "string_type"]
            if not _take_as_text(tree, words, asked):
                raise
            found = schema.model_validate(_with_own(schema, tree))
    except ValidationError as error:
        said = settings.all_explained(error, schema, partial(_where, where, words))
        refusal = ConfigError("; ".join(said))
        refusal.each = tuple(said)
        raise refusal from None
    except RecursionError:
        raise ConfigError(f"{where}: a value is nested too deeply to be read; flatten it") from None
    _check_values(tree, found, partial(_where, where, words))
    return found


def _at_home(value: Any) -> Any:
    """A recipe whose places below ~ are whole: shells leave key=~/x as it is, and Python all of them."""
    if isinstance(value, dict):
        return {name: _at_home(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_at_home(inner) for inner in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def _where(recipe: str, words: Mapping[tuple[str, ...], str], key: str) -> str:
    """Where a key stands: in the recipe, or among the settings that were typed."""
    return "settings" if tuple(key.split(".")) in words else recipe


def _with_own(schema: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """A section given in part keeps what the command sets in it: after `favor sft optim.clip=1` the rate is still sft's own."""
    filled = dict(tree)
    for name, field in schema.model_fields.items():
        given, default = tree.get(name), field.default
        if isinstance(given, dict) and isinstance(default, BaseModel) and (own := default.model_fields_set - {"kind"}):
            kind = given.get("kind", settings.kind_of(type(default)))
            sections = [each for each in settings.models(field.annotation) if settings.kind_of(each) == kind]
            own &= {key for section in sections for key in section.model_fields}
            filled[name] = {key: getattr(default, key) for key in own} | given
    return filled


def read(recipe: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe with its overrides as nested dicts, as written: nothing is checked but TOML."""
    return _tree(recipe, overrides)[0]


def _tree(recipe: Path | None, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    tree = _read_toml(recipe) if recipe else {}
    return tree, dict(_apply(tree, override) for override in overrides)


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
    shown = clipped(str(recipe))
    if recipe.suffix in _DATA:
        raise ConfigError(
            f"{shown}: is a data file by its name, not a recipe; give it as data={shown}, or make a recipe: "
            f"favor init --model MODEL --data {shown} --out recipe.toml"
        )
    try:
        with recipe.open("rb") as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise ConfigError(f"{shown}: larger than {_LARGEST} bytes, so it is not a recipe; name a TOML file")
        return tomllib.loads(raw.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{shown}: no such recipe file; check the path, or start from one in recipes/") from None
    except IsADirectoryError:
        raise ConfigError(f"{shown}: is a folder, not a recipe; a run is named by run={shown}") from None
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read as a recipe ({error.strerror}); name a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: not UTF-8 text (byte {error.start}); a recipe is a TOML text file") from None
    except RecursionError:
        raise ConfigError(f"{shown}: a value is nested too deeply to be read; flatten it") from None
    # tomllib's own errors are ValueErrors, and so is an integer of thousands of digits
    except ValueError as error:
        raise ConfigError(f"{shown}: not valid TOML: {error}; fix that line") from None


def _apply(tree: dict[str, Any], override: str) -> tuple[tuple[str, ...], str]:
    """Set one dotted key in place; returns its path and its text, read as TOML where it is TOML and else as a string."""
    key, _, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    if not all(parts):
        raise ConfigError(f"override '{clipped(override)}': expected section.key=value")
    node = tree
    for depth, part in enumerate(parts[:-1], 1):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            key = ".".join(parts[:depth])
            raise ConfigError(
                f"override '{clipped(override)}': '{key}' is a single value, it has no keys below it; give a section key by "
                f"key: {key}.path=..., or what is chosen by its kind as {key}.kind=..."
            )
    node[parts[-1]] = _value(text)
    return parts, text


def _value(text: str) -> Any:
    try:
        found = tomllib.loads(f"value = {text}")
    # tomllib's own errors are ValueErrors, and so is an integer of thousands of digits
    except (ValueError, RecursionError):
        return text
    # a line break in the text would smuggle in another key
    return found["value"] if len(found) == 1 else text


def _take_as_text(tree: dict[str, Any], words: Mapping[tuple[str, ...], str], asked: Sequence[str]) -> bool:
    """Where an override is to be text and TOML read a number, a date or a truth value, take the word as it was given."""
    found = [path for path in words if ".".join(path) in asked]
    for path in found:
        node = tree
        for part in path[:-1]:
            node = node[part]
        if not isinstance(node[path[-1]], dict | list):
            node[path[-1]] = words[path]
    return bool(found)


def _check_values(given: Any, found: Any, where: Callable[[str], str], key: str = "") -> None:
    """Refuse what pydantic lets pass and nothing downstream can use. `given`: as in the recipe; `found`: as validated."""
    if isinstance(given, dict):
        for name, value in given.items():
            inner = vars(found).get(name) if isinstance(found, BaseModel) else value
            _check_values(value, inner, where, f"{key}.{name}".lstrip("."))
    elif isinstance(given, list):
        both = found if isinstance(found, tuple) and len(found) == len(given) else given
        for value, inner in zip(given, both, strict=True):
            _check_values(value, inner, where, key)
    elif problem := _problem(given, found):
        raise ConfigError(f"{where(key)}: '{key}' {problem}")


def _problem(given: Any, found: Any) -> str | None:
    if isinstance(given, bool) and type(found) in (int, float):
        return f"is {str(given).lower()}, expected a number"
    if isinstance(given, int) and abs(given) >= 1 << 63:
        return "is too large for 64 bits; give a smaller number"
    return _problem_of_text(given) if isinstance(given, str) else None


def _problem_of_text(given: str) -> str | None:
    if not given.strip():
        return "is empty; give a value, or remove it"
    if any(ord(letter) < 32 and letter not in "\n\t" for letter in given):
        return "holds a control character; remove it"
    if not given.isascii() and given != given.encode("utf-8", "replace").decode("utf-8"):
        return "is not UTF-8 text; give it in UTF-8"
    return None


def options(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """The parameters of a pure function that are settings, those annotated `Annotated[type, Field(...)]`: (annotation, default)."""
    hints, parameters = get_type_hints(function, include_extras=True), inspect.signature(function).parameters
    return {
        name: (hints[name], parameters[name].default) for name in parameters if get_origin(hints.get(name)) is Annotated
    }


def by_kind(default: str = "") -> Discriminator:
    """Of a union of sections with a Tag each: the one that `kind` names, `default` where it names none; "": it must."""

    def chosen(given: Any) -> str | None:
        if isinstance(given, BaseModel):
            return vars(given).get("kind")
        return str(given.get("kind", default)) if isinstance(given, dict) else None

    return Discriminator(chosen)


def choice(sections: Mapping[str, Mapping[str, Any]], default: str, sentence: str, **more: Any) -> Any:
    """The union of sections that `kind` chooses among, `default` where it is not given; sentence: what is chosen.

    sections: kind -> its settings, name -> (annotation, default). more: settings and validators that all of them have.
    """
    made = {name: _section(name, {**own, **more}) for name, own in sections.items()}
    tagged = tuple(Annotated[section, Tag(name)] for name, section in made.items())
    return Annotated[Union[tagged], by_kind(default), Field(description=sentence)]  # noqa: UP007 (a union of computed types)


def _section(kind: str, own: dict[str, Any]) -> type[BaseModel]:
    literal = Annotated[Literal[kind], Field(description="Which one; every kind has its own settings.")]
    fields: dict[str, Any] = {"kind": (literal, kind), **own}
    # pydantic looks for docstrings in source files, which takes longer than torch's import and finds none here
    return create_model(kind, __config__={**STRICT, "use_attribute_docstrings": False}, **fields)
