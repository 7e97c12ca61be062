"""Formats of no single data set but pairs (fields.py): SFT data, thumbs, rankings, votes, verdicts.

In: a row. Out: what it says; weight and tools are read by Format. Next: published.py.
"""

from typing import Any

from favor.data.formats import fields
from favor.data.formats.fields import Judgment, Row, RowError
from favor.data.types import Text

# what an annotator may say of two responses, as a choice between them
_VERDICTS: dict[str, int | str] = {"first": 0, "second": 1, "tie": "tie", "both_bad": "tie"}


def sft(row: Row) -> Judgment:
    """`prompt, completion` (or `response`), or `messages` whose last turn is the assistant's."""
    if "messages" in row:
        messages = fields.as_messages(row["messages"], "messages")
        if len(messages) < 2:
            raise RowError("messages must hold a prompt before the last assistant turn")
        return Judgment(messages[:-1], (messages[-1:],))
    name = "completion" if "completion" in row else "response"
    prompt = fields.text(row, "prompt")
    return Judgment(prompt, (fields.as_response(fields.need(row, name), name, prompt),))


def thumbs(row: Row) -> Judgment:
    """TRL's unpaired preferences for KTO: an SFT row with `label`, true for a good response."""
    return sft(row)._replace(thumbs=((0, fields.flag(fields.need(row, "label"), "label")),))


def ranked(row: Row) -> Judgment:
    """`prompt, responses` with `ranking` (indices, best first) or `scores` (higher is better; ties give no order).

    `ended` (one true or false per response) says which came to their end; without it all did.
    """
    prompt, responses = _prompt_and_responses(row)
    count, cut = len(responses), _cut(row, len(responses))
    if "ranking" in row:
        return Judgment(prompt, responses, (_ranking(row["ranking"], count),), cut=cut)
    scores = fields.numbers(fields.need(row, "scores"), count, "scores")
    orders, ties = fields.by_scores(scores)
    if not orders:
        raise RowError("all scores are equal, so there is no preference")
    return Judgment(prompt, responses, orders, ties=ties, scores=scores, cut=cut)


def _cut(row: Row, count: int) -> tuple[int, ...]:
    """The responses that stop before their end, by the column `ended`."""
    ended = row.get("ended", [True] * count)
    if not isinstance(ended, list) or len(ended) != count or not all(isinstance(x, bool) for x in ended):
        raise RowError(f"ended must be a list of {count} true or false, one per response")
    return tuple(i for i, whole in enumerate(ended) if not whole)


def _ranking(ranking: Any, count: int) -> tuple[int, ...]:
    if not isinstance(ranking, list) or sorted(map(str, ranking)) != sorted(map(str, range(count))):
        expected = f"an order of the {count} responses (indices 0 to {count - 1}, best first)"
        raise RowError(f"ranking {fields.brief(ranking)} is not {expected}")
    return tuple(int(i) for i in ranking)


def _prompt_and_responses(row: Row) -> tuple[Text, tuple[Text, ...]]:
    """`prompt` and at least two different `responses`."""
    prompt, values = fields.text(row, "prompt"), fields.need(row, "responses")
    if not isinstance(values, list) or len(values) < 2:
        raise RowError("responses must be a list of at least two")
    named = {f"responses[{i}]": value for i, value in enumerate(values)}
    return prompt, fields.responses(named, prompt, "two of its responses")


def votes(row: Row) -> Judgment:
    """`prompt, responses` with `votes` (how many preferred each) or `choices` (each annotator's: an index or "tie").

    Two responses: the order of the majority, its label the share of the votes. More: the ranking by votes.
    An annotator's tie counts for all responses alike; equal votes are a tie. `ended` as in rankings.
    """
    prompt, responses = _prompt_and_responses(row)
    cut = _cut(row, len(responses))
    if "votes" not in row:
        return _voted(prompt, responses, _counted(fields.need(row, "choices"), len(responses)))._replace(cut=cut)
    counts = fields.numbers(row["votes"], len(responses), "votes")
    if min(counts) < 0 or sum(counts) == 0:
        raise RowError(f"votes {fields.brief(row['votes'])} must be 0 or more, and at least one above 0")
    return _voted(prompt, responses, counts)._replace(cut=cut)


def verdict(row: Row) -> Judgment:
    """`prompt, first, second` and `verdict`: "first", "second", "tie" or "both_bad", or a list of them, one an annotator.

    Read as votes on two responses. "both_bad" of one annotator among others is a tie; of more than half of them it is no
    comparison, but a thumb down for both. Without `prompt` it is what the two conversations share. `ended` as in rankings.
    """
    prompt, responses = fields.sides(row, ("first", "second"), "two of its responses")
    said = fields.need(row, "verdict")
    said = said if isinstance(said, list) else [said]
    for value in said:
        if not isinstance(value, str) or value not in _VERDICTS:
            expected = f"{', '.join(_VERDICTS)}; verdict.values maps other values"
            raise RowError(f"verdict holds {fields.brief(value)}, expected {expected}")
    if said.count("both_bad") * 2 > len(said):
        return Judgment(prompt, responses, thumbs=((0, False), (1, False)), cut=_cut(row, 2))
    return _voted(prompt, responses, _counted([_VERDICTS[value] for value in said], 2))._replace(cut=_cut(row, 2))


def _voted(prompt: Text, responses: tuple[Text, ...], counts: tuple[float, ...]) -> Judgment:
    orders, ties = fields.by_scores(counts)
    labels = (max(counts) / sum(counts),) if len(counts) == 2 and orders else ()
    return Judgment(prompt, responses, orders, ties=ties, labels=labels, votes=counts)


def _counted(choices: Any, count: int) -> tuple[float, ...]:
    """Votes for each response: every annotator has one."""
    if not isinstance(choices, list) or not choices:
        raise RowError("choices must be a list, one entry per annotator")
    counts = [0.0] * count
    for choice in choices:
        if choice == "tie":
            counts = [c + 1 / count for c in counts]
        elif isinstance(choice, bool) or not isinstance(choice, int) or not 0 <= choice < count:
            expected = f"the index of a response (0 to {count - 1}) or 'tie'"
            raise RowError(f"choices holds {fields.brief(choice)}, expected {expected}")
        else:
            counts[choice] += 1
    return tuple(counts)
