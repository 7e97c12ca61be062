"""Sampling beside transformers, and a step of GRPO beside TRL: two tables.

    python benchmarks/generation.py [--parts sampling grpo] [--repeats 3] [--trl-python PYTHON]

Both read HH's prompts as plain text, float32. An end token that the model never says keeps every sample at --new tokens.
sampling: favor's sampler as it stands, `model.generate` and continuous batching of transformers, these at their best of
--batches, in one process, in turn; first the likeliest answers of all must be equal. grpo: `favor ppo` with
ppo.advantage.kind=grpo and TRL's GRPOTrainer, in processes of their own, in turn; first TRL, given favor's samples, must have
favor's gradient (grpo_worker.py has the settings). Ratios are paired by turn.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from gemm import bandwidth, rate
from samplers import Task, alike, clocked, continues, endless, favors, generates, room
from shapes import spread
from transformers import AutoModelForCausalLM, AutoTokenizer
from vs_trl import ROOT, hh_rows
from vs_trl import measured as process

from favor.demo import model_folder
from favor.model.load import ModelConfig, Policy, load_policy
from favor.model.size import parameters
from favor.run import cache_folder

NORMS_AGREE = 1e-3


class Machine(NamedTuple):
    """What the floors are computed from: products a second, bytes read a second, numbers in the blocks and in the head."""

    flops: float
    bytes: float
    body: int
    head: int

    def passed(self, tokens: int, scored: int) -> float:
        """Seconds of a forward over tokens of which some are scored."""
        return 2 * (self.body * tokens + self.head * scored) / self.flops

    def sampled(self, task: Task) -> float:
        """Every prompt once, then all samples together a token at a time: products, or reading the weights where that is slower."""
        rows = len(task.prompts) * task.each
        once = max(self.passed(rows, rows), 4 * (self.body + self.head) / self.bytes)
        return self.passed(sum(map(len, task.prompts)), len(task.prompts)) + (task.new - 1) * once


def main() -> None:
    """Print each table as it is done."""
    args = parse()
    source = Path(args.model) if args.model else model_folder(cache_folder(), print)
    with tempfile.TemporaryDirectory() as work:
        model = endless(source, Path(work), args.end)
        config = AutoModelForCausalLM.from_pretrained(model, device_map="meta").config
        head = config.vocab_size * config.hidden_size
        machine = Machine(rate() * 1e9, bandwidth(), parameters(config) - head, head)
        print(
            f"{machine.flops / 1e9:.0f} GFLOP/s in float32, {machine.bytes / 1e9:.1f} GB/s; ranges over {args.repeats} turns"
        )
        prompts = list(islice(asked(args, model), 4 * args.prompts))
        assert len(prompts) == 4 * args.prompts, f"only {len(prompts)} prompts of at most {args.longest} tokens"
        if "sampling" in args.parts:
            beside_transformers(args, model, prompts, machine)
        if "grpo" in args.parts:
            beside_trl(args, model, prompts, machine, Path(work))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["sampling", "grpo"], default=["sampling", "grpo"])
    parser.add_argument("--model", help="model folder; default the embedded one")
    parser.add_argument("--end", default="<reponame>", help="a token that the model never says")
    parser.add_argument("--data", help="JSON lines with a prompt; default HH's")
    parser.add_argument(
        "--prompts", type=int, default=4, help="with --each samples; with one sample four times as many"
    )
    parser.add_argument("--each", type=int, default=8)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of a sample")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="transformers' samples at once, to try")
    parser.add_argument("--per-device", type=int, nargs="+", default=[1, 4, 8], help="TRL's batch sizes to try")
    parser.add_argument("--trl-python", default=sys.executable)
    return parser.parse_args()


def asked(args: argparse.Namespace, model: Path) -> Iterator[tuple[str, list[int]]]:
    """Distinct prompts of at most args.longest tokens, as text and as ids."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = map(json.loads, Path(args.data).read_text("utf-8").splitlines()) if args.data else hh_rows()
    for text in dict.fromkeys(row["prompt"] for row in rows):
        ids = tokenizer(text).input_ids
        if len(ids) <= args.longest:
            yield text, ids


def beside_transformers(
    args: argparse.Namespace, folder: Path, prompts: Sequence[tuple[str, list[int]]], machine: Machine
) -> None:
    """A row a task."""
    policy = load_policy(ModelConfig(path=str(folder), dtype="float32"), frozen=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    print(
        "| samples | favor, tokens/s | generate's best | continuous batching's best | favor / generate | favor / continuous "
        "| floor | likeliest answers equal |\n|---|---|---|---|---|---|---|---|"
    )
    for count, each in ((4 * args.prompts, 1), (args.prompts, args.each)):
        task = Task([ids for _, ids in prompts[:count]], each, args.new)
        print(compared(args, policy, model, task, machine), flush=True)


def compared(args: argparse.Namespace, policy: Policy, model: Any, task: Task, machine: Machine) -> str:
    """A row: the same where nothing is drawn by chance, then each at its best in turn."""
    greedy = Task(task.prompts, 1, min(task.new, 16))
    likeliest = favors(policy, greedy, 1e-4)
    ways: dict[str, Callable[[], list[list[int]]]] = {"favor": lambda: favors(policy, task)}
    told, equal = {"favor": "its default"}, []
    for name, way in (("generate", generates), ("continuous", continues)):
        try:
            equal.append(f"{alike(model, greedy, likeliest, way(model, greedy, 8, drawn=False))} of {len(likeliest)}")
            tried = {batch: clocked(lambda b=batch, w=way: w(model, task, b), task) for batch in args.batches}
        except (RuntimeError, ValueError, NotImplementedError) as error:
            told[name] = f"did not run: {error}"
            continue
        best = min(tried, key=lambda batch: tried[batch])
        ways[name], told[name] = lambda b=best, w=way: w(model, task, b), f"{best} at once"
    turns: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            turns[name].append(task.tokens / clocked(way, task))
    floor = task.tokens / machine.sampled(task)
    widths = sorted(map(len, task.prompts))
    cells = [f"{len(widths)} prompts of {widths[0]} to {widths[-1]} tokens, {task.each} x {task.new} tokens each"]
    cells += [f"{spread(turns[name], '.1f')} ({told[name]})" if name in turns else told[name] for name in told]
    for name in told:
        if name != "favor":
            cells.append(f"**{ratio(turns['favor'], turns[name])}**" if name in turns else "")
    cells.append(f"{floor:.0f} (favor at {statistics.median(turns['favor']) / floor:.0%})")
    return f"| {' | '.join([*cells, ', '.join(equal)])} |"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Paired by turn."""
    return f"{spread([a / b for a, b in zip(ours, theirs, strict=True)], '.2f')} x"


# a step of GRPO


def beside_trl(
    args: argparse.Namespace, model: Path, prompts: Sequence[tuple[str, list[int]]], machine: Machine, work: Path
) -> None:
    """A row a part of the step."""
    count, each = args.prompts, args.each
    task = Task([ids for _, ids in prompts[:count]], each, args.new)
    data, reward, samples = work / "prompts.jsonl", work / "reward.py", work / "samples.json"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text, _ in prompts[:count]), "utf-8")
    reward.write_text("def length(prompts, responses):\n    return [float(len(text)) for text in responses]\n", "utf-8")
    words = [
        "--data",
        data,
        "--reward",
        reward,
        "--model",
        model,
        "--prompts",
        count,
        "--each",
        each,
        "--new",
        args.new,
    ]

    def step(tool: str, *more: object) -> dict[str, Any]:
        out = Path(tempfile.mkdtemp(dir=work))
        python = args.trl_python if tool == "trl" else sys.executable
        command = [python, ROOT / "benchmarks/grpo_worker.py", tool, *words, "--out", out, *more]
        text, peak = process([str(word) for word in command], {"HF_HOME": str(out / "hf")})
        found = json.loads(next(line for line in text.splitlines() if line.startswith("RESULT "))[7:])
        assert list(map(len, found["samples"])) == [args.new] * count * each, f"{tool}: samples of another length"
        return found | {"peak_gib": peak, "after_s": found["before_s"] - found["sampling_s"]}

    ours = step("favor")
    samples.write_text(json.dumps(ours["samples"]), "utf-8")
    tried = {size: step("trl", "--per-device", size, "--replay", samples) for size in args.per_device}
    apart = max(abs(found["grad_norm"] / ours["grad_norm"] - 1) for found in tried.values())
    assert apart < NORMS_AGREE, f"of the same samples the gradients' norms lie {apart:.1e} apart, so it is other work"
    best = ["--per-device", min(tried, key=lambda size: tried[size]["update_s"])]
    paged = ["--continuous", json.dumps(room(task, count * each))]
    if step("trl", *best, *paged)["sampling_s"] < step("trl", *best)["sampling_s"]:
        best += paged
    turns: dict[str, list[dict[str, Any]]] = {"favor": [], "trl": []}
    for _ in range(args.repeats):
        turns["favor"].append(step("favor"))
        turns["trl"].append(step("trl", *best))
    print(table(task, machine, turns))
    said = f"TRL: {best[1]} a pass, samples by {'continuous batching' if paged[0] in best else 'generate'}"
    print(f"{said}; gradient norms of the same samples lie {apart:.0e} apart (favor {ours['grad_norm']:.4f})")


PARTS = {
    "sampling": ("sampling_s", "both: samples at temperature 1"),
    "between": ("after_s", "both: reward, advantages. favor: log-probs of policy and reference. TRL: of the reference"),
    "update": ("update_s", "both: clipped ratio, mean over tokens, AdamW. TRL: also KL in the loss and entropy"),
}


def table(task: Task, machine: Machine, turns: dict[str, list[dict[str, Any]]]) -> str:
    """A row a part, and the whole step; floors with every prompt computed once."""
    tokens, scored = turns["favor"][0]["tokens"], task.tokens
    once = machine.passed(tokens, scored)
    floors = {"sampling": machine.sampled(task), "between": 2 * once, "update": 3 * once}
    seconds = {
        tool: {part: [run[name] for run in runs] for part, (name, _) in PARTS.items()} for tool, runs in turns.items()
    }
    for parts in seconds.values():
        parts["whole step"] = [sum(values) for values in zip(*parts.values(), strict=True)]
    floors["whole step"] = sum(floors.values())
    peaks = [statistics.median(run["peak_gib"] for run in runs) for runs in turns.values()]
    lines = [
        f"| {len(task.prompts)} prompts x {task.each} samples of {task.new} tokens | favor, s | TRL, s | TRL / favor | floor, s "
        "| what is computed |",
        "|---|---|---|---|---|---|",
    ]
    for part, floor in floors.items():
        ours, theirs = seconds["favor"][part], seconds["trl"][part]
        what = PARTS[part][1] if part in PARTS else f"{tokens} tokens; peak GiB {peaks[0]:.2f}, TRL's {peaks[1]:.2f}"
        share = f"{floor:.2f} (favor at {floor / statistics.median(ours):.0%})"
        lines.append(
            f"| {part} | {spread(ours, '.2f')} | {spread(theirs, '.2f')} | **{ratio(theirs, ours)}** | {share} | {what} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
