"""Reading and tokenising: rows a second beside TRL's preparation, and peak memory as the data grow.

    python benchmarks/prepare.py [--trl-python PYTHON] [--rows 1000 100000 1000000]   (TRL needs the extra `bench`)

Every measurement is a process of its own. The pairs are the held-out HH conversations as chat messages, the reviews of
the demo, and synthetic rows; TRL gets the very same file. Loading the file counts for both, imports for neither.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from favor.demo import model_folder, review_files
from favor.run import cache_folder

ROOT = Path(__file__).parent.parent
HH = ROOT.parent / "shared/data/hh-harmless-base-test.jsonl.gz"
_WORDS = (
    "film",
    "actor",
    "story",
    "warm",
    "funny",
    "dull",
    "never",
    "always",
    "better",
    "worse",
    "plot",
    "scene",
    "light",
)


class Figures(NamedTuple):
    """What one process took."""

    rows: int
    seconds: float
    peak_mib: float
    anonymous_mib: float


def main() -> None:
    """Print two tables."""
    args = parse()
    console = Console()
    model = str(model_folder(cache_folder(), console.print))
    if args.favor:
        print("RESULT " + json.dumps(prepare_here(args.favor, model, cached=args.cached)))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        if args.trl_python:
            speeds(args, model, Path(work), console)
        memory(args, model, Path(work), console)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="'' leaves TRL out")
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hh", default=str(HH), help="the HH file")
    parser.add_argument("--work", help="folder for temporary files")
    parser.add_argument("--favor", help=argparse.SUPPRESS)
    parser.add_argument("--cached", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare_here(source: str, model: str, *, cached: bool) -> Figures:
    """favor's preparation in this process."""
    from transformers import AutoTokenizer

    from favor.data.prepare import prepare_split
    from favor.data.read import DataConfig, splits_of
    from favor.data.splits import Recipe
    from favor.data.tokenize import TokensConfig
    from favor.lint.cheap import CHECKS

    tokenizer = AutoTokenizer.from_pretrained(model)
    data = DataConfig(train=source, bad_rows="drop", cache=cached)
    began = time.monotonic()
    recipe = Recipe(splits_of(data)[0], data, TokensConfig(), tokenizer, frozenset({tokenizer.eos_token_id}))
    part = prepare_split(recipe, CHECKS, lambda _: None)
    seconds = time.monotonic() - began
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Figures(part.read["num_rows"], seconds, _mib(status["VmHWM"]), _mib(status["RssAnon"]))


def speeds(args: argparse.Namespace, model: str, work: Path, console: Console) -> None:
    """Rows a second of both tools, in turn; medians with ranges."""
    table = Table("pairs", "rows", "favor rows/s", "TRL rows/s", "TRL, 2 processes", "favor against TRL's best")
    for name, source in files(args, work, console).items():
        found: dict[str, list[float]] = {"favor": [], "TRL": [], "TRL 2": []}
        for _ in range(args.repeats):
            done = favor(source, model, work, cached=False)
            found["favor"].append(done.rows / done.seconds)
            found["TRL"].append(trl(args, source, model, 0))
            found["TRL 2"].append(trl(args, source, model, 2))
        mid = {tool: statistics.median(values) for tool, values in found.items()}
        shown = [f"{mid[tool]:.0f} ({min(v):.0f} to {max(v):.0f})" for tool, v in found.items()]
        table.add_row(name, str(done.rows), *shown, f"{mid['favor'] / max(mid['TRL'], mid['TRL 2']):.1f} x")
    console.print(table)


def memory(args: argparse.Namespace, model: str, work: Path, console: Console) -> None:
    """Peak memory through the cache as rows grow, and how fast a second start is."""
    table = Table(
        "rows", "file MiB", "built in s", "rows/s", "peak MiB", "of it not file pages", "reused in s", "cache MiB"
    )
    for count in args.rows:
        source, cache = work / f"{count}.jsonl", work / f"cache-{count}"
        synthetic(source, count)
        built = favor(source, model, cache, cached=True)
        again = favor(source, model, cache, cached=True)
        size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        cells = [source.stat().st_size / 2**20, built.seconds, built.rows / built.seconds, built.peak_mib]
        cells += [built.anonymous_mib, again.seconds, size / 2**20]
        table.add_row(str(count), *(f"{cell:.1f}" for cell in cells))
        console.print(f"{count} rows: " + ", ".join(f"{cell:.1f}" for cell in cells))
        source.unlink()
    console.print(table)


def files(args: argparse.Namespace, work: Path, console: Console) -> dict[str, Path]:
    """The data sets as chat messages, prompt and sides apart, which is what both tools like best."""
    from favor.data.read import DataConfig, read

    found: dict[str, Path] = {}
    reviews = review_files(cache_folder(), console.print) / "train.jsonl"
    for name, source in (("HH, chat", Path(args.hh)), ("film reviews, chat", reviews)):
        trees, _ = read(str(source), DataConfig(train=str(source), bad_rows="drop"), "train")
        found[name] = work / f"{len(found)}.jsonl"
        with found[name].open("w", encoding="utf-8") as file:
            for tree in trees:
                for comparison in tree.comparisons:
                    sides = [_messages(tree.responses[i], "assistant") for i in comparison.order]
                    row = {"prompt": _messages(tree.prompt, "user"), "chosen": sides[0], "rejected": sides[-1]}
                    file.write(json.dumps(row) + "\n")
    found["synthetic, short"] = work / "synthetic.jsonl"
    synthetic(found["synthetic, short"], 5000)
    return found


def synthetic(path: Path, count: int) -> None:
    """Rows of 10 to 40 words; every eighth belongs to the prompt of a row far before it."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            say = [" ".join(rng.choices(_WORDS, k=rng.randint(3, 14))) for _ in range(3)]
            number = i // 2 if i % 8 == 7 else i
            row = {"prompt": f"Write about film {number}.", "chosen": f"{say[0]} yes", "rejected": f"{say[1]} no"}
            file.write(json.dumps(row) + "\n")


def favor(source: Path, model: str, cache: Path, *, cached: bool) -> Figures:
    """favor in a process of its own, with a cache of its own."""
    command = [sys.executable, __file__, "--favor", str(source)] + ["--cached"] * cached
    return Figures(*_result(command, _model_beside(cache, model)))


def _model_beside(cache: Path, model: str) -> dict[str, str]:
    """An own cache folder in which the model is found."""
    cache.mkdir(parents=True, exist_ok=True)
    link = cache / Path(model).name
    if not link.exists():
        link.symlink_to(model)
    return {"FAVOR_CACHE": str(cache)}


def trl(args: argparse.Namespace, source: Path, model: str, processes: int) -> float:
    """Rows a second of TRL."""
    command = [args.trl_python, str(ROOT / "benchmarks/trl_prepare.py"), "--data", str(source), "--model", model]
    found = _result([*command, "--processes", str(processes)], {})
    return found["rows"] / (found["load_s"] + found["prepare_s"])


def _result(command: list[str], environment: dict[str, str]):
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def _messages(text, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _mib(text: str) -> float:
    return int(text.split()[0]) / 1024


if __name__ == "__main__":
    main()
