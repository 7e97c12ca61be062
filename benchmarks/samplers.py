"""The samplers that generation.py compares: favor's, `generate` and continuous batching of transformers, and what checks them."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from favor.data.prompts import sample_seeds
from favor.model.load import Policy
from favor.model.sample import SampleConfig, sample

# how far the logits of two likeliest answers may lie apart where they part
TIE = 0.01


class Task(NamedTuple):
    """What is asked of a sampler: `each` samples of `new` tokens for every prompt."""

    prompts: list[list[int]]
    each: int
    new: int

    @property
    def tokens(self) -> int:
        """All that are sampled."""
        return len(self.prompts) * self.each * self.new


def endless(source: Path, work: Path, end: str) -> Path:
    """The model with another end token, its weights linked."""
    folder = work / "model"
    folder.mkdir()
    changed = ("config.json", "generation_config.json", "tokenizer_config.json")
    for path in source.iterdir():
        if path.name not in changed:
            (folder / path.name).symlink_to(path.resolve())
    place = AutoTokenizer.from_pretrained(source).convert_tokens_to_ids(end)
    for name in changed:
        ends = (end, end) if name.startswith("tokenizer") else (place, place)
        names = ("eos_token", "pad_token") if name.startswith("tokenizer") else ("eos_token_id", "pad_token_id")
        found = json.loads((source / name).read_text("utf-8")) | dict(zip(names, ends, strict=True))
        (folder / name).write_text(json.dumps(found), "utf-8")
    return folder


def favors(policy: Policy, task: Task, temperature: float = 1.0) -> list[list[int]]:
    """favor's sampler at its own settings."""
    repeated = [ids for ids in task.prompts for _ in range(task.each)]
    seeds = sample_seeds(0, range(len(task.prompts)), task.each)
    config = SampleConfig(max_new_tokens=task.new, temperature=temperature)
    return [list(ids) for ids in sample(policy, repeated, seeds, config)]


def how(model: Any, task: Task, *, drawn: bool) -> GenerationConfig:
    """transformers' words for it."""
    ends = model.generation_config.eos_token_id
    chance = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if drawn else {"do_sample": False}
    return GenerationConfig(
        max_new_tokens=task.new, eos_token_id=ends, pad_token_id=ends, num_return_sequences=task.each, **chance
    )


def generates(model: Any, task: Task, batch: int, *, drawn: bool = True) -> list[list[int]]:
    """`generate` on prompts of like length together, padded on the left, `batch` samples at once."""
    order = sorted(range(len(task.prompts)), key=lambda i: len(task.prompts[i]))
    config, at_once = how(model, task, drawn=drawn), max(1, batch // task.each)
    found: list[list[int]] = [[] for _ in range(len(order) * task.each)]
    for start in range(0, len(order), at_once):
        members = order[start : start + at_once]
        width = max(len(task.prompts[i]) for i in members)
        ids = torch.tensor([[config.pad_token_id] * (width - len(task.prompts[i])) + task.prompts[i] for i in members])
        mask = torch.tensor([[0] * (width - len(task.prompts[i])) + [1] * len(task.prompts[i]) for i in members])
        rows = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        for place, i in enumerate(members):
            found[i * task.each : (i + 1) * task.each] = rows[place * task.each : (place + 1) * task.each]
    return found


def room(task: Task, batch: int) -> dict[str, int]:
    """Of continuous batching: a cache for all samples (its default is 60 % of the machine's memory), samples at once."""
    blocks = sum(math.ceil((len(ids) + task.new) / 64) for ids in task.prompts) * task.each
    return {"page_size": 64, "num_blocks": 2 * blocks + 16, "max_batch_tokens": 1024, "max_requests_per_batch": batch}


def continues(model: Any, task: Task, batch: int, *, drawn: bool = True) -> list[list[int]]:
    """`generate_batch`. Raises RuntimeError with what it said when a sample is missing."""
    config = ContinuousBatchingConfig(**room(task, batch))
    found = model.generate_batch(
        task.prompts, generation_config=how(model, task, drawn=drawn), continuous_batching_config=config
    )
    wrong = {str(one.error) for one in found.values() if one.error is not None}
    if wrong or len(found) != len(task.prompts) * task.each:
        raise RuntimeError("; ".join(wrong) or f"{len(found)} samples of {len(task.prompts) * task.each} came back")
    return [one.generated_tokens for one in found.values()]


def clocked(way: Callable[[], list[list[int]]], task: Task) -> float:
    """Seconds, of samples that are all there and all as long as asked."""
    torch.manual_seed(0)
    began = time.perf_counter()
    found = way()
    seconds = time.perf_counter() - began
    assert list(map(len, found)) == [task.new] * len(task.prompts) * task.each, sorted(map(len, found))
    return seconds


@torch.no_grad()
def alike(model: Any, task: Task, ours: list[list[int]], theirs: list[list[int]]) -> int:
    """How many answers are equal; others part where two tokens are as likely as rounding can tell, else it is another model."""
    for ids, a, b in zip(task.prompts, ours, theirs, strict=True):
        if a != b:
            place = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            logits = model(torch.tensor([ids + a[:place]]), use_cache=False).logits[0, -1]
            short = logits.max() - logits[[a[place], b[place]]].min()
            assert short < TIE, f"an answer parts at token {place}, {short:.3f} nats below the likeliest"
    return sum(a == b for a, b in zip(ours, theirs, strict=True))
