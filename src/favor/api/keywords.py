"""Keywords of Python -> a recipe's nested dicts: sections as dicts, dotted keys, plain names where one setting has it.

In: a command's config class and keywords. Out: what TOML would hold, still unchecked. Next: inputs.py.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from favor.config import read
from favor.errors import ConfigError
from favor.settings import RENAMED, models
from favor.trl import names as trl
from favor.words import expanded, keys, meant

# KEY=VALUE in a message: a value that lets itself be read, with tables in a table
_TYPED = re.compile(r"(?<![\w.=])[a-z_]+(?:\.[a-z_]+)*=(?:\{(?:[^{}]|\{[^{}]*\})*\}|[\w.+-]*\w)")


def tree_of(schema: type[BaseModel], words: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keywords as a recipe. None counts as not given; `where` names the function in messages.

    Raises ConfigError for a name that no setting has or several have, and for a setting that is given twice.
    """
    tree: dict[str, Any] = {}
    given = {name: _plain(value) for name, value in words.items() if value is not None}
    flat = {name: value for name, value in given.items() if "." not in name and name not in schema.model_fields}
    for name in given.keys() - flat.keys():
        put(tree, name, given[name], where)
    # a plain name may depend on the kinds that are chosen above
    for name, value in flat.items():
        put(tree, _key(schema, name, tree, where), value, where)
    return tree


def put(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key; two dicts for one section are joined. Raises ConfigError for what is set already."""
    *parents, leaf = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(
                f"{where}: '{part}' is {node!r:.80}, but {key} belongs to that section; give a dict there"
            )
    before = node.get(leaf)
    if isinstance(before, dict) and isinstance(value, dict):
        for inner, one in value.items():
            put(node, f"{leaf}.{inner}", one, where)
    elif leaf in node:
        raise ConfigError(f"{where}: {key} is given twice ({before!r:.80} and {value!r:.80}); give it once")
    else:
        node[leaf] = value


def in_python(schema: type[BaseModel], text: str) -> str:
    """A message whose settings, written as they are typed in a shell, stand as the keywords that say the same."""
    return _TYPED.sub(lambda word: _keyword(schema, word.group()), text)


def _keyword(schema: type[BaseModel], word: str) -> str:
    """The keyword for a word; the word itself where a message only looks as if it held a setting."""
    # three dots stand for what the user has to fill in
    filled = word.replace("[...]", '["..."]')
    data = schema.model_fields.get("data")
    with contextlib.suppress(ConfigError):
        # as it stands, and as a command with a section [data] takes it
        below = expanded("train", [filled]) if data and any(models(data.annotation)) else ()
        for typed in (filled, *below):
            if said := _said(schema, typed.partition("=")[0].split("."), read(None, [typed])):
                return said.replace('["..."]', "[...]")
    return word


def _said(schema: type[BaseModel], parts: list[str], wanted: Mapping[str, Any]) -> str:
    """The shortest keyword that means what is wanted, beta, or columns with a dict; "" for none."""
    value: Any = wanted
    for part in parts:
        value = value[part]
    for place in reversed(range(len(parts))):
        if parts[place] not in ("run", "out") and _means(schema, parts[place], value, wanted):
            return f"{parts[place]}={_shown(value)}"
        value = {parts[place]: value}
    return ""


def _means(schema: type[BaseModel], name: str, value: Any, wanted: Mapping[str, Any]) -> bool:
    try:
        return tree_of(schema, {name: value}, "favor") == wanted
    except ConfigError:
        return False


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if '"' in shown else shown.replace("'", '"')


def _plain(value: Any) -> Any:
    """What a recipe can hold: paths are text, absent values are left out, and nothing of the caller's is changed later."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _key(schema: type[BaseModel], name: str, tree: Mapping[str, Any], where: str) -> str:
    """The one setting of this plain name. Raises ConfigError for none, and for several that it could mean."""
    found = meant(schema, name, tree)
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(f"{where}: unknown keyword '{name}'; {_advice(schema, name)}")
    section, _, leaf = found[0].rpartition(".")
    said = f"{section.partition('.')[0]}={_nested(section, leaf)}"
    raise ConfigError(f"{where}: '{name}' could be {', '.join(found)}; say which, as in {said}")


def _nested(section: str, leaf: str) -> str:
    said = f'{{"{leaf}": ...}}'
    for part in reversed(section.split(".")[1:]):
        said = f'{{"{part}": {said}}}'
    return said


def _advice(schema: type[BaseModel], name: str) -> str:
    """TRL's name, an old name, the nearest name, or where all names are listed."""
    known = list(keys(schema, {}))
    if (told := trl.called(name)) and trl.KEYS.get(name, known[0]) in known:
        return told
    renamed = next((now for old, now in RENAMED.items() if old.rpartition(".")[2] == name and now in known), None)
    if renamed is not None:
        return f"it is called '{renamed}' now"
    leaves: dict[str, list[str]] = {}
    for key in known:
        leaves.setdefault(key.rpartition(".")[2], []).append(key)
    near = [key for leaf in difflib.get_close_matches(name, leaves, cutoff=0.7) for key in leaves[leaf]]
    return f"did you mean {' or '.join(near[:4])}?" if near else f"known here: {', '.join(schema.model_fields)}"
