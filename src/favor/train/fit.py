"""What a measured recipe means for a user: memory, hours, and settings with which it would fit a card.

In: Measured, the recipe as it was given. Out: lines. Next: ../cli.py.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from favor.config import load
from favor.errors import ConfigError
from favor.model.size import GIB, architecture_of
from favor.train.dryrun import estimated, has
from favor.train.measure import Measured, measure
from favor.train.notes import duration
from favor.train.preference import TrainConfig

# from what costs time alone to what changes what is trained
_SAVING = (
    "reference.mode=stored",
    # tried again beside adapters, which it goes with in every precision
    "model.weights=bfloat16",
    "model.gradient_checkpointing=true",
    "optim.kind=adamw8bit",
    "model.lora.rank=16",
    "model.weights=bfloat16",
    "model.weights=nf4",
)
# what CUDA and its libraries hold of a card beside tensors: an assumption, not measured
_CONTEXT = GIB // 2


def report(
    config: TrainConfig, card_gib: float | None, recipe: Path | None, overrides: Sequence[str]
) -> tuple[list[str], dict[str, object]]:
    """Measure; lines for people, figures for programs. card_gib: a card's memory; without it, what this machine or its GPU has."""
    found = measure(config)
    room, name, beside = _room(config, found, card_gib)
    needed = found.state + found.pack + beside
    copied = f"; a copy for checkpoints {_gib(found.copy)}, made where there is room" if found.copy else ""
    lines = [
        f"memory (measured): {_gib(found.peak)} at its peak (weights, gradients, optimizer {_gib(found.state)}; "
        f"a pack of {found.pack_tokens:,} tokens {_gib(found.pack)}{copied})",
        _time(found),
    ]
    figures: dict[str, object] = {"peak_bytes": found.peak, "seconds": found.seconds, "fits": needed <= room}
    if needed <= room:
        return [
            *lines,
            f"fits: yes, {_gib(needed)} of {_gib(room)} ({name}), of which {_gib(beside)} beside the model",
        ], figures
    words, size = fitting(config, found, room - beside, recipe, overrides)
    less = (
        f"about {_gib(size + beside)} with {' '.join(words)}"
        if words
        else "no setting changes that; take a smaller model"
    )
    lines.append(f"fits: no, {_gib(needed)} of {_gib(room)} ({name}); {less}")
    return lines, figures | {"fits_with": words}


def _time(found: Measured) -> str:
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in found.seconds.items())
    each = found.seconds["steps"] / found.num_steps
    return f"time (measured): {duration(sum(found.seconds.values()))} ({parts}), {each:.1f} s a step"


def _room(config: TrainConfig, found: Measured, card_gib: float | None) -> tuple[int, str, int]:
    """Bytes there are, where, and bytes there that a process takes beside the model and its packs."""
    if card_gib is not None:
        return round(card_gib * GIB), "the card", _CONTEXT
    room, place = has(config)
    return room, place, _CONTEXT if place == "this GPU" else found.peak - found.state - found.pack - found.copy


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def fitting(
    config: TrainConfig, found: Measured, room: int, recipe: Path | None, overrides: Sequence[str]
) -> tuple[list[str], int]:
    """Settings, as they are typed, with which a recipe takes at most `room` bytes, and its bytes then; none where none help.

    What was measured is scaled as the estimate changes. Smaller packs come first, since they change no result.
    """
    architecture = architecture_of(config.model)
    now = estimated(config, architecture, found.pack_tokens)

    def size(words: Sequence[str], tokens: int) -> int:
        try:
            changed = load(TrainConfig, recipe, [*overrides, *words])
        except ConfigError:
            # settings that do not go together fit nowhere
            return sys.maxsize
        then = estimated(changed, architecture, tokens)
        share = (then.activations + then.logits) / (now.activations + now.logits)
        return found.state + then.state - now.state + round(found.pack * share)

    def without_needless(words: list[str], tokens: int) -> list[str]:
        for word in tuple(words):
            fewer = [other for other in words if other != word]
            words = fewer if size(fewer, tokens) <= room else words
        return words

    words: list[str] = []
    for saving in (None, *_SAVING):
        more = words if saving is None else [*words, saving]
        if saving and (not _possible(saving, config, architecture) or size(more, 1) >= size(words, 1)):
            continue
        words = more
        for tokens in _packs(found):
            if size(words, tokens) <= room:
                said = [f"train.max_tokens_per_pack={tokens}"] if tokens < found.pack_tokens else []
                words = without_needless(words, tokens)
                return [*said, *words], size(words, tokens)
    return [], 0


def _possible(saving: str, config: TrainConfig, architecture: PreTrainedConfig) -> bool:
    """Whether a model can have it: kept in bfloat16 are weights that its files hold in bfloat16, and adapters may be there."""
    if saving == "model.weights=bfloat16":
        return architecture.dtype == torch.bfloat16
    return config.model.lora is None or not saving.startswith("model.lora")


def _packs(found: Measured) -> Iterator[int]:
    """Tokens of a pack, from what was measured down to the longest prompt with its answers."""
    tokens = found.pack_tokens
    while tokens > found.longest:
        yield tokens
        tokens //= 2
    yield found.longest
