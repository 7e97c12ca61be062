"""A split of the data in files, for sources larger than memory: made once, reused while nothing it came from has changed.

In: a Recipe. Out: Prepared, equal to what is made in memory: rows go into a SQLite table, the rows of each prompt become
a tree, trees are tokenised, checked and written in one pass. Next: prepare.py.
"""

import contextlib
import json
import shutil
import sqlite3
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar, cast, overload

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerFast

from favor import data as data_package
from favor.data import sources, tables
from favor.data.grow import ReadReport, grow
from favor.data.read import Half, joined, judge, judged, named_pictures, need_prompts, tree_key
from favor.data.settings import DataConfig, SourceConfig
from favor.data.splits import (
    WINDOW,
    Checks,
    Notes,
    OnMain,
    Prepared,
    Recipe,
    Streams,
    encode,
    pictures_of,
    refuse_changed,
    stamps_of,
)
from favor.data.tokenize import TokenReport, tokenized
from favor.data.types import Comparison, Finding, PromptTree, Text, Thumb, TokenTree
from favor.errors import DataError
from favor.guard import file_hash, sha
from favor.run import atomic_folder, cache_folder

# rows by number, and the first row of every prompt
_TABLES = """
create table rows (number integer primary key, prompt text, row text);
create index by_prompt on rows (prompt);
create table prompts (first integer primary key, prompt text);
"""
# settings that the token ids do not depend on
_MEANINGLESS = {"train", "sources", "eval", "eval_split", "cache"}
_TREES, _PROMPTS, _REPORT, _SEAL = "trees.arrow", "prompts.arrow", "report.json", "hashes.json"
_TREE_SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("judgments", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("first_response", pa.int64()),
        ("pictures", pa.string()),
        ("places", pa.string()),
    ]
)
_PROMPT_SCHEMA = pa.schema([("source", pa.string()), ("row", pa.int64()), ("prompt", pa.string())])
# pyarrow has no types
_RecordBatch: TypeAlias = Any
Item = TypeVar("Item")


def prepare_split(recipe: Recipe, checks: Checks, say: Callable[[str], None], on_main: OnMain) -> Prepared:
    """The split, from its cache. Raises DataError as reading and tokenising do, and when the cache cannot be written."""
    described, before = describe(recipe), stamps_of([recipe.split])
    folder = cache_folder() / "tokens" / sha(json.dumps(described, sort_keys=True))
    try:
        found = open_cache(folder)
        # a machine that has it waits for one that has not
        on_main(lambda: found or _build_once(recipe, checks, say, (described, before), folder))
        found = found or open_cache(folder)
    except (OSError, sqlite3.OperationalError) as error:
        place, reason = cache_folder(), str(error)
        if isinstance(error, OSError):
            place, reason = error.filename or place, error.strerror or error
        raise DataError(
            f"{place}: the token cache cannot be written ({reason}); free some space, "
            "set FAVOR_CACHE to another folder, or data.cache=false"
        ) from None
    if found is None:
        raise DataError(
            f"{folder}: the token cache is missing or damaged on this machine; "
            "set FAVOR_CACHE to a folder that all machines see, or data.cache=false"
        )
    return found


def describe(recipe: Recipe) -> dict[str, Any]:
    """Everything the token ids depend on: content of the source, settings, tokenizer, template, code."""
    backend = json.loads(cast(PreTrainedTokenizerFast, recipe.tokenizer).backend_tokenizer.to_str())
    # what a call sets and the next one changes
    backend |= {"truncation": None, "padding": None}
    code = "".join(
        path.read_text("utf-8") for folder in data_package.__path__ for path in sorted(Path(folder).rglob("*.py"))
    )
    return {
        "half": recipe.split.half,
        "sources": [source.model_dump(mode="json") for source in recipe.split.sources],
        "content": _content(recipe),
        "data": recipe.data.model_dump(mode="json", exclude=_MEANINGLESS),
        "tokens": recipe.tokens.model_dump(mode="json"),
        "tokenizer": sha(json.dumps(backend, sort_keys=True)),
        "special tokens": {key: str(value) for key, value in recipe.tokenizer.special_tokens_map.items()},
        "template": sha(json.dumps(recipe.tokenizer.chat_template)),
        "end ids": sorted(recipe.end_ids),
        "pictures": recipe.sight and recipe.sight.identity,
        "code": sha(code),
        "versions": {name: version(name) for name in ("tokenizers", "transformers")},
    }


def identity(source: str, split: str, *, streaming: bool) -> list[list[str]]:
    """What the rows of a source depend on: name and SHA-256 of every file, or the revision of a streamed hub id."""
    if streaming and sources.files(source) is None and not Path(source).exists():
        return [[source, tables.revision(source)]]
    files, found = sources.local_files(source), list[list[str]]()
    if files is None:
        files = [Path(item["filename"]) for item in tables.load(source, split, streaming=False).cache_files]
    for path in files:
        with sources.readable(path):
            found.append([str(path), file_hash(path)])
    return found


def _content(recipe: Recipe) -> list[list[list[str]]]:
    data, split = recipe.data, recipe.split
    own = [identity(each.path, each.split or data.split, streaming=data.streaming) for each in split.sources]
    # files that its rows only name
    return own if recipe.sight is None else [*own, *(named_pictures(each, data) for each in split.sources)]


def _build_once(
    recipe: Recipe,
    checks: Checks,
    say: Callable[[str], None],
    when: tuple[Mapping[str, Any], list[list[sources.Stamp]]],
    folder: Path,
) -> None:
    """Build the folder, one process after the other; whoever waits is told so, and builds nothing when another did."""
    with _alone(folder, say):
        if open_cache(folder) is not None:
            return
        damaged = "; what was there is damaged" if folder.exists() else ""
        say(f"{recipe.names}: tokenising into {folder} (once{damaged})")
        # what killed builds left, and a file in its place
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        if folder.is_file():
            folder.unlink()
        with atomic_folder(folder) as aside, tempfile.TemporaryDirectory(dir=aside) as work:
            report = _fill(aside, recipe, checks, Path(work))
            # what was read must be what `describe` says
            described, before = when
            if _content(recipe) != described["content"]:
                raise sources.changed(recipe.names)
            refuse_changed([recipe.split], before)
            seal(aside, {"made from": described, **report})


@contextlib.contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Generator[None]:
    place = cache_folder() / "locks" / f"{folder.name}.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{folder}: another process is tokenising the same data; waiting for it (lock {place})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fill(folder: Path, recipe: Recipe, checks: Checks, work: Path) -> dict[str, Any]:
    """Read, group, tokenise and check in one pass; the trees and prompts go to files, the reports are returned."""
    data, half, reports, streams = recipe.data, recipe.split.half, list[ReadReport](), Streams()
    grouped: list[Iterator[PromptTree]] = []
    for number, source in enumerate(recipe.split.sources):
        (work / str(number)).mkdir()
        reports.append(ReadReport(source.path, data.format_of(source)))
        grouped.append(group(source, data, half, work / str(number), reports[-1], sees=recipe.sight is not None))
    need_prompts(reports, recipe.split, data)
    waiting: deque[PromptTree] = deque()
    token_report = TokenReport()

    def texts() -> Iterator[PromptTree]:
        for tree in write_prompts(folder, (tree for trees in grouped for tree in trees)):
            waiting.append(tree)
            yield tree

    def written() -> Iterator[PromptTree]:
        """The trees as text, each once its tokens are written."""
        how = (recipe.tokenizer, recipe.tokens, recipe.end_ids, data.bad_rows, token_report, recipe.sight)
        for _ in write_trees(folder, tokenized(texts(), *how), streams):
            while waiting:
                yield waiting.popleft()
        yield from waiting

    findings = [finding._asdict() for finding in checks.split(written(), token_report)]
    read, tokens = asdict(joined(reports)), asdict(token_report)
    return {"read": read, "tokens": tokens, "findings": findings, **streams.notes()._asdict()}


def group(
    source: SourceConfig, config: DataConfig, half: Half, folder: Path, report: ReadReport, *, sees: bool = False
) -> Iterator[PromptTree]:
    """Read a source into an empty folder; the trees of its prompts, in the order of first rows, are then made one by one.

    Raises DataError as `read` does.
    """
    database = sqlite3.connect(folder / "rows.db", isolation_level=None)
    # nothing of it outlives this process
    database.executescript("pragma journal_mode = off; pragma synchronous = off; " + _TABLES)
    database.execute("begin")
    found = (
        (n, sha(tree_key(said))[:32], json.dumps(row, default=str))
        for n, row, said in judged(source, config, half, report, sees=sees)
    )
    database.executemany("insert into rows values (?, ?, ?)", found)
    database.execute("insert into prompts select min(number), prompt from rows group by prompt")
    database.execute("commit")

    def trees() -> Iterator[PromptTree]:
        with contextlib.closing(database):
            found = database.execute(
                "select first, number, row from prompts cross join rows using (prompt) order by first, number"
            )
            for _, rows in groupby(found, key=itemgetter(0)):
                said = [(number, judge(json.loads(row), report.format, source.weight)) for _, number, row in rows]
                yield grow(said, config.rules, source.path, report)

    return trees()


class Stored(Sequence[Item], Generic[Item]):
    """What lies in an Arrow file, as `read(record batch)` makes it; what is not asked for stays on the disk.

    outline: the same without what takes long to make. noted: of trees what `Streams` says.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[_RecordBatch], Iterator[Item]],
        outline: Callable[[_RecordBatch], Iterator[Item]] | None = None,
        noted: Notes | None = None,
    ) -> None:
        self._batches, self._read, self._outline = pa.ipc.open_file(pa.memory_map(str(path))), read, outline or read
        self.noted = noted or Notes((), ())
        last = self._batches.num_record_batches - 1
        self._len = last * WINDOW + self._batches.get_batch(last).num_rows if last >= 0 else 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Item]:
        return self._each(self._read)

    def outlines(self) -> Iterator[Item]:
        """Every item without what takes long to make."""
        return self._each(self._outline)

    def _each(self, read: Callable[[_RecordBatch], Iterator[Item]]) -> Iterator[Item]:
        for number in range(self._batches.num_record_batches):
            yield from read(self._batches.get_batch(number))

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._len))]
        number, place = divmod(range(self._len)[index], WINDOW)
        return next(self._read(self._batches.get_batch(number).slice(place, 1)))


def write_prompts(folder: Path, texts: Iterable[PromptTree]) -> Iterator[PromptTree]:
    """Write the prompt of every tree, and pass the tree on."""

    def columns(window: Sequence[PromptTree]) -> list[Any]:
        return [[t.source for t in window], [t.rows[0] for t in window], [json.dumps(t.prompt) for t in window]]

    return _written(folder / _PROMPTS, _PROMPT_SCHEMA, texts, columns)


def write_trees(folder: Path, trees: Iterable[TokenTree], streams: Streams) -> Iterator[TokenTree]:
    """Write every tree, take it into the digests, and pass it on."""

    def columns(window: Sequence[TokenTree]) -> list[Any]:
        ids, lengths, paths, judgments, pictures, places = found = encode(window)
        streams.add(found)
        ends = np.concatenate([[0], np.cumsum(paths)])
        tokens = np.concatenate([[0], np.cumsum(lengths)])[ends]
        return [
            pa.ListArray.from_arrays(pa.array(tokens.astype(np.int32)), pa.array(ids)),
            pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(lengths)),
            judgments,
            [tree.source for tree in window],
            [tree.row for tree in window],
            [tree.first_response for tree in window],
            pictures,
            places,
        ]

    return _written(folder / _TREES, _TREE_SCHEMA, trees, columns)


def _written(
    path: Path, schema: Any, items: Iterable[Item], columns: Callable[[Sequence[Item]], list[Any]]
) -> Iterator[Item]:
    iterator = iter(items)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as out:
        while window := list(islice(iterator, WINDOW)):
            arrays = [pa.array(column, kind) for column, kind in zip(columns(window), schema.types, strict=True)]
            out.write_batch(pa.record_batch(arrays, schema=schema))
            yield from window


def seal(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the report, and last of all the hashes of everything."""
    (folder / _REPORT).write_text(json.dumps(report, indent=1), "utf-8")
    hashes = {name: file_hash(folder / name) for name in (_TREES, _PROMPTS, _REPORT)}
    (folder / _SEAL).write_text(json.dumps(hashes), "utf-8")


def open_cache(folder: Path) -> Prepared | None:
    """What `seal` left there; None when there is nothing, or when it is not what was written."""
    try:
        hashes = json.loads((folder / _SEAL).read_text("utf-8"))
        if any(file_hash(folder / name) != hashes[name] for name in (_TREES, _PROMPTS, _REPORT)):
            return None
        report = json.loads((folder / _REPORT).read_text("utf-8"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    findings = [Finding(**finding) for finding in report["findings"]]
    findings = [f._replace(rows=tuple(map(tuple, f.rows)), examples=tuple(f.examples)) for f in findings]
    noted = Notes(tuple(report["digests"]), tuple(report["extremes"]))
    trees, texts = stored_trees(folder, noted), Stored(folder / _PROMPTS, _prompts)
    return Prepared(trees, texts, report["read"], report["tokens"], findings)


def stored_trees(folder: Path, noted: Notes) -> Stored[TokenTree]:
    """The token trees of a folder."""
    return Stored(folder / _TREES, _trees, _outlines, noted)


def _prompts(batch: _RecordBatch) -> Iterator[PromptTree]:
    for source, row, prompt in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        value: Text = json.loads(prompt)
        yield PromptTree(value if isinstance(value, str) else tuple(value), (), (), (row,), source)


def _trees(batch: _RecordBatch) -> Iterator[TokenTree]:
    ids, lengths = (batch.column(name).flatten().to_numpy() for name in ("ids", "lengths"))
    stops = np.cumsum(lengths, dtype=np.int64)
    # one path at a time becomes Python's numbers, so memory holds a tree of them
    paths = (tuple(ids[start:stop].tolist()) for start, stop in zip(stops - lengths, stops, strict=True))
    for prompt, outline in zip(paths, _outlines(batch), strict=False):
        responses = tuple(islice(paths, len(outline.response_ids)))
        yield replace(outline, prompt_ids=prompt, response_ids=responses)


def _outlines(batch: _RecordBatch) -> Iterator[TokenTree]:
    """The trees of a batch with no token in their prompt and responses."""
    for judgments, source, row, first, *seen in zip(*(column.to_pylist() for column in batch.columns[2:]), strict=True):
        complete, comparisons, ties, thumbs = _judged(judgments)
        empty = ((),) * len(complete)
        pictures, picture_id = pictures_of(*seen)
        yield TokenTree((), empty, complete, comparisons, first, row, ties, thumbs, source, pictures, picture_id)


@lru_cache(4096)
def _judged(
    text: str,
) -> tuple[tuple[bool, ...], tuple[Comparison, ...], tuple[Comparison, ...], tuple[Thumb, ...]]:
    """Most trees are judged alike (one pair), so few texts are parsed."""
    complete, comparisons, ties, thumbs = json.loads(text)
    compared = [
        tuple(Comparison(tuple(order), weight, tuple(gaps), label) for order, weight, gaps, label in each)
        for each in (comparisons, ties)
    ]
    return tuple(complete), compared[0], compared[1], tuple(Thumb(*thumb) for thumb in thumbs)
