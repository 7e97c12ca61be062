"""A split of the data: what it is made from, what becomes of it, and one identity for what it holds.

In: sections [data] and [tokens], a tokenizer; token trees. Out: Splits; hashes of trees as flat columns, the same in memory
and in a cache, for which memory does not grow with the data. Next: store.py.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase

from favor.data import sources
from favor.data.read import DataConfig, SplitSpec
from favor.data.sight import Sight
from favor.data.tokenize import TokenReport, TokensConfig
from favor.data.types import Finding, Picture, PromptTree, Text, TokenTree
from favor.errors import DataError

# Trees turned into columns at once.
WINDOW = 1024
# of some trees: all their ids int32 [tokens], the lengths of prompt and responses int32 [paths], paths of each tree
# int32 [trees] (1 + responses), what is said of the responses as JSON [trees], and of pictures what they are and where their
# files lie, as JSON [trees] ("" without any)
Columns: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, list[str], list[str], list[str]]
# runs a function in the main process while the others wait
OnMain: TypeAlias = Callable[[Callable[[], object]], None]


class Checks(NamedTuple):
    """What looks for faults in the data: of a split, and of the prompts of two splits.

    The trees of a split can be gone through once; its token report is whole only then.
    """

    split: Callable[[Iterable[PromptTree], TokenReport], Sequence[Finding]]
    leaks: Callable[[Iterable[PromptTree], Iterable[PromptTree]], Sequence[Finding]]


class Recipe(NamedTuple):
    """What a split is made from."""

    split: SplitSpec
    data: DataConfig
    tokens: TokensConfig
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    # of a model that reads pictures
    sight: Sight | None = None

    @property
    def names(self) -> str:
        """The sources, for messages."""
        return ", ".join(source.path for source in self.split.sources)


@dataclass(frozen=True)
class Prepared:
    """One split: token trees; what they came from, as trees of nothing but their prompts; reports, findings."""

    trees: Sequence[TokenTree]
    prompts: Sequence[PromptTree]
    read: Mapping[str, Any]
    tokens: Mapping[str, Any]
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Splits:
    """Token trees of the training split and of the held-out one (empty when the recipe names none).

    prompts: of each split the prompts as text, in the order of its trees. report: what became of the rows, for data.json.
    """

    train: Sequence[TokenTree]
    eval: Sequence[TokenTree]
    prompts: Mapping[str, Sequence[PromptTree]]
    report: Mapping[str, Any]

    @property
    def by_name(self) -> dict[str, Sequence[TokenTree]]:
        """The splits that hold anything."""
        splits = {"train": self.train, "eval": self.eval}
        return {name: trees for name, trees in splits.items() if trees}

    @cached_property
    def identity(self) -> str:
        """A hash of every token id and comparison."""
        return hash_all({"train": self.train, "eval": self.eval})

    def prompts_of(self, name: str, trees: Sequence[TokenTree]) -> list[Text]:
        """The prompts of some trees of a split, as text."""
        wanted = {(tree.source, tree.row) for tree in trees}
        keyed = (((text.source, text.rows[0]), text.prompt) for text in self.prompts[name])
        # no further than the last of them
        found = dict(islice(((key, prompt) for key, prompt in keyed if key in wanted), len(wanted)))
        return [found[tree.source, tree.row] for tree in trees]

    def need_comparisons(self) -> None:
        """Raises DataError when a split holds no comparison."""
        for name, trees in {"train": self.train, "eval": self.eval}.items():
            if name in self.report and not any(tree.comparisons for tree in outlines(trees)):
                names = self.report[name]["read"]["source"]
                raise DataError(
                    f"{names}: no comparison left to train on; give chosen and rejected, a ranking or scores"
                )


def stamps_of(splits: Sequence[SplitSpec]) -> list[list[sources.Stamp]]:
    """What the file system says of every local file of the splits; a write changes it, also one that is taken back."""
    return [sources.stamps(sources.local_files(source.path) or ()) for split in splits for source in split.sources]


def refuse_changed(splits: Sequence[SplitSpec], before: list[list[sources.Stamp]]) -> None:
    """Raises DataError when the files of the splits are not what they were at `before`."""
    if stamps_of(splits) != before:
        raise sources.changed(", ".join(dict.fromkeys(source.path for split in splits for source in split.sources)))


class Notes(NamedTuple):
    """What would take a pass over all trees: hashes of ids, lengths, paths, comparisons, any pictures; places of some trees.

    extremes: the first with the longest path, with the longest prompt, with the longest response, with the largest id.
    """

    digests: tuple[str, ...]
    extremes: tuple[int, ...]


@runtime_checkable
class Noted(Protocol):
    """Trees in a file, with what was noted when they were written."""

    noted: Notes

    def outlines(self) -> Iterator[TokenTree]:
        """The trees without their tokens."""
        ...


class Streams:
    """A running hash of each column, so that it does not matter where windows are cut; and the trees with most of something."""

    def __init__(self) -> None:
        self._hashes = [hashlib.sha256() for _ in range(5)]
        self._pictured = False
        self._most = [(-1, 0)] * 4
        self._seen = 0

    def add(self, columns: Columns) -> None:
        """Take in some trees."""
        for stream, column in zip(self._hashes, columns[:3], strict=False):
            stream.update(np.ascontiguousarray(column).tobytes())
        for stream, texts in zip(self._hashes[3:], columns[3:], strict=False):
            stream.update("".join(text + "\n" for text in texts).encode())
        self._pictured |= any(columns[4])
        for i, values in enumerate(_extents(columns)):
            # of equals the first
            self._most[i] = max(self._most[i], (int(values.max()), -self._seen - int(values.argmax())))
        self._seen += len(columns[2])

    def notes(self) -> Notes:
        """Of all trees so far."""
        # without pictures none of them is a part of what the data is
        digests = tuple(stream.hexdigest() for stream in self._hashes[: 4 + self._pictured])
        return Notes(digests, tuple(sorted({-place for _, place in self._most})))


def _extents(columns: Columns) -> tuple[np.ndarray, ...]:
    """Of every tree: tokens of its longest path, of its prompt, of its longest response; its largest id."""
    ids, lengths, paths, *_ = columns
    first = np.cumsum(paths) - paths
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    prompts, responses = lengths[first], lengths.copy()
    responses[first] = 0
    longest = np.maximum.reduceat(responses, first)
    # one more, so that a last tree without tokens has a place to look at
    # below zero stands the id of a token that is read only
    return prompts + longest, prompts, longest, np.maximum.reduceat(np.append(np.maximum(ids, ~ids), 0), starts[first])


def extremes(trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
    """All trees, or of those in a file the few among which are the longest path, prompt and response and the largest id."""
    return [trees[i] for i in trees.noted.extremes] if isinstance(trees, Noted) else trees


def outlines(trees: Iterable[TokenTree]) -> Iterable[TokenTree]:
    """The trees for whoever reads nothing of their tokens: those in a file come without, which is faster."""
    return trees.outlines() if isinstance(trees, Noted) else trees


def hash_ids(splits: Mapping[str, Sequence[TokenTree]]) -> str:
    """A hash of every token id and picture of every split."""
    nothing = hashlib.sha256().hexdigest()
    found = {name: _digests(trees) for name, trees in splits.items()}
    return _whole({name: [*digests[:3], nothing, *digests[4:]] for name, digests in found.items()})


def hash_all(splits: Mapping[str, Sequence[TokenTree]]) -> str:
    """A hash of every token id, comparison and picture of every split."""
    return _whole({name: _digests(trees) for name, trees in splits.items()})


def _whole(digests: Mapping[str, list[str]]) -> str:
    lines = "".join("\n".join([name, *found, ""]) for name, found in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def _digests(trees: Sequence[TokenTree]) -> list[str]:
    if isinstance(trees, Noted):
        return list(trees.noted.digests)
    streams = Streams()
    for start in range(0, len(trees), WINDOW):
        streams.add(encode(trees[start : start + WINDOW]))
    return list(streams.notes().digests)


def encode(trees: Sequence[TokenTree]) -> Columns:
    """Trees -> columns."""
    paths = [path for tree in trees for path in (tree.prompt_ids, *tree.response_ids)]
    return (
        np.fromiter((i for path in paths for i in path), np.int32, sum(map(len, paths))),
        np.fromiter(map(len, paths), np.int32, len(paths)),
        np.fromiter((1 + len(tree.response_ids) for tree in trees), np.int32, len(trees)),
        [json.dumps([tree.complete, tree.comparisons, tree.ties, tree.thumbs]) for tree in trees],
        [json.dumps([tree.picture_id, *map(_content, tree.pictures)]) if tree.pictures else "" for tree in trees],
        [json.dumps([picture.path for picture in tree.pictures]) if tree.pictures else "" for tree in trees],
    )


def _content(picture: Picture) -> list[Any]:
    """What a picture is, wherever its file lies."""
    return [picture.digest, picture.height, picture.width, picture.tokens]


def pictures_of(said: str, places: str) -> tuple[tuple[Picture, ...], int]:
    """The pictures of a tree, and the id that stands for their parts; as `encode` wrote them."""
    if not said:
        return (), -1
    picture_id, *found = json.loads(said)
    paths = json.loads(places)
    pictures = (Picture(digest, path, *size) for (digest, *size), path in zip(found, paths, strict=True))
    return tuple(pictures), picture_id
