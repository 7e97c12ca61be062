"""Recipes: TOML plus `key=value` overrides -> one frozen pydantic model.

In: a recipe path, override strings and a model class. Out: a validated, frozen record. This module
knows nobody's fields: every section is declared beside the code that reads it. Next: run.py.
"""

import difflib
import inspect
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, create_model

from favor.errors import ConfigError, clipped, without_secrets

M = TypeVar("M", bound=BaseModel)
STRICT = ConfigDict(
    frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
)
# what every generator of random numbers here takes (scikit-learn's is the narrowest)
Seed = Annotated[
    int, Field(ge=0, lt=1 << 32, description="Where random numbers start: the same seed, the same result.")
]
# settings that many commands have
Run = Annotated[str, Field(description="The folder this run writes into.")]
Resume = Annotated[bool, Field(description="Continue from the newest checkpoint of the run folder.")]
Overwrite = Annotated[bool, Field(description="Replace the output file if it is there.")]
# settings of earlier versions, dotted -> the key of today, or a sentence that says what to do instead
RENAMED: Mapping[str, str] = {
    "loss.name": 'it is loss.kind now (name = "sigmoid" is kind = "dpo")',
    "loss.also": 'all losses of a sum stand together now: loss.kind = "sum", loss.terms = [{kind = ...}, {kind = ...}]',
    "loss.weight": 'weights are of a sum: loss.kind = "sum", loss.terms = [{kind = ..., weight = ...}]',
    "loss.divergence_alpha": "loss.divergence.alpha",
    "train.save_every": "save.every",
    "train.keep_checkpoints": "save.keep",
    "watch.kl_every": "watch.kl.every",
    "watch.kl_prompts": "watch.kl.prompts",
    "watch.kl_tokens": "watch.kl.tokens",
    "watch.eval_every": "watch.eval.every",
    "watch.displacement_threshold": "reference.displacement_threshold",
    "reference.sync_every": "reference.sync.every",
    "reference.sync_weight": "reference.sync.weight",
    "data.eval_share": "data.hold_out.share",
    "data.eval_seed": "data.hold_out.seed",
    "data.pairing": "data.compare.pairing",
    "data.min_gap": "data.compare.min_gap",
    "data.votes": "data.compare.votes",
    "optim.name": "optim.kind",
    "ppo.gamma": "ppo.advantage.gamma",
    "ppo.lam": "ppo.advantage.lam",
    "ppo.value": "ppo.advantage.value",
    "ppo.value_clip": "ppo.advantage.value_clip",
    "ppo.value_coef": "ppo.advantage.value_coef",
    "ppo.whiten_rewards": "ppo.advantage.whiten_rewards",
    "ppo.whiten_advantages": "ppo.advantage.whiten",
    "ppo.kl_coef": "ppo.kl.coef",
    "ppo.target_kl": "ppo.kl.target",
    "ppo.kl_horizon": "ppo.kl.horizon",
    "ppo.kl_estimator": "ppo.kl.estimator",
    "reward.ties": "ties are learnt from where reward.tie_width is set; 0.5 is a fair start",
    "model": "the model that samples come from is engine.model now",
    "server": "the server that samples come from is engine.server now, with engine.kind = openai",
    "tokens": "prompts are rendered by engine.template and engine.special_text now (favor winrate: template, special_text)",
    "sample.batch": "it is engine.batch now",
}
# bytes of a recipe: more must be another kind of file
_LARGEST = 1 << 20


def load(schema: type[M], recipe: Path | None, overrides: Sequence[str] = ()) -> M:
    """Read a recipe and apply `section.key=value` overrides.

    Raises ConfigError: no such file, broken TOML, a malformed override, an unknown key (its new name or the nearest valid one
    is offered), a value of the wrong type or outside its range.
    """
    tree, words = _tree(recipe, overrides)
    where = str(recipe) if recipe else "settings"
    try:
        try:
            found = schema.model_validate(tree)
        except ValidationError as error:
            # run=2024-11-24 and run=7 are TOML of other types, and meant as text
            asked = [_place(item["loc"], schema)[0] for item in error.errors() if item["type"] == "string_type"]
            if not _take_as_text(tree, words, asked):
                raise
            found = schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item, schema, where) for item in error.errors())) from None
    except RecursionError:
        raise ConfigError(f"{where}: a value is nested too deeply to be read; flatten it") from None
    _check_values(tree, found, where)
    return found


def read(recipe: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe with its overrides as nested dicts, as written: nothing is checked but TOML."""
    return _tree(recipe, overrides)[0]


def _tree(recipe: Path | None, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    tree = _read_toml(recipe) if recipe is not None else {}
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
    try:
        with recipe.open("rb") as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise ConfigError(f"{shown}: larger than {_LARGEST} bytes, so it is not a recipe; name a TOML file")
        return tomllib.loads(raw.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{shown}: no such recipe file; check the path, or start from one in recipes/") from None
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
    shown = clipped(override)
    if not all(parts):
        raise ConfigError(f"override '{shown}': expected section.key=value")
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override '{shown}': '{part}' is a single value, it has no keys below it")
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


def _check_values(given: Any, found: Any, where: str, key: str = "") -> None:
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
        raise ConfigError(f"{where}: '{key}' {problem}")


def _problem(given: Any, found: Any) -> str | None:
    if isinstance(given, bool) and type(found) in (int, float):
        return f"is {str(given).lower()}, expected a number"
    if isinstance(given, int) and abs(given) >= 1 << 63:
        return "is beyond what a computer word holds; give a smaller number"
    return _problem_of_text(given) if isinstance(given, str) else None


def _problem_of_text(given: str) -> str | None:
    if not given.strip():
        return "is empty; give a value, or remove it"
    if any(ord(letter) < 32 and letter not in "\n\t" for letter in given):
        return "holds a control character; remove it"
    if not given.isascii() and given != given.encode("utf-8", "replace").decode("utf-8"):
        return "is not UTF-8 text; give it in UTF-8"
    return None


def _explain(item: Any, schema: type[BaseModel], where: str) -> str:
    key, here = _place(item["loc"], schema)
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key '{clipped(key)}'; {_advice(key, schema, here)}"
    if item["type"] == "missing":
        return f"{where}: '{key}' is not set; add it to the recipe or give {key}=..."
    given = clipped(without_secrets(repr(item["input"])))
    if item["type"].startswith("union_tag"):
        return f"{where}: {_kinds(key, here, item['input'], given)}"
    if item["type"] == "model_type":
        return f"{where}: '{key}' is a section, found {given}; set {key}.KEY=..., one of {', '.join(_below(key, here))}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        said = f"{key + ': ' if key else ''}{message}"
    else:
        said = f"'{key}' is {given}: {message[0].lower() + message[1:]}"
    return f"{where}: {said}"


def _kinds(key: str, here: Sequence[type[BaseModel]], section: Any, given: str) -> str:
    """A union whose kind is not one of its kinds."""
    known = ", ".join(map(kind_of, here))
    if not isinstance(section, dict):
        return f"'{key}' is a section, found {given}; set {key}.kind=..., one of {known}"
    said = clipped(without_secrets(repr(section["kind"]))) if "kind" in section else "not set"
    return f"'{key}.kind' is {said}; choose one of {known}"


def _place(loc: Sequence[str | int], schema: type[BaseModel]) -> tuple[str, list[type[BaseModel]]]:
    """Where pydantic found an error, as the recipe writes it (without the kinds chosen on the way), and what may stand there."""
    parts: list[str] = []
    here = [schema]
    for part in loc:
        chosen = [model for model in here if kind_of(model) == part]
        if len(here) > 1 and chosen:
            here = chosen
            continue
        parts.append(str(part))
        if isinstance(part, str):
            field = next((model.model_fields[part] for model in here if part in model.model_fields), None)
            here = list(models(field.annotation)) if field else here
    return ".".join(parts), here


def _advice(key: str, schema: type[BaseModel], here: Sequence[type[BaseModel]]) -> str:
    """What to write instead of an unknown key: its new name, the kind that reads it, the nearest valid one, or all known there."""
    if now := RENAMED.get(key):
        return now if " " in now else f"it is called '{now}' now"
    valid = list(dict.fromkeys(_keys(schema)))
    if key in valid:
        readers = clipped(", ".join(_readers(key, schema)))
        return f"it is not read by kind '{kind_of(here[0])}'; remove it or choose a kind that reads it ({readers})"
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.75)
    if not close:
        leaf = key.rsplit(".", 1)[-1]
        close = [name for name in valid if name.rsplit(".", 1)[-1] == leaf][:1]
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known here: {', '.join(_below(key.rpartition('.')[0], here))}"


def _readers(key: str, schema: type[BaseModel]) -> Iterator[str]:
    """The kinds of a section that have this setting."""
    here, (*parents, leaf) = [schema], key.split(".")
    for part in parents:
        fields = [model.model_fields[part] for model in here if part in model.model_fields]
        here = [model for field in fields for model in models(field.annotation)]
    yield from (kind_of(model) for model in here if leaf in model.model_fields)


def _below(key: str, here: Sequence[type[BaseModel]]) -> list[str]:
    return [
        f"{key}.{name}".lstrip(".") for name in dict.fromkeys(name for model in here for name in model.model_fields)
    ]


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for section in models(field.annotation, lists=False):
            yield from _keys(section, f"{prefix}{name}.")


def models(annotation: Any, *, lists: bool = True) -> Iterator[type[BaseModel]]:
    """The sections an annotation can hold: one, those of a union, and with `lists` those of a list of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif lists or get_origin(annotation) in (Union, UnionType, Annotated):
        for inner in get_args(annotation):
            yield from models(inner, lists=lists)


def kind_of(model: type[BaseModel]) -> str:
    """The `kind` that chooses this section of a union; empty where none does."""
    return str(get_args(model.model_fields["kind"].annotation)[0]) if "kind" in model.model_fields else ""


def options(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """The parameters of a pure function that are settings, those annotated `Annotated[type, Field(...)]`: (annotation, default)."""
    hints, parameters = get_type_hints(function, include_extras=True), inspect.signature(function).parameters
    return {
        name: (hints[name], parameters[name].default) for name in parameters if get_origin(hints.get(name)) is Annotated
    }


def by_kind(default: str) -> Discriminator:
    """Of a union of sections with a Tag each: the one that `kind` names, `default` where it names none."""

    def chosen(given: Any) -> str | None:
        if isinstance(given, BaseModel):
            return kind_of(type(given))
        return str(given.get("kind", default)) if isinstance(given, dict) else None

    return Discriminator(chosen)


def choice(sections: Mapping[str, Mapping[str, Any]], default: str, sentence: str, **more: Any) -> Any:
    """The union of sections that `kind` chooses among, `default` where it is not given; sentence: what is chosen.

    sections: kind -> its settings, name -> (annotation, default). more: settings and validators that all of them have.
    """
    made = {name: _section(name, {**own, **more}) for name, own in sections.items()}
    tagged = tuple(Annotated[section, Tag(name)] for name, section in made.items())
    return Annotated[Union[tagged], by_kind(default), Field(description=sentence)]  # noqa: UP007 (a union of computed types)


def _section(kind: str, settings: dict[str, Any]) -> type[BaseModel]:
    literal = Annotated[Literal[kind], Field(description="Which one; every kind has its own settings.")]
    fields: dict[str, Any] = {"kind": (literal, kind), **settings}
    return create_model(kind, __config__=STRICT, **fields)
