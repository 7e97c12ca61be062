"""Formats of published data sets, and of Alpaca and ShareGPT files as LLaMA-Factory reads them.

In: a row. Out: what it says; weight and tools are read by Format. Next: ../grow.py.
"""

import math
from collections.abc import Callable
from typing import Any

from favor.data.formats import fields
from favor.data.formats.fields import Judgment, Row, RowError
from favor.data.readers import parse
from favor.data.types import Message, Text

# HelpSteer2's mark of a turn; ShareGPT's names of roles
_TURN = "<extra_id_1>"
_SAME = {role: role for role in ("user", "assistant", "system", "tool")}
_ROLES = _SAME | {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


def binarized(row: Row) -> Judgment:
    """UltraFeedback's pairs: `prompt, chosen, rejected` and their scores, `score_chosen, score_rejected`."""
    prompt, responses = fields.sides(row, ("chosen", "rejected"), "chosen and rejected")
    best, worst = (fields.number(fields.need(row, name), name) for name in ("score_chosen", "score_rejected"))
    if best < worst:
        raise RowError(f"score_chosen is {best:g} and score_rejected {worst:g}, but chosen should be the better one")
    return _pair(prompt, responses, 0, best - worst)


def shp(row: Row) -> Judgment:
    """Stanford Human Preferences: a post (`history`), two comments and their votes; `labels` is 1 when A is better.

    The gap is log2 of the ratio of the votes, known where both are positive or the row gives `score_ratio`.
    """
    prompt = fields.text(row, "history")
    responses = fields.responses(fields.needed(row, "human_ref_A", "human_ref_B"), prompt, "two of its comments")
    best = 1 - _zero_or_one(row, "labels", "1 (comment A is better) or 0 (comment B is)")
    ratio = _vote_ratio(row, best)
    return _pair(prompt, responses, best, None if ratio is None else math.log2(ratio))


def _vote_ratio(row: Row, best: int) -> float | None:
    """Votes of the better comment over those of the other; None where the row does not say."""
    if "score_A" in row and "score_B" in row:
        votes = [fields.number(row[name], name) for name in ("score_A", "score_B")]
        if votes[best] < votes[1 - best]:
            raise RowError(f"labels says that comment {'AB'[best]} is better, but score_A and score_B say otherwise")
        if votes[1 - best] > 0:
            return fields.number(votes[best] / votes[1 - best], "score_A over score_B")
    if "score_ratio" not in row:
        return None
    expected = "1 or more: the better comment's votes over the other's"
    return fields.number(row["score_ratio"], "score_ratio", expected, 1)


def helpsteer2_preference(row: Row) -> Judgment:
    """HelpSteer2-Preference: `prompt, response_1, response_2` and `preference_strength`."""
    return _by_strength(row, fields.text(row, "prompt"), ("response_1", "response_2"), "preference_strength")


def helpsteer3(row: Row) -> Judgment:
    """HelpSteer3: `context` (messages), `response1, response2` and `overall_preference`."""
    context = fields.as_conversation(fields.need(row, "context"), "context")
    return _by_strength(row, context, ("response1", "response2"), "overall_preference")


def _by_strength(row: Row, prompt: Text, names: tuple[str, str], scale: str) -> Judgment:
    """A pair on a scale from -3 (the first is much better) to 3 (the second is); 0 is a tie."""
    responses = fields.responses(fields.needed(row, *names), prompt, "two of its responses")
    expected = "a number from -3 (the first is better) to 3 (the second is)"
    value = fields.number(fields.need(row, scale), scale, expected, -3, 3)
    return _pair(prompt, responses, int(value > 0), abs(value))


def openai_tldr(row: Row) -> Judgment:
    """Summarize from feedback: `info` (a Reddit post), two `summaries`, and `choice`, the index of the better one.

    The prompt ends with "TL;DR:" and a summary begins with a blank, as in the models of the paper.
    """
    info = fields.need(row, "info")
    if not isinstance(info, dict):
        raise RowError(f"info must be an object with subreddit, title and post, found {fields.shown(info)}")
    for name in ("subreddit", "title", "post"):
        if not isinstance(info.get(name), str) or not info[name].strip():
            found = fields.brief(info.get(name))
            raise RowError(f"info.{name} is {found}, expected text (CNN/DM articles have none; they are not read)")
    subreddit, title, post = (info[name].strip() for name in ("subreddit", "title", "post"))
    prompt = f"SUBREDDIT: r/{subreddit.removeprefix('r/')}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    items, responses = _listed(row, "summaries", "text", prompt, lambda text: f" {text.strip()}")
    if len(items) != 2:
        raise RowError(f"summaries holds {len(items)} summaries, expected two")
    return _pair(prompt, responses, _zero_or_one(row, "choice", "0 or 1: the index of the better summary"), None)


def openai_preference(row: Row) -> Judgment:
    """OpenAI's preference fine-tuning: `input` with messages and tools, `preferred_output`, `non_preferred_output`."""
    given = fields.need(row, "input")
    if not isinstance(given, dict) or "messages" not in given:
        raise RowError(f"input must be an object with messages, found {fields.shown(given)}")
    prompt = fields.as_conversation(given["messages"], "input.messages")
    responses = fields.responses(
        fields.needed(row, "preferred_output", "non_preferred_output"), prompt, "the two outputs"
    )
    return _pair(prompt, responses, 0, None)._replace(tools=fields.tools_of(given))


def _pair(prompt: Text, responses: tuple[Text, ...], best: int, gap: float | None) -> Judgment:
    """Two responses, the one at `best` better by `gap`: 0 is a tie, None is not known."""
    if gap == 0:
        return Judgment(prompt, responses, ties=((0, 1),))
    scores = () if gap is None else tuple(gap if i == best else 0.0 for i in (0, 1))
    return Judgment(prompt, responses, ((best, 1 - best),), scores=scores)


def _zero_or_one(row: Row, name: str, expected: str) -> int:
    value = fields.need(row, name)
    if not fields.is_number(value) or value not in (0, 1):
        raise RowError(f"{name} is {fields.brief(value)}, expected {expected}")
    return int(value)


def ultrafeedback(row: Row) -> Judgment:
    """UltraFeedback as published: `instruction` and `completions` with `response` and scores; equal scores are ties."""
    prompt = fields.text(row, "instruction")
    items, responses = _listed(row, "completions", "response", prompt)
    scores = tuple(_overall(item, name) for name, item in items.items())
    orders, ties = fields.by_scores(scores)
    return Judgment(prompt, responses, orders, ties=ties, scores=scores)


def _overall(completion: dict[str, Any], name: str) -> float:
    """`overall_score`, else `fine-grained_score`, else the mean of the annotations' Ratings, which may be N/A."""
    for column in ("overall_score", "fine-grained_score"):
        if completion.get(column) is not None:
            return fields.number(completion[column], f"{name}.{column}")
    annotations = completion.get("annotations")
    if not isinstance(annotations, dict) or not annotations:
        raise RowError(f"{name} has no overall_score, fine-grained_score or annotations")
    ratings: list[float] = []
    for aspect, value in annotations.items():
        if not isinstance(value, dict) or "Rating" not in value:
            raise RowError(f"{name}.annotations.{aspect} has no Rating, found {fields.shown(value)}")
        rating = value["Rating"]
        if rating is not None and rating != "N/A":
            is_text = isinstance(rating, str) and rating.strip().isdecimal()
            ratings.append(fields.number(float(rating) if is_text else rating, f"{name}.annotations.{aspect}.Rating"))
    if not ratings:
        raise RowError(f"{name}.annotations has no Rating that is a number")
    return sum(ratings) / len(ratings)


def nectar(row: Row) -> Judgment:
    """Nectar: a transcript `prompt` and `answers` with `answer` and `rank`, 1 being best; equal ranks are ties."""
    prompt = fields.text(row, "prompt")
    if isinstance(prompt, str) and prompt.startswith("\n\nHuman:"):
        prompt = _asked(fields.dialogue(prompt))
    items, responses = _listed(row, "answers", "answer", prompt, str.strip)
    ranks = [fields.number(item.get("rank"), f"{name}.rank") for name, item in items.items()]
    orders, ties = fields.by_scores([-rank for rank in ranks])
    return Judgment(prompt, responses, orders, ties=ties)


def _listed(
    row: Row, column: str, field: str, prompt: Text, trim: Callable[[str], str] = str
) -> tuple[dict[str, dict[str, Any]], tuple[Text, ...]]:
    """The objects of a list by their names in messages, and the response in a field of each."""
    value = fields.need(row, column)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, dict) for item in value):
        raise RowError(f"{column} must be a list of at least 2 objects, found {fields.shown(value)}")
    items = {f"{column}[{i}]": item for i, item in enumerate(value)}
    named = {f"{name}.{field}": fields.joined_parts(item.get(field), f"{name}.{field}") for name, item in items.items()}
    named = {name: trim(text) if isinstance(text, str) else text for name, text in named.items()}
    return items, fields.responses(named, prompt, f"two of its {column}")


def helpsteer(row: Row) -> Judgment:
    """HelpSteer and HelpSteer2: one `response` a row, scored by `helpfulness`; rows of one prompt are compared."""
    prompt = fields.text(row, "prompt")
    if isinstance(prompt, str) and _TURN in prompt:
        prompt = _steered(prompt)
    response = fields.as_response(fields.need(row, "response"), "response", prompt)
    return Judgment(prompt, (response,), scores=(fields.number(fields.need(row, "helpfulness"), "helpfulness"),))


def _steered(text: str) -> tuple[Message, ...]:
    """The turns of a HelpSteer2 prompt: the user's, then each after a line "<extra_id_1>Assistant" or "...User"."""
    first, *rest = text.split(_TURN)
    turns: list[Message] = [{"role": "user", "content": first.strip()}]
    for part in rest:
        who, _, said = part.partition("\n")
        if who.strip() not in ("Assistant", "User"):
            raise RowError(f"prompt has a turn of {who[:20]!r} after {_TURN}, expected Assistant or User")
        turns.append({"role": who.strip().lower(), "content": said.strip()})
    return _asked(tuple(turns))


def _asked(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """Turns that end with the human's; an empty one of the assistant behind them goes."""
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns = turns[:-1]
    if not turns or turns[-1]["role"] != "user":
        raise RowError("prompt must end with what the human says, and perhaps an empty turn of the assistant")
    return turns


def alpaca(row: Row) -> Judgment:
    """`instruction` and perhaps `input`, joined by a line break; `system` and `history` (pairs of turns) come first.

    The answers: a list `output`, best first; or `chosen, rejected`; or one `output`, with `kto_tag` a thumb.
    """
    prompt = _alpaca_prompt(row)
    if "chosen" in row or "rejected" in row:
        named = fields.needed(row, "chosen", "rejected")
    elif isinstance(output := fields.need(row, "output"), list):
        named = {f"output[{i}]": value for i, value in enumerate(output)}
        if len(output) < 2:
            raise RowError("output must be text, or a list of at least two answers, best first")
    else:
        named = {"output": output}
    return _answered(row, prompt, fields.responses(named, prompt, "two of its answers"))


def _alpaca_prompt(row: Row) -> Text:
    fields.need(row, "instruction")
    text, more, system = (_string(row, name) for name in ("instruction", "input", "system"))
    if not text.strip():
        raise RowError("instruction is empty", "empty")
    text = f"{text}\n{more}" if more.strip() else text
    before: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    history = row.get("history", [])
    for said in history if isinstance(history, list) else [history]:
        if not isinstance(said, list) or len(said) != 2 or not all(isinstance(turn, str) for turn in said):
            raise RowError(f"history must hold pairs of texts, what was asked and answered; found {fields.shown(said)}")
        before += [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    return (*before, {"role": "user", "content": text}) if before else text


def sharegpt(row: Row) -> Judgment:
    """`conversations` of turns with `from` and `value`, then `chosen` and `rejected`, a turn or a list of turns each.

    Without them the last turn of conversations is the answer: with `kto_tag` a thumb, else SFT.
    """
    turns = _turns(fields.need(row, "conversations"), "conversations")
    if "system" in row:
        turns = ({"role": "system", "content": _string(row, "system")}, *turns)
    if "chosen" in row or "rejected" in row:
        named = fields.needed(row, "chosen", "rejected").items()
        sides = [(name, value if isinstance(value, list) else [value]) for name, value in named]
        responses = tuple(fields.complete(_turns(side, name), name) for name, side in sides)
        fields.distinct(responses, "chosen and rejected")
        return _answered(row, turns, responses)
    if len(turns) < 2:
        raise RowError("conversations must hold a prompt before the last turn of 'gpt'")
    return _answered(row, turns[:-1], (fields.complete(turns, "conversations")[-1:],))


def _answered(row: Row, prompt: Text, responses: tuple[Text, ...]) -> Judgment:
    """The answers, best first; or one alone, with a thumb where the row has one."""
    if len(responses) > 1:
        return Judgment(prompt, responses, (tuple(range(len(responses))),))
    thumbs = ((0, fields.flag(row["kto_tag"], "kto_tag")),) if "kto_tag" in row else ()
    return Judgment(prompt, responses, thumbs=thumbs)


def _string(row: Row, name: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, found {fields.shown(value)}")
    return value


def _turns(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} must be a list of turns, found {fields.shown(value)}")
    return tuple(_turn(turn, f"{name}[{i}]") for i, turn in enumerate(value))


def _turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
        raise RowError(f"{name} is not a turn with from and value, found {fields.shown(turn)}")
    if turn["from"] not in _ROLES:
        raise RowError(f"{name}.from is '{turn['from']}', known are {', '.join(_ROLES)}")
    if turn["from"] != "function_call":
        return {"role": _ROLES[turn["from"]], "content": turn["value"]}
    calls = [{"type": "function", "function": call} for call in _function_calls(turn["value"], f"{name}.value")]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _function_calls(text: str, name: str) -> list[dict[str, Any]]:
    """What a turn of `function_call` calls: the JSON of one call, or of a list of them."""
    try:
        found = parse(text)
    except ValueError as error:
        raise RowError(f"{name} is not a function call: {error}") from None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(
            f"{name} must be the JSON of a function call, an object with name and arguments, or a list of such; "
            f"found {fields.shown(found)}"
        )
    return calls
