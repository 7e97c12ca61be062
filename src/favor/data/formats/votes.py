"""Rows in which several annotators compared the responses of a prompt.

In: a row as a dict. Out: its Judgment, as soft labels; data.votes can ask for more (../pairing.py). Next: shapes.py.
"""

from typing import Any

from favor.data.formats.common import (
    Judgment,
    RowError,
    brief,
    by_scores,
    distinct,
    need,
    numbers_of,
    tools_of,
    weight_of,
)
from favor.data.formats.pairs import sides
from favor.data.formats.scored import prompt_and_responses

# what an annotator may say of two responses, as a choice between them
VERDICTS: dict[str, int | str] = {"first": 0, "second": 1, "tie": "tie", "both_bad": "tie"}


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
