"""The main job on real input: SFT, DPO, held-out evaluation and a report, on the embedded model and data.

In: DemoConfig. Out: run folders `sft` and `dpo` and a page. Task: write a one-line review of a film; a
fresh quote is preferred to a rotten one of the same film. Next: train/preference.py.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from rich.console import Console

from favor.config import STRICT, Seed
from favor.demo.embedded import model_folder, review_files
from favor.eval.evaluate import EvalConfig, evaluate
from favor.report.collect import collect
from favor.report.page import write_page
from favor.report.table import figures_table
from favor.rewards.classifier import train_judge
from favor.run import RunFolder, cache_folder, make_folder
from favor.stop import StoppedError
from favor.train.preference import TrainConfig, train
from favor.train.session import Session
from favor.train.sft import SftConfig, sft


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
    open_session: Callable[[Path], Session],
    console: Console,
    progress: Callable[[str, int, int], None],
) -> None:
    """Run it all, print the table and name the page. Raises what its parts raise."""
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
    write_page([collect(root / "dpo")], page)
    console.print(f"report: {page}    ({time.monotonic() - began:.0f} s without downloads)")


def _recipe(config: DemoConfig, run: Path, model: Path, reviews: Path, lr: float) -> dict[str, Any]:
    """What SFT and DPO have in common."""
    return {
        "run": str(run),
        "seed": config.seed,
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(reviews / "train.jsonl"), "max_rows": config.pairs},
        "optim": {"lr": lr, "warmup_steps": 2},
        "train": {"batch_prompts": 8, "save_every": 0, "max_steps": config.max_steps},
    }


def dpo_recipe(config: DemoConfig, root: Path, reviews: Path) -> TrainConfig:
    """DPO from the model that SFT made, with the KL watched on samples."""
    recipe = _recipe(config, root / "dpo", RunFolder(root / "sft").model, reviews, config.lr)
    recipe["data"]["eval"] = str(reviews / "test.jsonl")
    recipe["loss"] = {"kind": "dpo", "beta": config.beta}
    recipe["watch"] = {"kl_every": 10, "kl_prompts": 8, "kl_tokens": 40}
    return TrainConfig.model_validate(recipe)


@contextlib.contextmanager
def _stopped(command: str, run: Path) -> Generator[None]:
    """The demo takes no resume=true, but the command that it ran does."""
    try:
        yield
    except StoppedError as error:
        told = f"stopped, with a checkpoint; finish this part with: favor {command} {run}/config.toml resume=true"
        raise StoppedError(told, error.exit_code - 128) from None
