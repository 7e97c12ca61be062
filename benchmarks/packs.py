"""Tokens that one optimizer batch costs, by budget and by how its trees are put into packs.

In: a model's tokenizer, preferences, the length of an opening that all prompts share. Out: a table: every pair by itself, the
trees of favor filled into packs in their order, and favor's plan. Nothing is computed with the model.

    python benchmarks/packs.py MODEL PREFERENCES --opening 600
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from favor.data.batches import build, computed_tokens, plan
from favor.data.prepare import prepare
from favor.data.settings import DataConfig
from favor.data.tokenize import TokensConfig
from favor.data.types import TokenTree
from favor.lint.cheap import CHECKS
from favor.model.load import ModelConfig, end_ids, load_tokenizer


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--opening", type=int, default=600, help="tokens with which every prompt begins")
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 16, 64], help="prompts of a batch")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 2048, 4096])
    args = parser.parse_args()
    tokenizer = load_tokenizer(ModelConfig(path=args.model))
    vocabulary = (tokenizer, end_ids(tokenizer, None))
    splits = prepare(DataConfig(train=args.data), TokensConfig(), vocabulary, CHECKS, lambda said: None)
    opening = tuple(100 + i for i in range(args.opening))
    trees = [
        replace(splits.train[i], prompt_ids=opening + splits.train[i].prompt_ids)
        for i in range(min(max(args.prompts), len(splits.train)))
    ]
    print(
        "| prompts | budget | every response by itself | packs in order | favor's plan | packs |\n|---|---|---|---|---|---|"
    )
    for count in args.prompts:
        for budget in args.budgets:
            print(_row(trees[:count], budget))


def _row(trees: Sequence[TokenTree], budget: int) -> str:
    alone = sum(len(tree.prompt_ids) + len(response) for tree in trees for response in tree.response_ids)
    planned = [members for members in plan(trees, "tree", budget) if members]
    costs = [
        sum(build([trees[i] for i in pack], "tree").num_tokens for pack in cut)
        for cut in (_in_order(trees, budget), planned)
    ]
    return f"| {len(trees)} | {budget:,} | {alone:,} | {costs[0]:,} | {costs[1]:,} | {len(planned)} |"


def _in_order(trees: Sequence[TokenTree], budget: int) -> list[list[int]]:
    """Trees as they come, each counted as if it stood alone."""
    packs, load = [[]], 0
    for i, tree in enumerate(trees):
        size = computed_tokens(tree, "tree")
        if packs[-1] and load + size > budget:
            packs.append([])
            load = 0
        packs[-1].append(i)
        load += size
    return packs


if __name__ == "__main__":
    main()
