"""Scores from models: a reward model's scalar, or the implicit reward of a trained policy; on prompt trees.

In: a model folder, prompts and responses as text. Out: one score per response. Next: ../model/heads.py.
"""

import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from favor.data import pack
from favor.data.formats import RowError
from favor.data.tokenize import TokensConfig, encode_prompt, tokenize
from favor.data.types import Batch, PromptTree, Text, TokenTree
from favor.errors import CheckpointError, ConfigError, DataError
from favor.model.heads import load_scalar_model, response_scores
from favor.model.layout import settle
from favor.model.load import ModelConfig, Policy, load_policy
from favor.model.logprobs import response_logps
from favor.run import RunFolder
from favor.scoring.source import Scorer

# Tokens computed at once; there is no gradient, so this bounds the memory of one forward only.
_BUDGET = 4096


def model_scorer(path: str, tokens: TokensConfig) -> Scorer:
    """The scalar of a sequence classifier with one output at each response's last token."""
    policy = load_scalar_model(ModelConfig(path=path, dtype="float32"))

    def score(prompts: Sequence[Text], responses: Sequence[str]) -> list[float]:
        trees, place = encode(prompts, responses, policy, tokens)
        settled, _ = settle(policy, "auto", trees, response_scores)
        return measure(trees, settled, lambda batch: response_scores(settled, batch))[place].tolist()

    return score


def implicit_scorer(run: str, reference: str | None, beta: float | None, tokens: TokensConfig) -> Scorer:
    """r(x, y) = beta log(pi(y|x) / ref(y|x)), nats x beta; policy, reference and beta are those of the run."""
    folder = RunFolder(Path(run))
    if not folder.config.exists() or not folder.model.exists():
        raise CheckpointError(f"{run}: no finished run here (config.toml and model/); name a folder of favor train")
    recipe: dict[str, Any] = tomllib.loads(folder.config.read_text("utf-8"))
    used = beta or recipe.get("loss", {}).get("beta")
    if used is None:
        raise ConfigError(f"{run}: its recipe has no loss.beta; give reward.beta")
    policy = load_policy(ModelConfig(path=str(folder.model), dtype="float32"))
    base = load_policy(ModelConfig(path=reference or recipe["model"]["path"], dtype="float32"))

    def score(prompts: Sequence[Text], responses: Sequence[str]) -> list[float]:
        trees, place = encode(prompts, responses, policy, tokens)
        first, _ = settle(policy, "auto", trees)
        second, _ = settle(base, first.layout, trees)

        def log_ratio(batch: Batch) -> Tensor:
            return response_logps(first, batch) - response_logps(second, batch)

        return (used * measure(trees, first, log_ratio))[place].tolist()

    return score


def encode(
    prompts: Sequence[Text], responses: Sequence[str], policy: Policy, tokens: TokensConfig
) -> tuple[list[TokenTree], list[int]]:
    """One tree per distinct prompt and, for every (prompt, response), the index of its value among all trees' responses.

    Text is tokenised as in training; where a token would straddle the boundary (samples can do that) prompt and
    response are tokenised apart, which is how the sampled text came about. A blank response is its end token alone.
    Raises DataError for a prompt that cannot be rendered or is too long.
    """
    groups: dict[str, tuple[Text, dict[str, int]]] = {}
    keys: list[tuple[str, str]] = []
    for prompt, response in zip(prompts, responses, strict=True):
        key = json.dumps(prompt)
        _, members = groups.setdefault(key, (prompt, {}))
        members.setdefault(response, len(members))
        keys.append((key, response))
    trees: list[TokenTree] = []
    first: dict[str, int] = {}
    count = 0
    for key, (prompt, members) in groups.items():
        tree = _tree(prompt, list(members), policy, tokens, count)
        trees.append(tree)
        first[key] = count
        count += len(members)
    return trees, [first[key] + groups[key][1][response] for key, response in keys]


def _tree(prompt: Text, responses: list[str], policy: Policy, tokens: TokensConfig, first: int) -> TokenTree:
    settings = tokens.model_copy(update={"special_text": "allow"})
    try:
        ids = encode_prompt(prompt, policy.tokenizer, settings)
    except RowError as error:
        raise DataError(f"the prompt {prompt!r:.80} cannot be scored: {error}") from None
    told = [text for text in responses if text.strip()]
    encoded = _exact(prompt, told, policy, settings) if told else {}
    blank = (min(policy.end_ids),)
    room = tokens.max_tokens - len(ids)
    if room < 1:
        raise DataError(
            f"the prompt {prompt!r:.80} has {len(ids)} tokens; raise reward.tokens.max_tokens = {tokens.max_tokens}"
        )
    cut = tuple(encoded.get(text, blank)[:room] for text in responses)
    return TokenTree(ids, cut, (True,) * len(cut), (), first, row=1)


def _exact(prompt: Text, told: list[str], policy: Policy, settings: TokensConfig) -> dict[str, tuple[int, ...]]:
    """The ids of each response as training sees them; those for which there are none are tokenised apart."""
    sides = tuple(told) if isinstance(prompt, str) else tuple(({"role": "assistant", "content": t},) for t in told)
    try:
        tree = PromptTree(prompt, sides, (), (1,), "scored text")
        (exact,), _ = tokenize([tree], policy.tokenizer, settings, policy.end_ids, "error")
    except DataError:
        if len(told) == 1:
            return {told[0]: _apart(told[0], policy)}
        # one that cannot be exact must not change how the others are scored
        return {text: ids for each in told for text, ids in _exact(prompt, [each], policy, settings).items()}
    return dict(zip(told, exact.response_ids, strict=True))


def _apart(text: str, policy: Policy) -> tuple[int, ...]:
    return (*policy.tokenizer(text, add_special_tokens=False).input_ids, min(policy.end_ids))


def measure(trees: Sequence[TokenTree], policy: Policy, function: Callable[[Batch], Tensor]) -> Tensor:
    """`function` of every response, without gradients: float64 [responses], CPU, in the trees' order."""
    total = torch.zeros(sum(len(tree.response_ids) for tree in trees), dtype=torch.float64)
    with torch.no_grad():
        for members in pack.plan([pack.computed_tokens(tree, policy.layout) for tree in trees], _BUDGET):
            batch = pack.build([trees[i] for i in members], policy.layout).to(policy.device)
            total[batch.index_R.cpu() - trees[0].first_response] = function(batch).double().cpu()
    return total
