"""Preference files -> prompt trees: what every public format means, and which rows cannot be used.

In: a local file or folder, or a hub id. Out: PromptTrees (rows of one prompt merged) and a ReadReport. Row
shapes are in formats.py. Next: tokenize.py.
"""

import json
from collections.abc import Iterator
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
    """Section [data]. A source is a .jsonl, .jsonl.gz, .json or .parquet file, a glob or folder of them, or a hub id.

    Data sets saved by `datasets` are sources too. streaming: read a hub id row by row instead of fetching it whole.
    cache: keep the token ids in a file under ~/.cache/favor that is memory-mapped and reused; auto does so for sources
    over 50 MB and streamed ones.
    """

    model_config = STRICT
    train: str
    eval: str | None = None
    format: Literal["auto", "pairs", "ranked", "sft"] = "auto"
    split: str = "train"
    eval_split: str = "test"
    max_rows: int | None = Field(default=None, ge=1)
    bad_rows: Literal["error", "drop"] = "error"
    streaming: bool = False
    cache: Literal["auto"] | bool = "auto"


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
    growing: dict[str, Growing] = {}
    seen = Seen(config.format)
    for number, _, judgment in judged(source, config, split, seen):
        tree = growing.setdefault(tree_key(judgment), Growing(judgment.prompt, judgment.tools))
        tree.add(number, judgment)
    trees: list[PromptTree] = []
    for tree in growing.values():
        seen.count(tree)
        trees.append(tree.finish(source))
    return trees, seen.report(source)


def judged(source: str, config: DataConfig, split: str, seen: "Seen") -> Iterator[tuple[int, dict[str, Any], Judgment]]:
    """(row number, row, what it says) of every usable row; `seen` counts, and lists those left out."""
    found = sources.rows(source, split, streaming=config.streaming)
    for number, row in sources.limited(found, config.max_rows):
        seen.rows += 1
        try:
            row = sources.as_object(row)
            seen.format = recognise(row) if seen.format == "auto" else seen.format
            judgment = FORMATS[seen.format](row)
        except RowError as error:
            if config.bad_rows == "error":
                raise DataError(
                    f"{sources.where(source, number)}: {error}; mend the row, or leave such rows out with data.bad_rows=drop"
                ) from None
            seen.dropped.append((number, str(error)))
            continue
        yield number, row, judgment


def tree_key(judgment: Judgment) -> str:
    """Rows with the same key are of one prompt."""
    return _key([judgment.prompt, judgment.tools])


@dataclass
class Seen:
    """What reading has met so far: the ReadReport in the making."""

    format: str
    rows: int = 0
    dropped: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    trees: int = 0
    responses: int = 0
    comparisons: int = 0
    ties: int = 0
    thumbs: int = 0
    merged: int = 0
    repeated: int = 0

    def count(self, tree: "Growing") -> None:
        """A tree whose rows are all there."""
        self.trees += 1
        self.responses += len(tree.responses)
        self.comparisons += len(tree.weights)
        self.ties += len(tree.ties)
        self.thumbs += len(tree.thumbs)
        self.merged += tree.merged
        self.repeated += tree.repeated

    def report(self, source: str) -> ReadReport:
        """The whole. Raises DataError when nothing can be used."""
        if not self.trees:
            bad = self.dropped
            reason = f"all {self.rows} rows are bad, the first: {bad[0][1]}" if bad else "it holds no rows"
            raise DataError(f"{source}: nothing to use: {reason}")
        return ReadReport(
            source=source,
            format=self.format,
            num_rows=self.rows,
            num_trees=self.trees,
            num_responses=self.responses,
            num_comparisons=self.comparisons,
            num_ties=self.ties,
            num_thumbs=self.thumbs,
            merged_prompts=self.rows - len(self.dropped) - self.trees,
            merged_responses=self.merged,
            repeated_comparisons=self.repeated,
            dropped=tuple(self.dropped),
        )


@dataclass
class Growing:
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
    places: dict[str, int] = field(default_factory=dict[str, int])
    merged: int = 0
    repeated: int = 0

    def add(self, row: int, judgment: Judgment) -> None:
        """Add a row; the weights of comparisons that were there already add up."""
        self.rows.append(row)
        index: list[int] = []
        for i, response in enumerate(judgment.responses):
            # the same words with and without their end are two responses
            key = _key([response, i in judgment.cut])
            self.merged += key in self.responses
            self.responses.setdefault(key, response)
            index.append(self.places.setdefault(key, len(self.places)))
        self.cut.update(index[i] for i in judgment.cut)
        for number, order in enumerate(judgment.orders):
            mine = tuple(index[i] for i in order)
            self.repeated += mine in self.weights
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

    def finish(self, source: str) -> PromptTree:
        """The tree as it stands."""
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
