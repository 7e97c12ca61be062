"""Preference files -> prompt trees: what every public format means, and which rows cannot be used.

In: section [data]. Out: for each part, PromptTrees (rows of one prompt merged) and a ReadReport. Row
shapes are in formats/ and docs/formats.md, DataConfig is in settings.py. Next: tokenize.py.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from favor.data import sources
from favor.data.formats import FORMATS, Judgment, RowError, check_order, recognise
from favor.data.formats.fields import brief
from favor.data.grow import Counts, Growing, Grown, key_of
from favor.data.settings import DataConfig, SourceConfig, VerdictConfig
from favor.data.types import PromptTree, Text
from favor.errors import DataError

__all__ = ["LEFT_OUT", "DataConfig", "ReadReport", "SourceConfig", "read", "read_splits"]

_TABLE = "data.verdict"
# counts of a report that say what was left out, for people
LEFT_OUT = {
    "close_pairs": "pairs closer than data.min_gap left out",
    "unasked_pairs": "pairs left out by data.pairing",
    "unchecked_gaps": "comparisons without scores, to which data.min_gap does not apply",
    "lone_scores": "scored responses without another to compare with",
    "both_bad": "rows that judge both responses bad: thumbs down, no comparison",
}


@dataclass(frozen=True)
class ReadReport:
    """What became of the rows of one part. `dropped` lists (row, reason) of every row left out.

    close_pairs: pairs nearer than min_gap; unasked_pairs: pairs and ties that the pairing leaves out; unchecked_gaps:
    comparisons without scores, kept although min_gap is set; lone_scores: scored responses without another of their
    prompt. num_placed: rows that judge two responses in an order of their own, first_preferred: those that prefer the first.
    both_bad: rows that judge both responses bad, which gives two thumbs down and no comparison. A part read from several
    sources has a report of each in `sources`.
    """

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
    close_pairs: int
    unasked_pairs: int
    unchecked_gaps: int
    lone_scores: int
    num_placed: int
    first_preferred: int
    both_bad: int
    dropped: tuple[tuple[int, str], ...]
    sources: "tuple[ReadReport, ...]" = ()

    @property
    def each(self) -> "tuple[ReadReport, ...]":
        """The report of every source."""
        return self.sources or (self,)

    def as_json(self) -> dict[str, Any]:
        """For data.json."""
        found = asdict(self) | {"dropped": [list(item) for item in self.dropped]}
        return found | {"sources": [report.as_json() for report in self.sources]}


Part: TypeAlias = tuple[Sequence[PromptTree], ReadReport]
Half: TypeAlias = Literal["all", "train", "eval"]


class SplitSpec(NamedTuple):
    """One part of the data: its sources, and which half of their prompts belongs to it."""

    name: str
    sources: tuple[SourceConfig, ...]
    half: Half


def splits_of(config: DataConfig) -> list[SplitSpec]:
    """The parts "train" and, where the recipe holds anything out, "eval".

    With eval_share a prompt goes wholly to one part, by a hash of its text: more rows or another order change nothing.
    """
    if config.eval is not None:
        held_out = SourceConfig(path=config.eval, split=config.eval_split)
        return [SplitSpec("train", config.parts, "all"), SplitSpec("eval", (held_out,), "all")]
    if config.eval_share:
        return [SplitSpec("train", config.parts, "train"), SplitSpec("eval", config.parts, "eval")]
    return [SplitSpec("train", config.parts, "all")]


def read_splits(config: DataConfig) -> dict[str, Part]:
    """Every part, read whole. Raises DataError as `read` does."""
    return {wanted.name: read_split(wanted, config) for wanted in splits_of(config)}


def read_split(wanted: SplitSpec, config: DataConfig) -> Part:
    """One part, read whole. Raises DataError as `read` does."""
    trees: list[PromptTree] = []
    reports: list[ReadReport] = []
    for source in wanted.sources:
        growing: dict[str, Growing] = {}
        seen = Seen(config.format_of(source))
        for number, _, judgment in judged(source, config, wanted.half, seen):
            tree = growing.setdefault(tree_key(judgment), Growing(judgment.prompt, judgment.tools, config.rules))
            tree.add(number, judgment)
        for tree in growing.values():
            grown = tree.finish(source.path)
            seen.count(grown)
            trees.append(grown.tree)
        reports.append(seen.report(source.path, wanted.half))
    return trees, joined(reports, wanted, config)


def read(source: str, config: DataConfig, split: str) -> Part:
    """Read one source whole, as section [data] says. `split` matters for hub data sets only.

    Raises DataError: no such file, damaged or empty file, unknown format; and for the first row that cannot
    be used, unless `data.bad_rows = "drop"` leaves such rows out and lists them.
    """
    return read_split(SplitSpec("train", (SourceConfig(path=source, split=split),), "all"), config)


def judged(
    source: SourceConfig, config: DataConfig, half: Half, seen: "Seen"
) -> Iterator[tuple[int, dict[str, Any], Judgment]]:
    """(row number, row under our names, what it says) of every usable row of a half; `seen` counts, and lists the rest.

    What the source does not say, the section says.
    """
    asked = config.format_of(source)
    found = sources.rows(source.path, source.split or config.split, streaming=config.streaming)
    for number, raw in sources.limited(found, source.max_rows or config.max_rows):
        try:
            row = named(raw, source, config)
            seen.format = recognise(row) if seen.format == "auto" else seen.format
            if asked == "auto":
                check_order(row, seen.format)
            judgment = judge(row, seen.format, source)
        except RowError as error:
            if config.bad_rows == "error":
                raise DataError(
                    f"{sources.where(source.path, number)}: {error}; fix the row, or leave such rows out with "
                    "data.bad_rows=drop"
                ) from None
            if half != "eval":
                seen.dropped.append((number, str(error)))
            continue
        if half == "all" or (half == "eval") is _held_out(judgment.prompt, config):
            seen.rows += 1
            seen.see(judgment)
            yield number, row, judgment


def named(raw: Any, source: SourceConfig, config: DataConfig) -> dict[str, Any]:
    """A row of a source under our names. Raises RowError for one that is no object or lacks a column that is mapped."""
    row = renamed(sources.as_object(raw), config.columns if source.columns is None else source.columns)
    verdict = config.verdict_of(source)
    return row if verdict is None else _with_verdict(row, verdict)


def _with_verdict(row: dict[str, Any], table: VerdictConfig) -> dict[str, Any]:
    """The row with first, second and verdict; several annotators make a list of verdicts."""
    several = len(table.columns) > 1
    said: list[Any] = []
    for column in table.columns:
        value = _lookup(row, column, "column", table=_TABLE, needed=not several)
        said += value if isinstance(value, list) else [] if value is None else [value]
    if not said:
        raise RowError(f"none of the verdict's columns {', '.join(table.columns)} has a value")
    found = {
        "first": _lookup(row, table.first, "first", table=_TABLE),
        "second": _lookup(row, table.second, "second", table=_TABLE),
    }
    gone = {table.first, table.second, *table.columns}
    rest = {name: value for name, value in row.items() if name not in gone}
    return rest | found | {"verdict": [_meant(value, table) for value in said]}


def _meant(value: Any, table: VerdictConfig) -> str:
    """What a value of the verdict's column means; 1, "1" and true are different values, 1 and 1.0 the same."""
    meanings = table.values.model_dump()
    for meaning, values in meanings.items():
        if any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values):
            return meaning
    known = ", ".join(f"{meaning} {brief(list(values))}" for meaning, values in meanings.items() if values)
    raise RowError(f"the verdict is {brief(value)}, and data.verdict.values knows {known}; add it to one of them")


def judge(row: dict[str, Any], name: str, source: SourceConfig) -> Judgment:
    """What a row under our names says, with its source's weight. Raises RowError."""
    judgment = FORMATS[name](row)
    return judgment._replace(weight=judgment.weight * source.weight)


def tree_key(judgment: Judgment) -> str:
    """Rows with the same key are of one prompt."""
    return key_of([judgment.prompt, judgment.tools])


@dataclass
class Seen:
    """What reading a source has met so far: its ReadReport in the making."""

    format: str
    rows: int = 0
    dropped: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    trees: int = 0
    responses: int = 0
    comparisons: int = 0
    ties: int = 0
    thumbs: int = 0
    counts: Counts = field(default_factory=Counts)
    placed: int = 0
    first_preferred: int = 0
    both_bad: int = 0

    def see(self, judgment: Judgment) -> None:
        """Where the preferred response of a row stands, for rows in which that says something."""
        if judgment.placed and len(judgment.orders) == 1:
            self.placed += 1
            self.first_preferred += judgment.orders[0][0] == 0
        self.both_bad += len(judgment.thumbs) == 2

    def count(self, grown: Grown) -> None:
        """A tree whose rows are all there."""
        tree = grown.tree
        self.trees += 1
        self.responses += len(tree.responses)
        self.comparisons += len(tree.comparisons)
        self.ties += len(tree.ties)
        self.thumbs += len(tree.thumbs)
        self.counts = Counts(*(a + b for a, b in zip(self.counts, grown.counts, strict=True)))

    def report(self, source: str, half: Half) -> ReadReport:
        """The whole. Raises DataError when nothing of the source can be used."""
        if not self.trees and half == "all":
            bad = self.dropped
            reason = f"all {len(bad)} rows are bad, the first: {bad[0][1]}" if bad else "it holds no rows"
            raise DataError(f"{source}: nothing to use: {reason}; name a file with usable rows")
        return ReadReport(
            source=source,
            format=self.format,
            num_rows=self.rows + len(self.dropped),
            num_trees=self.trees,
            num_responses=self.responses,
            num_comparisons=self.comparisons,
            num_ties=self.ties,
            num_thumbs=self.thumbs,
            merged_prompts=self.rows - self.trees,
            merged_responses=self.counts.merged_responses,
            repeated_comparisons=self.counts.repeated,
            close_pairs=self.counts.close,
            unasked_pairs=self.counts.unasked,
            unchecked_gaps=self.counts.unknown,
            lone_scores=self.counts.alone,
            num_placed=self.placed,
            first_preferred=self.first_preferred,
            both_bad=self.both_bad,
            dropped=tuple(self.dropped),
        )


def renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the file's columns under our names. Raises RowError for a column that it lacks."""
    if not columns:
        return row
    found = {ours: _lookup(row, theirs, ours) for ours, theirs in columns.items()}
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return rest | {name: value for name, value in found.items() if value is not None}


def _lookup(row: dict[str, Any], path: str, ours: str, *, table: str = "data.columns", needed: bool = True) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        elif not needed:
            return None
        else:
            raise RowError(
                f"there is no column '{path}', which {table} names for '{ours}'; its columns are {', '.join(row) or 'none'}"
            )
    return value


def _held_out(prompt: Text, config: DataConfig) -> bool:
    """Whether a prompt belongs to the held-out part: its hash, seen as a number from 0 to 1, is below the share."""
    words = prompt if isinstance(prompt, str) else "\n".join(str(m.get("content") or "") for m in prompt)
    digest = hashlib.sha256(f"{config.eval_seed}\n{words.strip()}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.eval_share * 2**64


def joined(reports: Sequence[ReadReport], wanted: SplitSpec, config: DataConfig) -> ReadReport:
    """The report of a part from those of its sources. Raises DataError when a half holds no prompt."""
    if not any(report.num_trees for report in reports):
        raise DataError(
            f"{config.training}: data.eval_share = {config.eval_share} leaves no prompt for {wanted.name}; change the share or "
            "data.eval_seed, or name data.eval"
        )
    if len(reports) == 1:
        return reports[0]
    numbers = [
        {key: value for key, value in vars(report).items() if key not in ("source", "format", "dropped", "sources")}
        for report in reports
    ]
    total = {key: sum(each[key] for each in numbers) for key in numbers[0]}
    return ReadReport(
        source=", ".join(report.source for report in reports),
        format=", ".join(dict.fromkeys(report.format for report in reports)),
        dropped=tuple((row, f"{r.source}: {reason}") for r in reports for row, reason in r.dropped),
        sources=tuple(reports),
        **total,
    )
