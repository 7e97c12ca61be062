"""What every reader of a format shares: the record it makes, and text, messages and numbers taken out of a row; and pairs.

In: a row, or values of it. Out: checked values, or a RowError that names the column. Next: plain.py.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, TypeAlias

from favor.config import check_variables
from favor.data.readers import DEEPEST, TOO_DEEP, RowError, half_character, parse
from favor.data.types import Message, Text

Row: TypeAlias = dict[str, Any]

# fields of a message that hold what its author says; others are data about it
SAID = ("content", "reasoning_content", "reasoning", "thinking", "thought", "tool_calls", "function_call", "refusal")
# TRL's name of the column
TEMPLATE_KWARGS = "chat_template_kwargs"
# columns of pictures, which are marks in the prompt where a model reads them (../pictures.py)
PICTURES = ("images", "image")
# kinds of content parts that are text
_TEXT_PARTS = ("text", "input_text", "output_text")
# beyond this a float32 or a difference of two numbers overflows
_LARGEST = 1e30


class Judgment(NamedTuple):
    """One row: `orders` index `responses`, best first; no orders in plain SFT data.

    `ties` are pairs judged equally good. `scores` (one per response, or none) say by how much one is better; a lone
    response with a score is compared with those that other rows give to its prompt. `cut` are responses that stop before
    their end, as samples at a length limit do: they get no end-of-turn token. `labels` (one per order, or none) are the
    probabilities that the orders are right. `thumbs` judge single responses. `votes` (one number per response, or none)
    say how many annotators preferred each. `placed`: two responses in an order that has nothing to do with the verdict.
    `template_kwargs`: variables of the chat template.
    """

    prompt: Text
    responses: tuple[Text, ...]
    orders: tuple[tuple[int, ...], ...] = ()
    weight: float = 1.0
    tools: tuple[dict[str, Any], ...] | None = None
    ties: tuple[tuple[int, int], ...] = ()
    scores: tuple[float, ...] = ()
    cut: tuple[int, ...] = ()
    labels: tuple[float, ...] = ()
    thumbs: tuple[tuple[int, bool], ...] = ()
    votes: tuple[float, ...] = ()
    placed: bool = False
    template_kwargs: Mapping[str, Any] | None = None


class Format(NamedTuple):
    """A row of the table FORMATS, whose call reads a row of data.

    reader: the columns of a row -> what it says; `weight`, `tools` and `chat_template_kwargs` are read here. needs: the sets
    of columns that it is recognised by. also: columns read beside them. says: what its rows can say: order (which response
    is better), scores (by how much), votes (of annotators), thumbs, sides (that two responses stand in an order of their
    own). list_of: a column whose list may be a ranking or not.
    """

    reader: Callable[[Row], Judgment]
    needs: tuple[tuple[str, ...], ...]
    also: frozenset[str]
    says: frozenset[str]
    list_of: str = ""

    def __call__(self, row: Row) -> Judgment:
        """What a row says. Raises RowError for one that cannot be used, or holds something else where text belongs."""
        refuse_pictures(row)
        try:
            said = self.reader(row)
            tools = tools_of(row) if "tools" in self.also else said.tools
            kwargs = template_kwargs(row[TEMPLATE_KWARGS], TEMPLATE_KWARGS) if TEMPLATE_KWARGS in row else None
        except RecursionError:
            raise RowError(TOO_DEEP) from None
        weight = row["weight"] if "weight" in self.also and "weight" in row else 1.0
        weight = number(weight, "weight", "a positive number", 1 / _LARGEST)
        checked_texts((said.prompt, said.responses, tools, kwargs))
        placed = "sides" in self.says and len(said.responses) == 2
        return said._replace(weight=weight, tools=tools, placed=placed, template_kwargs=kwargs)

    @property
    def columns(self) -> frozenset[str]:
        """Every column that is read."""
        return self.also.union(*self.needs, {TEMPLATE_KWARGS}, PICTURES)

    def __str__(self) -> str:
        return " or ".join(" + ".join(names) for names in self.needs)


def refuse_pictures(row: Mapping[str, Any]) -> None:
    """Raises RowError for a row with pictures: whoever reads it would answer without seeing them."""
    if held := [name for name in PICTURES if row.get(name)]:
        raise RowError(
            f"it has pictures (column '{held[0]}'), which favor train and favor eval alone read, for a model that sees "
            "(docs/vision.md); name such a model, or take the column out"
        )


def brief(value: Any, limit: int = 60) -> str:
    """A value as Python writes it, short; it may be nested too deeply, or be too long a number, to be written at all."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return "(too large to show)"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def shown(value: Any) -> str:
    """A wrong value with its type, short."""
    return "an empty list" if value == [] else f"{type(value).__name__} {brief(value)}"[:60]


def checked_texts(value: Any) -> list[str]:
    """Every text inside a value, names of fields too. Raises RowError for deep nesting and for what JSON cannot hold."""
    found: list[str] = []
    level = [value]
    for _ in range(DEEPEST):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                deeper += item
            elif isinstance(item, str):
                if half := half_character(item):
                    raise RowError(half)
                found.append(item)
            elif item is not None and not isinstance(item, int | float):
                # a Parquet file can hold bytes in a turn
                raise RowError(f"it holds {type(item).__name__} where text, a number or a list belongs")
        if not deeper:
            return found
        level = deeper
    raise RowError(TOO_DEEP)


def need(row: Row, name: str) -> Any:
    """The value of a column that must be there."""
    if name not in row:
        raise RowError(f"column '{name}' is missing or null", "empty")
    return row[name]


def needed(row: Row, *names: str) -> dict[str, Any]:
    """These columns, all of which must be there."""
    return {name: need(row, name) for name in names}


def as_text(value: Any, name: str) -> Text:
    """Plain text, or messages; empty ones are refused. Content parts that are text are text."""
    value = joined_parts(value, name)
    if not isinstance(value, str):
        return as_conversation(value, name)
    if not value.strip():
        raise RowError(f"{name} is empty", "empty")
    return value


def text(row: Row, name: str) -> Text:
    """A column that must hold plain text or messages."""
    return as_text(need(row, name), name)


def as_response(value: Any, name: str, prompt: Text = "") -> Text:
    """Text or the messages of one answer; text becomes a turn where the prompt is messages. Empty ones are refused."""
    value = joined_parts(value, name)
    if not isinstance(value, str):
        return as_messages([value] if isinstance(value, dict) else value, name)
    text = as_text(value, name)
    return ({"role": "assistant", "content": text},) if isinstance(prompt, tuple) else text


def responses(named: Mapping[str, Any], prompt: Text, what: str) -> tuple[Text, ...]:
    """Responses by the names of their columns, in the shape of the prompt. `what` are the same when two are refused."""
    found = tuple(as_response(value, name, prompt) for name, value in named.items())
    distinct(found, what)
    return found


def distinct(responses: Sequence[Text], what: str) -> None:
    """Raises RowError when two responses are the same."""
    if len({json.dumps(r, sort_keys=True, default=str) for r in responses}) < len(responses):
        raise RowError(f"{what} are the same", "identical")


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
    if not isinstance(message.get("content", ""), str) or ("content" not in message and not _calls(message)):
        raise RowError(f"{name} has no text content", "empty")
    return message


def _calls(message: Message) -> Any:
    return message.get("tool_calls") or message.get("function_call")


def joined_parts(value: Any, name: str) -> Any:
    """The text of a list of content parts, [{"type": "text", "text": ...}]; any other value as it is.

    Raises RowError for a part that is not text, such as an image.
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
    if not (last.get("content") or "").strip() and not _calls(last):
        raise RowError(f"{name} is empty (its last turn says nothing)", "empty")
    return messages


def dialogue(text: str) -> tuple[Message, ...]:
    r"""The turns of "\n\nHuman: ...\n\nAssistant: ...", the last of which may be empty."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return tuple({"role": roles[who], "content": said.strip()} for who, said in pairs)


def transcript(text: str, name: str) -> tuple[Message, ...]:
    """A transcript that ends with the assistant's answer. Raises RowError when it is none."""
    if not text.startswith("\n\nHuman:"):
        raise RowError(
            f"there is no prompt column and {name} is not a transcript (it would begin with '\\n\\nHuman:'); "
            "name the prompt's column: 'columns={prompt=\"COLUMN\"}'",
            of_names=True,
        )
    return complete(dialogue(text), name)


def tools_of(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
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


def template_kwargs(value: Any, name: str) -> dict[str, Any] | None:
    """Variables of the chat template: an object, or one as JSON text; None for an empty one. Raises RowError."""
    if isinstance(value, str):
        try:
            value = parse(value)
        except ValueError as error:
            raise RowError(f"{name} is not JSON that can be used: {error}") from None
    if not isinstance(value, dict):
        raise RowError(f"{name} must be an object of variables of the chat template, found {shown(value)}")
    try:
        return check_variables(value) or None
    except ValueError as error:
        raise RowError(f"{name}: {error}") from None


def is_number(value: Any, least: float = -_LARGEST, most: float = _LARGEST) -> bool:
    """Whether it is a number in these bounds that can be computed with."""
    return not isinstance(value, bool) and isinstance(value, int | float) and least <= value <= most


def number(
    value: Any, name: str, expected: str = "a finite number", least: float = -_LARGEST, most: float = _LARGEST
) -> float:
    """A number in these bounds, which `expected` names."""
    if not is_number(value, least, most):
        raise RowError(f"{name} is {brief(value)}, expected {expected}")
    return float(value)


def numbers(value: Any, count: int, name: str) -> tuple[float, ...]:
    """A list of finite numbers, one per response."""
    if not isinstance(value, list) or len(value) != count:
        raise RowError(f"{name} must be a list of {count} numbers, one per response")
    if not all(map(is_number, value)):
        raise RowError(f"{name} {brief(value)} must be finite numbers")
    return tuple(map(float, value))


def flag(value: Any, name: str, expected: str = "true (a good response) or false (a bad one)") -> bool:
    """True or false, and nothing else."""
    if not isinstance(value, bool):
        raise RowError(f"{name} is {brief(value)}, expected {expected}")
    return value


def by_scores(numbers: Sequence[float]) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, int], ...]]:
    """(orders, ties) of scores, higher being better: one ranking, or pairs when some scores are equal."""
    count = len(numbers)
    by_score = sorted(range(count), key=lambda i: (-numbers[i], i))
    if len(set(numbers)) == count:
        return (tuple(by_score),), ()
    better = tuple((i, j) for i in by_score for j in by_score if numbers[i] > numbers[j])
    ties = tuple((i, j) for i in range(count) for j in range(i + 1, count) if numbers[i] == numbers[j])
    return better, ties


def pairs(row: Row) -> Judgment:
    """`prompt, chosen, rejected` as text or messages; without prompt: full message lists or HH transcripts.

    `margin` says by how much chosen is better (a score difference); `tie = true` that neither is.
    """
    said = Judgment(*sides(row, ("chosen", "rejected"), "chosen and rejected"), orders=((0, 1),))
    if flag(row.get("tie", False), "tie", "true or false"):
        return said._replace(orders=(), ties=((0, 1),))
    if "margin" not in row:
        return said
    margin = number(row["margin"], "margin", "a number from 0 up: by how much chosen is better", 0)
    return said._replace(scores=(margin, 0.0))


def sides(row: Row, names: tuple[str, str], both: str) -> tuple[Text, tuple[Text, ...]]:
    """The prompt and the two different responses of these columns, which messages call `both`.

    Where they hold whole conversations (messages or transcripts), the turns they share are the prompt.
    """
    named = {name: joined_parts(need(row, name), name) for name in names}
    texts = all(isinstance(value, str) for value in named.values())
    if "prompt" not in row:
        read = transcript if texts else as_messages
        return _common_prompt([read(value, name) for name, value in named.items()], both)
    prompt = text(row, "prompt")
    if all(map(_is_whole, named.values())):
        shared, answers = _common_prompt([as_messages(value, name) for name, value in named.items()], both)
        _check_within(prompt, shared)
        return shared, answers
    if isinstance(prompt, str) and not texts:
        prompt = ({"role": "user", "content": prompt},)
    return prompt, responses(named, prompt, both)


def _is_whole(side: Any) -> bool:
    """Whether it is a conversation, not an answer: messages that do not begin with the assistant's."""
    return isinstance(side, list) and len(side) > 1 and isinstance(side[0], dict) and side[0].get("role") != "assistant"


def _common_prompt(conversations: list[tuple[Message, ...]], both: str) -> tuple[tuple[Message, ...], tuple[Text, ...]]:
    """The turns two conversations share are the prompt; what follows are the responses, from a turn of the assistant on."""
    first, second = conversations
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))
    if shared == len(first) == len(second):
        raise RowError(f"{both} are the same", "identical")
    # others answered differently: the sides part at what the assistant said before
    while shared and any(len(side) == shared or side[shared]["role"] != "assistant" for side in conversations):
        shared -= 1
    if shared == 0:
        raise RowError(f"{both} share no prompt before a turn of the assistant")
    return first[:shared], (first[shared:], second[shared:])


def _check_within(prompt: Text, shared: tuple[Message, ...]) -> None:
    """Refuses a row whose prompt has a turn that is not among those that both sides share."""
    said = [prompt] if isinstance(prompt, str) else [str(message.get("content")) for message in prompt]
    there = [str(message.get("content")).strip() for message in shared]
    if any(text.strip() not in there for text in said):
        raise RowError("prompt is not among the turns that both sides share; drop the column if they hold it all")
