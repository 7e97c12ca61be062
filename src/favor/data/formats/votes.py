"""Rows in which several annotators compared the responses of a prompt.

In: a row as a dict. Out: its Judgment, as soft labels; data.votes can ask for more (../pairing.py). Next: shapes.py.
"""

from typing import Any

from favor.data.formats.common import Judgment, RowError, brief, by_scores, need, numbers_of, tools_of, weight_of
from favor.data.formats.scored import prompt_and_responses


def votes(row: dict[str, Any]) -> Judgment:
    """`prompt, responses` with `votes` (how many preferred each) or `choices` (each annotator's: an index or "tie").

    Two responses: the order of the majority, its label the share of the votes. More: the ranking by votes.
    An annotator's tie counts for all responses alike; equal votes are a tie.
    """
    prompt, responses = prompt_and_responses(row)
    counts = _counts(row, len(responses))
    orders, ties = by_scores(counts)
    pair = len(responses) == 2 and bool(orders)
    labels = (max(counts) / sum(counts),) if pair else ()
    return Judgment(prompt, responses, orders, weight_of(row), tools_of(row), ties, labels=labels, votes=counts)


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
