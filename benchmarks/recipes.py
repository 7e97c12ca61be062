"""What every recipe costs: each is run on the embedded model and film reviews, alone, in a process of its own.

    python benchmarks/recipes.py [--write] [NAME ...]

Prints rows, seconds (start and loading included) and peak resident memory; `--write` puts them into the second line of
the recipe. `frontier` trains 75 models: it is measured by `make frontier`, not here.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from favor.demo import model_folder, review_files
from favor.run import cache_folder

RECIPES = Path(__file__).parent.parent / "recipes"
ROWS = 64
# of recipes that sample
PROMPTS = 16
MEASURED = "# Measured: "


class Cost(NamedTuple):
    """One process: its wall time and peak resident memory."""

    seconds: float
    gib: float


class Inputs(NamedTuple):
    """Where the recipes' inputs lie."""

    model: Path
    pairs: Path
    test: Path
    rankings: Path


def main() -> None:
    """Run the recipes in an order in which each finds what it needs: sft and reward come first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="recipes to run; without them all")
    parser.add_argument("--write", action="store_true", help="replace the recipe's line of measured figures")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as work:
        here = Path(work)
        table = commands(inputs(here), here)
        wanted = {"sft", "reward", *args.names} if args.names else set(table)
        for name, (command, words, work_done) in table.items():
            if name not in wanted:
                continue
            cost = run([command, str(RECIPES / f"{name}.toml"), *words], here)
            where = f"SmolLM2-135M, {os.cpu_count()} CPU cores; benchmarks/recipes.py at {commit}"
            line = f"{work_done} in {cost.seconds:.0f} s, {cost.gib:.1f} GiB ({where})"
            print(f"{name}: {line}", flush=True)
            if args.write:
                write(RECIPES / f"{name}.toml", line)


def inputs(here: Path) -> Inputs:
    """The first rows of the embedded reviews as pairs, and the reviews of a film as one ranking."""
    model, reviews = model_folder(cache_folder(), print), review_files(cache_folder(), print)
    rows = [json.loads(line) for line in (reviews / "train.jsonl").read_text("utf-8").splitlines()]
    test = [json.loads(line) for line in (reviews / "test.jsonl").read_text("utf-8").splitlines()]
    by_film = [list(group) for _, group in groupby(sorted(rows, key=lambda r: r["prompt"]), key=lambda r: r["prompt"])]
    rankings = [
        {
            "prompt": group[0]["prompt"],
            "responses": [r["chosen"] for r in group[:2]] + [r["rejected"] for r in group[:2]],
        }
        for group in by_film
        if len(group) > 1
    ]
    found = Inputs(model, here / "pairs.jsonl", here / "test.jsonl", here / "rankings.jsonl")
    dump(found.pairs, rows[:ROWS])
    dump(found.test, test[:ROWS])
    dump(found.rankings, [{**row, "ranking": [0, 1, 2, 3]} for row in rankings[: ROWS // 4]])
    return found


def dump(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def commands(at: Inputs, here: Path) -> dict[str, tuple[str, list[str], str]]:
    """Recipe -> (command, settings, what is done)."""
    model, train = f"model.path={at.model}", f"data.train={at.pairs}"
    held_out = f"data.eval={at.test}"
    sft, scorer = f"model.path={here / 'sft/model'}", f"reward.path={here / 'reward/model'}"

    def into(name: str) -> str:
        return f"run={here / name}"

    pairs = f"{ROWS} pairs"
    return {
        "sft": ("sft", [into("sft"), model, train], pairs),
        "reward": ("reward", [into("reward"), sft, train, held_out], f"{pairs}, {ROWS} held out,"),
        "dpo": ("train", [into("dpo"), model, train, held_out], f"{pairs}, {ROWS} held out,"),
        "dpo-lora": ("train", [into("lora"), model, train], pairs),
        "paper": ("train", [into("paper"), model, train], pairs),
        "plackett-luce": ("train", [into("pl"), model, f"data.train={at.rankings}"], f"{ROWS // 4} rankings of 4"),
        "ppo": (
            "ppo",
            [into("ppo"), sft, train, f"data.max_prompts={PROMPTS}", "train.max_steps=1", scorer],
            f"one rollout of {PROMPTS} prompts x 4 samples of up to 128 tokens",
        ),
        "prefer": (
            "prefer",
            [
                f"out={here / 'preferences.jsonl'}",
                f"prompts={at.pairs}",
                f"max_prompts={PROMPTS}",
                f"engine.model.path={at.model}",
                scorer,
            ],
            f"{PROMPTS} prompts x 4 samples of up to 128 tokens",
        ),
        "loop": (
            "loop",
            [into("loop"), model, f"prompts={at.pairs}", scorer, "rounds=1", f"prompts_per_round={PROMPTS}"],
            f"one round of {PROMPTS} prompts x 4 samples of up to 128 tokens",
        ),
        "winrate": (
            "winrate",
            [
                into("winrate"),
                f"a.model={here / 'sft/model'}",
                f"b.model={at.model}",
                f"prompts={at.test}",
                f"max_prompts={PROMPTS}",
                f"judge.{scorer}",
            ],
            f"{PROMPTS} prompts x 2 sides of up to 128 tokens",
        ),
        "diff": (
            "diff",
            [
                f"a={here / 'sft/model'}",
                f"b={at.model}",
                f"prompts={at.test}",
                f"max_prompts={PROMPTS}",
                "unsettled=pass",
            ],
            f"{PROMPTS} prompts x 2 models of up to 128 tokens",
        ),
    }


def run(words: list[str], here: Path) -> Cost:
    """One command, waited for. Exits with what it said when it failed."""
    command = [sys.executable, "-c", "from favor.cli import main; main()", *words]
    with (here / "said.txt").open("w+") as said:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        said.seek(0)
        if status != 0:
            sys.exit(f"favor {' '.join(words)} failed:\n{said.read()}")
    return Cost(time.monotonic() - began, usage.ru_maxrss / 2**20)


def write(path: Path, line: str) -> None:
    """The second line of a recipe is its measured cost."""
    first, _, rest = path.read_text("utf-8").partition("\n")
    rest = re.sub(rf"^{MEASURED}.*\n", "", rest)
    path.write_text(f"{first}\n{MEASURED}{line}\n{rest}", "utf-8")


if __name__ == "__main__":
    main()
