"""A prompt's tree while the rows that judge its responses are still coming in.

In: arranged Judgments of one prompt. Out: a PromptTree and what was merged or left out. Next: types.py.
"""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from favor.data.formats import Judgment
from favor.data.formats.fields import by_scores
from favor.data.pairing import LeftOut, Rules, arrange
from favor.data.types import Comparison, PromptTree, Text, Thumb


class Counts(NamedTuple):
    """What happened to one tree's rows beside becoming comparisons."""

    merged_responses: int = 0
    repeated: int = 0
    close: int = 0
    unasked: int = 0
    unknown: int = 0
    alone: int = 0

    def plus(self, left_out: LeftOut) -> "Counts":
        """The same with what a judgment left out."""
        close, unasked, unknown = left_out
        return self._replace(close=self.close + close, unasked=self.unasked + unasked, unknown=self.unknown + unknown)


class Grown(NamedTuple):
    """A finished tree and its counts."""

    tree: PromptTree
    counts: Counts


@dataclass
class Growing:
    """A tree while its rows are still coming in."""

    prompt: Text
    tools: tuple[dict[str, Any], ...] | None
    rules: Rules
    responses: dict[str, Text] = field(default_factory=dict[str, Text])
    first_rows: list[int] = field(default_factory=list[int])
    weights: dict[tuple[int, ...], float] = field(default_factory=dict[tuple[int, ...], float])
    gaps: dict[tuple[int, ...], tuple[float, ...]] = field(default_factory=dict[tuple[int, ...], tuple[float, ...]])
    labels: dict[tuple[int, ...], float] = field(default_factory=dict[tuple[int, ...], float])
    ties: dict[tuple[int, ...], float] = field(default_factory=dict[tuple[int, ...], float])
    thumbs: dict[tuple[int, bool], float] = field(default_factory=dict[tuple[int, bool], float])
    # (score, weight) of responses that rows score one at a time
    alone: dict[int, list[tuple[float, float]]] = field(default_factory=dict[int, list[tuple[float, float]]])
    cut: set[int] = field(default_factory=set[int])
    rows: list[int] = field(default_factory=list[int])
    counts: Counts = field(default_factory=Counts)

    def add(self, row: int, judgment: Judgment) -> None:
        """Add a row; weights of comparisons that were there already add up."""
        self.rows.append(row)
        judgment, left_out = arrange(judgment, self.rules)
        self.counts = self.counts.plus(left_out)
        index = self._places(judgment)
        self.cut.update(index[i] for i in judgment.cut)
        self._compare(judgment, index)
        for i, good in judgment.thumbs:
            self.thumbs[index[i], good] = self.thumbs.get((index[i], good), 0.0) + judgment.weight
        if judgment.scores and len(judgment.responses) == 1:
            self.alone.setdefault(index[0], []).append((judgment.scores[0], judgment.weight))

    def finish(self, source: str) -> Grown:
        """The tree; responses that were scored alone are compared now."""
        self._compare_alone()
        comparisons = tuple(
            Comparison(order, w, self.gaps.get(order, ()), self.labels[order]) for order, w in self.weights.items()
        )
        thumbs = tuple(Thumb(response, good, weight) for (response, good), weight in self.thumbs.items())
        responses = tuple(self.responses.values())
        ties = tuple(Comparison(members, weight) for members, weight in self.ties.items())
        cut, rows = tuple(sorted(self.cut)), tuple(self.rows)
        first = tuple(self.first_rows)
        tree = PromptTree(self.prompt, responses, comparisons, rows, source, self.tools, ties, cut, thumbs, first)
        return Grown(tree, self.counts)

    def _places(self, judgment: Judgment) -> list[int]:
        """Where each of the judgment's responses is among the tree's."""
        index: list[int] = []
        merged = 0
        for i, response in enumerate(judgment.responses):
            # the same words with and without their end are two responses
            key = key_of([response, i in judgment.cut])
            merged += key in self.responses
            if key not in self.responses:
                self.responses[key] = response
                self.first_rows.append(self.rows[-1])
            index.append(list(self.responses).index(key))
        self.counts = self.counts._replace(merged_responses=self.counts.merged_responses + merged)
        return index

    def _compare(self, judgment: Judgment, index: list[int]) -> None:
        repeated = 0
        for number, order in enumerate(judgment.orders):
            mine = tuple(index[i] for i in order)
            repeated += mine in self.weights
            before = self.weights.get(mine, 0.0)
            self.weights[mine] = before + judgment.weight
            label = judgment.labels[number] if judgment.labels else 1.0
            # repeated soft labels: their weighted mean
            self.labels[mine] = (self.labels.get(mine, 1.0) * before + label * judgment.weight) / self.weights[mine]
            if judgment.scores:
                by_rank = [judgment.scores[i] for i in order]
                self.gaps[mine] = tuple(better - worse for better, worse in pairwise(by_rank))
        for tie in judgment.ties:
            tied = tuple(sorted(index[i] for i in tie))
            self.ties[tied] = self.ties.get(tied, 0.0) + judgment.weight
        self.counts = self.counts._replace(repeated=self.counts.repeated + repeated)

    def _compare_alone(self) -> None:
        """Compare the responses that rows scored one at a time, by their mean scores and with their rows' mean weight."""
        if len(self.alone) < 2:
            self.counts = self.counts._replace(alone=len(self.alone))
            return
        index, given = list(self.alone), list(self.alone.values())
        scores = tuple(sum(s * w for s, w in items) / sum(w for _, w in items) for items in given)
        weights = [weight for items in given for _, weight in items]
        orders, ties = by_scores(scores)
        responses = tuple(list(self.responses.values())[i] for i in index)
        weight = sum(weights) / len(weights)
        whole = Judgment(self.prompt, responses, orders, weight, self.tools, ties, scores)
        judgment, left_out = arrange(whole, self.rules)
        self.counts = self.counts.plus(left_out)
        self._compare(judgment, index)


def key_of(value: Any) -> str:
    """A text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
