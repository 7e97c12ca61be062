"""Token trees in memory-mapped Arrow files: tokenised once, reused while nothing they came from has changed.

In: a folder, and what reading and tokenising give. Out: Sequences that decode what is asked for. Who fills the folder
and when it may be reused is told in ../train/prepared.py. Next: digest.py.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
import pyarrow as pa

from favor.data.columns import WINDOW, Columns, decode, encode
from favor.data.types import PromptTree, Text, TokenTree
from favor.guard import file_hash

# pyarrow has no types
_RecordBatch: TypeAlias = Any
_TREES, _PROMPTS, _REPORT = "trees.arrow", "prompts.arrow", "report.json"
_SEAL = "hashes.json"
_TREE_SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("judgments", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("first_response", pa.int64()),
    ]
)
_PROMPT_SCHEMA = pa.schema([("row", pa.int64()), ("prompt", pa.string())])


class Cached(NamedTuple):
    """What a cache folder holds."""

    trees: "CachedTrees"
    prompts: "CachedPrompts"
    report: dict[str, Any]


class CachedTrees(Sequence[TokenTree]):
    """Token trees in an Arrow file; what is not asked for stays on the disk."""

    def __init__(self, path: Path) -> None:
        self._batches = pa.ipc.open_file(pa.memory_map(str(path)))
        last = self._batches.num_record_batches - 1
        self._len = last * WINDOW + self._batches.get_batch(last).num_rows if last >= 0 else 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[TokenTree]:
        for number in range(self._batches.num_record_batches):
            batch = self._batches.get_batch(number)
            yield from (_tree(batch, i) for i in range(batch.num_rows))

    @overload
    def __getitem__(self, index: int) -> TokenTree: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenTree]: ...
    def __getitem__(self, index: int | slice) -> TokenTree | list[TokenTree]:
        if isinstance(index, slice):
            return [self._one(i) for i in range(*index.indices(self._len))]
        return self._one(range(self._len)[index])

    def columns(self) -> Iterator[Columns]:
        """Everything, a window of trees at a time."""
        for number in range(self._batches.num_record_batches):
            batch = self._batches.get_batch(number)
            paths = np.diff(batch.column("lengths").offsets.to_numpy())
            yield Columns(_flat(batch, "ids"), _flat(batch, "lengths"), paths, batch.column("judgments").to_pylist())

    def _one(self, i: int) -> TokenTree:
        number, place = divmod(i, WINDOW)
        return _tree(self._batches.get_batch(number), place)


class CachedPrompts(Mapping[tuple[str, int], Text]):
    """(source, row number) -> prompt text, for the first row of every prompt that was read.

    counts: how many prompts came from each source; they lie in that order, by row.
    """

    def __init__(self, path: Path, counts: Sequence[tuple[str, int]]) -> None:
        self._batches = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = range(self._batches.num_record_batches)
        rows = [self._batches.get_batch(n).column("row").to_numpy() for n in batches]
        self.rows = np.concatenate(rows) if rows else np.empty(0, np.int64)
        self._ends = np.cumsum([count for _, count in counts])
        self._names = [name for name, _ in counts]
        self._spans = {
            name: (int(end) - count, int(end)) for (name, count), end in zip(counts, self._ends, strict=True)
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return (self.key(i) for i in range(len(self)))

    def __getitem__(self, key: tuple[str, int]) -> Text:
        start, stop = self._spans.get(key[0], (0, 0))
        place = start + int(np.searchsorted(self.rows[start:stop], key[1]))
        if place == stop or self.rows[place] != key[1]:
            raise KeyError(key)
        return self.at(place)

    def key(self, place: int) -> tuple[str, int]:
        """(source, row) of the prompt at a place."""
        return self._names[int(np.searchsorted(self._ends, place, side="right"))], int(self.rows[place])

    def at(self, place: int) -> Text:
        """The prompt at a place."""
        number, within = divmod(place, WINDOW)
        return _text(json.loads(self._batches.get_batch(number).column("prompt")[within].as_py()))


class PromptsAlone(Sequence[PromptTree]):
    """Trees of nothing but their prompts: what is compared between the parts of a data set."""

    def __init__(self, prompts: CachedPrompts) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> PromptTree: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptTree]: ...
    def __getitem__(self, index: int | slice) -> PromptTree | list[PromptTree]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        source, row = self._prompts.key(place)
        return PromptTree(self._prompts.at(place), (), (), (row,), source)


def write_prompts(folder: Path, texts: Iterable[PromptTree]) -> None:
    """The prompts, in the order of their rows."""
    with pa.OSFile(str(folder / _PROMPTS), "wb") as file, pa.ipc.new_file(file, _PROMPT_SCHEMA) as out:
        for window in _windows(texts):
            rows, prompts = [tree.rows[0] for tree in window], [json.dumps(tree.prompt) for tree in window]
            out.write_batch(pa.record_batch([pa.array(rows, pa.int64()), pa.array(prompts)], schema=_PROMPT_SCHEMA))


def write_trees(folder: Path, trees: Iterable[TokenTree]) -> None:
    """The token trees, as they come."""
    with pa.OSFile(str(folder / _TREES), "wb") as file, pa.ipc.new_file(file, _TREE_SCHEMA) as out:
        for window in _windows(trees):
            out.write_batch(_batch(window))


def seal(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the report, and last of all the hashes of everything."""
    (folder / _REPORT).write_text(json.dumps(report, indent=1), "utf-8")
    hashes = {name: file_hash(folder / name) for name in (_TREES, _PROMPTS, _REPORT)}
    (folder / _SEAL).write_text(json.dumps(hashes), "utf-8")


def open_cache(folder: Path) -> Cached | None:
    """What `seal` left there; None when there is nothing, or when it is not what was written."""
    try:
        hashes = json.loads((folder / _SEAL).read_text("utf-8"))
        if any(file_hash(folder / name) != hashes[name] for name in (_TREES, _PROMPTS, _REPORT)):
            return None
        report = json.loads((folder / _REPORT).read_text("utf-8"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    found = report["read"]["sources"] or [report["read"]]
    counts = [(each["source"], each["num_trees"]) for each in found]
    return Cached(CachedTrees(folder / _TREES), CachedPrompts(folder / _PROMPTS, counts), report)


def _windows(items: Iterable[Any]) -> Iterator[list[Any]]:
    window: list[Any] = []
    for item in items:
        window.append(item)
        if len(window) == WINDOW:
            yield window
            window = []
    if window:
        yield window


def _batch(trees: Sequence[TokenTree]) -> _RecordBatch:
    columns = encode(trees)
    ends = np.concatenate([[0], np.cumsum(columns.paths)])
    tokens = np.concatenate([[0], np.cumsum(columns.lengths)])[ends]
    arrays = [
        pa.ListArray.from_arrays(pa.array(tokens.astype(np.int32)), pa.array(columns.ids)),
        pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(columns.lengths)),
        pa.array(columns.judgments, pa.string()),
        pa.array([tree.source for tree in trees], pa.string()),
        pa.array([tree.row for tree in trees], pa.int64()),
        pa.array([tree.first_response for tree in trees], pa.int64()),
    ]
    return pa.record_batch(arrays, schema=_TREE_SCHEMA)


def _tree(batch: _RecordBatch, i: int) -> TokenTree:
    return decode(
        _share(batch, "ids", i),
        _share(batch, "lengths", i),
        batch.column("judgments")[i].as_py(),
        (batch.column("source")[i].as_py(), batch.column("row")[i].as_py()),
        batch.column("first_response")[i].as_py(),
    )


def _share(batch: _RecordBatch, name: str, i: int) -> list[int]:
    return batch.column(name)[i].values.to_numpy().tolist()


def _flat(batch: _RecordBatch, name: str) -> np.ndarray:
    return batch.column(name).flatten().to_numpy()


def _text(value: Any) -> Text:
    return value if isinstance(value, str) else tuple(value)
