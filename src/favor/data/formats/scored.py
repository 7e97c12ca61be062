"""Rows that rank or score several responses, and rows that score one.

In: a row as a dict. Out: its Judgment. Next: thumbs.py.
"""

from typing import Any

from favor.data.formats.common import (
    Judgment,
    RowError,
    as_response,
    as_text,
    beside,
    by_ranking,
    by_scores,
    cut_of,
    dialogue,
    distinct,
    need,
    number_of,
    numbers_of,
    objects_of,
    shown,
    tools_of,
    weight_of,
)
from favor.data.types import Message, Text

_TURN = "<extra_id_1>"


def ranked(row: dict[str, Any]) -> Judgment:
    """`prompt, responses` with `ranking` (indices, best first) or `scores` (higher is better; ties give no order).

    `ended` (one true or false per response) says which came to their end; without it all did.
    """
    prompt, responses = prompt_and_responses(row)
    cut = cut_of(row, len(responses))
    if "ranking" in row:
        orders = by_ranking(row["ranking"], len(responses))
        return Judgment(prompt, responses, orders, weight_of(row), tools_of(row), cut=cut, placed=len(responses) == 2)
    scores = numbers_of(need(row, "scores"), len(responses), "scores")
    orders, ties = by_scores(scores)
    if not orders:
        raise RowError("all scores are equal, so there is no preference")
    return Judgment(
        prompt, responses, orders, weight_of(row), tools_of(row), ties, scores, cut, placed=len(responses) == 2
    )


def ultrafeedback(row: dict[str, Any]) -> Judgment:
    """UltraFeedback as published: `instruction` and `completions` with `response` and scores; equal scores are ties.

    A completion's score is `overall_score`, else `fine-grained_score`, else the mean of its annotations' Ratings.
    """
    prompt = as_text(need(row, "instruction"), "instruction")
    completions = objects_of(need(row, "completions"), "completions")
    names = [f"completions[{i}]" for i in range(len(completions))]
    named = list(zip(completions, names, strict=True))
    responses = tuple(beside(prompt, as_response(item.get("response"), f"{name}.response")) for item, name in named)
    distinct(responses, "completions")
    scores = tuple(_overall(item, name) for item, name in named)
    orders, ties = by_scores(scores)
    return Judgment(prompt, responses, orders, weight_of(row), None, ties, scores)


def nectar(row: dict[str, Any]) -> Judgment:
    """Nectar: a transcript `prompt` and `answers` with `answer` and `rank`, 1 being best; equal ranks are ties."""
    text = as_text(need(row, "prompt"), "prompt")
    prompt = _open_dialogue(text) if isinstance(text, str) and text.startswith("\n\nHuman:") else text
    answers = objects_of(need(row, "answers"), "answers")
    named = [(item, f"answers[{i}]") for i, item in enumerate(answers)]
    responses = tuple(
        beside(prompt, as_response(_stripped(item.get("answer")), f"{name}.answer")) for item, name in named
    )
    distinct(responses, "answers")
    orders, ties = by_scores([-number_of(item.get("rank"), f"{name}.rank") for item, name in named])
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
    responses = tuple(beside(prompt, as_response(value, f"responses[{i}]")) for i, value in enumerate(values))
    distinct(responses, "responses")
    return prompt, responses


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


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value
