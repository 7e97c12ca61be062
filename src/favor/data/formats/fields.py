"""What every format's reader shares: the Judgment they make, and text, messages and numbers out of a row.

In: values of a row. Out: checked values, or a RowError that names the column. Next: pairs.py.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from favor.data.strict import parse
from favor.data.types import Message, Text

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


# fields of a message that hold what its author says; others are data about it
SAID = ("content", "reasoning_content", "reasoning", "thinking", "thought", "tool_calls", "function_call", "refusal")
# kinds of content parts that are text
_TEXT_PARTS = ("text", "input_text", "output_text")
_DEEPEST = 100
TOO_DEEP = f"it is nested more than {_DEEPEST} levels deep"
# beyond this a float32 or a difference of two numbers overflows
_LARGEST = 1e30


Kind: TypeAlias = Literal["malformed", "empty", "identical", "special_text", "equal_ids", "round_trip", "truncation"]


class RowError(Exception):
    """Why a row cannot be used, in one printable line; read.py adds file and row number.

    kind: reading gives malformed, empty (a side or a column is missing or says nothing), identical (two responses are
    the same); tokenising gives special_text (text of a control token), equal_ids (responses become the same tokens),
    round_trip (text that template or tokenizer change), truncation. place: the response it is about, or 0.
    """

    def __init__(self, reason: str, kind: Kind = "malformed", place: int = 0) -> None:
        line = " ".join(reason.split())
        # a file's own names may hold what a terminal would obey
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))
        self.kind: Kind = kind
        self.place = place


class Judgment(NamedTuple):
    """One row: `orders` index `responses`, best first; no orders in plain SFT data.

    `ties` are pairs judged equally good. `scores` (one per response, or none) say by how much one is better. `cut`
    are responses that stop before their end, as samples at a length limit do: they get no end-of-turn token.
    `labels` (one per order, or none) are the probabilities that the orders are right. `thumbs` judge single responses.
    `votes` (one number per response, or none) say how many annotators preferred each. A single response with a score
    is compared with the scored responses that other rows give to its prompt. `placed`: the responses stand in an order that
    has nothing to do with the judgment, so how often the first is preferred says something.
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
    votes: tuple[float, ...] = ()
    placed: bool = False


def dialogue(text: str, name: str) -> tuple[Message, ...]:
    r"""The turns of "\n\nHuman: ...\n\nAssistant: ...", the last of which may be empty."""
    if not text.startswith(_HUMAN):
        raise RowError(f"{name} is not a transcript (it must begin with '\\n\\nHuman:')")
    messages: list[Message] = []
    rest = text
    while rest:
        marker = _HUMAN if rest.startswith(_HUMAN) else _ASSISTANT
        rest = rest[len(marker) :]
        ends = [at for at in (rest.find(_HUMAN), rest.find(_ASSISTANT)) if at >= 0]
        end = min(ends, default=len(rest))
        messages.append({"role": "user" if marker == _HUMAN else "assistant", "content": rest[:end].strip()})
        rest = rest[end:]
    return tuple(messages)


def transcript(text: str, name: str) -> tuple[Message, ...]:
    """A transcript that ends with the assistant's answer."""
    if not text.startswith(_HUMAN):
        raise RowError(f"there is no prompt column and {name} is not a transcript (it must begin with '\\n\\nHuman:')")
    return complete(dialogue(text, name), name)


def common_prompt(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Text, ...]]:
    """The turns two conversations share are the prompt; what follows are the responses, one assistant turn each."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise RowError("chosen and rejected are the same", "identical")
    if shared < len(chosen) - 1 or shared < len(rejected) - 1:
        raise RowError(
            f"chosen and rejected part ways before the last turn (turn {shared + 1} of {len(chosen)} and {len(rejected)})"
        )
    if shared == 0:
        raise RowError("chosen and rejected share no prompt")
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def strings(value: Any) -> Iterator[str]:
    """Every text inside a value, names of fields too. Raises RowError where it is nested too deeply or holds what JSON has not."""
    level = [value]
    for _ in range(_DEEPEST):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                yield item
            elif isinstance(item, dict):
                deeper += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                deeper += item
            elif item is not None and not isinstance(item, int | float):
                # a Parquet file can hold bytes in a turn
                raise RowError(f"it holds {type(item).__name__} where text, a number or a list belongs")
        if not deeper:
            return
        level = deeper
    raise RowError(TOO_DEEP)


def check_unicode(text: str) -> None:
    """Raises RowError for half a character (a lone surrogate), which no tokenizer or file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"it holds half a character (U+{ord(text[error.start]):04X}, a lone surrogate), which is not text"
        ) from None


def need(row: dict[str, Any], name: str) -> Any:
    """The value of a column that must be there."""
    if name not in row:
        raise RowError(f"column '{name}' is missing or null", "empty")
    return row[name]


def as_text(value: Any, name: str) -> Text:
    """Plain text, or messages; empty ones are refused. Content parts that are text are text."""
    value = joined_parts(value, name)
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{name} is empty", "empty")
        return value
    return as_conversation(value, name)


def as_response(value: Any, name: str) -> Text:
    """Plain text, or the messages of one answer; empty ones are refused."""
    value = joined_parts(value, name)
    if isinstance(value, str):
        return as_text(value, name)
    if isinstance(value, dict):
        value = [value]
    return as_messages(value, name)


def as_conversation(value: Any, name: str) -> tuple[Message, ...]:
    """Chat messages, without their empty fields; their content is text."""
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"{name} must be text or a list of chat messages, found {shown(value)}")
    return tuple(_message(message, f"{name}[{i}]") for i, message in enumerate(value))


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise RowError(f"{name} is not a chat message with role and content")
    message = {str(key): v for key, v in value.items() if v is not None}
    if "content" in message:
        message["content"] = joined_parts(message["content"], f"{name}.content")
    if not isinstance(message.get("content", ""), str) or ("content" not in message and not message.get("tool_calls")):
        raise RowError(f"{name} has no text content", "empty")
    return message


def joined_parts(value: Any, name: str) -> Any:
    """The text of a list of content parts, [{"type": "text", "text": ...}]; any other value as it is.

    Raises RowError for a part that is no text, such as an image.
    """
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        return value
    if any("type" not in part or "role" in part for part in value):
        return value
    for i, part in enumerate(value):
        if part["type"] not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RowError(f"{name}[{i}] is a part of type {shown(part['type'])}, and only text can be used")
    return "".join(part["text"] for part in value)


def as_messages(value: Any, name: str) -> tuple[Message, ...]:
    """A conversation that ends with an assistant turn that says something."""
    return complete(as_conversation(value, name), name)


def complete(messages: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """The same messages, if the last turn is the assistant's and says something."""
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowError(f"{name} ends with a turn of '{last['role']}', expected the assistant's")
    if not (last.get("content") or "").strip() and not last.get("tool_calls"):
        raise RowError(f"{name} is empty (its last turn says nothing)", "empty")
    return messages


def shown(value: Any) -> str:
    """A wrong value, short."""
    return "an empty list" if value == [] else f"{type(value).__name__} {brief(value)}"[:60]


def brief(value: Any, limit: int = 60) -> str:
    """A value as Python writes it, short; it may be nested too deeply, or be too long a number, to be written at all."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return "(too large to show)"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def by_scores(numbers: Sequence[float]) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, int], ...]]:
    """(orders, ties) of scores, higher being better: one ranking, or pairs when some scores are equal."""
    count = len(numbers)
    by_score = sorted(range(count), key=lambda i: (-numbers[i], i))
    if len(set(numbers)) == count:
        return (tuple(by_score),), ()
    better = tuple((i, j) for i in by_score for j in by_score if numbers[i] > numbers[j])
    ties = tuple((i, j) for i in range(count) for j in range(i + 1, count) if numbers[i] == numbers[j])
    return better, ties


def is_number(value: Any) -> bool:
    """Whether it is a number that can be computed with."""
    return not isinstance(value, bool) and isinstance(value, int | float) and -_LARGEST <= value <= _LARGEST


def number_of(
    value: Any, name: str, meaning: str = "a finite number", least: float = -_LARGEST, most: float = _LARGEST
) -> float:
    """A finite number within bounds; `meaning` says in a RowError what was expected."""
    if not is_number(value) or not least <= value <= most:
        raise RowError(f"{name} is {brief(value)}, expected {meaning}")
    return float(value)


def numbers_of(value: Any, count: int, name: str) -> tuple[float, ...]:
    """A list of finite numbers, one per response."""
    if not isinstance(value, list) or len(value) != count:
        raise RowError(f"{name} must be a list of {count} numbers, one per response")
    if not all(map(is_number, value)):
        raise RowError(f"{name} {brief(value)} must be finite numbers")
    return tuple(map(float, value))


def objects_of(row: dict[str, Any], name: str) -> list[tuple[dict[str, Any], str]]:
    """(object with named fields, its name) of a column that lists at least two."""
    value = need(row, name)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, dict) for item in value):
        raise RowError(f"{name} must be a list of at least 2 objects, found {shown(value)}")
    return [(item, f"{name}[{i}]") for i, item in enumerate(value)]


def beside(prompt: Text, response: Text) -> Text:
    """A response in the shape of its prompt: a turn where the prompt is messages."""
    if isinstance(prompt, tuple) and isinstance(response, str):
        return ({"role": "assistant", "content": response},)
    return response


def answers_to(prompt: Text, values: Sequence[Any], names: Sequence[str], what: str) -> tuple[Text, ...]:
    """Responses of these columns in the shape of their prompt. what: their name in a RowError when two are the same."""
    responses = tuple(beside(prompt, as_response(value, name)) for value, name in zip(values, names, strict=True))
    distinct(responses, what)
    return responses


def distinct(responses: Sequence[Text], names: str) -> None:
    """Raise RowError when two responses are the same."""
    if len({json.dumps(r, sort_keys=True, default=str) for r in responses}) < len(responses):
        raise RowError(f"two of its {names} are the same", "identical")


def flag_of(row: dict[str, Any], name: str, meaning: str = "true or false") -> bool:
    """A column that must be true or false."""
    value = need(row, name)
    if not isinstance(value, bool):
        raise RowError(f"{name} is {brief(value)}, expected {meaning}")
    return value


def weight_of(row: dict[str, Any]) -> float:
    """The column weight: 1 without it."""
    return number_of(row.get("weight", 1.0), "weight", "a positive number", 1 / _LARGEST)


def tools_of(row: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    """The column tools: a list of descriptions, or one as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse(tools)
        except ValueError as error:
            raise RowError(f"tools is not JSON that can be used: {error}") from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools must be a list of tool descriptions")
    return tuple(tools)
