"""Preference files -> prompt trees: what every public format means, and which rows cannot be used.

In: a local file or folder, or a hub id. Out: PromptTrees (rows of one prompt merged) and a ReadReport. Row
shapes are in formats.py. Next: tokenize.py.
"""

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, Field

from favor.config import STRICT
from favor.data import sources
from favor.data.formats import FORMATS, Judgment, RowError, recognise
from favor.data.types import Comparison, PromptTree, Text, Thumb
from favor.errors import DataError


class DataConfig(BaseModel):
    """Section [data]. A source is a local .jsonl, .jsonl.gz, .json or .parquet file, a saved folder or a hub id."""

    model_config = STRICT
    train: str
    eval: str | None = None
    format: Literal["auto", "pairs", "ranked", "sft"] = "auto"
    split: str = "train"
    eval_split: str = "test"
    max_rows: int | None = Field(default=None, ge=1)
    bad_rows: Literal["error", "drop"] = "error"


@dataclass(frozen=True)
class ReadReport:
    """What became of the rows of one source. `dropped` lists (row, reason) of every row left out."""

    source: str
    format: str
    num_rows: int
    num_trees: int
    num_responses: int
    num_comparisons: int
    num_ties: int
    num_thumbs: int
    merged_prompts: int
    merged_responses: int
    repeated_comparisons: int
    dropped: tuple[tuple[int, str], ...]

    def as_json(self) -> dict[str, Any]:
        """For data.json."""
        return asdict(self) | {"dropped": [list(item) for item in self.dropped]}


def read(source: str, config: DataConfig, split: str) -> tuple[list[PromptTree], ReadReport]:
    """Read a source whole. `split` matters for hub data sets only.

    Raises DataError: no such file, damaged or empty file, unknown format; and for the first row that cannot
    be used, unless `data.bad_rows = "drop"` leaves such rows out and lists them.
    """
    growing: dict[str, _Growing] = {}
    dropped: list[tuple[int, str]] = []
    name, num_rows, repeated = config.format, 0, 0
    for number, row in sources.limited(sources.rows(source, split), config.max_rows):
        num_rows += 1
        try:
            row = sources.as_object(row)
            name = recognise(row) if name == "auto" else name
            judgment = FORMATS[name](row)
        except RowError as error:
            if config.bad_rows == "error":
                raise DataError(
                    f"{source}, row {number}: {error}; mend the row, or leave such rows out with data.bad_rows=drop"
                ) from None
            dropped.append((number, str(error)))
            continue
        key = _key([judgment.prompt, judgment.tools])
        tree = growing.setdefault(key, _Growing(judgment.prompt, judgment.tools))
        repeated += tree.add(number, judgment)
    trees = [tree.finish(source) for tree in growing.values()]
    if not trees:
        reason = f"all {num_rows} rows are bad, the first: {dropped[0][1]}" if dropped else "it holds no rows"
        raise DataError(f"{source}: nothing to use: {reason}")
    report = ReadReport(
        source=source,
        format=name,
        num_rows=num_rows,
        num_trees=len(trees),
        num_responses=sum(len(tree.responses) for tree in trees),
        num_comparisons=sum(len(tree.comparisons) for tree in trees),
        num_ties=sum(len(tree.ties) for tree in trees),
        num_thumbs=sum(len(tree.thumbs) for tree in trees),
        merged_prompts=num_rows - len(dropped) - len(trees),
        merged_responses=sum(tree.merged for tree in growing.values()),
        repeated_comparisons=repeated,
        dropped=tuple(dropped),
    )
    return trees, report


@dataclass
class _Growing:
    """A tree while its rows are still coming in."""

    prompt: Text
    tools: tuple[dict[str, Any], ...] | None
    responses: dict[str, Text] = field(default_factory=dict[str, Text])
    weights: dict[tuple[int, ...], float] = field(default_factory=dict[tuple[int, ...], float])
    gaps: dict[tuple[int, ...], tuple[float, ...]] = field(default_factory=dict[tuple[int, ...], tuple[float, ...]])
    labels: dict[tuple[int, ...], float] = field(default_factory=dict[tuple[int, ...], float])
    ties: dict[tuple[int, ...], float] = field(default_factory=dict[tuple[int, ...], float])
    thumbs: dict[tuple[int, bool], float] = field(default_factory=dict[tuple[int, bool], float])
    cut: set[int] = field(default_factory=set[int])
    rows: list[int] = field(default_factory=list[int])
    merged: int = 0

    def add(self, row: int, judgment: Judgment) -> int:
        """Add a row; returns how many of its comparisons were there already (their weights add up)."""
        self.rows.append(row)
        index: list[int] = []
        for i, response in enumerate(judgment.responses):
            # the same words with and without their end are two responses
            key = _key([response, i in judgment.cut])
            self.merged += key in self.responses
            self.responses.setdefault(key, response)
            index.append(list(self.responses).index(key))
        self.cut.update(index[i] for i in judgment.cut)
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
        for i, good in judgment.thumbs:
            self.thumbs[index[i], good] = self.thumbs.get((index[i], good), 0.0) + judgment.weight
        return repeated

    def finish(self, source: str) -> PromptTree:
        comparisons = tuple(
            Comparison(order, w, self.gaps.get(order, ()), self.labels[order]) for order, w in self.weights.items()
        )
        thumbs = tuple(Thumb(response, good, weight) for (response, good), weight in self.thumbs.items())
        responses = tuple(self.responses.values())
        ties = tuple(Comparison(members, weight) for members, weight in self.ties.items())
        cut = tuple(sorted(self.cut))
        return PromptTree(self.prompt, responses, comparisons, tuple(self.rows), source, self.tools, ties, cut, thumbs)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
