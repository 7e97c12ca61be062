"""One part of the data, ready to train on: in memory, or in a cache that is built once and reused.

In: a source, sections [data] and [tokens], a tokenizer. Out: Part. Small sources are read and tokenised in memory;
large ones (data.cache) go through files, with the same result. Next: data.py.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from favor import data as data_package
from favor.data import cache, sources
from favor.data.group import Joined, group
from favor.data.read import DataConfig, ReadReport, Wanted, joined, read_part
from favor.data.tokenize import TokensConfig, tokenize, tokenized
from favor.data.types import PromptTree, Text, TokenTree
from favor.errors import DataError
from favor.lint import brief as lint
from favor.ranks import World, barrier
from favor.run import atomic_folder, cache_folder

# From here on data.cache = "auto" keeps token ids in a file.
_LARGE = 50 * 1024**2
_MEANINGLESS = {"train", "sources", "eval", "eval_split", "cache"}
Stamps: TypeAlias = list[list[tuple[str, int, int, int, int, int]]]


@dataclass(frozen=True)
class Part:
    """Token trees, the prompts they came from (by source and row, and as trees to compare parts by), reports, findings."""

    trees: Sequence[TokenTree]
    prompts: Mapping[tuple[str, int], Text]
    texts: Sequence[PromptTree]
    read: Mapping[str, Any]
    tokens: Mapping[str, Any]
    findings: Sequence[lint.Finding]


class Recipe(NamedTuple):
    """What a part is made from."""

    part: Wanted
    data: DataConfig
    tokens: TokensConfig
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]

    @property
    def names(self) -> str:
        """The sources, for messages."""
        return ", ".join(source.path for source in self.part.sources)


def prepare(wanted: Recipe, world: World, say: Callable[[str], None]) -> Part:
    """The part, from the cache where that is wanted. Raises DataError as reading and tokenising do."""
    if not _large(wanted):
        return _in_memory(wanted)
    try:
        found = _cached(wanted, world, say)
    except OSError as error:
        raise DataError(
            f"{error.filename or cache_folder()}: the token cache cannot be written ({error.strerror or error}); make room, "
            "set FAVOR_CACHE to another folder, or data.cache=false"
        ) from None
    report = found.report
    findings = [lint.Finding(**finding)._replace(rows=tuple(finding["rows"])) for finding in report["findings"]]
    texts = cache.PromptsAlone(found.prompts)
    return Part(found.trees, found.prompts, texts, report["read"], report["tokens"], findings)


def stamps_of(parts: Sequence[Wanted]) -> Stamps:
    """What the file system says of every local file of the parts; a write changes it, also one that is taken back."""
    return [sources.stamps(sources.local_files(source.path) or ()) for part in parts for source in part.sources]


def refuse_changed(parts: Sequence[Wanted], before: Stamps) -> None:
    """Raises DataError when the files of the parts are not what they were at `before`."""
    if stamps_of(parts) != before:
        raise sources.changed(", ".join(dict.fromkeys(source.path for part in parts for source in part.sources)))


def _cached(wanted: Recipe, world: World, say: Callable[[str], None]) -> cache.Cached:
    before = stamps_of([wanted.part])
    described = describe(wanted)
    folder = cache_folder() / "tokens" / _sha(json.dumps(described, sort_keys=True))
    found = cache.open_cache(folder)
    if found is None and world.is_main:
        with _alone(folder, say):
            # another process may have built it meanwhile
            found = cache.open_cache(folder)
            if found is None:
                damaged = "; what was there is damaged" if folder.exists() else ""
                say(f"{wanted.names}: tokenising into {folder} (once{damaged})")
                _build(wanted, described, before, folder)
    barrier(world)
    found = found or cache.open_cache(folder)
    if found is None:
        raise DataError(f"{folder}: the token cache is not there or damaged on this machine; set data.cache=false")
    return found


@contextlib.contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Generator[None]:
    """One process after the other builds a cache folder; whoever waits is told so."""
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


def describe(wanted: Recipe) -> dict[str, Any]:
    """Everything the token ids depend on: content of the source, settings, tokenizer, template, code."""
    backend = json.loads(cast(PreTrainedTokenizerFast, wanted.tokenizer).backend_tokenizer.to_str())
    # what a call sets and the next one changes
    backend |= {"truncation": None, "padding": None}
    special = {key: str(value) for key, value in wanted.tokenizer.special_tokens_map.items()}
    code = "".join(
        path.read_text("utf-8") for folder in data_package.__path__ for path in sorted(Path(folder).rglob("*.py"))
    )
    return {
        "half": wanted.part.half,
        "sources": [source.model_dump(mode="json") for source in wanted.part.sources],
        "content": _content(wanted),
        "data": wanted.data.model_dump(mode="json", exclude=_MEANINGLESS),
        "tokens": wanted.tokens.model_dump(mode="json"),
        "tokenizer": _sha(json.dumps(backend, sort_keys=True)),
        "special tokens": special,
        "template": _sha(json.dumps(wanted.tokenizer.chat_template)),
        "end ids": sorted(wanted.end_ids),
        "code": _sha(code),
        "versions": {name: version(name) for name in ("tokenizers", "transformers")},
    }


def _content(wanted: Recipe) -> list[list[list[str]]]:
    return [
        sources.identity(source.path, source.split or wanted.data.split, streaming=wanted.data.streaming)
        for source in wanted.part.sources
    ]


def _large(wanted: Recipe) -> bool:
    if wanted.data.cache != "auto":
        return wanted.data.cache
    return wanted.data.streaming or sum(sources.size(source.path) or 0 for source in wanted.part.sources) > _LARGE


def _in_memory(wanted: Recipe) -> Part:
    texts, read_report = read_part(wanted.part, wanted.data)
    trees, report = tokenize(texts, wanted.tokenizer, wanted.tokens, wanted.end_ids, wanted.data.bad_rows)
    prompts = {(tree.source, tree.rows[0]): tree.prompt for tree in texts}
    findings = [*lint.lint(texts), *lint.lint_tokens(report)]
    return Part(trees, prompts, texts, read_report.as_json(), report.as_json(), findings)


def _build(wanted: Recipe, described: Mapping[str, Any], before: Stamps, folder: Path) -> None:
    """Read, group, tokenise and check through files; the folder appears whole or not at all.

    Raises DataError when what was read need not be what `described` says.
    """
    data = wanted.data
    _clear(folder)
    with atomic_folder(folder) as aside, tempfile.TemporaryDirectory(dir=aside) as work:
        texts, read_report = _grouped(wanted, Path(work))
        trees, report = tokenized(texts, wanted.tokenizer, wanted.tokens, wanted.end_ids, data.bad_rows)
        cache.write_trees(aside, trees)
        cache.write_prompts(aside, texts)
        findings = [finding._asdict() for finding in (*lint.lint(texts), *lint.lint_tokens(report))]
        reports = {"read": read_report.as_json(), "tokens": report.as_json(), "findings": findings}
        if _content(wanted) != described["content"]:
            raise sources.changed(wanted.names)
        refuse_changed([wanted.part], before)
        cache.seal(aside, {"made from": described, **reports})


def _clear(folder: Path) -> None:
    """Remove what killed builds of this folder left, and a file in its place. The caller holds its lock."""
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    if folder.is_file():
        folder.unlink()


def _grouped(wanted: Recipe, work: Path) -> tuple[Sequence[PromptTree], ReadReport]:
    """The part's trees in files, and the report that reading in memory gives."""
    found: list[Sequence[PromptTree]] = []
    reports: list[ReadReport] = []
    for number, source in enumerate(wanted.part.sources):
        folder = work / str(number)
        folder.mkdir()
        trees, seen = group(source, wanted.data, wanted.part.half, folder)
        found.append(trees)
        reports.append(seen.report(source.path, wanted.part.half))
    return Joined(found), joined(reports, wanted.part, wanted.data)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
