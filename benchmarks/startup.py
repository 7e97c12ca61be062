"""How long `favor train` takes from the command to its first step when the token cache is there, and how long the cache takes.

    python benchmarks/startup.py [--rows 200000] [--repeats 3] [--keep FOLDER]

Rows are synthetic chat pairs (benchmarks/prepare.py), the tokenizer is the demo's, the model two small layers, so that what is
measured is favor and its data, not the model. Every start is a process of its own, imports included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prepare import synthetic
from rich.console import Console

from favor.demo import model_folder
from favor.run import cache_folder


def main() -> None:
    """Print seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", help="a folder for file, model and cache, used again by the next call")
    args = parser.parse_args()
    console = Console()
    tokenizer = str(model_folder(cache_folder(), console.print))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        source, model = folder / f"{args.rows}.jsonl", folder / "model"
        if not source.exists():
            synthetic(source, args.rows)
        if not model.exists():
            small_model(model, tokenizer)
        first = start(folder, source, model)
        again = [start(folder, source, model) for _ in range(args.repeats)]
        size = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
        console.print(f"{args.rows} rows of {source.stat().st_size / 2**20:.0f} MiB, cache {size / 2**20:.0f} MiB")
        console.print(f"first start, building the cache: {first:.1f} s ({args.rows / first:.0f} rows/s)")
        shown = ", ".join(f"{seconds:.1f}" for seconds in again)
        console.print(f"start from the cache: {statistics.median(again):.1f} s ({shown})")


def small_model(folder: Path, tokenizer: str) -> None:
    """Two layers with the demo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tokenizer)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config.update(small | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    config.layer_types = None
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def start(folder: Path, source: Path, model: Path) -> float:
    """Seconds until a run of one step has ended."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        keys = {"run": f"{run}/run", "model": model, "data": source, "loss.kind": "simpo", "train.max_steps": 1}
        words = [f"{key}={value}" for key, value in keys.items()]
        began = time.monotonic()
        done = subprocess.run(
            ["favor", "train", *words, "data.cache=true"],
            env=os.environ | {"FAVOR_CACHE": str(folder / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - began
        if done.returncode != 0:
            sys.exit(f"favor train failed:\n{done.stdout}\n{done.stderr}")
        lines = (Path(run) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
        assert any(json.loads(line)["kind"] == "step" for line in lines)
    return seconds


if __name__ == "__main__":
    main()
