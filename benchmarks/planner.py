"""`favor train --dry-run --measure` beside the run that it speaks of: peak memory and time, five recipes.

    python benchmarks/planner.py [--repeats 1] [--recipes NAME ...]

Each recipe is measured and then trained whole, in turn, in processes of their own: SmolLM2-135M-Instruct on the demo's film
quotes. The peak of a run is what the operating system says of its process; its time is that of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from favor.demo import model_folder, review_files
from favor.run import cache_folder

COMMON = ("optim.lr=1e-6", "data.hold_out.share=0.05", "save.every=0")
RECIPES = {
    "all weights, stored reference": ("train.max_steps=6", "train.batch_prompts=4"),
    "all weights, live reference": ("train.max_steps=6", "train.batch_prompts=4", "reference.mode=live"),
    "LoRA, packs of 2,048": (
        "train.max_steps=6",
        "train.batch_prompts=8",
        "model.lora.rank=16",
        "train.max_tokens_per_pack=2048",
        "reference.mode=live",
    ),
    "recomputed layers, packs of 4,096": (
        "train.max_steps=6",
        "train.batch_prompts=12",
        "model.gradient_checkpointing=true",
        "train.max_tokens_per_pack=4096",
        "reference.mode=live",
    ),
    "KL probes, checkpoints": (
        "train.max_steps=6",
        "train.batch_prompts=4",
        "watch.kl.every=3",
        "watch.kl.tokens=24",
        "save.every=2",
        "loss.kind=ipo",
    ),
}


def main() -> None:
    """Print a row a recipe and repeat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    args = parser.parse_args()
    model = model_folder(cache_folder(), print)
    data = review_files(cache_folder(), print) / "train.jsonl"
    print(
        "| recipe | peak measured, GiB | peak of the run | | time measured, s | time of the run | |\n|---|---|---|---|---|---|---|"
    )
    for _ in range(args.repeats):
        for name in args.recipes:
            words = RECIPES[name]
            with tempfile.TemporaryDirectory() as place:
                given = [f"model.path={model}", f"data.train={data}", f"run={place}/run", *COMMON, *words]
                told = json.loads(_ran(*given, "--dry-run", "--measure", "--json")[0])["figures"]
                _, peak, seconds = _ran(*given, "--quiet")
            guess, total = told["peak_bytes"] / 2**30, sum(told["seconds"].values())
            print(
                f"| {name} | {guess:.2f} | {peak:.2f} | {guess / peak - 1:+.1%} | {total:.0f} | {seconds:.0f} "
                f"| {total / seconds - 1:+.1%} |",
                flush=True,
            )


def _ran(*words: str) -> tuple[str, float, float]:
    """What `favor train` printed, its peak in GiB and its seconds."""
    out, began = Path(tempfile.mkstemp()[1]), time.monotonic()
    with out.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", "from favor.cli import main; main()", "train", *words], stdout=file
        )
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, words
    return out.read_text(), usage.ru_maxrss / 2**20, time.monotonic() - began


if __name__ == "__main__":
    main()
