"""A split of the data in a cache that is built once and reused: for sources larger than memory.

In: a Recipe. Out: Prepared, equal to what is made in memory. Next: cache.py.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerFast

from favor import data as data_package
from favor.data import cache, sources
from favor.data.group import Joined, group
from favor.data.prepare import Checks, Prepared, Recipe, refuse_changed, stamps_of
from favor.data.read import ReadReport, joined
from favor.data.tokenize import tokenized
from favor.data.types import Finding, PromptTree
from favor.errors import DataError
from favor.run import atomic_folder, cache_folder

_MEANINGLESS = {"train", "sources", "eval", "eval_split", "cache"}


def prepare_split(
    recipe: Recipe, checks: Checks, say: Callable[[str], None], on_main: Callable[[Callable[[], object]], None]
) -> Prepared:
    """The split, from its cache. Raises DataError as reading and tokenising do, and when the cache cannot be written."""
    try:
        found = _cached(recipe, checks, say, on_main)
    except OSError as error:
        raise DataError(
            f"{error.filename or cache_folder()}: the token cache cannot be written ({error.strerror or error}); make room, "
            "set FAVOR_CACHE to another folder, or data.cache=false"
        ) from None
    report = found.report
    findings = [
        Finding(f["severity"], f["kind"], f["message"], tuple(map(tuple, f["rows"]))) for f in report["findings"]
    ]
    texts = cache.PromptsAlone(found.prompts)
    return Prepared(found.trees, found.prompts, texts, report["read"], report["tokens"], findings)


def _cached(
    recipe: Recipe, checks: Checks, say: Callable[[str], None], on_main: Callable[[Callable[[], object]], None]
) -> cache.Cached:
    before = stamps_of([recipe.split])
    described = describe(recipe)
    folder = cache_folder() / "tokens" / _sha(json.dumps(described, sort_keys=True))
    found = cache.open_cache(folder)

    def build() -> None:
        if found is not None:
            return
        with _alone(folder, say):
            # another process may have built it meanwhile
            if cache.open_cache(folder) is None:
                damaged = "; what was there is damaged" if folder.exists() else ""
                say(f"{recipe.names}: tokenising into {folder} (once{damaged})")
                _build(recipe, checks, (described, before), folder)

    on_main(build)
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


def describe(recipe: Recipe) -> dict[str, Any]:
    """Everything the token ids depend on: content of the source, settings, tokenizer, template, code."""
    backend = json.loads(cast(PreTrainedTokenizerFast, recipe.tokenizer).backend_tokenizer.to_str())
    # what a call sets and the next one changes
    backend |= {"truncation": None, "padding": None}
    special = {key: str(value) for key, value in recipe.tokenizer.special_tokens_map.items()}
    code = "".join(
        path.read_text("utf-8") for folder in data_package.__path__ for path in sorted(Path(folder).rglob("*.py"))
    )
    return {
        "half": recipe.split.half,
        "sources": [source.model_dump(mode="json") for source in recipe.split.sources],
        "content": _content(recipe),
        "data": recipe.data.model_dump(mode="json", exclude=_MEANINGLESS),
        "tokens": recipe.tokens.model_dump(mode="json"),
        "tokenizer": _sha(json.dumps(backend, sort_keys=True)),
        "special tokens": special,
        "template": _sha(json.dumps(recipe.tokenizer.chat_template)),
        "end ids": sorted(recipe.end_ids),
        "code": _sha(code),
        "versions": {name: version(name) for name in ("tokenizers", "transformers")},
    }


def _content(recipe: Recipe) -> list[list[list[str]]]:
    return [
        sources.identity(source.path, source.split or recipe.data.split, streaming=recipe.data.streaming)
        for source in recipe.split.sources
    ]


def _build(
    recipe: Recipe, checks: Checks, when: tuple[Mapping[str, Any], list[list[sources.Stamp]]], folder: Path
) -> None:
    """Read, group, tokenise and check through files; the folder appears whole or not at all.

    Raises DataError when what was read need not be what `described` says.
    """
    described, before = when
    data = recipe.data
    _clear(folder)
    with atomic_folder(folder) as aside, tempfile.TemporaryDirectory(dir=aside) as work:
        texts, read_report = _grouped(recipe, Path(work))
        trees, report = tokenized(texts, recipe.tokenizer, recipe.tokens, recipe.end_ids, data.bad_rows)
        cache.write_trees(aside, trees)
        cache.write_prompts(aside, texts)
        findings = [finding._asdict() for finding in checks.split(texts, report)]
        reports = {"read": read_report.as_json(), "tokens": report.as_json(), "findings": findings}
        if _content(recipe) != described["content"]:
            raise sources.changed(recipe.names)
        refuse_changed([recipe.split], before)
        cache.seal(aside, {"made from": described, **reports})


def _clear(folder: Path) -> None:
    """Remove what killed builds of this folder left, and a file in its place. The caller holds its lock."""
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    if folder.is_file():
        folder.unlink()


def _grouped(recipe: Recipe, work: Path) -> tuple[Sequence[PromptTree], ReadReport]:
    """The part's trees in files, and the report that reading in memory gives."""
    found: list[Sequence[PromptTree]] = []
    reports: list[ReadReport] = []
    for number, source in enumerate(recipe.split.sources):
        folder = work / str(number)
        folder.mkdir()
        trees, seen = group(source, recipe.data, recipe.split.half, folder)
        found.append(trees)
        reports.append(seen.report(source.path, recipe.split.half))
    return Joined(found), joined(reports, recipe.split, recipe.data)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
