"""What share of the machine's own rate of matrix products favor reaches, by model.dtype.

    python benchmarks/rate.py [--pairs 5] [--turns 7]

One pack of HH pairs in trees, log-probs and their gradient. Counted are the products of the blocks alone (6 a weight and token),
over all the time that the pack takes: head, attention, norms and loss are in the time and not in the work. The rate beside it is
that of the same products by themselves, of as many tokens, in the same number format, taken at every turn as machines drift.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from shapes import spread
from torch import nn
from transformers import AutoTokenizer
from vs_trl import hh_rows

from favor.data.batches import build
from favor.data.types import Batch, TokenTree
from favor.demo import model_folder
from favor.model.layout import settle
from favor.model.load import ModelConfig, Policy, load_policy
from favor.model.logprobs import response_logps
from favor.model.room import memory_settings
from favor.run import cache_folder

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bfloat16x2": torch.bfloat16}


def main() -> None:
    """Print a row a format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--longest", type=int, default=400, help="tokens of a pair's longer side at most")
    args = parser.parse_args()
    memory_settings()
    model = str(model_folder(cache_folder(), print))
    trees = trees_of(model, args.pairs, args.longest)
    print(
        "| `model.dtype` | a pack, s | blocks, GFLOP/s | their products alone, GFLOP/s | share |\n|---|---|---|---|---|"
    )
    for form, dtype in FORMATS.items():
        policy, _ = settle(load_policy(ModelConfig(path=model, dtype=form)), "auto", trees, train=True)
        batch = build(trees, policy.layout)
        weights = [p for name, p in policy.causal_lm.named_parameters() if p.dim() == 2 and "embed" not in name]
        flops = 6 * batch.num_tokens * sum(p.numel() for p in weights)
        work = pack(policy, batch)
        alone = products([(p.shape[0], p.shape[1]) for p in weights], batch.num_tokens, dtype)
        work()
        turns = [(seconds(work), seconds(alone)) for _ in range(args.turns)]
        print(row(form, flops, turns), f"({batch.num_tokens:,} tokens)", flush=True)


def trees_of(model: str, pairs: int, longest: int) -> list[TokenTree]:
    """HH's first pairs that are no longer, as trees."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text).input_ids)

    rows = (row for row in hh_rows() if len(ids(row["prompt"] + row["chosen"])) < longest)
    end = (tokenizer.eos_token_id,)
    return [
        TokenTree(ids(row["prompt"]), (ids(row["chosen"]) + end, ids(row["rejected"]) + end), (True, True), (), 0, i)
        for i, row in enumerate(islice(rows, pairs))
    ]


def pack(policy: Policy, batch: Batch) -> Callable[[], None]:
    """Log-probs of a pack and the gradient of its margins."""

    def work() -> None:
        logp_R = response_logps(policy, batch)
        (logp_R[0::2] - logp_R[1::2]).sum().backward()
        policy.causal_lm.zero_grad(set_to_none=True)

    return work


def products(shapes: Sequence[tuple[int, int]], tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    """The three products of every linear layer, of `tokens` rows, and nothing else."""
    made = {
        (out, into): [torch.randn(shape).to(dtype) for shape in ((tokens, into), (out, into), (tokens, out))]
        for out, into in set(shapes)
    }

    def work() -> None:
        for shape in shapes:
            x, weight, grad = made[shape]
            nn.functional.linear(x, weight)
            grad @ weight
            grad.t() @ x

    return work


def seconds(work: Callable[[], None]) -> float:
    """Of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def row(form: str, flops: float, turns: Sequence[tuple[float, float]]) -> str:
    """Medians and ranges; shares are paired by turn."""
    packs, alone = zip(*turns, strict=True)
    shares = [there / here for here, there in turns]
    figures = [
        spread(packs, ".2f"),
        spread([flops / s / 1e9 for s in packs], ".0f"),
        spread([flops / s / 1e9 for s in alone], ".0f"),
        spread([100 * share for share in shares], ".0f") + " %",
    ]
    return f"| {form} | " + " | ".join(figures) + " |"


if __name__ == "__main__":
    main()
