"""What turns say: texts marked and found again in what a template makes of them, reasoning and calls in other forms.

In: messages, or rendered text. Out: the same in another form, or whether a text is there. Next: render.py.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from favor.data.formats.fields import shown
from favor.data.pictures import MARK as PICTURE
from favor.data.readers import RowError, parse
from favor.data.shapes import MARK
from favor.data.types import Message

# parts of a tool call that are not said
_UNSAID = frozenset(("type", "id", "index"))
# reasoning that opens a text; what a model says behind a prompt that opened it for it has its end alone
_REASONED = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_ENDED = re.compile(r"(?:\s*<think>)?(.*?)</think>(.*)", re.DOTALL)
_FIELDS = ("reasoning_content", "reasoning", "thinking")
REMEDY = "; use a template that keeps it, set tokens.template=plain, or change the row to the form in which the template writes it"
_A_ROW_EACH = "make a row of every turn, with those before it as its prompt, or take out its reasoning"


def as_object(arguments: Any) -> Any:
    """JSON text as what it says, where that is an object."""
    try:
        found = parse(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def as_json(arguments: Any) -> Any:
    """An object as JSON text."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


# what templates take for the arguments of a call
ARGUMENTS = (as_object, as_json)


def calls_of(turn: Message) -> list[dict[str, Any]]:
    """What a turn calls: name and arguments."""
    calls = [call.get("function", call) for call in turn.get("tool_calls") or [] if isinstance(call, dict)]
    return [call for call in calls if isinstance(call, dict)]


def called(turn: Message) -> set[str]:
    """The names of what a turn calls."""
    return {str(call.get("name")) for call in calls_of(turn)}


def parameters_of(tools: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Name of a tool -> schema of its arguments."""
    inner = [tool.get("function", tool) for tool in tools]
    return {str(one.get("name")): one.get("parameters") for one in inner if isinstance(one, Mapping)}


def apart(turn: Message) -> Message | None:
    """A turn whose text begins with its reasoning, <think>...</think>, with that in a field of its own; None for others."""
    found = _REASONED.fullmatch(str(turn.get("content") or ""))
    if found is None or turn.get("reasoning_content") or not (found[1] + found[2]).strip():
        return None
    return {**turn, "reasoning_content": found[1].strip(), "content": found[2].strip()}


def reasoned(turn: Message, opened: str) -> tuple[str, Message]:
    """What stands behind `opened`, a <think> with blanks, up to the answer; and the turn without it.

    Raises RowError for reasoning in more than one place, or with a mark of its own inside.
    """
    fields = [name for name in _FIELDS if turn.get(name)]
    bare = {name: value for name, value in turn.items() if name not in fields}
    found = _ENDED.fullmatch(str(turn.get("content") or ""))
    if len(fields) + (found is not None) > 1:
        raise RowError("a response has its reasoning in more than one place; leave it in one")
    if fields:
        text = str(turn[fields[0]]).strip()
        if "<think>" in text or "</think>" in text:
            raise RowError(f"{fields[0]} holds <think> or </think>, which the template writes around it; take it out")
        return f"{text}\n</think>\n\n", bare
    if found is None or not found[1].strip():
        return "", turn
    # a text that was written so is taken so; one that opens its reasoning itself stands behind the blanks of the prompt's
    opens = "<think>" in turn["content"].partition("</think>")[0]
    inner = found[1].removeprefix(opened.removeprefix("<think>")) if opens else found[1]
    return f"{inner}</think>", {**bare, "content": found[2]}


def differs(known: str, *, last: bool) -> RowError:
    """Why a row is refused whose template shows `known`, all up to a turn, otherwise once that turn (`last`) or more follow."""
    if last and known.rstrip().endswith("</think>"):
        return RowError(
            "the prompt ends the model's reasoning (</think>), and the chat template does not write that once the response "
            "follows; set enable_thinking=true (in chat_template_kwargs or model.template_kwargs), or take out its reasoning"
        )
    what, remedy = "an earlier turn differently once others follow", _A_ROW_EACH
    if last:
        what = "the prompt differently once the response follows"
        remedy = "use another template, or tokens.template=plain"
    return RowError(f"the chat template renders {what}, so no exact boundary exists; {remedy}")


def left_out(lost: str, turn: Message, *, last: bool) -> RowError:
    """Why a row cannot be used whose template does not write `lost`, which a turn of a response says; `last`: its last one."""
    remedy = REMEDY if last else f"; {_A_ROW_EACH}"
    if lost in called(turn):
        remedy = "; use a template that writes every tool call of a turn"
    return RowError(f"the chat template leaves out {shown(lost)} of the response{remedy}")


def mark(value: Any, values: list[str], *, keys: bool = False) -> Any:
    """A value with a mark for every text that is said in it (in arguments of a call names too); the texts join `values`."""
    if isinstance(value, str):
        values.append(value)
        return MARK.format(len(values) - 1)
    if isinstance(value, dict):
        return {
            (mark(name, values) if keys else name): inner
            if name in _UNSAID and not keys
            else mark(inner, values, keys=keys or name == "arguments")
            for name, inner in value.items()
        }
    return [mark(inner, values, keys=keys) for inner in value] if isinstance(value, list | tuple) else value


def placed(tail: str, pieces: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where each piece stands, if a text is these one after the other, blanks apart; None: it is not. Texts may be JSON in it."""
    at, found = 0, list[tuple[int, int]]()
    for piece in pieces:
        start = len(tail) - len(tail[at:].lstrip())
        form = next((form for form in forms(piece) if tail.startswith(form.strip(), start)), None)
        if form is None:
            return None
        at = start + len(form.strip())
        found.append((start, at))
    return None if tail[at:].strip() else found


def forms(text: str) -> Iterator[str]:
    """A text as a template may write it: as it is, inside JSON, or as Python writes it."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]


def check_heard(turns: Sequence[Message], rendered: str, what: str) -> None:
    """Every turn's text must stand in what is rendered; of the assistant's earlier turns what follows their reasoning.

    Raises RowError.
    """
    for turn in turns:
        text = str(turn.get("content") or "")
        if turn.get("role") == "assistant":
            text = text.rpartition("</think>")[2]
        # between the marks of pictures
        said = PICTURE.split(text)[::2]
        mark([turn.get("tool_calls"), turn.get("function_call")], said)
        lost = next((text for text in said if not any(form.strip() in rendered for form in forms(text))), None)
        if lost is not None:
            raise RowError(f"the chat template leaves out or changes {shown(lost)} of the {what}{REMEDY}")
