"""Preference files -> prompt trees: which rows belong to which split, what they say, and which cannot be used.

In: section [data]. Out: for each split, PromptTrees (rows of one prompt merged) and a ReadReport. Row shapes are in
formats/ and docs/formats.md, DataConfig is in settings.py. Next: tokenize.py.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeAlias

from favor.data import pictures, sources
from favor.data.formats import FORMATS, Judgment, RowError, check_order, recognise
from favor.data.formats.columns import named
from favor.data.grow import ReadReport, grow, key_of
from favor.data.settings import DataConfig, SourceConfig
from favor.data.types import PromptTree, words_of
from favor.errors import DataError

__all__ = ["DataConfig", "ReadReport", "SourceConfig", "read", "read_splits"]

Trees: TypeAlias = tuple[Sequence[PromptTree], ReadReport]
Half: TypeAlias = Literal["all", "train", "eval"]
# a row: its number, the value in the file, the row under our names, and what it says or why it says nothing
Outcome: TypeAlias = tuple[int, Any, dict[str, Any], Judgment | RowError]


class SplitSpec(NamedTuple):
    """One split of the data: its sources, and which half of their prompts belongs to it."""

    name: str
    sources: tuple[SourceConfig, ...]
    half: Half


def splits_of(config: DataConfig) -> list[SplitSpec]:
    """The splits "train" and, where the recipe holds anything out, "eval".

    With [data.hold_out] a prompt goes wholly to one split, by a hash of its text: more rows or another order change nothing.
    """
    # the hub names held-out splits test or validation, files have none: eval_split is not split
    if config.eval is not None:
        held_out = SourceConfig(path=config.eval, split=config.eval_split)
        return [SplitSpec("train", config.parts, "all"), SplitSpec("eval", (held_out,), "all")]
    if config.hold_out is not None:
        return [SplitSpec("train", config.parts, "train"), SplitSpec("eval", config.parts, "eval")]
    return [SplitSpec("train", config.parts, "all")]


def read_splits(config: DataConfig, *, sees: bool = False) -> dict[str, Trees]:
    """Every split, read whole. Raises DataError as `read` does."""
    return {spec.name: read_split(spec, config, sees=sees) for spec in splits_of(config)}


def read(source: str, config: DataConfig, split: str, *, sees: bool = False) -> Trees:
    """Read one source whole, as section [data] says. `split` matters for hub data sets only. sees: with pictures.

    Raises DataError: no such file, damaged or empty file, unknown format; and for the first row that cannot
    be used, unless `data.bad_rows = "drop"` leaves such rows out and lists them.
    """
    return read_split(SplitSpec("train", (SourceConfig(path=source, split=split),), "all"), config, sees=sees)


def read_split(spec: SplitSpec, config: DataConfig, *, sees: bool = False) -> Trees:
    """One split, read whole. Raises DataError as `read` does."""
    trees: list[PromptTree] = []
    reports: list[ReadReport] = []
    for source in spec.sources:
        report = ReadReport(source.path, config.format_of(source))
        by_prompt: dict[str, list[tuple[int, Judgment]]] = {}
        # rows of one prompt need not stand together, so a tree is made when all are there
        for number, _, judgment in judged(source, config, spec.half, report, sees=sees):
            by_prompt.setdefault(tree_key(judgment), []).append((number, judgment))
        trees += [grow(rows, config.rules, source.path, report) for rows in by_prompt.values()]
        reports.append(report)
    need_prompts(reports, spec, config)
    return trees, joined(reports)


def judged(
    source: SourceConfig, config: DataConfig, half: Half, report: ReadReport, *, sees: bool = False
) -> Iterator[tuple[int, dict[str, Any], Judgment]]:
    """(row number, row under our names, what it says) of every usable row of a half; the report counts, and lists the rest.

    Raises DataError for a row that cannot be used, unless those are dropped, and for a source without a usable row.
    """
    for number, _, row, judgment in outcomes(source, config, report, sees=sees):
        if isinstance(judgment, RowError):
            if config.bad_rows == "error":
                raise refused(source.path, number, judgment)
            # a row whose prompt cannot be read is of no half; it is counted once, with the training half
            if half != "eval":
                report.num_rows += 1
                report.dropped.append((number, str(judgment)))
        elif half == "all" or (half == "eval") is _is_held_out(judgment, config):
            report.see(judgment)
            yield number, row, judgment
    bad = report.dropped
    if half == "all" and report.num_rows == len(bad):
        reason = f"all {len(bad)} rows are bad, the first: {bad[0][1]}" if bad else "it holds no rows"
        raise DataError(f"{source.path}: nothing to use: {reason}; name a file with usable rows")


def outcomes(source: SourceConfig, config: DataConfig, report: ReadReport, *, sees: bool = False) -> Iterator[Outcome]:
    """Every row of a source; what the source does not say, the section says. The format found goes into the report.

    sees: a model reads the pictures of rows; without one a row that has any cannot be used.
    """
    asked = config.format_of(source)
    columns, verdict = config.columns_of(source), config.verdict_of(source)
    folder = pictures.folder_of(source.path) if sees else None
    for number, raw in _raw(source, config):
        row: dict[str, Any] = {}
        try:
            row = sources.as_object(raw)
            if columns or verdict:
                row = named(row, columns, verdict)
            row = pictures.marked(row, folder) if sees else row
            if report.format == "auto":
                # the first row that can be read decides; a later row of another format is a bad row
                report.format = recognise(row)
            if asked == "auto":
                check_order(row, report.format)
            judgment = judge(row, report.format, source.weight)
            if sees:
                pictures.refuse_said(judgment.responses)
        except RowError as error:
            judgment = error
        yield number, raw, row, judgment


def _raw(source: SourceConfig, config: DataConfig) -> Iterator[tuple[int, Any]]:
    """The rows of a source as they are, with their numbers."""
    found = sources.rows(source.path, source.split or config.split, streaming=config.streaming)
    return islice(found, source.max_rows or config.max_rows)


def named_pictures(source: SourceConfig, config: DataConfig) -> list[list[str]]:
    """Every picture file that the rows of a source name, with its SHA-256; what cannot be read is left to `outcomes`."""
    columns, folder, found = config.columns_of(source), pictures.folder_of(source.path), dict[str, str]()
    for _, raw in _raw(source, config):
        with contextlib.suppress(RowError):
            row = named(sources.as_object(raw), columns, None)
            names = [name for name in pictures.named(row, folder) if name not in found]
            found |= {name: pictures.digest_of(name) for name in names}
    return [[name, what] for name, what in sorted(found.items())]


def refused(source: str, number: int, error: RowError) -> DataError:
    """The error that names the file and the row."""
    where = sources.where(source, number)
    if error.of_names:
        return DataError(f"{where}: {error}. If this row alone is odd, data.bad_rows=drop leaves it out")
    return DataError(f"{where}: {error}; fix the row, or leave such rows out with data.bad_rows=drop")


def judge(row: dict[str, Any], name: str, weight: float) -> Judgment:
    """What a row under our names says, with its source's weight. Raises RowError."""
    judgment = FORMATS[name](row)
    return judgment._replace(weight=judgment.weight * weight)


def tree_key(judgment: Judgment) -> str:
    """Rows with the same key are of one prompt."""
    return key_of([judgment.prompt, judgment.tools, judgment.template_kwargs])


def _is_held_out(judgment: Judgment, config: DataConfig) -> bool:
    """Whether a prompt belongs to the held-out part: its hash, seen as a number from 0 to 1, is below the share."""
    prompt, hold_out = judgment.prompt, config.hold_out
    assert hold_out is not None, "only then is the data split"
    # wherever the files of its pictures lie
    words = pictures.without_places(words_of(prompt).strip())
    digest = hashlib.sha256(f"{hold_out.seed}\n{words}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < hold_out.share * 2**64


def need_prompts(reports: Sequence[ReadReport], spec: SplitSpec, config: DataConfig) -> None:
    """Raises DataError when a half holds no prompt."""
    if all(report.num_rows == len(report.dropped) for report in reports):
        raise DataError(
            f"{config.training}: data.hold_out.share leaves no prompt for {spec.name}; change the share or "
            "data.hold_out.seed, or name data.eval"
        )


def joined(reports: Sequence[ReadReport]) -> ReadReport:
    """The report of a split from those of its sources."""
    if len(reports) == 1:
        return reports[0]
    # a row's number says where it is only together with its file, so what was dropped names both
    counts = [name for name, value in vars(reports[0]).items() if isinstance(value, int)]
    return ReadReport(
        source=", ".join(report.source for report in reports),
        format=", ".join(dict.fromkeys(report.format for report in reports)),
        dropped=[(row, f"{report.source}: {reason}") for report in reports for row, reason in report.dropped],
        sources=list(reports),
        **{name: sum(vars(report)[name] for report in reports) for name in counts},
    )
