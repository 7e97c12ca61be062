"""Preference files -> prompt trees: what every public format means, and which rows cannot be used.

In: section [data]. Out: for each part, PromptTrees (rows of one prompt merged) and a ReadReport. Row
shapes are in formats/ and docs/formats.md, DataConfig is in settings.py. Next: tokenize.py.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

from favor.data import sources
from favor.data.formats import FORMATS, Judgment, RowError, recognise
from favor.data.grow import Growing, Grown, key_of
from favor.data.settings import DataConfig, SourceConfig
from favor.data.types import PromptTree, Text
from favor.errors import DataError

__all__ = ["LEFT_OUT", "DataConfig", "ReadReport", "SourceConfig", "read", "read_parts"]

# counts of a report that say what was left out, for people
LEFT_OUT = {
    "close_pairs": "pairs closer than data.min_gap left out",
    "unasked_pairs": "pairs left out by data.pairing",
    "unchecked_gaps": "comparisons without scores, to which data.min_gap does not apply",
    "lone_scores": "scored responses without another to compare with",
}


@dataclass(frozen=True)
class ReadReport:
    """What became of the rows of one part. `dropped` lists (row, reason) of every row left out.

    close_pairs: pairs nearer than min_gap; unasked_pairs: pairs and ties that the pairing leaves out; unchecked_gaps:
    comparisons without scores, kept although min_gap is set; lone_scores: scored responses without another of their
    prompt. A part read from several sources has a report of each in `sources`.
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


Part: TypeAlias = tuple[list[PromptTree], ReadReport]


class _Source(NamedTuple):
    """One source read whole."""

    path: str
    format: str
    grown: list[Grown]
    dropped: tuple[tuple[int, str], ...]


def read_parts(config: DataConfig) -> dict[str, Part]:
    """The parts "train" and, where the recipe holds anything out, "eval". Raises DataError as `read` does.

    With eval_share a prompt goes wholly to one part, by a hash of its text: more rows or another order change nothing.
    """
    found = [_read(source, config) for source in config.parts]
    if config.eval is not None:
        return {"train": _join(found), "eval": read(config.eval, config, config.eval_split)}
    if not config.eval_share:
        return {"train": _join(found)}
    train = [s._replace(grown=[g for g in s.grown if not _held_out(g.tree.prompt, config)]) for s in found]
    held = [s._replace(grown=[g for g in s.grown if _held_out(g.tree.prompt, config)], dropped=()) for s in found]
    parts = {"train": _join(train), "eval": _join(held)}
    for name, (trees, _) in parts.items():
        if not trees:
            raise DataError(
                f"{config.training}: data.eval_share = {config.eval_share} leaves no prompt for {name}; change the share or "
                "data.eval_seed, or name data.eval"
            )
    return parts


def read(source: str, config: DataConfig, split: str) -> Part:
    """Read one source whole, as section [data] says. `split` matters for hub data sets only.

    Raises DataError: no such file, damaged or empty file, unknown format; and for the first row that cannot
    be used, unless `data.bad_rows = "drop"` leaves such rows out and lists them.
    """
    return _join([_read(SourceConfig(path=source, split=split), config)])


def _read(source: SourceConfig, config: DataConfig) -> _Source:
    """What the source does not say, the section says."""
    growing: dict[str, Growing] = {}
    dropped: list[tuple[int, str]] = []
    name = source.format or config.format
    columns = config.columns if source.columns is None else source.columns
    all_rows = sources.rows(source.path, source.split or config.split)
    num_rows = 0
    for number, row in sources.limited(all_rows, source.max_rows or config.max_rows):
        num_rows += 1
        try:
            row = renamed(sources.as_object(row), columns)
            name = recognise(row) if name == "auto" else name
            judgment = FORMATS[name](row)
        except RowError as error:
            if config.bad_rows == "error":
                raise DataError(
                    f"{source.path}, row {number}: {error}; mend the row, or leave such rows out with data.bad_rows=drop"
                ) from None
            dropped.append((number, str(error)))
            continue
        _grow(growing, number, judgment._replace(weight=judgment.weight * source.weight), config)
    if not growing:
        reason = f"all {num_rows} rows are bad, the first: {dropped[0][1]}" if dropped else "it holds no rows"
        raise DataError(f"{source.path}: nothing to use: {reason}")
    return _Source(source.path, name, [tree.finish(source.path) for tree in growing.values()], tuple(dropped))


def _grow(growing: dict[str, Growing], number: int, judgment: Judgment, config: DataConfig) -> None:
    key = key_of([judgment.prompt, judgment.tools])
    tree = growing.setdefault(key, Growing(judgment.prompt, judgment.tools, config.rules))
    tree.add(number, judgment)


def renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the file's columns under our names. Raises RowError for a column that it lacks."""
    if not columns:
        return row
    found = {ours: _lookup(row, theirs, ours) for ours, theirs in columns.items()}
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return rest | {name: value for name, value in found.items() if value is not None}


def _lookup(row: dict[str, Any], path: str, ours: str) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            raise RowError(
                f"there is no column '{path}', which data.columns names for '{ours}'; its columns are {', '.join(row) or 'none'}"
            )
    return value


def _held_out(prompt: Text, config: DataConfig) -> bool:
    """Whether a prompt belongs to the held-out part: its hash, seen as a number from 0 to 1, is below the share."""
    words = prompt if isinstance(prompt, str) else "\n".join(str(m.get("content") or "") for m in prompt)
    digest = hashlib.sha256(f"{config.eval_seed}\n{words.strip()}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.eval_share * 2**64


def _join(found: Sequence[_Source]) -> Part:
    """The trees of all sources and their report."""
    reports = [_report(source) for source in found]
    trees = [grown.tree for source in found for grown in source.grown]
    if len(reports) == 1:
        return trees, reports[0]
    numbers = [
        {key: value for key, value in vars(report).items() if key not in ("source", "format", "dropped", "sources")}
        for report in reports
    ]
    total = {key: sum(each[key] for each in numbers) for key in numbers[0]}
    report = ReadReport(
        source=", ".join(report.source for report in reports),
        format=", ".join(dict.fromkeys(report.format for report in reports)),
        dropped=tuple((row, f"{r.source}: {reason}") for r in reports for row, reason in r.dropped),
        sources=tuple(reports),
        **total,
    )
    return trees, report


def _report(source: _Source) -> ReadReport:
    trees = [grown.tree for grown in source.grown]
    counts = [grown.counts for grown in source.grown]
    used = sum(len(tree.rows) for tree in trees)
    return ReadReport(
        source=source.path,
        format=source.format,
        num_rows=used + len(source.dropped),
        num_trees=len(trees),
        num_responses=sum(len(tree.responses) for tree in trees),
        num_comparisons=sum(len(tree.comparisons) for tree in trees),
        num_ties=sum(len(tree.ties) for tree in trees),
        num_thumbs=sum(len(tree.thumbs) for tree in trees),
        merged_prompts=used - len(trees),
        merged_responses=sum(c.merged_responses for c in counts),
        repeated_comparisons=sum(c.repeated for c in counts),
        close_pairs=sum(c.close for c in counts),
        unasked_pairs=sum(c.unasked for c in counts),
        unchecked_gaps=sum(c.unknown for c in counts),
        lone_scores=sum(c.alone for c in counts),
        dropped=source.dropped,
    )
