"""`favor train --dry-run`: what a recipe would train, without loading weights or touching the run folder.

In: TrainConfig. Out: a few lines of text. Next: preference.py.
"""

from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from favor.data import batches
from favor.data.prepare import prepare_split, summary
from favor.data.read import splits_of
from favor.data.splits import Recipe
from favor.data.types import TokenTree
from favor.lint.cheap import CHECKS
from favor.model.layout import config_obstacle, longest_path
from favor.model.load import ModelConfig, end_ids, load_tokenizer, precision_of
from favor.model.weights import readable
from favor.train.loop import num_steps
from favor.train.preference import TrainConfig
from favor.train.stats import usable

_GIB = 1 << 30


def describe(config: TrainConfig) -> str:
    """Rows, trees, unique against naive tokens, steps, and a memory estimate. Raises what training would raise."""
    tokenizer = load_tokenizer(config.model)
    recipe = Recipe(splits_of(config.data)[0], config.data, config.tokens, tokenizer, end_ids(tokenizer, None))
    part = prepare_split(recipe, CHECKS, lambda _: None)
    # as training, on the trees that hold items of the loss
    trees = [part.trees[i] for i in usable(config.loss, part.trees, config.data.training)]
    architecture = _architecture(config.model)
    longest = max(map(longest_path, part.trees))
    obstacle = config_obstacle(architecture.get_text_config().to_dict(), longest)
    layout = "rows" if obstacle or config.model.layout == "rows" else "tree"
    naive = sum(
        len(tree.prompt_ids) + len(r)
        for tree in trees
        for c in tree.comparisons
        for i in c.order
        for r in [tree.response_ids[i]]
    )
    size = config.train.batch_prompts
    unique = sum(batches.build(trees[i : i + size], layout).num_tokens for i in range(0, len(trees), size))
    steps = num_steps(config.train, len(trees))
    lines = [
        f"train: {summary(part.read, part.tokens)}",
        f"precision: {precision_of(config.model.dtype)}",
        f"layout: {layout}" + (f" ({obstacle})" if obstacle else ""),
        f"longest row: {longest} tokens",
        f"tokens an epoch: {unique} computed against {naive} naive ({naive / unique:.2f} x)",
        f"steps: {steps} of {config.train.batch_prompts} prompts",
        _memory(config, architecture, trees),
    ]
    return "\n".join(lines)


def _architecture(model: ModelConfig) -> PreTrainedConfig:
    with readable(model.path):
        return AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )


def _memory(config: TrainConfig, architecture: PreTrainedConfig, trees: Sequence[TokenTree]) -> str:
    """Weights, gradients and AdamW moments in float32, activations of one full pack, its logits; an estimate.

    Per token and layer a transformer block keeps about 14 vectors of the hidden and 4 of the MLP width for its backward
    (measured on Llama blocks, docs/log.md); recomputation keeps one hidden vector a layer.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    total = sum(parameter.numel() for parameter in model.parameters())
    text = architecture.get_text_config()
    hidden, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    trained = total if config.model.lora is None else 0
    state = 4 * total + 4 * trained * (3 if config.optim.kind == "adamw" else 2)
    if config.reference.mode == "live" or config.watch.kl:
        state += 0 if config.model.lora else 4 * total
    pack_tokens = max(config.train.max_tokens_per_pack, max(tree.num_tokens for tree in trees))
    pack_tokens = min(pack_tokens, sum(tree.num_tokens for tree in trees))
    width = text.to_dict().get("intermediate_size") or 4 * hidden
    a_layer = hidden if config.model.gradient_checkpointing else 14 * hidden + 4 * width
    activations = 4 * pack_tokens * layers * a_layer
    logits = min(4 * pack_tokens * vocabulary, _GIB)
    parts = {"weights, gradients, optimizer": state, "activations": activations, "logits": logits}
    shown = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts.items())
    return f"memory (estimate): {sum(parts.values()) / _GIB:.2f} GiB ({shown})"
