"""Batched sampling with a KV cache, seeded per prompt, and the one decoder of what was sampled.

In: a Policy and prompts as token ids. Out: sampled token ids, the same for the same seed whatever else is in
the batch; their text. Next: ../generate/engines.py.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from favor.config import STRICT
from favor.errors import ConfigError, NumericsError
from favor.model.load import Policy, attention_name, check_ids, use_attention
from favor.model.logprobs import precision, within
from favor.ranks import World, sum_


class SampleConfig(BaseModel):
    """Section [sample]."""

    model_config = STRICT
    max_new_tokens: int = Field(default=64, ge=1, le=1_000_000)
    """A response is cut after this many tokens."""
    temperature: float = Field(default=1.0, ge=1e-4)
    """Logits are divided by it; 1 samples from the model's own distribution."""
    batch: int = Field(default=32, ge=1)
    """Responses sampled at once: lower it if memory runs out."""


class Mix(NamedTuple):
    """What is sampled from in place of a policy: logits (1 - weight) reference + weight policy, at every token (mixed.py)."""

    reference: Policy
    weight: float


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    config: SampleConfig,
    progress: Callable[[int], None] = lambda done: None,
    told: Callable[[int], None] | None = None,
    mix: Mix | None = None,
) -> list[tuple[int, ...]]:
    """One sampled response per prompt, its end-of-turn token included if it reached one.

    Each prompt has its own random stream, so two models given the same seeds see the same noise. With one prompt, `told`
    gets each token as it is sampled; what it raises ends the sampling. `mix`: the policy's logits are mixed with another's.
    """
    assert told is None or len(prompts) == 1, "tokens are told of a single response"
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[tuple[int, ...]] = [()] * len(prompts)
    check_ids(policy, max(map(max, prompts)))
    other = policy if mix is None else mix.reference
    with _plain_attention(policy), _plain_attention(other), torch.no_grad(), precision(policy):
        for start in range(0, len(order), config.batch):
            members = order[start : start + config.batch]
            try:
                mine, noise = [prompts[i] for i in members], [seeds[i] for i in members]
                sampled = _sample_batch(policy, mine, noise, config, told, mix)
            except IndexError:
                # a table of learned positions that ends
                longest = max(len(prompts[i]) for i in members) + config.max_new_tokens
                raise ConfigError(
                    f"{policy.source}: has no positions for {longest} tokens, prompt and sample.max_new_tokens = "
                    f"{config.max_new_tokens} together; lower it, or shorten the prompts"
                ) from None
            for i, response in zip(members, sampled, strict=True):
                results[i] = response
            progress(len(members))
    return results


def sampled(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    config: SampleConfig,
    world: World,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[int, ...]]:
    """As `sample`, each rank sampling its share; equal on all ranks. `progress` is told of all ranks' responses."""
    mine = range(world.rank, len(prompts), world.size)
    # split weights are collected by all ranks together, so one that has a prompt less draws one more, which is not kept
    idle = [0] if policy.root is not None and len(mine) * world.size < len(prompts) else []
    drawn = [*mine, *idle]
    found: list[tuple[int, ...]] = []
    if drawn:
        found = sample(policy, [prompts[i] for i in drawn], [seeds[i] for i in drawn], config, progress)
    progress(len(prompts) - len(drawn))
    # token ids + 1, so that 0 marks what is not there; the sum over ranks puts every rank's rows together
    table = torch.zeros(len(prompts), config.max_new_tokens, dtype=torch.int64, device=policy.device)
    for i, response in zip(mine, found, strict=not idle):
        table[i, : len(response)] = torch.tensor(response) + 1
    return [tuple(token - 1 for token in row if token) for row in sum_(table, world).tolist()]


def decode(tokenizer: PreTrainedTokenizerBase, responses: Sequence[Sequence[int]]) -> list[str]:
    """Sampled ids as text without special tokens; white space around it stays, because it was sampled too."""
    return tokenizer.batch_decode([list(ids) for ids in responses], skip_special_tokens=True)


@contextlib.contextmanager
def _plain_attention(policy: Policy) -> Generator[None]:
    """The model's own attention for the time of the block."""
    before = attention_name(policy.causal_lm)
    use_attention(policy, policy.plain_attention)
    try:
        yield
    finally:
        use_attention(policy, before)


def _sample_batch(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    config: SampleConfig,
    told: Callable[[int], None] | None,
    mix: Mix | None,
) -> list[tuple[int, ...]]:
    width = max(map(len, prompts))
    ends = sorted(policy.end_ids)
    pad = ends[0]
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=policy.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=policy.device)
    # of greedy decoding, as the noise is in the logits
    common = {"do_sample": False, "pad_token_id": pad, "use_cache": True}

    def forward() -> Tensor:
        mixing = [] if mix is None else [_Mixing(mix, mask, common)]
        noise = LogitsProcessorList([*mixing, _PerPromptNoise(seeds, config.temperature, policy)])
        given, seen, begun = _begun(policy, prompts, ids, mask, noise, common)
        left = width + config.max_new_tokens - given.shape[1]
        if left == 0:
            return given
        return policy.causal_lm.generate(  # pyright: ignore[reportCallIssue]
            given,
            attention_mask=seen,
            **begun,
            generation_config=GenerationConfig(max_new_tokens=left, eos_token_id=ends, **common),
            logits_processor=noise,
            streamer=_Streamer(told) if told else None,
            # of split weights every rank computes as many tokens as the longest sample of any
            synced_gpus=policy.root is not None,
        )

    out = within(policy, forward)
    rows: list[list[int]] = out[:, width:].tolist()
    # what follows the first end of turn is padding
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)]


def _begun(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    ids: Tensor,
    mask: Tensor,
    noise: LogitsProcessorList,
    common: Mapping[str, Any],
) -> tuple[Tensor, Tensor, dict[str, DynamicCache]]:
    """Where a prompt has several samples: it is computed once for them, and their first token is sampled.

    Rows and mask with that token, and the keys and values of the prompts. As given, with nothing, where no prompt is shared or
    a model keeps more than keys and values. It changes samples by rounding alone.
    """
    number: dict[tuple[int, ...], int] = {}
    row_of = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    # of split weights all ranks run equally many passes
    if policy.root is not None or len(number) == len(prompts):
        return ids, mask, {}
    first = [row_of.index(row) for row in number.values()]
    once = _next(policy, ids[first], mask[first], common)
    cache = once.past_key_values
    if not _goes_on(cache, ids.shape[1]):
        return ids, mask, {}
    places = torch.tensor(row_of, device=ids.device)
    cache.batch_select_indices(places)
    scores_RV = noise(ids, once.logits[0][places])  # pyright: ignore[reportArgumentType]
    token_R1 = scores_RV.argmax(-1, keepdim=True)
    return torch.cat([ids, token_R1], 1), torch.cat([mask, torch.ones_like(token_R1)], 1), {"past_key_values": cache}


def _next(policy: Policy, ids: Tensor, mask: Tensor, common: Mapping[str, Any], **kept: Any) -> Any:
    """One step of generation: the logits of the next token as logits[0], and the cache of all before it."""
    step = GenerationConfig(max_new_tokens=1, return_dict_in_generate=True, output_logits=True, **common)
    return policy.causal_lm.generate(ids, attention_mask=mask, generation_config=step, **kept)  # pyright: ignore[reportCallIssue]


def _goes_on(cache: Any, length: int) -> bool:
    """Whether a cache holds the keys and values of so many tokens and nothing else, so that it can be gone on from."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(cache) is not DynamicCache or any(type(layer) not in plain for layer in cache.layers):
        return False
    # a model that keeps nothing leaves it empty
    return cache.get_seq_length() == length


class _Streamer:
    """What transformers tells of a single response while it is made: the prompt first, which is passed over."""

    def __init__(self, told: Callable[[int], None]) -> None:
        self._told = told
        self._begun = False

    def put(self, value: Tensor) -> None:
        """The prompt, then one token at a time."""
        if self._begun:
            self._told(int(value))
        self._begun = True

    def end(self) -> None:
        """Nothing is left to tell."""


class _Mixing(LogitsProcessor):
    """The policy's logits mixed with those of a reference, which reads the same tokens with a cache of its own."""

    def __init__(self, mix: Mix, mask: Tensor, common: Mapping[str, Any]) -> None:
        self._mix, self._mask, self._common = mix, mask, common
        self._kept: dict[str, Any] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        length = input_ids.shape[1]
        mask = nn.functional.pad(self._mask, (0, length - self._mask.shape[1]), value=1)
        found = _next(self._mix.reference, input_ids, mask, self._common, **self._kept)
        # what keeps more than keys and values reads its past again
        self._kept = {"past_key_values": found.past_key_values} if _goes_on(found.past_key_values, length) else {}
        return torch.lerp(found.logits[0], scores, self._mix.weight)


class _PerPromptNoise(LogitsProcessor):
    """Gumbel noise from one generator per prompt: the greedy choice of logits / t + noise is a sample of softmax(logits / t)."""

    def __init__(self, seeds: Sequence[int], temperature: float, policy: Policy) -> None:
        self._generators = [torch.Generator(policy.device).manual_seed(seed) for seed in seeds]
        self._temperature = temperature
        self._source = policy.source
        self._checked = False
        # a row's draws are serial, and those of 32 rows of 49,152 words were a quarter of a token's time; each has its own stream
        self._threads = ThreadPoolExecutor(torch.get_num_threads())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 (transformers' signature)
        # the first token tells; asking at every one would wait for the device each time
        if not self._checked and bool(torch.isnan(scores).any()):
            raise NumericsError(
                f"{self._source}: its outputs are not finite, so nothing can be sampled; its weights are damaged, fetch them again"
            )
        self._checked = True
        noise = torch.empty_like(scores)
        list(self._threads.map(_draw, noise, self._generators))
        return scores / self._temperature - noise.log()


def _draw(row: Tensor, stream: torch.Generator) -> None:
    row.exponential_(generator=stream)
