"""The main job on real input: SFT, DPO, held-out evaluation and a report, on the embedded model and data.

In: DemoConfig. Out: run folders `sft` and `dpo` and a page. Task: write a one-line review of a film; a
fresh quote is preferred to a rotten one of the same film. Next: train/preference.py.
"""

import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, Field
from rich.console import Console

from favor.config import STRICT, Seed
from favor.data.read import DataConfig
from favor.demo.embedded import cache_folder, model_folder, review_files
from favor.eval.evaluate import EvalConfig, evaluate
from favor.losses import LossConfig
from favor.model.load import ModelConfig
from favor.model.sample import SampleConfig
from favor.report.collect import collect
from favor.report.page import write_page
from favor.report.table import figures_table
from favor.rewards.classifier import train_judge
from favor.run import RunFolder, make_folder
from favor.train.loop import LoopConfig
from favor.train.optim import OptimConfig
from favor.train.preference import TrainConfig, WatchConfig, train
from favor.train.session import Session
from favor.train.sft import SftConfig, sft


class DemoConfig(BaseModel):
    """Settings of `favor demo`; the defaults are what README reports. Without `run` a fresh folder runs/demo-N is taken."""

    model_config = STRICT
    run: str | None = None
    seed: Seed = 0
    pairs: int = Field(default=200, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    sft_lr: float = Field(default=1e-4, gt=0)
    lr: float = Field(default=3e-5, gt=0)
    beta: float = Field(default=0.1, gt=0)
    test_pairs: int = Field(default=80, ge=1)
    prompts: int = Field(default=20, ge=1)
    samples_per_prompt: int = Field(default=4, ge=1)


def demo(
    config: DemoConfig,
    open_session: Callable[[Path], Session],
    console: Console,
    progress: Callable[[str, int, int], None],
) -> None:
    """Run it all, print the table and name the page. Raises what its parts raise."""
    cache = cache_folder()
    root = Path(config.run) if config.run else _free_folder(Path("runs"))
    model, reviews = model_folder(cache, console.print), review_files(cache, console.print)
    make_folder(root)
    began = time.monotonic()
    console.rule("1. supervised fine-tuning on the preferred quotes")
    sft(_sft_recipe(config, root, model, reviews), open_session)
    console.rule("2. DPO")
    train(_dpo_recipe(config, root, reviews), open_session)
    console.rule("3. held-out films")
    figures = evaluate_run(config, root / "dpo", reviews, console, progress)
    console.print(figures_table(figures))
    page = RunFolder(root / "dpo").report
    write_page([collect(root / "dpo")], page)
    console.print(f"report: {page}    ({time.monotonic() - began:.0f} s without downloads)")


def evaluate_run(
    config: DemoConfig, run: Path, reviews: Path, console: Console, progress: Callable[[str, int, int], None]
) -> dict[str, object]:
    """Held-out figures, the samples scored by a judge trained on films that neither training nor test saw."""
    judge = train_judge(reviews / "classifier.jsonl")
    console.print(f"judge: TF-IDF + logistic regression, accuracy {judge.accuracy:.3f} on films it was not trained on")
    settings = EvalConfig(
        run=str(run),
        seed=config.seed,
        max_rows=config.test_pairs,
        sample_prompts=config.prompts,
        samples_per_prompt=config.samples_per_prompt,
        sample=SampleConfig(max_new_tokens=40, batch=80),
    )
    return evaluate(settings, console.print, progress, ("sentiment", judge.score))


def _sft_recipe(config: DemoConfig, root: Path, model: Path, reviews: Path) -> SftConfig:
    return SftConfig(
        run=str(root / "sft"),
        seed=config.seed,
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(train=str(reviews / "train.jsonl"), max_rows=config.pairs),
        optim=OptimConfig(lr=config.sft_lr, warmup_steps=2),
        train=LoopConfig(batch_prompts=8, save_every=0, max_steps=config.max_steps),
    )


def _dpo_recipe(config: DemoConfig, root: Path, reviews: Path) -> TrainConfig:
    return TrainConfig(
        run=str(root / "dpo"),
        seed=config.seed,
        model=ModelConfig(path=str(RunFolder(root / "sft").model), dtype="float32"),
        data=DataConfig(train=str(reviews / "train.jsonl"), eval=str(reviews / "test.jsonl"), max_rows=config.pairs),
        loss=LossConfig(name="sigmoid", beta=config.beta),
        optim=OptimConfig(lr=config.lr, warmup_steps=2),
        train=LoopConfig(batch_prompts=8, save_every=0, max_steps=config.max_steps),
        watch=WatchConfig(kl_every=10, kl_prompts=8, kl_tokens=40),
    )


def _free_folder(parent: Path) -> Path:
    number = 1
    while (parent / f"demo-{number}").exists():
        number += 1
    return parent / f"demo-{number}"
