"""The list of settings: key, type, default, what is allowed, one sentence; read off the sections themselves.

In: a command's config class. Out: Setting records, a table for the terminal (docs/settings.py makes docs/settings.md of them).
Next: config.py.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from favor.config import kind_of, models

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
    schema: type[BaseModel], given: Mapping[str, Any] | None = None, prefix: str = "", *, every: bool = False
) -> Iterator[Setting]:
    """Every setting of a config class.

    Of a section that is chosen by `kind`, those of the kind in `given` (a recipe as nested dicts), else of the default; of a
    section that is off unless it is written, its own line unless it stands in `given`. every: all kinds and all sections.
    """
    here = given or {}
    for name, field in schema.model_fields.items():
        key, sections = prefix + name, list(models(field.annotation, lists=False))
        inner = here.get(name)
        inner = inner if isinstance(inner, Mapping) else {}
        if not sections and any(models(field.annotation)):
            yield Setting(key, "section", _default(field), "a list of tables", field.description or "")
        elif not sections:
            if name != "kind" or not kind_of(schema) or len(get_args(field.annotation)) > 1:
                yield _leaf(key, field)
        elif field.default is None and name not in here and not every:
            yield Setting(
                f"{key}.*", "section", "off", "", f"{_sentence(field, sections[0])} Off unless one of its keys is set."
            )
        elif len(sections) == 1:
            yield from settings(sections[0], inner, f"{key}.", every=every)
        else:
            yield from _union(key, field, sections, inner, every=every)


def _union(
    key: str, field: FieldInfo, sections: list[type[BaseModel]], given: Mapping[str, Any], *, every: bool
) -> Iterator[Setting]:
    default = kind_of(type(field.default)) if isinstance(field.default, BaseModel) else ""
    known = {kind_of(section): section for section in sections}
    shown = json.dumps(default) if default else _default(field)
    yield Setting(f"{key}.kind", "choice", shown, ", ".join(known), _sentence(field, sections[0]))
    if not every:
        chosen = given.get("kind", default)
        if chosen in known:
            yield from settings(known[chosen], given, f"{key}.")
        return
    found: dict[Setting, tuple[str, ...]] = {}
    for kind, section in known.items():
        for setting in settings(section, given, f"{key}.", every=True):
            found[setting] = (*found.get(setting, ()), kind)
    yield from (replace(setting, kinds=setting.kinds or kinds) for setting, kinds in found.items())


def _leaf(key: str, field: FieldInfo) -> Setting:
    inside = [part for part in get_args(field.annotation) if part is not NoneType]
    bare: Any = inside[0] if NoneType in get_args(field.annotation) else field.annotation
    literal = get_origin(bare) is Literal
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    bounds = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in signs if hasattr(m, name)]
    shape = "choice" if literal else _NAMES.get(get_origin(bare) or bare, "value")
    allowed = ", ".join(map(str, get_args(bare))) if literal else " and ".join(bounds)
    return Setting(key, shape, _default(field), allowed, field.description or "")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=False)
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
