"""What one row of each public preference format says.

In: a row as a dict. Out: a Judgment: the prompt, its responses and their orders, best first. Next: read.py.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from favor.data.types import Message, Text

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class RowError(Exception):
    """Why a row cannot be used; read.py adds file and row number."""


class Judgment(NamedTuple):
    """One row: `orders` index `responses`, best first; no orders in plain SFT data.

    `ties` are pairs judged equally good. `scores` (one per response, or none) say by how much one is better. `cut`
    are responses that stop before their end, as samples at a length limit do: they get no end-of-turn token.
    `labels` (one per order, or none) are the probabilities that the orders are right. `thumbs` judge single responses.
    """

    prompt: Text
    responses: tuple[Text, ...]
    orders: tuple[tuple[int, ...], ...]
    weight: float = 1.0
    tools: tuple[dict[str, Any], ...] | None = None
    ties: tuple[tuple[int, int], ...] = ()
    scores: tuple[float, ...] = ()
    cut: tuple[int, ...] = ()
    labels: tuple[float, ...] = ()
    thumbs: tuple[tuple[int, bool], ...] = ()


def recognise(row: dict[str, Any]) -> str:
    """The format a row's columns belong to. Raises RowError, naming the columns found and the formats known."""
    columns = set(row)
    if {"chosen", "rejected"} <= columns:
        return "pairs"
    if "responses" in columns and columns & {"ranking", "scores"}:
        return "ranked"
    if "messages" in columns or ("prompt" in columns and columns & {"completion", "response"}):
        return "sft"
    raise RowError(
        f"its columns ({', '.join(sorted(columns)) or 'none'}) are of no known format; expected prompt + chosen + rejected, "
        "chosen + rejected, prompt + responses + ranking or scores, prompt + completion, or messages"
    )


def pairs(row: dict[str, Any]) -> Judgment:
    """`prompt, chosen, rejected` as text or messages; without prompt: full message lists or HH transcripts.

    `margin` says by how much chosen is better (a score difference); `tie = true` that neither is.
    """
    chosen, rejected = _need(row, "chosen"), _need(row, "rejected")
    if "prompt" in row:
        prompt = _text(row["prompt"], "prompt")
        responses = (_response(chosen, "chosen"), _response(rejected, "rejected"))
        if isinstance(prompt, tuple) and not all(isinstance(r, tuple) for r in responses):
            responses = tuple(r if isinstance(r, tuple) else _assistant(r) for r in responses)
        if isinstance(prompt, str) and any(isinstance(r, tuple) for r in responses):
            prompt = ({"role": "user", "content": prompt},)
            responses = tuple(r if isinstance(r, tuple) else _assistant(r) for r in responses)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        prompt, responses = _common_prompt(transcript(chosen, "chosen"), transcript(rejected, "rejected"))
    else:
        prompt, responses = _common_prompt(_messages(chosen, "chosen"), _messages(rejected, "rejected"))
    if responses[0] == responses[1]:
        raise RowError("chosen and rejected are the same")
    if _is_tie(row):
        return Judgment(prompt, responses, (), _weight(row), _tools(row), ties=((0, 1),))
    scores = (_margin(row), 0.0) if "margin" in row else ()
    return Judgment(prompt, responses, ((0, 1),), _weight(row), _tools(row), scores=scores)


def ranked(row: dict[str, Any]) -> Judgment:
    """`prompt, responses` with `ranking` (indices, best first) or `scores` (higher is better; ties give no order).

    `ended` (one true or false per response) says which came to their end; without it all did.
    """
    prompt = _text(_need(row, "prompt"), "prompt")
    values = _need(row, "responses")
    if not isinstance(values, list) or len(values) < 2:
        raise RowError("responses must be a list of at least two")
    responses = tuple(_response(value, f"responses[{i}]") for i, value in enumerate(values))
    if len({json.dumps(r, sort_keys=True) for r in responses}) < len(responses):
        raise RowError("two of its responses are the same")
    if isinstance(prompt, tuple):
        responses = tuple(r if isinstance(r, tuple) else _assistant(r) for r in responses)
    cut = _cut(row, len(responses))
    if "ranking" in row:
        orders = _by_ranking(row["ranking"], len(responses))
        return Judgment(prompt, responses, orders, _weight(row), _tools(row), cut=cut)
    orders, scores = _by_scores(row["scores"], len(responses)), tuple(float(s) for s in row["scores"])
    ties = tuple((i, j) for i in range(len(scores)) for j in range(i + 1, len(scores)) if scores[i] == scores[j])
    return Judgment(prompt, responses, orders, _weight(row), _tools(row), ties, scores, cut)


def sft(row: dict[str, Any]) -> Judgment:
    """`prompt, completion` (or `response`), or `messages` whose last turn is the assistant's."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        if len(messages) < 2:
            raise RowError("messages must hold a prompt before the last assistant turn")
        return Judgment(messages[:-1], (messages[-1:],), (), 1.0, _tools(row))
    name = "completion" if "completion" in row else "response"
    prompt, response = _text(_need(row, "prompt"), "prompt"), _response(_need(row, name), name)
    if isinstance(prompt, tuple) and isinstance(response, str):
        response = _assistant(response)
    return Judgment(prompt, (response,), (), 1.0, _tools(row))


FORMATS: dict[str, Callable[[dict[str, Any]], Judgment]] = {"pairs": pairs, "ranked": ranked, "sft": sft}


def transcript(text: str, name: str) -> tuple[Message, ...]:
    r"""Parse "\n\nHuman: ...\n\nAssistant: ..." into messages. Raises RowError when it is no such transcript."""
    if not text.startswith(_HUMAN):
        raise RowError(f"there is no prompt column and {name} is no transcript (it must begin with '\\n\\nHuman:')")
    messages: list[Message] = []
    rest = text
    while rest:
        marker = _HUMAN if rest.startswith(_HUMAN) else _ASSISTANT
        rest = rest[len(marker) :]
        ends = [at for at in (rest.find(_HUMAN), rest.find(_ASSISTANT)) if at >= 0]
        end = min(ends, default=len(rest))
        messages.append({"role": "user" if marker == _HUMAN else "assistant", "content": rest[:end].strip()})
        rest = rest[end:]
    return _complete(tuple(messages), name)


def _common_prompt(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Text, ...]]:
    """The turns two conversations share are the prompt; what follows are the responses, one assistant turn each."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise RowError("chosen and rejected are the same")
    if shared < len(chosen) - 1 or shared < len(rejected) - 1:
        raise RowError(
            f"chosen and rejected part ways before the last turn (turn {shared + 1} of {len(chosen)} and {len(rejected)})"
        )
    if shared == 0:
        raise RowError("chosen and rejected share no prompt")
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def _need(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise RowError(f"column '{name}' is missing or null")
    return row[name]


def _text(value: Any, name: str) -> Text:
    """Plain text, or messages; empty ones are refused."""
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{name} is empty")
        return value
    return _conversation(value, name)


def _response(value: Any, name: str) -> Text:
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{name} is empty")
        return value
    if isinstance(value, dict):
        value = [value]
    return _messages(value, name)


def _conversation(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} must be text or a list of chat messages, found {_found(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError(f"{name}[{i}] is no chat message with role and content")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise RowError(f"{name}[{i}] has no text content")
    return tuple({key: v for key, v in message.items() if v is not None} for message in value)


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    """A conversation that ends with an assistant turn that says something."""
    return _complete(_conversation(value, name), name)


def _complete(messages: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowError(f"{name} ends with a turn of '{last['role']}', expected the assistant's")
    if not (last.get("content") or "").strip() and not last.get("tool_calls"):
        raise RowError(f"{name} is empty (its last turn says nothing)")
    return messages


def _assistant(text: str) -> tuple[Message, ...]:
    return ({"role": "assistant", "content": text},)


def _found(value: Any) -> str:
    return "an empty list" if value == [] else f"{type(value).__name__} {value!r}"[:60]


def _by_ranking(ranking: Any, count: int) -> tuple[tuple[int, ...], ...]:
    if not isinstance(ranking, list) or sorted(map(str, ranking)) != sorted(map(str, range(count))):
        raise RowError(
            f"ranking {ranking!r} is no order of the {count} responses (indices 0 to {count - 1}, best first)"
        )
    return (tuple(int(i) for i in ranking),)


def _by_scores(scores: Any, count: int) -> tuple[tuple[int, ...], ...]:
    if not isinstance(scores, list) or len(scores) != count:
        raise RowError(f"scores must be a list of {count} numbers, one per response")
    if not all(isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s) for s in scores):
        raise RowError(f"scores {scores!r} must be finite numbers")
    numbers = [float(s) for s in scores]
    by_score = sorted(range(count), key=lambda i: (-numbers[i], i))
    if len(set(numbers)) == count:
        return (tuple(by_score),)
    better = tuple((i, j) for i in by_score for j in by_score if numbers[i] > numbers[j])
    if not better:
        raise RowError("all scores are equal, so there is no preference")
    return better


def _weight(row: dict[str, Any]) -> float:
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise RowError(f"weight is {weight!r}, expected a positive number")
    return float(weight)


def _margin(row: dict[str, Any]) -> float:
    margin = row["margin"]
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < math.inf:
        raise RowError(f"margin is {margin!r}, expected a number from 0 up: by how much chosen is better")
    return float(margin)


def _cut(row: dict[str, Any], count: int) -> tuple[int, ...]:
    ended = row.get("ended", [True] * count)
    if not isinstance(ended, list) or len(ended) != count or not all(isinstance(x, bool) for x in ended):
        raise RowError(f"ended must be a list of {count} true or false, one per response")
    return tuple(i for i, whole in enumerate(ended) if not whole)


def _is_tie(row: dict[str, Any]) -> bool:
    tie = row.get("tie", False)
    if not isinstance(tie, bool):
        raise RowError(f"tie is {tie!r}, expected true or false")
    return tie


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError(f"tools is not JSON ({error.msg})") from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools must be a list of tool descriptions")
    return tuple(tools)
