"""What was forgotten: favor's fixed set of short questions (checks.toml), asked by log-probs, without sampling.

In: a settled policy. Out: for every question whether the right continuation is the likeliest of four. Next: run.py.
"""

import tomllib
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from favor.data.tokenize import TokensConfig, prompt_encoder
from favor.data.types import TokenTree
from favor.eval.intervals import Array
from favor.model.batched import measured
from favor.model.load import Policy
from favor.model.logprobs import response_logps

# wrong continuations of a question
_WRONG = 3


class Check(NamedTuple):
    """A question: its text, and continuations of which the first is right."""

    group: str
    prompt: str
    choices: tuple[str, ...]


def questions() -> list[Check]:
    """The fixed set; the wrong continuations of a pair are the answers of the pairs behind it, in a circle."""
    groups = tomllib.loads(files("favor.diff").joinpath("checks.toml").read_text("utf-8"))["group"]
    found: list[Check] = []
    for group in groups:
        pairs = [pair.split() for pair in group["pairs"].split(",")]
        for place, (asked, _) in enumerate(pairs):
            answers = [pairs[(place + step) % len(pairs)][1] for step in range(_WRONG + 1)]
            found.append(Check(group["name"], group["prompt"].format(asked), tuple(f" {word}" for word in answers)))
    return found


def trees_of(checks: Sequence[Check], tokenizer: PreTrainedTokenizerBase) -> list[TokenTree]:
    """Each question as a tree of plain text. Raises ConfigError for a tokenizer that cannot take plain text."""
    encode = prompt_encoder(tokenizer, TokensConfig(template="plain", special_text="allow"))
    return [_tree(encode(check.prompt), [encode(check.prompt + text) for text in check.choices]) for check in checks]


def _tree(prompt: tuple[int, ...], whole: Sequence[tuple[int, ...]]) -> TokenTree:
    # where a token straddles the boundary, what all of them share comes first
    together = next((i for i, ids in enumerate(zip(prompt, *whole, strict=False)) if len(set(ids)) > 1), len(prompt))
    shared = min(together, *(len(ids) - 1 for ids in whole))
    return TokenTree(prompt[:shared], tuple(ids[shared:] for ids in whole), (False,) * len(whole), (), 0, 0)


def right(policy: Policy, trees: Sequence[TokenTree], budget: int) -> Array:
    """1 where the right continuation alone has the highest log-prob (nats, summed over its tokens), else 0: [questions]."""
    logps = measured(policy, trees, lambda batch: response_logps(policy, batch), budget).view(len(trees), -1)
    return (logps[:, 0] > logps[:, 1:].max(1).values).numpy().astype(np.float64)
