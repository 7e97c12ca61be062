"""Rows that rank, score or vote on several responses, rows that score one, and rows of the Alpaca and ShareGPT kind.

In: a row as a dict. Out: its Judgment. Next: table.py.
"""

from typing import Any

from favor.data.formats.fields import (
    Judgment,
    RowError,
    answers_to,
    as_response,
    as_text,
    beside,
    brief,
    by_scores,
    complete,
    dialogue,
    distinct,
    flag_of,
    need,
    number_of,
    numbers_of,
    objects_of,
    shown,
    tools_of,
    weight_of,
)
from favor.data.formats.pairs import THUMB, sides
from favor.data.strict import parse
from favor.data.types import Message, Text

_TURN = "<extra_id_1>"
# what an annotator may say of two responses, as a choice between them
VERDICTS: dict[str, int | str] = {"first": 0, "second": 1, "tie": "tie", "both_bad": "tie"}
# who speaks in a ShareGPT turn
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


def ranked(row: dict[str, Any]) -> Judgment:
    """`prompt, responses` with `ranking` (indices, best first) or `scores` (higher is better; ties give no order).

    `ended` (one true or false per response) says which came to their end; without it all did.
    """
    prompt, responses = prompt_and_responses(row)
    count, scores, ties = len(responses), (), ()
    ended = row.get("ended", [True] * count)
    if not isinstance(ended, list) or len(ended) != count or not all(isinstance(x, bool) for x in ended):
        raise RowError(f"ended must be a list of {count} true or false, one per response")
    cut = tuple(i for i, whole in enumerate(ended) if not whole)
    if "ranking" in row:
        orders = (_ranking(row["ranking"], count),)
    else:
        scores = numbers_of(need(row, "scores"), count, "scores")
        orders, ties = by_scores(scores)
    if not orders:
        raise RowError("all scores are equal, so there is no preference")
    return Judgment(prompt, responses, orders, weight_of(row), tools_of(row), ties, scores, cut, placed=count == 2)


def ultrafeedback(row: dict[str, Any]) -> Judgment:
    """UltraFeedback as published: `instruction` and `completions` with `response` and scores; equal scores are ties.

    A completion's score is `overall_score`, else `fine-grained_score`, else the mean of its annotations' Ratings.
    """
    prompt = as_text(need(row, "instruction"), "instruction")
    completions = objects_of(row, "completions")
    names = [f"{name}.response" for _, name in completions]
    responses = answers_to(prompt, [item.get("response") for item, _ in completions], names, "completions")
    scores = tuple(_overall(item, name) for item, name in completions)
    orders, ties = by_scores(scores)
    return Judgment(prompt, responses, orders, weight_of(row), None, ties, scores)


def nectar(row: dict[str, Any]) -> Judgment:
    """Nectar: a transcript `prompt` and `answers` with `answer` and `rank`, 1 being best; equal ranks are ties."""
    text = as_text(need(row, "prompt"), "prompt")
    prompt = _open_dialogue(text) if isinstance(text, str) and text.startswith("\n\nHuman:") else text
    answers = objects_of(row, "answers")
    texts = [item.get("answer") for item, _ in answers]
    texts = [text.strip() if isinstance(text, str) else text for text in texts]
    responses = answers_to(prompt, texts, [f"{name}.answer" for _, name in answers], "answers")
    orders, ties = by_scores([-number_of(item.get("rank"), f"{name}.rank") for item, name in answers])
    return Judgment(prompt, responses, orders, weight_of(row), None, ties)


def helpsteer(row: dict[str, Any]) -> Judgment:
    """HelpSteer and HelpSteer2: one `response` a row with attributes from 0 to 4; `helpfulness` is its score.

    The responses of one prompt, each in its own row, are compared by their scores once all rows are read.
    """
    prompt = as_text(need(row, "prompt"), "prompt")
    if isinstance(prompt, str) and _TURN in prompt:
        prompt = _steered(prompt)
    response = beside(prompt, as_response(need(row, "response"), "response"))
    score = number_of(need(row, "helpfulness"), "helpfulness")
    return Judgment(prompt, (response,), (), weight_of(row), scores=(score,))


def prompt_and_responses(row: dict[str, Any]) -> tuple[Text, tuple[Text, ...]]:
    """`prompt` and at least two different `responses`."""
    prompt = as_text(need(row, "prompt"), "prompt")
    values = need(row, "responses")
    if not isinstance(values, list) or len(values) < 2:
        raise RowError("responses must be a list of at least two")
    return prompt, answers_to(prompt, values, [f"responses[{i}]" for i in range(len(values))], "responses")


def _ranking(ranking: Any, count: int) -> tuple[int, ...]:
    if not isinstance(ranking, list) or sorted(map(str, ranking)) != sorted(map(str, range(count))):
        raise RowError(
            f"ranking {brief(ranking)} is not an order of the {count} responses (indices 0 to {count - 1}, best first)"
        )
    return tuple(int(i) for i in ranking)


def _overall(completion: dict[str, Any], name: str) -> float:
    for column in ("overall_score", "fine-grained_score"):
        if completion.get(column) is not None:
            return number_of(completion[column], f"{name}.{column}")
    annotations = completion.get("annotations")
    if not isinstance(annotations, dict) or not annotations:
        raise RowError(f"{name} has no overall_score, fine-grained_score or annotations")
    ratings = [_rating(value, f"{name}.annotations.{aspect}") for aspect, value in annotations.items()]
    known = [rating for rating in ratings if rating is not None]
    if not known:
        raise RowError(f"{name}.annotations has no Rating that is a number")
    return sum(known) / len(known)


def _rating(annotation: Any, name: str) -> float | None:
    """The number in Rating, which stands there as text; None for N/A."""
    if not isinstance(annotation, dict) or "Rating" not in annotation:
        raise RowError(f"{name} has no Rating, found {shown(annotation)}")
    rating = annotation["Rating"]
    if rating is None or rating == "N/A":
        return None
    if isinstance(rating, str) and rating.strip().isdecimal():
        return number_of(float(rating), f"{name}.Rating")
    return number_of(rating, f"{name}.Rating")


def _open_dialogue(text: str) -> tuple[Message, ...]:
    r"""The turns of a transcript that ends with an empty "\n\nAssistant:"."""
    turns = dialogue(text, "prompt")
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns = turns[:-1]
    if not turns or turns[-1]["role"] != "user":
        raise RowError("prompt must end with what the human says, and an empty '\\n\\nAssistant:'")
    return turns


def _steered(text: str) -> tuple[Message, ...]:
    """The turns of a HelpSteer2 prompt: the user's, then each after a line "<extra_id_1>Assistant" or "...User"."""
    first, *rest = text.split(_TURN)
    turns: list[Message] = [{"role": "user", "content": first.strip()}]
    for part in rest:
        who, _, said = part.partition("\n")
        if who.strip() not in ("Assistant", "User"):
            raise RowError(f"prompt has a turn of {who[:20]!r} after {_TURN}, expected Assistant or User")
        turns.append({"role": who.strip().lower(), "content": said.strip()})
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    if turns[-1]["role"] != "user":
        raise RowError("prompt must end with what the user says")
    return tuple(turns)


def votes(row: dict[str, Any]) -> Judgment:
    """`prompt, responses` with `votes` (how many preferred each) or `choices` (each annotator's: an index or "tie").

    Two responses: the order of the majority, its label the share of the votes. More: the ranking by votes.
    An annotator's tie counts for all responses alike; equal votes are a tie.
    """
    prompt, responses = prompt_and_responses(row)
    counts = _counts(row, len(responses))
    return _voted(Judgment(prompt, responses, (), weight_of(row), tools_of(row)), counts)


def verdict(row: dict[str, Any]) -> Judgment:
    """`prompt, first, second` and `verdict`: "first", "second", "tie" or "both_bad", or a list of them, one an annotator.

    Read as votes on two responses. "both_bad" of one annotator among others is a tie; of more than half of them it is no
    comparison, but a thumb down for both. Without `prompt` it is what the two conversations share.
    """
    prompt, responses = sides(row, ("first", "second"))
    distinct(responses, "responses")
    said = need(row, "verdict")
    said = said if isinstance(said, list) else [said]
    for value in said:
        if not isinstance(value, str) or value not in VERDICTS:
            raise RowError(
                f"verdict holds {brief(value)}, expected {', '.join(VERDICTS)}; data.verdict maps other values"
            )
    judgment = Judgment(prompt, responses, (), weight_of(row), tools_of(row))
    if said.count("both_bad") * 2 > len(said):
        return judgment._replace(thumbs=((0, False), (1, False)))
    return _voted(judgment, _counted([VERDICTS[value] for value in said], 2))


def _voted(judgment: Judgment, counts: tuple[float, ...]) -> Judgment:
    """The same with what the votes on its responses say."""
    orders, ties = by_scores(counts)
    pair = len(counts) == 2
    labels = (max(counts) / sum(counts),) if pair and orders else ()
    return judgment._replace(orders=orders, ties=ties, labels=labels, votes=counts, placed=pair)


def _counts(row: dict[str, Any], count: int) -> tuple[float, ...]:
    if "votes" not in row:
        return _counted(need(row, "choices"), count)
    found = numbers_of(row["votes"], count, "votes")
    if min(found) < 0 or sum(found) == 0:
        raise RowError(f"votes {brief(row['votes'])} must be 0 or more, and at least one above 0")
    return found


def _counted(choices: Any, count: int) -> tuple[float, ...]:
    if not isinstance(choices, list) or not choices:
        raise RowError("choices must be a list, one entry per annotator")
    counts = [0.0] * count
    for choice in choices:
        if choice == "tie":
            counts = [c + 1 / count for c in counts]
        elif isinstance(choice, bool) or not isinstance(choice, int) or not 0 <= choice < count:
            raise RowError(
                f"choices holds {brief(choice)}, expected the index of a response (0 to {count - 1}) or 'tie'"
            )
        else:
            counts[choice] += 1
    return tuple(counts)


def alpaca(row: dict[str, Any]) -> Judgment:
    """`instruction` and perhaps `input`, joined by a line break; `system` and `history` (pairs of turns) come first.

    The answers: a list `output`, best first; or `chosen, rejected`; or one `output`, with `kto_tag` a thumb.
    """
    prompt = _alpaca_prompt(row)
    texts = [as_response(value, name) for value, name in _outputs(row)]
    return _best_first(row, prompt, tuple(beside(prompt, text) for text in texts))


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
        return _best_first(row, turns, responses)
    if len(turns) < 2:
        raise RowError("conversations must hold a prompt before the last turn of 'gpt'")
    return _best_first(row, turns[:-1], (complete(turns, "conversations")[-1:],))


def _best_first(row: dict[str, Any], prompt: Text, responses: tuple[Text, ...]) -> Judgment:
    """The answers, best first, or one alone."""
    judgment = Judgment(prompt, responses, (), weight_of(row), tools_of(row))
    if len(responses) > 1:
        distinct(responses, "answers")
        return judgment._replace(orders=(tuple(range(len(responses))),))
    if "kto_tag" in row:
        return judgment._replace(thumbs=((0, flag_of(row, "kto_tag", THUMB)),))
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
        raise RowError(f"{name} is not a turn with from and value, found {shown(turn)}")
    if turn["from"] not in _ROLES:
        raise RowError(f"{name}.from is '{turn['from']}', known are {', '.join(_ROLES)}")
    if turn["from"] != "function_call":
        return {"role": _ROLES[turn["from"]], "content": turn["value"]}
    try:
        call = parse(turn["value"])
    except ValueError as error:
        raise RowError(f"{name}.value is not a function call: {error}") from None
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
