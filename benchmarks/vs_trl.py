"""favor beside TRL on the same pairs: pairs a second and peak memory, in separate processes, in turn.

    python benchmarks/vs_trl.py --data hh | demo | FILE.jsonl   (needs the extra `bench`)

Both read the same plain text (prompt, chosen, rejected), in the same order, with the same batches, AdamW settings,
clipping and seeds, in one precision; the losses must agree at every step (1e-3 in float32), else the run fails.
TRL runs at its best settings here: gradient checkpointing off, fused AdamW, the fastest of the per-device batch sizes it is given,
with and without precomputed reference log-probs. The time counted is training plus reference, without loading.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from favor.demo import model_folder, review_files
from favor.run import cache_folder

ROOT = Path(__file__).parent.parent
HH = ROOT.parent / "shared/data/hh-harmless-base-test.jsonl.gz"
# how far the losses of both may lie apart
AGREE = {"float32": 1e-3, "bfloat16": 5e-2}
MARKER = "\n\nAssistant:"


class Run(NamedTuple):
    """Figures of one process."""

    train_s: float
    reference_s: float
    peak_gib: float
    losses: list[float]
    tokens: int


def main() -> None:
    """Prepare the pairs, run both tools in turn, print one table."""
    args = parse()
    console = Console()
    model = Path(args.model) if args.model else model_folder(cache_folder(), console.print)
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "pairs.jsonl"
        rows, per_prompt = prepare(args, model, console)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        contenders = {"favor": lambda: favor(args, data, model, per_prompt, Path(work))}
        for per_device in args.per_device:
            for reference in args.reference:
                precompute = reference == "stored"
                name = f"TRL, {per_device} pairs a pass, {reference} reference"
                contenders[name] = lambda p=per_device, r=precompute: trl(args, data, model, p, r, Path(work))
        runs: dict[str, list[Run]] = defaultdict(list)
        for repeat in range(args.repeats):
            for name, start in contenders.items():
                runs[name].append(start())
                done = runs[name][-1]
                seconds = done.train_s + done.reference_s
                console.print(
                    f"{repeat + 1}/{args.repeats} {name}: {args.batch * args.steps / seconds:.3f} pairs/s, {done.peak_gib:.2f} GiB"
                )
    report(args, runs, console)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="hh", help="hh, demo or a JSONL file of prompt, chosen, rejected")
    parser.add_argument("--model", help="model folder; default the embedded one")
    parser.add_argument("--batch", type=int, default=8, help="pairs an optimizer step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--per-device", type=int, nargs="+", default=[1], help="TRL's per-device batch sizes to try")
    parser.add_argument("--reference", nargs="+", choices=["stored", "live"], default=["stored", "live"], help="TRL's")
    parser.add_argument("--budget", type=int, default=1024, help="favor's train.max_tokens_per_pack")
    parser.add_argument("--max-tokens", type=int, default=512, help="longer rows are left out for both")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both")
    parser.add_argument("--layout", default="auto", choices=["auto", "rows"], help="favor's model.layout")
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--json", help="write every figure there")
    return parser.parse_args()


def prepare(args: argparse.Namespace, model: Path, console: Console) -> tuple[list[dict[str, str]], int]:
    """Batch x steps rows as plain text, those of one prompt side by side; and how many pairs a prompt has."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if args.data == "demo":
        rows, per_prompt = demo_rows(review_files(cache_folder(), console.print) / "train.jsonl", tokenizer), 4
    else:
        rows, per_prompt = (
            list(hh_rows() if args.data == "hh" else map(json.loads, open(args.data, encoding="utf-8"))),
            1,
        )
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        lengths = [len(tokenizer(row["prompt"] + row[side]).input_ids) for side in ("chosen", "rejected")]
        if max(lengths) < args.max_tokens and len(groups[row["prompt"]]) < per_prompt:
            groups[row["prompt"]].append(row)
    kept = [row for group in groups.values() if len(group) == per_prompt for row in group][: args.batch * args.steps]
    assert len(kept) == args.batch * args.steps, f"only {len(kept)} rows fit"
    assert args.batch % per_prompt == 0
    return kept, per_prompt


def hh_rows() -> Iterator[dict[str, str]]:
    """HH transcripts cut at the last assistant marker; rows whose sides part earlier are left out."""
    for line in gzip.open(HH, "rt", encoding="utf-8"):
        row = json.loads(line)
        (prompt, _, chosen), (other, _, rejected) = (row[side].rpartition(MARKER) for side in ("chosen", "rejected"))
        if prompt == other and chosen.strip() and rejected.strip() and chosen != rejected:
            yield {"prompt": prompt + MARKER, "chosen": " " + chosen.strip(), "rejected": " " + rejected.strip()}


def demo_rows(path: Path, tokenizer) -> list[dict[str, str]]:
    """The film reviews with the chat template already rendered; both tools append the end token."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    def rendered(row: dict[str, str]) -> dict[str, str]:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}

    return [rendered(row) for row in rows]


def favor(args: argparse.Namespace, data: Path, model: Path, per_prompt: int, work: Path) -> Run:
    """One run of `favor train`, read back from its metrics."""
    out = Path(tempfile.mkdtemp(dir=work))
    words = [
        f"run={out / 'run'}",
        f"model.path={model}",
        f"model.dtype={args.dtype}",
        f"model.layout={args.layout}",
        f"data.train={data}",
        "tokens.template=plain",
        "tokens.special_text=allow",
        f"tokens.max_tokens={args.max_tokens}",
        f"optim.lr={args.lr}",
        "optim.schedule=constant",
        f"train.batch_prompts={args.batch // per_prompt}",
        f"train.max_tokens_per_pack={args.budget}",
        "train.shuffle=false",
        "save.every=0",
    ]
    _, peak = measured([sys.executable, "-c", "from favor.cli import main; main()", "train", *words])
    records = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    reference = next(record["seconds"] for record in records if record.get("name") == "reference")
    tokens = sum(step["unique_tokens"] for step in steps)
    return Run(steps[-1]["seconds"], reference, peak, [step["loss"] for step in steps], tokens)


def trl(args: argparse.Namespace, data: Path, model: Path, per_device: int, precompute: bool, work: Path) -> Run:
    """One run of TRL's trainer, with a cache of its own so that no earlier run's reference is found."""
    out = Path(tempfile.mkdtemp(dir=work))
    command = [args.trl_python, str(ROOT / "benchmarks/trl_worker.py"), "--data", str(data), "--model", str(model)]
    command += ["--out", str(out / "out"), "--batch", str(args.batch), "--per-device", str(per_device)]
    command += ["--steps", str(args.steps), "--lr", str(args.lr)] + ["--precompute"] * precompute
    command += ["--bf16"] * (args.dtype == "bfloat16")
    text, peak = measured(command, {"HF_HOME": str(out / "hf")})
    found = json.loads(next(line for line in text.splitlines() if line.startswith("RESULT "))[7:])
    return Run(found["train_s"], found["reference_s"], peak, found["losses"], 0)


def measured(command: list[str], environment: dict[str, str] | None = None) -> tuple[str, float]:
    """Standard output and peak resident memory (GiB) of a process."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, env={**os.environ, **(environment or {})})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if status != 0:
        sys.exit(f"{' '.join(command[:4])} ... failed:\n{text}")
    return text, usage.ru_maxrss / 2**20


def report(args: argparse.Namespace, runs: dict[str, list[Run]], console: Console) -> None:
    """Medians with ranges, ratios against favor, loss agreement, share of the matrix-product rate."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gemm import rate

    pairs = args.batch * args.steps
    ours = runs["favor"]
    speeds = {name: [pairs / (run.train_s + run.reference_s) for run in found] for name, found in runs.items()}
    table = Table("tool", "pairs/s (range)", "favor is faster by", "peak GiB", "favor needs", "largest loss difference")
    for name, found in runs.items():
        speed, peak = statistics.median(speeds[name]), statistics.median(run.peak_gib for run in found)
        difference = max(abs(a - b) for run in found for a, b in zip(run.losses, ours[0].losses, strict=True))
        table.add_row(
            name,
            f"{speed:.3f} ({min(speeds[name]):.3f} to {max(speeds[name]):.3f})",
            f"{statistics.median(speeds['favor']) / speed:.2f} x",
            f"{peak:.2f}",
            f"{statistics.median(run.peak_gib for run in ours) / peak:.2f} x",
            f"{difference:.1e}",
        )
        assert difference < AGREE[args.dtype], f"{name} and favor do not do the same work"
    console.print(table)
    gemm = rate()
    tokens, seconds = ours[0].tokens, statistics.median(run.train_s for run in ours)
    # 6 x parameters FLOPs a trained token (forward 2, backward 4); the head only on scored tokens, left out here
    flops = 6 * 106.2e6 * tokens
    console.print(
        f"favor computed {tokens} unique tokens for {pairs} pairs: {flops / seconds / 1e9:.0f} GFLOP/s in the blocks alone, "
        f"{flops / seconds / 1e9 / gemm:.0%} of the machine's float32 matrix-product rate ({gemm:.0f} GFLOP/s, benchmarks/gemm.py)"
    )
    if args.json:
        Path(args.json).write_text(
            json.dumps({name: [run._asdict() for run in found] for name, found in runs.items()}, indent=1)
        )


if __name__ == "__main__":
    main()
