"""What settings there are, read off the sections themselves: the list, and what is said of one that is refused.

In: a command's config class; an error of pydantic. Out: Setting records and a table of them for the terminal (docs/settings.py
makes docs/settings.md of them); a line that says what to write instead. Next: config.py.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from favor.errors import ConfigError, clipped, without_secrets
from favor.trl import names as trl

if TYPE_CHECKING:
    from rich.table import Table

_NAMES = {
    float: "number",
    int: "integer",
    bool: "true or false",
    str: "text",
    dict: "table",
    tuple: "list",
    list: "list",
}


# settings of earlier versions, dotted -> the key of today, or a sentence that says what to do instead
RENAMED: Mapping[str, str] = {
    "loss.name": 'it is loss.kind now (name = "sigmoid" is kind = "dpo")',
    "loss.also": 'all losses of a sum stand together now: loss.kind = "sum", loss.terms = [{kind = ...}, {kind = ...}]',
    "loss.weight": 'weights belong to a sum: loss.kind = "sum", loss.terms = [{kind = ..., weight = ...}]',
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
    "optim.warmup_steps": "optim.warmup",
    "optim.warmup_share": "it is optim.warmup now: a number below 1 is a share",
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
    "RewardTrainConfig.reward": "its settings are in [bradley_terry] now: margin_scale, centering, tie_width (ties count if set)",
    "model": "the model that samples come from is engine.model now",
    "server": "the server that samples come from is engine.server now, with engine.kind = openai",
    "tokens": "prompts are rendered by engine.template and engine.special_text now (favor winrate: template, special_text)",
    "sample.batch": "it is engine.batch now",
    "reward.tokens.truncation": "what is scored is never cut: raise reward.tokens.max_tokens, or shorten the text",
    "reward.tokens.special_text": "any text can be scored; remove it",
    # a command's own
    "PpoConfig.tokens.max_tokens": "PPO takes its prompts whole; sample.max_new_tokens bounds the responses",
    "PpoConfig.tokens.truncation": "PPO takes its prompts whole; data.max_rows takes fewer of them",
    "DemoConfig.sft_lr": "the demo's SFT has a fixed learning rate; for one of your own: favor sft optim.lr=...",
    "DemoConfig.test_pairs": "the demo reads 80 held-out rows; for another number: favor eval run=RUN/dpo max_rows=...",
    "DemoConfig.prompts": "the demo samples 20 prompts; for another number: favor eval run=RUN/dpo sample_prompts=...",
    "DemoConfig.samples_per_prompt": "the demo takes 4 samples; for another number: favor eval run=RUN/dpo samples_per_prompt=...",
}


@dataclass(frozen=True)
class Setting:
    """One line of the list. kinds: the kinds of its section that read it; empty where there is no choice."""

    key: str
    type: str
    default: str
    allowed: str
    sentence: str
    kinds: tuple[str, ...] = ()


def settings(
    schema: type[BaseModel],
    given: Mapping[str, Any] | None = None,
    prefix: str = "",
    *,
    every: bool = False,
    own: Any = None,
) -> Iterator[Setting]:
    """Every setting of a config class.

    Of a section that is chosen by `kind`, those of the kind in `given` (a recipe as nested dicts), else of the default; of a
    section that is off unless it is written, its own line unless it stands in `given`. every: all kinds and all sections.
    own: values that the command sets in the section, its defaults.
    """
    here = given or {}
    for name, field in schema.model_fields.items():
        key, sections = prefix + name, list(models(field.annotation, lists=False))
        inner = here.get(name)
        inner = inner if isinstance(inner, Mapping) else {}
        if not sections and any(models(field.annotation)):
            by_name = get_origin(field.annotation) is dict
            allowed = "tables by name" if by_name else "a list of tables"
            yield Setting(key, "section", _shown(field.default), allowed, field.description or "")
        elif not sections:
            if name != "kind" or not kind_of(schema) or len(get_args(field.annotation)) > 1:
                yield _leaf(key, field, getattr(own, name) if own and name in own.model_fields_set else field.default)
        elif field.default is None and name not in here and not every:
            yield Setting(
                f"{key}.*", "section", "off", "", f"{_sentence(field, sections[0])} Off unless one of its keys is set."
            )
        elif len(sections) == 1:
            yield from settings(sections[0], inner, f"{key}.", every=every, own=_own(field))
        else:
            yield from _union(key, field, sections, inner, every=every)


def _union(
    key: str, field: FieldInfo, sections: list[type[BaseModel]], given: Mapping[str, Any], *, every: bool
) -> Iterator[Setting]:
    default = kind_of(type(field.default)) if isinstance(field.default, BaseModel) else ""
    known = {kind_of(section): section for section in sections}
    shown = json.dumps(default) if default else _shown(field.default)
    yield Setting(f"{key}.kind", "choice", shown, ", ".join(known), _sentence(field, sections[0]))
    if not every:
        chosen = given.get("kind", default)
        if "kind" in given and chosen not in list(known):
            raise ConfigError(_kinds(key, sections, given, clipped(repr(given))))
        if chosen in known:
            yield from settings(known[chosen], given, f"{key}.", own=_own(field))
        return
    found: dict[Setting, tuple[str, ...]] = {}
    for kind, section in known.items():
        for setting in settings(section, given, f"{key}.", every=True, own=_own(field)):
            found[setting] = (*found.get(setting, ()), kind)
    yield from (replace(setting, kinds=setting.kinds or kinds) for setting, kinds in found.items())


def _own(field: FieldInfo) -> BaseModel | None:
    return field.default if isinstance(field.default, BaseModel) else None


def _leaf(key: str, field: FieldInfo, default: Any) -> Setting:
    inside = [part for part in get_args(field.annotation) if part is not NoneType]
    bare: Any = inside[0] if NoneType in get_args(field.annotation) else field.annotation
    literal = get_origin(bare) is Literal
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    bounds = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in signs if hasattr(m, name)]
    parts = [get_args(part)[0] if get_origin(part) is Annotated else part for part in get_args(bare)]
    several = get_origin(bare) in (Union, UnionType) and all((get_origin(part) or part) in _NAMES for part in parts)
    shape = " or ".join(_NAMES[get_origin(part) or part] for part in parts) if several else "value"
    shape = "choice" if literal else _NAMES.get(get_origin(bare) or bare, shape)
    allowed = ", ".join(map(str, get_args(bare))) if literal else " and ".join(bounds)
    return Setting(key, shape, _shown(default), allowed, field.description or "")


def _shown(value: Any) -> str:
    if value is PydanticUndefined:
        return "must be given"
    if isinstance(value, BaseModel) or value is None:
        return "absent"
    return json.dumps(value, ensure_ascii=False)


def _sentence(field: FieldInfo, section: type[BaseModel]) -> str:
    """The field's sentence, or the first of its section's docstring."""
    said = (section.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    said = re.sub(r"^Section \[[^]]*\]: ", "", said)
    return field.description or said[:1].upper() + said[1:]


def table(found: Iterator[Setting]) -> "Table":
    """For the terminal."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table("setting", "allowed (default)", "what it does")
    # keys are typed again, so they are never cut
    shown.columns[0].no_wrap = True
    for setting in found:
        allowed = f"{setting.allowed or setting.type} ({setting.default})"
        shown.add_row(*map(escape, (setting.key, allowed, setting.sentence)))
    return shown


def all_explained(error: ValidationError, schema: type[BaseModel], where: Callable[[str], str]) -> list[str]:
    """A line for everything that pydantic refuses; of a list that is short only by what was refused inside it, nothing.

    where: says of a key where it was given.
    """
    items = error.errors()
    inside = {item["loc"][:n] for item in items for n in range(len(item["loc"]))}
    return [
        explained(item, schema, where) for item in items if item["type"] != "too_short" or item["loc"] not in inside
    ]


def schema_of(config: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a recipe. A section may leave out `kind`, so it may fit several kinds: anyOf, not oneOf."""

    def any_of(node: Any) -> Any:
        if isinstance(node, list):
            return [any_of(item) for item in node]
        if not isinstance(node, dict):
            return node
        return {"anyOf" if name == "oneOf" else name: any_of(value) for name, value in node.items()}

    return any_of(config.model_json_schema())


def explained(item: Any, schema: type[BaseModel], where: Callable[[str], str]) -> str:
    """What pydantic refuses, as a line: where it stands in the recipe, what was found, what to write instead."""
    key, here = place(item["loc"], schema)
    if item["type"] == "extra_forbidden":
        # a section that was renamed as a whole says where its settings are now
        asked = key if _renamed(key, schema) else inmost(key, item["input"])
        said = _advice(asked, schema, here) or f"known here: {', '.join(_below(key.rpartition('.')[0], here))}"
        return f"{where(asked)}: unknown key '{clipped(asked)}'; {said}"
    if item["type"] == "missing":
        return f"{where(key)}: '{key}' is not set; add it to the recipe or give {key}=..."
    given = clipped(without_secrets(repr(item["input"])))
    if item["type"].startswith("union_tag"):
        return f"{where(f'{key}.kind')}: {_kinds(key, here, item['input'], given)}"
    if item["type"] == "model_type":
        return f"{where(key)}: '{key}' is a section, found {given}; set {key}.KEY=..., one of {', '.join(_below(key, here))}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        said = f"{key + ': ' if key else ''}{message}"
    else:
        said = f"'{key}' is {given}: {message[0].lower() + message[1:]}"
    return f"{where(key)}: {said}"


def _renamed(key: str, schema: type[BaseModel]) -> str | None:
    return RENAMED.get(f"{schema.__name__}.{key}", RENAMED.get(key))


def inmost(key: str, value: Any) -> str:
    """The dotted key as it was typed: below a section that nobody knows, the first of its settings."""
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key


def _kinds(key: str, here: Sequence[type[BaseModel]], section: Any, given: str) -> str:
    """A union whose kind is not one of its kinds."""
    known = ", ".join(map(kind_of, here))
    if not isinstance(section, dict):
        return f"'{key}' is a section, found {given}; set {key}.kind=..., one of {known}"
    said = clipped(without_secrets(repr(section["kind"]))) if "kind" in section else "not set"
    if key == "loss" and (told := trl.loss_called(str(section.get("kind")))):
        return f"'{key}.kind' is {said}; {told}"
    return f"'{key}.kind' is {said}; choose one of {known}"


def place(loc: Sequence[str | int], schema: type[BaseModel]) -> tuple[str, list[type[BaseModel]]]:
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
    """What to write instead of an unknown key: its new name, the kind that reads it, the nearest valid one; or ""."""
    if now := _renamed(key, schema):
        return now if " " in now else f"it is called '{now}' now"
    valid = list(dict.fromkeys(_keys(schema)))
    if key in valid:
        readers = clipped(", ".join(_readers(key, schema)))
        kind = f"kind '{kind_of(here[0])}'" if kind_of(here[0]) else "the kind that is chosen"
        return f"it is not read by {kind}; remove it or choose a kind that reads it ({readers})"
    leaf = key.rsplit(".", 1)[-1]
    if (told := trl.called(leaf)) and trl.KEYS.get(leaf, valid[0]) in valid:
        return told
    # never the section in which the key stands
    close = [name for name in difflib.get_close_matches(key, valid, n=3, cutoff=0.75) if not key.startswith(f"{name}.")]
    if not close:
        close = [name for name in valid if name.rsplit(".", 1)[-1] == leaf][:1]
    if close:
        return f"did you mean '{close[0]}'?"
    return ""


def _readers(key: str, schema: type[BaseModel]) -> Iterator[str]:
    """The kinds of its section, or of the nearest section above that has kinds, which have this setting."""
    (*parents, leaf), here = key.split("."), [(schema, "")]
    for part in parents:
        fields = [(model.model_fields[part], kind) for model, kind in here if part in model.model_fields]
        here = [(model, kind_of(model) or kind) for field, kind in fields for model in models(field.annotation)]
    yield from dict.fromkeys(kind for model, kind in here if leaf in model.model_fields)


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
