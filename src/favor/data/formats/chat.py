"""Alpaca and ShareGPT rows, as LLaMA-Factory reads them: pairs, rankings, thumbs or SFT, as their columns say.

In: a row as a dict. Out: its Judgment. Next: scored.py.
"""

from typing import Any

from favor.data.formats.common import (
    Judgment,
    RowError,
    as_response,
    assistant_turn,
    complete,
    distinct,
    need,
    shown,
    tools_of,
    weight_of,
)
from favor.data.formats.thumbs import is_good
from favor.data.strict import parse
from favor.data.types import Message, Text

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}


def alpaca(row: dict[str, Any]) -> Judgment:
    """`instruction` and perhaps `input`, joined by a line break; `system` and `history` (pairs of turns) come first.

    The answers: a list `output`, best first; or `chosen, rejected`; or one `output`, with `kto_tag` a thumb.
    """
    prompt = _alpaca_prompt(row)
    chat = isinstance(prompt, tuple)
    texts = [as_response(value, name) for value, name in _outputs(row)]
    responses = tuple(assistant_turn(text) if chat and isinstance(text, str) else text for text in texts)
    return _judged(row, prompt, responses)


def sharegpt(row: dict[str, Any]) -> Judgment:
    """`conversations` of turns with `from` and `value`, then `chosen` and `rejected`, one turn each.

    Without them the last turn of conversations is the answer: with `kto_tag` a thumb, else SFT.
    """
    turns = _turns(need(row, "conversations"), "conversations")
    if "system" in row:
        turns = ({"role": "system", "content": _string(row, "system")}, *turns)
    if "chosen" in row or "rejected" in row:
        names = ("chosen", "rejected")
        responses = tuple(complete(_turns([need(row, name)], name), name) for name in names)
        return _judged(row, turns, responses)
    if len(turns) < 2:
        raise RowError("conversations must hold a prompt before the last turn of 'gpt'")
    return _judged(row, turns[:-1], (complete(turns, "conversations")[-1:],))


def _judged(row: dict[str, Any], prompt: Text, responses: tuple[Text, ...]) -> Judgment:
    """The answers, best first, or one alone."""
    judgment = Judgment(prompt, responses, (), weight_of(row), tools_of(row))
    if len(responses) > 1:
        distinct(responses, "answers")
        return judgment._replace(orders=(tuple(range(len(responses))),))
    if "kto_tag" in row:
        return judgment._replace(thumbs=((0, is_good(row["kto_tag"], "kto_tag")),))
    return judgment


def _outputs(row: dict[str, Any]) -> list[tuple[Any, str]]:
    if "chosen" in row or "rejected" in row:
        return [(need(row, name), name) for name in ("chosen", "rejected")]
    output = need(row, "output")
    if not isinstance(output, list):
        return [(output, "output")]
    if len(output) < 2:
        raise RowError("output must be text, or a list of at least two answers, best first")
    return [(value, f"output[{i}]") for i, value in enumerate(output)]


def _alpaca_prompt(row: dict[str, Any]) -> Text:
    text = _string(row, "instruction")
    if not text.strip():
        raise RowError("instruction is empty", "empty")
    more = _string(row, "input") if "input" in row else ""
    text = f"{text}\n{more}" if more.strip() else text
    before: list[Message] = []
    if "system" in row and _string(row, "system").strip():
        before.append({"role": "system", "content": row["system"]})
    history = row.get("history", [])
    for said in history if isinstance(history, list) else [history]:
        if not isinstance(said, list) or len(said) != 2 or not all(isinstance(turn, str) for turn in said):
            raise RowError(f"history must hold pairs of texts, what was asked and answered; found {shown(said)}")
        before += [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    return (*before, {"role": "user", "content": text}) if before else text


def _string(row: dict[str, Any], name: str) -> str:
    value = need(row, name)
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, found {shown(value)}")
    return value


def _turns(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} must be a list of turns, found {shown(value)}")
    return tuple(_turn(turn, f"{name}[{i}]") for i, turn in enumerate(value))


def _turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
        raise RowError(f"{name} is no turn with from and value, found {shown(turn)}")
    if turn["from"] not in _ROLES:
        raise RowError(f"{name}.from is '{turn['from']}', known are {', '.join(_ROLES)}")
    if turn["from"] != "function_call":
        return {"role": _ROLES[turn["from"]], "content": turn["value"]}
    try:
        call = parse(turn["value"])
    except ValueError as error:
        raise RowError(f"{name}.value is no function call: {error}") from None
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
