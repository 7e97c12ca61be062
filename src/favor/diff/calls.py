"""Calls of tools in the text of an answer, in the form that the chat template writes; whether each is one that a tool takes.

The form is found by rendering a call with marks, as data/render.py proves what survives a template. In: a tokenizer; text and
tools. Out: Form; how an answer calls. Next: checks.py.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from favor.data.readers import value_at
from favor.data.schema import holds
from favor.data.turns import as_object, parameters_of

_NAME, _KEY, _VALUE = "zqnamefavorqz", "zqkeyfavorqz", "zqvaluefavorqz"
# ways in which a template can fail on a call that it does not know
_FAILS = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Form(NamedTuple):
    """How a template writes a call.

    Behind `opening` an object with name and arguments under these keys; or, keys empty, the name, `between`, the arguments.
    """

    opening: str
    name_key: str = ""
    arguments_key: str = ""
    between: str = ""


class Called(NamedTuple):
    """How an answer calls: in all, and how many of them no tool takes."""

    calls: int
    bad: int


def form_of(tokenizer: PreTrainedTokenizerBase) -> Form | None:
    """The form of the tokenizer's template; None where it writes no calls, or not as JSON."""
    for arguments in ({_KEY: _VALUE}, json.dumps({_KEY: _VALUE})):
        tail = _rendered(tokenizer, arguments)
        form = None if tail is None else _as_object(tail) or _named_before(tail)
        if form is not None:
            return form
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase, arguments: Any) -> str | None:
    """What the template writes behind a prompt for a call with marks."""
    asked = [{"role": "user", "content": "hi"}]
    described = {"type": "object", "properties": {_KEY: {"type": "string", "description": "x"}}}
    tool = {"type": "function", "function": {"name": _NAME, "description": "x", "parameters": described}}
    call = {"type": "function", "id": "abcdefghi", "function": {"name": _NAME, "arguments": arguments}}
    turns: list[dict[str, Any]] = [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
    given: dict[str, Any] = {"tokenize": False, "tools": [tool]}
    try:
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **given)
        full = tokenizer.apply_chat_template(turns, add_generation_prompt=False, **given)
    except _FAILS:
        return None
    return (
        full[len(prompt) :] if isinstance(full, str) and isinstance(prompt, str) and full.startswith(prompt) else None
    )


def _as_object(tail: str) -> Form | None:
    for at, value in _objects(tail):
        keys = {_key_of(inner): key for key, inner in value.items()}
        if "name" in keys and "arguments" in keys:
            return Form(_last_word(tail[:at].rstrip(" \n[")), keys["name"], keys["arguments"])
    return None


def _key_of(value: Any) -> str:
    return "name" if value == _NAME else "arguments" if as_object(value) == {_KEY: _VALUE} else ""


def _named_before(tail: str) -> Form | None:
    at = tail.find(_NAME)
    for start, value in _objects(tail):
        if 0 <= at < start and value == {_KEY: _VALUE} and tail[:at].strip():
            return Form(_last_word(tail[:at]), between=_last_word(tail[at + len(_NAME) : start]))
    return None


def _last_word(text: str) -> str:
    """What stands right before a call; reasoning and the like before it may be left out."""
    return (text.split() or [""])[-1]


def _objects(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every JSON object of a text, where it begins; those inside another are not looked for."""
    at = text.find("{")
    while at >= 0:
        value, end = _decoded(text, at)
        if value is not None:
            yield at, value
        at = text.find("{", end)


def _decoded(text: str, at: int) -> tuple[dict[str, Any] | None, int]:
    """The object that begins there and where it ends; None and the next place where there is none."""
    try:
        value, end = value_at(text, at)
    except ValueError:
        return None, at + 1
    return (value, end) if isinstance(value, dict) else (None, at + 1)


def called(text: str, form: Form, tools: Sequence[Mapping[str, Any]]) -> Called:
    """The calls of an answer (with its special tokens). Without a mark before them a text that begins with { is one."""
    known = parameters_of(tools)
    parts = text.split(form.opening)[1:] if form.opening else [text] if text.lstrip().startswith("{") else []
    found = [call for part in parts for call in (_calls(part, form) or [None])]
    bad = sum(call is None or call[0] not in known or not holds(call[1], known[call[0]]) for call in found)
    return Called(len(found), bad)


def _calls(part: str, form: Form) -> list[tuple[str, dict[str, Any]] | None]:
    """Name and arguments of the calls behind an opening, None for one that is none; several may stand in a list."""
    if not form.name_key:
        return [_named(part, form)]
    found: list[tuple[str, dict[str, Any]] | None] = []
    rest = part.lstrip(" \t\r\n[")
    while rest.startswith("{"):
        value, end = _decoded(rest, 0)
        if value is None:
            return [*found, None]
        name, arguments = value.get(form.name_key), as_object(value.get(form.arguments_key))
        found.append((name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None)
        rest = rest[end:].lstrip(" \t\r\n,;")
    return found


def _named(part: str, form: Form) -> tuple[str, dict[str, Any]] | None:
    start, name = part.find("{"), re.match(r"[\w.-]+", part)
    value = _decoded(part, start)[0] if start >= 0 else None
    if value is None or name is None or form.between not in part[name.end() : start]:
        return None
    return name[0], value
