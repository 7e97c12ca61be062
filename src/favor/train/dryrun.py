"""`favor train --dry-run`: what a recipe would train, without loading weights or touching the run folder.

In: TrainConfig. Out: a few lines of text. Next: preference.py.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from favor.data import batches
from favor.data.prepare import Vocabulary, check_sources, prepare
from favor.data.sight import Sight
from favor.data.splits import outlines
from favor.data.types import Layout, TokenTree, longest_path
from favor.lint.cheap import CHECKS
from favor.model.layout import config_obstacle
from favor.model.load import end_ids, load_tokenizer, precision_of
from favor.model.room import memory
from favor.model.size import GIB, Sizes, architecture_of, described_ends, sizes, trained
from favor.model.vision import SEES, load_sight
from favor.model.weights import model_type
from favor.train.loop import length_notes, num_steps
from favor.train.optim import STATE_BYTES, learning_rate, warmup
from favor.train.packs import chosen, looked_at
from favor.train.preference import TrainConfig, compares_live
from favor.train.stats import usable


def describe(config: TrainConfig) -> str:
    """Rows, what the cheap checks find in them, steps, learning rate, memory and disk. Raises what training would raise."""
    check_sources(config.data)
    (tokenizer, sight), lines = _vocabulary(config), list[str]()
    ends = end_ids(tokenizer, described_ends(config.model))
    splits = prepare(config.data, config.tokens, Vocabulary(tokenizer, ends, sight), CHECKS, lines.append)
    # as training, on the trees that hold items of the loss
    trees = [splits.train[i] for i in usable(config.loss, outlines(splits.train), config.data.training)]
    architecture = architecture_of(config.model)
    longest = max(map(longest_path, splits.train))
    obstacle = config_obstacle(architecture.get_text_config().to_dict(), longest)
    layout = "rows" if obstacle or config.model.layout == "rows" else "tree"
    steps, size = num_steps(config.train, len(trees)), config.train.batch_prompts
    if layout == "tree":
        unique = sum(batches.build(trees[i : i + size], layout).num_tokens for i in range(0, len(trees), size))
    else:
        unique = sum(batches.computed_tokens(tree, layout) for tree in trees)
    apart = sum(
        len(tree.prompt_ids) + len(tree.response_ids[i]) for tree in trees for c in tree.comparisons for i in c.order
    )
    lines += [
        f"precision: {precision_of(config.model.dtype)}",
        f"device: {'GPU' if config.model.on_gpu else 'CPU'}",
        f"layout: {layout}" + (f" ({obstacle})" if obstacle else ""),
        f"longest row: {longest} tokens",
        f"tokens an epoch: {unique} computed; every response with its own prompt would be {apart} ({apart / unique:.2f} x)",
        f"steps: {steps}, each of up to {size} prompts",
        *_rate(config, steps),
        *_held_out(config),
        _memory(config, architecture, trees, layout),
        _disk(config, architecture),
    ]
    return "\n".join(lines)


def _vocabulary(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, Sight | None]:
    """The tokenizer, and what sees the pictures of a model that reads them."""
    model = config.model
    if model_type(model.path, model.revision) not in SEES:
        return load_tokenizer(model), None
    sight = load_sight(model.path, model.revision, trust=model.trust_remote_code)
    return sight.processor.tokenizer, sight


def _rate(config: TrainConfig, steps: int) -> Iterator[str]:
    rising = warmup(config.optim, steps)
    highest = max(learning_rate(config.optim, step, steps) for step in range(steps))
    yield f"learning rate: up to {highest:.3g}, after {rising} steps of warm-up, then {config.optim.schedule}"
    yield from (said for _, said in length_notes(config, steps))


def _held_out(config: TrainConfig) -> Iterator[str]:
    if config.data.eval is None and config.data.hold_out is None:
        yield "note: no rows are held out, so favor eval has nothing to measure on; data.hold_out.share=0.1 holds a tenth out"


def _disk(config: TrainConfig, architecture: PreTrainedConfig) -> str:
    """What trains, in float32; a checkpoint has the optimizer's state beside it."""
    place = Path(config.run).absolute()
    free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.is_dir())).free
    weights = 4 * trained(architecture, config.model.lora)
    kept = weights + weights * STATE_BYTES[config.optim.kind] // 4
    # the newest ones, and one more while it is written
    checkpoints = config.save.keep + 1 if config.save.every else 1
    checkpoints += config.health is not None and config.health.keeps
    needed = weights + checkpoints * kept
    lacking = f"\nwarning: {needed / GIB:.2f} GiB are needed; save.keep=1 keeps one checkpoint" if needed > free else ""
    what = "adapters" if config.model.lora else "model"
    return f"disk (estimate): {what} {weights / GIB:.2f} GiB, each checkpoint {kept / GIB:.2f}; {free / GIB:.1f} GiB free{lacking}"


def _memory(config: TrainConfig, architecture: PreTrainedConfig, trees: Sequence[TokenTree], layout: Layout) -> str:
    asked = config.train.max_tokens_per_pack
    # what is free when training starts may make it less
    few = [[trees[i] for i in some] for some in looked_at(config.train, range(len(trees)))]
    budget = chosen(layout, few, gpu=config.model.on_gpu) if asked == "auto" else asked
    tokens = [batches.computed_tokens(tree, layout) for tree in trees]
    pack = min(max(budget, *tokens), sum(tokens))
    parts = {"none": "", "full": "processes", "hybrid": "processes of a machine"}[config.ranks.shard]
    size, (room, place) = estimated(config, architecture, pack), has(config)
    said = f"memory (estimate): {size}, in packs of up to {budget:,} tokens"
    if parts:
        return f"{said}; the first is divided by the number of {parts} (ranks.shard)"
    if sum(size) > room:
        said += (
            f"\nwarning: {place} has {room / GIB:.2f} GiB. Less takes: model.lora.rank=16, with it model.weights=bfloat16 or nf4; "
            "model.gradient_checkpointing=true; ranks.shard=full over several processes (docs/choose.md)"
        )
    return said


def has(config: TrainConfig) -> tuple[int, str]:
    """Bytes of memory where the recipe trains, and where that is."""
    if config.model.on_gpu:
        return torch.cuda.get_device_properties(0).total_memory, "this GPU"
    return memory().total, "this machine"


def estimated(config: TrainConfig, architecture: PreTrainedConfig, tokens: int) -> Sizes:
    """Memory of training in packs of so many tokens, by the architecture alone."""
    return sizes(
        architecture,
        config.model,
        tokens,
        trained_bytes=4 + STATE_BYTES[config.optim.kind],
        # under adapters the model without them is the reference
        copies=1 if compares_live(config) and not config.model.lora else 0,
        moving=config.reference.sync is not None,
    )
