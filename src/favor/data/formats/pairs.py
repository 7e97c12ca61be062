"""Rows that compare two responses or judge one, and rows of plain SFT data.

In: a row as a dict. Out: its Judgment. Next: lists.py.
"""

import math
from typing import Any

from favor.data.formats.fields import (
    Judgment,
    RowError,
    answers_to,
    as_conversation,
    as_messages,
    as_response,
    as_text,
    beside,
    brief,
    common_prompt,
    distinct,
    flag_of,
    is_number,
    need,
    number_of,
    objects_of,
    shown,
    tools_of,
    transcript,
    weight_of,
)
from favor.data.types import Text

# what labels of one response mean, and what a margin is
THUMB = "true (a good response) or false (a bad one)"
_MARGIN = "a number from 0 up: by how much chosen is better"


def pairs(row: dict[str, Any]) -> Judgment:
    """`prompt, chosen, rejected` as text or messages; without prompt: full message lists or HH transcripts.

    Where chosen and rejected hold whole conversations beside a prompt, the turns they share are the prompt.
    `margin` says by how much chosen is better (a score difference); `tie = true` that neither is.
    """
    prompt, responses = sides(row, ("chosen", "rejected"))
    if responses[0] == responses[1]:
        raise RowError("chosen and rejected are the same", "identical")
    if row.get("tie") is not None and flag_of(row, "tie"):
        return Judgment(prompt, responses, (), weight_of(row), tools_of(row), ties=((0, 1),))
    margin = number_of(row["margin"], "margin", _MARGIN, 0) if "margin" in row else None
    scores = () if margin is None else (margin, 0.0)
    return Judgment(prompt, responses, ((0, 1),), weight_of(row), tools_of(row), scores=scores)


def ultrafeedback_binarized(row: dict[str, Any]) -> Judgment:
    """`prompt, chosen, rejected` and the scores they had, `score_chosen, score_rejected`: equal ones are a tie."""
    judgment = pairs(row)
    names = ("score_chosen", "score_rejected")
    best, worst = (number_of(need(row, name), name) for name in names)
    if best < worst:
        raise RowError(f"score_chosen is {best:g} and score_rejected {worst:g}, but chosen should be the better one")
    if best == worst:
        return judgment._replace(orders=(), ties=((0, 1),), scores=())
    return judgment._replace(scores=(best - worst, 0.0))


def shp(row: dict[str, Any]) -> Judgment:
    """Stanford Human Preferences: a post (`history`), two comments and their votes; `labels` is 1 when A is better.

    The gap is log2 of the ratio of the votes, known where both are positive or the row gives `score_ratio`.
    """
    prompt = as_text(need(row, "history"), "history")
    names = ("human_ref_A", "human_ref_B")
    responses = answers_to(prompt, [need(row, name) for name in names], names, "comments")
    label = _bit(row, "labels", "1 (comment A is better) or 0 (comment B is)")
    order = (1 - label, label)
    ratio = _vote_ratio(row, order)
    judgment = Judgment(prompt, responses, (order,), weight_of(row), placed=True)
    if ratio is None:
        return judgment
    if ratio == 1:
        return judgment._replace(orders=(), ties=((0, 1),))
    scores = [0.0, 0.0]
    scores[order[0]] = math.log2(ratio)
    return judgment._replace(scores=tuple(scores))


def helpsteer3(row: dict[str, Any]) -> Judgment:
    """HelpSteer3: `context` (messages), `response1, response2`, `overall_preference` from -3 (1 better) to 3 (2 better)."""
    context = as_conversation(need(row, "context"), "context")
    return _from_strength(row, context, ("response1", "response2"), "overall_preference")


def helpsteer2_preference(row: dict[str, Any]) -> Judgment:
    """HelpSteer2-Preference: `prompt, response_1, response_2`, `preference_strength` from -3 (1 better) to 3 (2 better)."""
    prompt = as_text(need(row, "prompt"), "prompt")
    return _from_strength(row, prompt, ("response_1", "response_2"), "preference_strength")


def openai_tldr(row: dict[str, Any]) -> Judgment:
    """Summarize from feedback: `info` (a Reddit post), two `summaries`, and `choice`, the index of the better one.

    The prompt ends with "TL;DR:" and a summary begins with a blank, as in the models of the paper.
    """
    info = need(row, "info")
    if not isinstance(info, dict):
        raise RowError(f"info must be an object with subreddit, title and post, found {shown(info)}")
    parts: list[str] = []
    for name in ("subreddit", "title", "post"):
        part = info.get(name)
        if not isinstance(part, str) or not part.strip():
            raise RowError(
                f"info.{name} is {brief(part)}, expected text (CNN/DM articles have none; they are not read)"
            )
        parts.append(part.strip())
    prompt = f"SUBREDDIT: r/{parts[0].removeprefix('r/')}\n\nTITLE: {parts[1]}\n\nPOST: {parts[2]}\n\nTL;DR:"
    summaries = objects_of(row, "summaries")
    if len(summaries) != 2:
        raise RowError(f"summaries holds {len(summaries)} summaries, expected two")
    texts = [as_response(item.get("text"), f"{name}.text") for item, name in summaries]
    responses = tuple(" " + text.strip() if isinstance(text, str) else text for text in texts)
    distinct(responses, "summaries")
    choice = _bit(row, "choice", "0 or 1: the index of the better summary")
    return Judgment(prompt, responses, ((choice, 1 - choice),), weight_of(row), placed=True)


def openai_preference(row: dict[str, Any]) -> Judgment:
    """OpenAI's preference fine-tuning: `input` with messages and tools, `preferred_output`, `non_preferred_output`."""
    given = need(row, "input")
    if not isinstance(given, dict) or "messages" not in given:
        raise RowError(f"input must be an object with messages, found {shown(given)}")
    prompt = as_conversation(given["messages"], "input.messages")
    names = ("preferred_output", "non_preferred_output")
    responses = tuple(beside(prompt, as_response(need(row, name), name)) for name in names)
    if responses[0] == responses[1]:
        raise RowError("preferred_output and non_preferred_output are the same", "identical")
    return Judgment(prompt, responses, ((0, 1),), weight_of(row), tools_of(given))


def thumbs(row: dict[str, Any]) -> Judgment:
    """TRL's unpaired preferences: `prompt, completion, label`, true for a good response; text or messages."""
    prompt, response = prompt_and_response(row)
    return Judgment(prompt, (response,), (), weight_of(row), tools_of(row), thumbs=((0, flag_of(row, "label", THUMB)),))


def sft(row: dict[str, Any]) -> Judgment:
    """`prompt, completion` (or `response`), or `messages` whose last turn is the assistant's."""
    prompt, response = prompt_and_response(row)
    return Judgment(prompt, (response,), (), 1.0, tools_of(row))


def prompt_and_response(row: dict[str, Any]) -> tuple[Text, Text]:
    """`prompt, completion` (or `response`), or `messages` whose last turn is the response."""
    if "messages" in row:
        messages = as_messages(row["messages"], "messages")
        if len(messages) < 2:
            raise RowError("messages must hold a prompt before the last assistant turn")
        return messages[:-1], messages[-1:]
    name = "completion" if "completion" in row else "response"
    prompt, response = as_text(need(row, "prompt"), "prompt"), as_response(need(row, name), name)
    return prompt, beside(prompt, response)


def sides(row: dict[str, Any], names: tuple[str, str]) -> tuple[Text, tuple[Text, ...]]:
    """The prompt and the two responses of these columns; the prompt may be what two whole conversations share."""
    values = [need(row, name) for name in names]
    if "prompt" in row and all(map(_is_whole, values)):
        shared, responses = common_prompt(*map(as_messages, values, names))
        _check_within(as_text(row["prompt"], "prompt"), shared)
        return shared, responses
    if "prompt" in row:
        prompt = as_text(row["prompt"], "prompt")
        responses = tuple(map(as_response, values, names))
        if isinstance(prompt, str) and any(isinstance(r, tuple) for r in responses):
            prompt = ({"role": "user", "content": prompt},)
        return prompt, tuple(beside(prompt, r) for r in responses)
    read = transcript if all(isinstance(value, str) for value in values) else as_messages
    return common_prompt(*map(read, values, names))


def _is_whole(side: Any) -> bool:
    """Whether it is a conversation, not an answer: messages that do not begin with the assistant's."""
    return isinstance(side, list) and len(side) > 1 and isinstance(side[0], dict) and side[0].get("role") != "assistant"


def _check_within(prompt: Text, shared: Text) -> None:
    """Raise RowError when a turn of the prompt is not among those that chosen and rejected share."""
    said = [prompt] if isinstance(prompt, str) else [str(message.get("content")) for message in prompt]
    there = [str(message.get("content")).strip() for message in shared if isinstance(message, dict)]
    if any(text.strip() not in there for text in said):
        raise RowError(
            "prompt is not among the turns that chosen and rejected share; drop the column if they hold it all"
        )


def _vote_ratio(row: dict[str, Any], order: tuple[int, ...]) -> float | None:
    """Votes of the better comment over those of the other; None where the row does not say."""
    if "score_A" in row and "score_B" in row:
        votes = [number_of(row[name], name) for name in ("score_A", "score_B")]
        if votes[order[0]] < votes[order[1]]:
            raise RowError(
                f"labels says that comment {'AB'[order[0]]} is better, but score_A and score_B say otherwise"
            )
        if votes[order[1]] > 0:
            return number_of(votes[order[0]] / votes[order[1]], "score_A over score_B")
    if "score_ratio" not in row:
        return None
    return number_of(row["score_ratio"], "score_ratio", "1 or more: the better comment's votes over the other's", 1)


def _from_strength(row: dict[str, Any], prompt: Text, names: tuple[str, str], strength: str) -> Judgment:
    """A pair judged on a scale from -3 (the first is much better) to 3 (the second is); 0 is a tie."""
    responses = answers_to(prompt, [need(row, name) for name in names], names, "responses")
    meaning = "a number from -3 (the first is better) to 3 (the second is)"
    value = number_of(need(row, strength), strength, meaning, -3, 3)
    judgment = Judgment(prompt, responses, (), weight_of(row), placed=True)
    if value == 0:
        return judgment._replace(ties=((0, 1),))
    order = (0, 1) if value < 0 else (1, 0)
    return judgment._replace(orders=(order,), scores=(max(0.0, -value), max(0.0, value)))


def _bit(row: dict[str, Any], name: str, meaning: str) -> int:
    value = need(row, name)
    if not is_number(value) or value not in (0, 1):
        raise RowError(f"{name} is {brief(value)}, expected {meaning}")
    return int(value)
