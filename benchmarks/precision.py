"""What model.dtype does to a run: trained in each, measured in float32; and how exactly each reads a trained policy.

    python benchmarks/precision.py [--seeds 0 1 2] [--out FOLDER] [--pairs 200] [--read 32]

The demo's start and pairs: SFT and DPO in float32, whose policy is read in every format on the first held-out pairs: margins,
log-ratios, the gradient of DPO's loss. Then DPO in every other format from the same start, order and seed, evaluated in float32
on 80 held-out pairs. Runs that are there are kept, so a stopped call goes on.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import favor
from favor.data.batches import build, plan
from favor.data.read import DataConfig, read
from favor.data.tokenize import TokensConfig, tokenize
from favor.data.types import TokenTree
from favor.demo import model_folder, review_files
from favor.model.layout import settle
from favor.model.load import ModelConfig, Policy, load_policy
from favor.model.logprobs import response_logps
from favor.model.room import memory_settings
from favor.run import RunFolder, cache_folder

FORMATS = ("float32", "bfloat16", "bfloat16x2")
BETA = 0.1
BUDGET = 1024
Reading = dict[str, Tensor]


def main() -> None:
    """Print the table of whole runs, then that of readings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/precision"), help="folder of all runs")
    parser.add_argument("--pairs", type=int, default=200, help="pairs to train on")
    parser.add_argument("--read", type=int, default=32, help="held-out pairs read in every format")
    parser.add_argument("--model", help="model folder; default the embedded one")
    args = parser.parse_args()
    memory_settings()
    files = review_files(cache_folder(), print)
    model = args.model or str(model_folder(cache_folder(), print))
    starts = {seed: started(model, files, args, seed) for seed in args.seeds}
    lines = [whole(start, files, args, seed, "float32") for seed, start in starts.items()]
    print(
        "| seed | model.dtype | margin | its error | log-ratio off, nats (bias) | log-prob off | gradient's cosine | its length |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for seed, start in starts.items():
        for line in readings(start, trained_at(args.out, seed, "float32"), files, args.read):
            print(f"| {seed} | {line}", flush=True)
    print(
        "\n| seed | model.dtype | accuracy | margin | loss of the last 5 steps |\n|---|---|---|---|---|",
        *lines,
        sep="\n",
    )
    for form in FORMATS[1:]:
        for seed, start in starts.items():
            print(whole(start, files, args, seed, form), flush=True)


def trained_at(out: Path, seed: int, form: str) -> Path:
    """The folder of a run."""
    return out / f"{form}-{seed}"


def started(model: str, files: Path, args: argparse.Namespace, seed: int) -> Path:
    """SFT on the preferred quotes, as the demo does; returns its model."""
    run = RunFolder(args.out / f"sft-{seed}")
    if not run.model.exists():
        favor.sft(
            model,
            str(files / "train.jsonl"),
            out=run.root,
            lr=1e-4,
            seed=seed,
            resume=run.config.exists(),
            **common(args),
        )
    return run.model


def common(args: argparse.Namespace) -> Mapping[str, Any]:
    """What every run has from the demo."""
    return {
        "dtype": "float32",
        "warmup": 2,
        "batch_prompts": 8,
        "data": {"max_rows": args.pairs},
        "save": {"every": 20},
        "max_tokens_per_pack": BUDGET,
    }


def whole(start: Path, files: Path, args: argparse.Namespace, seed: int, form: str) -> str:
    """A row: DPO in a format, its held-out figures in float32."""
    run = RunFolder(trained_at(args.out, seed, form))
    settings: dict[str, Any] = {**common(args), "dtype": form}
    if not run.model.exists():
        favor.train(
            str(start),
            str(files / "train.jsonl"),
            out=run.root,
            lr=3e-5,
            seed=seed,
            loss={"kind": "dpo", "beta": BETA},
            resume=run.config.exists(),
            **settings,
        )
    records = [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    figures = favor.evaluate(str(run.root), data=str(files / "test.jsonl"), max_rows=80, sample_prompts=0)
    accuracy, margin = figures["accuracy"], figures["margin"]
    return f"| {seed} | {form} | {accuracy} | {margin} | {statistics.fmean(losses[-5:]):.4f} |"


def readings(start: Path, end: Path, files: Path, count: int) -> list[str]:
    """Rows: a trained policy against its start in every format; float32 is the truth."""
    exact, lines = None, []
    for form in FORMATS:
        now = reading(start, RunFolder(end).model, files, count, form)
        exact = exact or now
        ratio, margin = now["end"] - now["start"], now["margin"].mean()
        off = ratio - (exact["end"] - exact["start"])
        here, there = now["gradient"].double(), exact["gradient"].double()
        cells = (
            form,
            f"{margin:+.4f}",
            f"{margin / exact['margin'].mean() - 1:+.2%}",
            f"{off.abs().mean():.3f} ({off.mean():+.3f})",
            f"{(now['end'] - exact['end']).abs().mean():.3f}",
            f"{here @ there / here.norm() / there.norm():.5f}",
            f"{here.norm() / there.norm() - 1:+.2%}",
        )
        lines.append(" | ".join(cells) + " |")
    return lines


def reading(start: Path, end: Path, files: Path, count: int, form: str) -> Reading:
    """Log-probs of both models [R], DPO's margins [P] and its gradient, all in a format."""
    reference, packs = opened(start, files, count, form)
    batches = [build(trees, reference.layout) for trees in packs]
    with torch.no_grad():
        before = [response_logps(reference, batch) for batch in batches]
    del reference
    policy, _ = opened(end, files, count, form)
    after: list[Tensor] = []
    margins: list[Tensor] = []
    for batch, old in zip(batches, before, strict=True):
        logps = response_logps(policy, batch)
        ratio = logps - old
        margin = BETA * (ratio[batch.chosen_P] - ratio[batch.rejected_P])
        (-torch.nn.functional.logsigmoid(margin).sum() / count).backward()
        after.append(logps.detach())
        margins.append(margin.detach())
    gradient = torch.cat([p.grad.flatten() for p in policy.trainable().values() if p.grad is not None])
    return {"start": torch.cat(before), "end": torch.cat(after), "margin": torch.cat(margins), "gradient": gradient}


def opened(path: Path, files: Path, count: int, form: str) -> tuple[Policy, list[list[TokenTree]]]:
    """A model in a format, and the first held-out pairs in packs."""
    policy = load_policy(ModelConfig.model_validate({"path": str(path), "device": "cpu", "dtype": form}))
    texts, _ = read(str(files / "test.jsonl"), DataConfig(train=str(files / "train.jsonl"), max_rows=count), "train")
    trees, _ = tokenize(texts, policy.tokenizer, TokensConfig(), policy.end_ids, "error")
    policy, _ = settle(policy, "auto", trees)
    return policy, [[trees[i] for i in pack] for pack in plan(trees, policy.layout, BUDGET)]


if __name__ == "__main__":
    main()
