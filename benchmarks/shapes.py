"""favor beside TRL by the shape of the data: one table.

    python benchmarks/shapes.py [--shapes pairs four ...] [--dtype float32] [--repeats 3] [--trl-python PYTHON]

A shape is how much of the text its pairs share: pairs alone, four answers with all six pairs, sixteen answers, a system text of
600 tokens before every prompt, conversations with a pair at every turn. Of TRL every batch size is tried once with a stored
reference, the best size with a live one too; the fastest, favor and favor's plain rows are then run in turn. Same rows, order,
batches and optimizer; losses must agree (vs_trl.py has the details). Ratios are paired by turn.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from pathlib import Path

import torch
from gemm import rate
from transformers import AutoConfig, AutoTokenizer
from vs_trl import AGREE, MARKER, Run, demo_rows, favor, hh_rows, trl

from favor.demo import model_folder, review_files
from favor.model.size import parameters
from favor.run import cache_folder

Row = dict[str, str]
# a step of every shape: pairs, and pairs that a prompt has
SIZES = {"pairs": (8, 1), "four": (24, 6), "sixteen": (16, 16), "system": (8, 1), "turns": (8, 1)}
NAMES = {
    "pairs": "pairs (HH, one a prompt)",
    "four": "4 answers, all 6 pairs",
    "sixteen": "16 answers, 16 pairs",
    "system": "600-token system text, pairs",
    "turns": "4 turns a conversation, a pair at each",
}
LONGEST = 1536


def main() -> None:
    """Print a row a shape as it is done."""
    args = parse()
    model = Path(args.model) if args.model else model_folder(cache_folder(), print)
    tokenizer = AutoTokenizer.from_pretrained(model)
    # the embedding is looked up, not multiplied; the head reads scored positions alone and is left out
    text = AutoConfig.from_pretrained(model)
    weights = parameters(text) - text.vocab_size * text.hidden_size
    print(f"{args.dtype}; matrix products {rate_of(args):.0f} GFLOP/s; ranges over {args.repeats} turns")
    print(
        "| shape | favor, pairs/s | favor's rows | TRL's best | favor / TRL | favor / its rows | peak GiB, TRL's | floor |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as work:
            print(measured(shape, args, model, tokenizer, weights, Path(work)), flush=True)


def parse() -> argparse.Namespace:
    """Command line; what vs_trl.py's functions read is there under its names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--model", help="model folder; default the embedded one")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--per-device", type=int, nargs="+", default=[1, 2, 4, 8], help="TRL's batch sizes to try")
    parser.add_argument("--budget", default="auto", help="favor's train.max_tokens_per_pack")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--trl-python", default=sys.executable)
    args = parser.parse_args()
    args.max_tokens = LONGEST
    return args


def measured(shape: str, args: argparse.Namespace, model: Path, tokenizer, weights: int, work: Path) -> str:
    """A row of the table."""
    args.batch, per_prompt = SIZES[shape]
    rows = list(islice(ROWS[shape](tokenizer), args.batch * args.steps))
    assert len(rows) == args.batch * args.steps, f"{shape}: only {len(rows)} rows"
    data = work / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def ours(layout: str) -> Run:
        args.layout = layout
        return favor(args, data, model, per_prompt, work)

    best = best_of_trl(args, data, model, work)
    turns: dict[str, list[Run]] = defaultdict(list)
    for _ in range(args.repeats):
        turns["favor"].append(ours("auto"))
        turns["rows"].append(ours("rows"))
        turns["trl"].append(trl(args, data, model, *best, work))
    for run in (*turns["rows"], *turns["trl"]):
        difference = max(abs(a - b) for a, b in zip(run.losses, turns["favor"][0].losses, strict=True))
        assert difference < AGREE[args.dtype], f"{shape}: the losses lie {difference} apart, so it is other work"
    pairs, tokens = len(rows), turns["favor"][0].tokens
    speeds = {name: [pairs / seconds(run) for run in runs] for name, runs in turns.items()}
    # forward 2, backward 4, the stored reference's forward 2: times the weights, a token
    floor = pairs * rate_of(args) * 1e9 / (8 * weights * tokens)
    peaks = {name: statistics.median(run.peak_gib for run in runs) for name, runs in turns.items()}
    cells = (
        NAMES[shape],
        spread(speeds["favor"], ".3f"),
        spread(speeds["rows"], ".3f"),
        f"{spread(speeds['trl'], '.3f')} ({best[0]} a pass, {'stored' if best[1] else 'live'})",
        f"**{spread([a / b for a, b in zip(speeds['favor'], speeds['trl'], strict=True)], '.2f')} x**",
        f"{spread([a / b for a, b in zip(speeds['favor'], speeds['rows'], strict=True)], '.2f')} x",
        f"{peaks['favor']:.2f}, {peaks['trl']:.2f}",
        f"{floor:.3f} ({tokens} tokens; favor at {statistics.median(speeds['favor']) / floor:.0%})",
    )
    return f"| {' | '.join(cells)} |"


def rate_of(args: argparse.Namespace) -> float:
    """GFLOP/s of the machine's products in the format that is measured."""
    return rate(dtype=torch.bfloat16 if args.dtype == "bfloat16" else torch.float32)


def best_of_trl(args: argparse.Namespace, data: Path, model: Path, work: Path) -> tuple[int, bool]:
    """TRL's fastest (size of a pass, stored reference): all sizes with it stored, then that size with it live."""
    tried = {size: seconds(trl(args, data, model, size, True, work)) for size in args.per_device}
    size = min(tried, key=lambda one: tried[one])
    return size, tried[size] <= seconds(trl(args, data, model, size, False, work))


def seconds(run: Run) -> float:
    """Training with its reference."""
    return run.train_s + run.reference_s


def spread(values: Sequence[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def pairs(tokenizer) -> Iterator[Row]:
    """HH's pairs of at most 512 tokens."""
    for row in hh_rows():
        if max(len(tokenizer(row["prompt"] + row[side]).input_ids) for side in ("chosen", "rejected")) < 512:
            yield row


def system(tokenizer) -> Iterator[Row]:
    """The same behind an opening of 600 tokens."""
    opening = tokenizer.decode(
        tokenizer("A policy for assistants. " + "Be kind, exact and brief; say what you do not know. " * 80).input_ids[
            :600
        ]
    )
    for row in pairs(tokenizer):
        yield row | {"prompt": opening + row["prompt"]}


def answers(tokenizer, count: int) -> Iterator[tuple[str, list[str]]]:
    """Film prompts with `count` different quotes of the demo's data."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for row in demo_rows(review_files(cache_folder(), print) / "train.jsonl", tokenizer):
        found[row["prompt"]] |= dict.fromkeys((row["chosen"], row["rejected"]))
    every = list(dict.fromkeys(quote for quotes in found.values() for quote in quotes))
    for number, (prompt, quotes) in enumerate(found.items()):
        # a film with fewer quotes gets others'
        yield prompt, list(dict.fromkeys([*quotes, *every[number * count :]]))[:count]


def four(tokenizer) -> Iterator[Row]:
    """All six pairs of four answers."""
    for prompt, quotes in answers(tokenizer, 4):
        yield from ({"prompt": prompt, "chosen": a, "rejected": b} for a, b in combinations(quotes, 2))


def sixteen(tokenizer) -> Iterator[Row]:
    """The best of sixteen answers against each other one, and the second against the third."""
    for prompt, (best, *others) in answers(tokenizer, 16):
        yield from ({"prompt": prompt, "chosen": best, "rejected": other} for other in others)
        yield {"prompt": prompt, "chosen": others[0], "rejected": others[1]}


def turns(tokenizer) -> Iterator[Row]:
    """Conversations of HH with four answers or more, at most 512 tokens: each of the first four against another conversation's."""
    last = " I do not know."
    for row in pairs(tokenizer):
        parts = (row["prompt"] + row["chosen"]).split(MARKER)
        if len(parts) < 5:
            continue
        said = [part.partition("\n\nHuman:")[0] for part in parts[1:5]]
        if any(not one.strip() for one in said):
            continue
        for turn, answer in enumerate(said):
            yield {"prompt": MARKER.join(parts[: turn + 1]) + MARKER, "chosen": answer, "rejected": last}
            last = answer


ROWS = {"pairs": pairs, "four": four, "sixteen": sixteen, "system": system, "turns": turns}

if __name__ == "__main__":
    main()
