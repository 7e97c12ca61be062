"""favor on a GPU: MFU, pairs a second and peak memory of models with random weights, beside TRL where it is installed.

    python benchmarks/gpu.py [--models 0.5B 1B 8B-lora] [--answers 2 4] [--trl 1 2 4 8]

Words of no meaning make up the prompts and answers; one word is one token, so lengths are exact. Optimizer steps of DPO with
a stored reference of zeros, bfloat16 products; the first step is left out. TRL trains on the same rows (pairs alone).
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from favor.data.types import Batch, Comparison, TokenTree
from favor.losses.table import make_loss
from favor.model.adapters import LoraSettings
from favor.model.layout import settle
from favor.model.load import ModelConfig, Policy, make_policy
from favor.ranks import World
from favor.train.loop import micro_batches
from favor.train.optim import AdamW, make_optimizer
from favor.train.preference import make_objective
from favor.train.reference import none
from favor.train.step import Learner, step

# hidden, MLP, layers, heads, heads of keys, vocabulary: as Qwen2.5-0.5B, Llama 3.2 1B and Llama 3.1 8B have them
SIZES = {
    "tiny": (32, 48, 2, 4, 2, 320),
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1B": (2048, 8192, 16, 32, 8, 128_256),
    "8B-lora": (4096, 14_336, 32, 32, 8, 128_256),
}
# dense bfloat16 products a second, by a word of the device's name (NVIDIA's data sheets)
PEAKS = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12, "L40S": 362e12}


class Measured(NamedTuple):
    """Seconds of each step, FLOPs and pairs of one, peak memory in bytes, how it was computed."""

    seconds: list[float]
    flops: float
    pairs: int
    peak: int
    why: str


def config_of(name: str) -> LlamaConfig:
    """The architecture of a model."""
    hidden, mlp, layers, heads, keys, words = SIZES[name]
    return LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=8192,
        tie_word_embeddings=name != "8B-lora",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def word_tokenizer(count: int) -> PreTrainedTokenizerFast:
    """One token a word: <pad> 0, <s> 1, </s> 2, then w3, w4, ..."""
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, count))]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def drawn(prompts: int, answers: int, lengths: tuple[int, int], words: int) -> list[TokenTree]:
    """Prompts with so many answers each, all pairs of them compared; answers part at their first token."""
    rng = random.Random(0)

    def text(count: int) -> list[int]:
        return [rng.randrange(3, words) for _ in range(count)]

    pairs = tuple(Comparison(pair) for pair in combinations(range(answers), 2))
    return [
        TokenTree(
            tuple(text(lengths[0])),
            tuple((3 + a, *text(lengths[1] - 2), 2) for a in range(answers)),
            (True,) * answers,
            pairs,
            answers * p,
            p,
        )
        for p in range(prompts)
    ]


def flops(config: LlamaConfig, batch: Batch, *, lora: bool) -> float:
    """FLOPs that a step needs for a batch: matrix products alone, nothing twice.

    2 for every weight of the blocks and token, forward; as many for the gradient of activations, and of weights where they train.
    Attention 4 x width x keys seen, forward, twice that backward. The head only where a token is scored.
    """
    width = config.hidden_size // config.num_attention_heads
    heads, keys = width * config.num_attention_heads, width * config.num_key_value_heads
    block = config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)
    times = 2 if lora else 3
    # a token sees itself and all before it on its path
    seen = float((batch.position_BT + 1).sum())
    attention = 3 * 4 * heads * config.num_hidden_layers * seen
    head = times * 2 * config.hidden_size * config.vocab_size * len(batch.head_N)
    return times * 2 * block * config.num_hidden_layers * batch.num_tokens + attention + head


def peak_rate(device: torch.device) -> float:
    """Products a second that the device is sold with; of one that is not listed, what a large product reaches."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    listed = next((rate for word, rate in PEAKS.items() if word in name), None)
    return listed or product_rate(device, 8192 if device.type == "cuda" else 512)


def product_rate(device: torch.device, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = []
    for _ in range(5):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        taken.append(time.perf_counter() - began)
    return 2 * size**3 / min(taken)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def policy_of(name: str, device: str, layout: str) -> Policy:
    """Random weights; adapters on a frozen bfloat16 base for the model that trains them."""
    config, lora = config_of(name), name.endswith("lora")
    torch.manual_seed(0)
    # born in bfloat16, so that 8 B weights are kept so without a change of any number
    with torch.device("cuda" if device == "cuda" else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).float().eval()
    asked = ModelConfig(
        path=name,
        device=device,
        dtype="bfloat16",
        layout=layout,
        weights="bfloat16" if lora else "float32",
        lora=LoraSettings() if lora else None,
    )
    return make_policy(model, word_tokenizer(min(config.vocab_size, 5000)), asked)


def run(name: str, trees: Sequence[TokenTree], device: str, budget: int, steps: int, layout: str = "auto") -> Measured:
    """Optimizer steps on the same trees; the first warms up."""
    policy, why = settle(policy_of(name, device, layout), layout, trees, train=True)
    parameters = policy.trainable()
    learner = Learner(parameters, make_optimizer(AdamW(lr=1e-6), parameters), 1.0, policy.device, World())
    objective = make_objective(make_loss(), policy, none())
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(1 + steps):
        wait(policy.device)
        began = time.perf_counter()
        cut = micro_batches(trees, policy, budget, World())
        step(learner, cut, objective)
        wait(policy.device)
        taken.append(time.perf_counter() - began)
    needed = sum(flops(config_of(name), batch, lora=policy.lora) for batch in cut)
    peak = torch.cuda.max_memory_allocated() if policy.device.type == "cuda" else 0
    return Measured(taken[1:], needed, sum(len(tree.comparisons) for tree in trees), peak, why)


def trl(name: str, trees: Sequence[TokenTree], per_device: int, steps: int) -> tuple[float, int] | None:
    """Pairs a second and peak bytes of TRL on the same pairs; None where it fails, as when memory ends."""
    with tempfile.TemporaryDirectory() as work:
        folder, data = Path(work) / "model", Path(work) / "pairs.jsonl"
        LlamaForCausalLM(config_of(name)).save_pretrained(folder)
        word_tokenizer(5000).save_pretrained(folder)
        rows = [
            {
                "prompt": said(tree.prompt_ids),
                "chosen": said(tree.response_ids[a]),
                "rejected": said(tree.response_ids[b]),
            }
            for tree in trees
            for a, b in (comparison.order for comparison in tree.comparisons)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows * (steps + 1)), "utf-8")
        command = [sys.executable, str(Path(__file__).with_name("trl_worker.py")), "--gpu", "--bf16", "--precompute"]
        command += ["--data", str(data), "--model", str(folder), "--out", f"{work}/out", "--batch", str(len(rows))]
        command += ["--per-device", str(per_device), "--steps", str(steps + 1), "--lr", "1e-6"]
        done = subprocess.run(command, capture_output=True, text=True)
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        return None
    return len(rows) / statistics.median(found[0]["step_s"][1:]), found[0]["peak_bytes"]


def said(ids: Sequence[int]) -> str:
    """Token ids as words; the end is the trainer's to add."""
    return "".join(f" w{i}" for i in ids if i > 2)


def row_of(name: str, answers: int, found: Measured, rate: float) -> list[str]:
    """A line of the table."""
    median = statistics.median(found.seconds)
    spread = f"{found.pairs / max(found.seconds):.1f} to {found.pairs / min(found.seconds):.1f}"
    speed, share = found.pairs / median, found.flops / median / rate
    return [name, str(answers), f"{speed:.1f} ({spread})", f"{share:.1%}", f"{found.peak / 2**30:.1f}"]


def main() -> None:
    """Every model and number of answers, one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["0.5B", "1B", "8B-lora"])
    parser.add_argument("--answers", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--prompts", type=int, default=32, help="an optimizer step")
    parser.add_argument("--lengths", nargs=2, type=int, default=[256, 256], help="tokens of prompts and answers")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens computed at once")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layout", default="auto", help="model.layout")
    parser.add_argument("--trl", nargs="*", type=int, default=[1, 2, 4, 8], help="pairs a pass; nothing: without TRL")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch sees no GPU here, so there is nothing to measure")
    console, rate = Console(), peak_rate(torch.device(args.device))
    console.print(f"peak: {rate / 1e12:.1f} TFLOP/s in bfloat16")
    table = Table("model", "answers", "pairs/s (range)", "MFU", "peak GiB")
    for name in args.models:
        for answers in args.answers:
            trees = drawn(args.prompts, answers, tuple(args.lengths), min(SIZES[name][5], 5000))
            found = run(name, trees, args.device, args.budget, args.steps, args.layout)
            console.print(f"{name}, {answers} answers: {found.why}")
            table.add_row(*row_of(name, answers, found, rate))
            # TRL's worker trains all weights
            for per_device in args.trl if not name.endswith("lora") else ():
                other = trl(name, trees, per_device, args.steps)
                shown = [f"{other[0]:.1f}", "", f"{other[1] / 2**30:.1f}"] if other else ["failed", "", ""]
                table.add_row(f"{name}, TRL, {per_device} a pass", str(answers), *shown)
    console.print(table)


if __name__ == "__main__":
    main()
