"""The rows of one prompt become its tree; and the tally of what became of all rows of a source.

In: Judgments of one prompt. Out: a PromptTree, counted in a ReadReport. Next: types.py.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

from favor.data.formats import Judgment
from favor.data.formats.fields import by_scores
from favor.data.pairing import LeftOut, Rules, arrange
from favor.data.types import Comparison, PromptTree, Text, Thumb

Order: TypeAlias = tuple[int, ...]


@dataclass
class ReadReport:
    """What became of the rows of a source, or of all sources of a split. `dropped` lists (row, reason) of every row left out.

    close_pairs: pairs nearer than min_gap; unasked_pairs: pairs and ties that the pairing leaves out; unchecked_gaps:
    comparisons without scores, kept although min_gap is set; lone_scores: scored responses without another of their
    prompt. num_placed: rows that judge two responses in an order of their own, first_preferred: those that prefer the
    first. both_bad: rows that judge both responses bad, which gives two thumbs down and no comparison. A split of several
    sources has a report of each in `sources`.
    """

    source: str
    format: str
    num_rows: int = 0
    num_trees: int = 0
    num_responses: int = 0
    num_comparisons: int = 0
    num_ties: int = 0
    num_thumbs: int = 0
    merged_prompts: int = 0
    merged_responses: int = 0
    repeated_comparisons: int = 0
    close_pairs: int = 0
    unasked_pairs: int = 0
    unchecked_gaps: int = 0
    lone_scores: int = 0
    num_placed: int = 0
    first_preferred: int = 0
    both_bad: int = 0
    dropped: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    sources: "list[ReadReport]" = field(default_factory=list["ReadReport"])

    @property
    def each(self) -> "list[ReadReport]":
        """The report of every source."""
        return self.sources or [self]

    def as_json(self) -> dict[str, Any]:
        """For data.json."""
        return asdict(self)

    def see(self, judgment: Judgment) -> None:
        """Count a usable row, and where its preferred response stands, if that says something."""
        self.num_rows += 1
        if judgment.placed and len(judgment.orders) == 1:
            self.num_placed += 1
            self.first_preferred += judgment.orders[0][0] == 0
        self.both_bad += len(judgment.thumbs) == 2

    def see_left_out(self, left_out: LeftOut) -> None:
        """Count the pairs that arranging a judgment left out."""
        self.close_pairs += left_out.close
        self.unasked_pairs += left_out.unasked
        self.unchecked_gaps += left_out.unknown

    def see_tree(self, tree: PromptTree) -> None:
        """Count a tree whose rows are all there."""
        self.num_trees += 1
        self.num_responses += len(tree.responses)
        self.num_comparisons += len(tree.comparisons)
        self.num_ties += len(tree.ties)
        self.num_thumbs += len(tree.thumbs)
        self.merged_prompts += len(tree.rows) - 1


def grow(rows: Sequence[tuple[int, Judgment]], rules: Rules, source: str, report: ReadReport) -> PromptTree:
    """The tree of all (row number, judgment) of one prompt: equal responses become one, equal comparisons add up."""
    prompt, tools = rows[0][1].prompt, rows[0][1].tools
    arranged: list[tuple[int, Judgment]] = []
    for number, judgment in rows:
        judgment, left_out = arrange(judgment, rules)
        report.see_left_out(left_out)
        arranged.append((number, judgment))
    responses, indices, first_rows = _responses(arranged, report)
    compared = [(judgment, index) for (_, judgment), index in zip(arranged, indices, strict=True)]
    alone = [(judgment, index[0]) for judgment, index in compared if judgment.scores and len(index) == 1]
    if whole := _scored_alone(alone, responses, report):
        judgment, left_out = arrange(whole[0], rules)
        report.see_left_out(left_out)
        compared.append((judgment, whole[1]))
    thumbs: dict[tuple[int, bool], float] = {}
    ties: dict[Order, float] = {}
    for judgment, index in compared:
        for i, good in judgment.thumbs:
            thumbs[index[i], good] = thumbs.get((index[i], good), 0.0) + judgment.weight
        for tie in judgment.ties:
            tied = tuple(sorted(index[i] for i in tie))
            ties[tied] = ties.get(tied, 0.0) + judgment.weight
    tree = PromptTree(
        prompt=prompt,
        responses=responses,
        comparisons=_comparisons(compared, report),
        rows=tuple(number for number, _ in rows),
        source=source,
        tools=tools,
        ties=tuple(Comparison(members, weight) for members, weight in ties.items()),
        cut=tuple(sorted({index[i] for judgment, index in compared for i in judgment.cut})),
        thumbs=tuple(Thumb(response, good, weight) for (response, good), weight in thumbs.items()),
        first_rows=first_rows,
    )
    report.see_tree(tree)
    return tree


def _responses(
    rows: Sequence[tuple[int, Judgment]], report: ReadReport
) -> tuple[tuple[Text, ...], list[list[int]], tuple[int, ...]]:
    """The distinct responses; where each judgment's are among them; the row that gave each first."""
    places: dict[str, int] = {}
    responses: list[Text] = []
    first_rows: list[int] = []
    indices: list[list[int]] = []
    for number, judgment in rows:
        # the same words with and without their end are two responses
        keys = [key_of([response, i in judgment.cut]) for i, response in enumerate(judgment.responses)]
        for key, response in zip(keys, judgment.responses, strict=True):
            if key in places:
                report.merged_responses += 1
                continue
            places[key] = len(responses)
            responses.append(response)
            first_rows.append(number)
        indices.append([places[key] for key in keys])
    return tuple(responses), indices, tuple(first_rows)


def _comparisons(compared: Sequence[tuple[Judgment, list[int]]], report: ReadReport) -> tuple[Comparison, ...]:
    """The comparisons of all rows; one that comes again adds its weight."""
    found: dict[Order, Comparison] = {}
    for judgment, index in compared:
        for number, order in enumerate(judgment.orders):
            mine = tuple(index[i] for i in order)
            report.repeated_comparisons += mine in found
            before = found.get(mine, Comparison(mine, 0.0))
            weight = before.weight + judgment.weight
            label = judgment.labels[number] if judgment.labels else 1.0
            by_rank = [judgment.scores[i] for i in order] if judgment.scores else []
            gaps = tuple(better - worse for better, worse in pairwise(by_rank)) or before.gaps
            # repeated soft labels: their weighted mean
            label = (before.label * before.weight + label * judgment.weight) / weight
            found[mine] = Comparison(mine, weight, gaps, label)
    return tuple(found.values())


def _scored_alone(
    given: Sequence[tuple[Judgment, int]], responses: Sequence[Text], report: ReadReport
) -> tuple[Judgment, list[int]] | None:
    """One judgment of the responses that rows scored one at a time, by their mean scores and with their rows' mean weight."""
    by_response: dict[int, list[Judgment]] = {}
    for judgment, place in given:
        by_response.setdefault(place, []).append(judgment)
    if len(by_response) < 2:
        report.lone_scores += len(by_response)
        return None
    scores = tuple(
        sum(j.scores[0] * j.weight for j in judgments) / sum(j.weight for j in judgments)
        for judgments in by_response.values()
    )
    orders, ties = by_scores(scores)
    # the sum in the order of the responses
    weights = [judgment.weight for judgments in by_response.values() for judgment in judgments]
    first, index = given[0][0], list(by_response)
    compared = tuple(responses[i] for i in index)
    weight = sum(weights) / len(weights)
    return Judgment(first.prompt, compared, orders, weight, first.tools, ties, scores), index


def key_of(value: Any) -> str:
    """A text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
