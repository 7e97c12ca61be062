"""The rows of one prompt become its tree; and the tally of what became of all rows of a source.

In: Judgments of one prompt. Out: a PromptTree, counted in a ReadReport. Next: types.py.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, Field

from favor.config import STRICT
from favor.data.formats import Judgment
from favor.data.formats.fields import by_scores
from favor.data.types import Comparison, PromptTree, Text, Thumb

Pairing: TypeAlias = Literal["auto", "ranking", "all", "best_worst", "best_rest"]
Votes: TypeAlias = Literal["soft", "weight", "majority"]
Pair: TypeAlias = tuple[int, int]
Order: TypeAlias = tuple[int, ...]


class Rules(BaseModel):
    """Section [data.compare]: which comparisons scores, rankings and votes become."""

    model_config = STRICT
    pairing: Pairing = "auto"
    """What scores and rankings become; auto keeps rankings, and makes pairs where members are equal or too close."""
    min_gap: float = Field(default=0.0, ge=0)
    """Pairs whose scores differ by less are left out."""
    votes: Votes = "soft"
    """What votes on two responses become: a soft label, a weight, or the majority alone."""


def arrange(judgment: Judgment, rules: Rules, report: "ReadReport") -> Judgment:
    """The judgment as the rules want it; the pairs left out are counted. Single responses and plain SFT data pass as they are."""
    if judgment.votes:
        return _voted(judgment, rules, report)
    if not judgment.orders and not judgment.ties:
        return judgment
    scores = judgment.scores
    better = sorted({pair for order in judgment.orders for pair in combinations(order, 2)})
    far = {(a, b) for a, b in better if not scores or scores[a] - scores[b] >= rules.min_gap}
    orders, ties = _asked(judgment, better, far, rules.pairing)
    said = {pair for order in orders for pair in combinations(order, 2)}
    report.close_pairs += len(better) - len(far)
    report.unasked_pairs += len(far - said) + len(judgment.ties) - len(ties)
    report.unchecked_gaps += len(orders) if rules.min_gap > 0 and not scores else 0
    return judgment._replace(orders=tuple(orders), ties=tuple(ties))


def _voted(judgment: Judgment, rules: Rules, report: "ReadReport") -> Judgment:
    """Votes are compared as scores are; how many more one got is not a score difference, so the scores go again."""
    votes = judgment.votes
    found = arrange(judgment._replace(scores=votes, votes=(), labels=()), rules, report)._replace(scores=())
    if len(votes) != 2 or not found.orders or rules.votes == "majority":
        return found
    if rules.votes == "soft":
        return found._replace(labels=judgment.labels)
    return found._replace(weight=found.weight * abs(votes[0] - votes[1]))


def _asked(
    judgment: Judgment, better: list[Pair], far: Collection[Pair], pairing: Pairing
) -> tuple[list[tuple[int, ...]], list[Pair]]:
    """The orders and the ties that the pairing wants, out of the pairs that are far enough apart."""
    ties = list(judgment.ties)
    if pairing == "auto" and len(far) == len(better):
        return list(judgment.orders), ties
    if pairing in ("auto", "all"):
        return [pair for pair in better if pair in far], ties
    # best first; of equals the earlier in the row
    wins = {i: sum(pair[0] == i for pair in better) for order in (*judgment.orders, *ties) for i in order}
    best, *others = sorted(wins, key=lambda i: (-wins[i], i))
    if pairing == "ranking":
        # a strict one: from the best down, each far enough below the last one kept
        kept = [best]
        for i in others:
            kept += [i] if (kept[-1], i) in far else []
        return ([tuple(kept)] if len(kept) > 1 else []), ties
    wanted = others[-1:] if pairing == "best_worst" else others
    met = [{best, other} for other in wanted]
    return [(best, other) for other in wanted if (best, other) in far], [tie for tie in ties if set(tie) in met]


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

    def see(self, judgment: Judgment) -> None:
        """Count a usable row, and where its preferred response stands, if that says something."""
        self.num_rows += 1
        if judgment.placed and len(judgment.orders) == 1:
            self.num_placed += 1
            self.first_preferred += judgment.orders[0][0] == 0
        self.both_bad += len(judgment.thumbs) == 2

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
    first = rows[0][1]
    arranged = [(number, arrange(judgment, rules, report)) for number, judgment in rows]
    responses, indices, first_rows = _responses(arranged, report)
    compared = [(judgment, index) for (_, judgment), index in zip(arranged, indices, strict=True)]
    alone = [(judgment, index[0]) for judgment, index in compared if judgment.scores and len(index) == 1]
    if whole := _scored_alone(alone, responses, report):
        compared.append((arrange(whole[0], rules, report), whole[1]))
    thumbs: dict[tuple[int, bool], float] = defaultdict(float)
    ties: dict[Order, float] = defaultdict(float)
    for judgment, index in compared:
        for i, good in judgment.thumbs:
            thumbs[index[i], good] += judgment.weight
        for tie in judgment.ties:
            ties[tuple(sorted(index[i] for i in tie))] += judgment.weight
    tree = PromptTree(
        prompt=first.prompt,
        responses=responses,
        comparisons=_comparisons(compared, report),
        rows=tuple(number for number, _ in rows),
        source=source,
        tools=first.tools,
        ties=tuple(Comparison(members, weight) for members, weight in ties.items()),
        cut=tuple(sorted({index[i] for judgment, index in compared for i in judgment.cut})),
        thumbs=tuple(Thumb(response, good, weight) for (response, good), weight in thumbs.items()),
        first_rows=first_rows,
        template_kwargs=first.template_kwargs,
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
    by_response: dict[int, list[Judgment]] = defaultdict(list)
    for judgment, place in given:
        by_response[place].append(judgment)
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
