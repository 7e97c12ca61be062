"""Where samples come from: the model here, vLLM, or a server; all behind one call.

In: SamplesConfig and jobs, one per sample, each with its own seed. Out: texts, handed to `keep` as they come.
Next: samples.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT, Seed
from favor.data.formats import RowError
from favor.data.prompts import encode_prompts
from favor.data.render import plain_prompt
from favor.data.tokenize import TokensConfig
from favor.data.types import Text
from favor.errors import ConfigError, DataError
from favor.eval.partial import Sampled
from favor.model.load import ModelConfig, load_policy, load_tokenizer
from favor.model.sample import SampleConfig, sample
from favor.model.weights import check_path, readable
from favor.rewards.source import RewardConfig
from favor.server import Reply, ServerConfig, chat, complete, parallel

Engine = Literal["transformers", "vllm", "openai"]
Keep: TypeAlias = Callable[[Mapping[int, Sampled]], None]
# Samples that vLLM is given at once: many, because it schedules them itself, yet a kill loses no more than these.
_VLLM_CHUNK = 1024
# Servers keep seeds in 32 bits; the prime below 2^31 leaves neighbours distinct.
_SEEDS = 2**31 - 1
_UNREAD: dict[str, tuple[str, ...]] = {
    "transformers": ("server", "tokens.max_tokens", "tokens.truncation"),
    "vllm": (
        *("server", "tokens.max_tokens", "tokens.truncation", "sample.batch"),
        *("model.device", "model.layout", "model.gradient_checkpointing", "model.lora"),
    ),
    "openai": ("model", "tokens.max_tokens", "tokens.truncation", "tokens.special_text", "sample.batch"),
}


class SamplesConfig(BaseModel):
    """A recipe for `favor sample`. `prompts` is any file `favor` reads; its prompt column (text or messages) counts.

    engine: transformers (this process), vllm (needs favor[vllm]), openai (section [server]). With `best_of` = N each
    response kept is the one with the highest [reward] of N. overwrite: replace a finished `out` of other settings.
    """

    model_config = STRICT
    out: str
    prompts: str
    split: str = "train"
    engine: Engine = "transformers"
    model: ModelConfig | None = None
    server: ServerConfig | None = None
    tokens: TokensConfig = TokensConfig()
    sample: SampleConfig = SampleConfig()
    samples_per_prompt: int = Field(default=1, ge=1, le=1000)
    best_of: int | None = Field(default=None, ge=1, le=1000)
    reward: RewardConfig | None = None
    max_prompts: int | None = Field(default=None, ge=1)
    seed: Seed = 0
    overwrite: bool = False

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "SamplesConfig":
        check_engine(self.engine, self.model, self.server, self.model_dump(exclude_unset=True))
        if (self.best_of is None) != (self.reward is None):
            raise ValueError("best_of and [reward] go together: give both, or neither")
        if self.num_drawn > 1000:
            raise ValueError(
                f"samples_per_prompt x best_of is {self.num_drawn}; at most 1000 a prompt have their own seed"
            )
        return self

    @property
    def num_drawn(self) -> int:
        """Samples drawn for each prompt."""
        return self.samples_per_prompt * (self.best_of or 1)


@dataclass(frozen=True)
class Job:
    """One sample to draw: its index among all, its prompt (with the row it came from) and its own seed."""

    index: int
    row: int
    prompt: Text
    seed: int


def check_engine(
    engine: Engine, model: ModelConfig | None, server: ServerConfig | None, given: Mapping[str, Any]
) -> None:
    """Raises ValueError when the engine's section is missing, or one of the options `given` is not read by it."""
    needed = "server" if engine == "openai" else "model"
    if (server if engine == "openai" else model) is None:
        raise ValueError(f"engine '{engine}' needs section [{needed}]; add it")
    for name in _UNREAD[engine]:
        section, _, key = name.partition(".")
        if given.get(section) is not None and (not key or key in given[section]):
            raise ValueError(f"{name} is not read by engine '{engine}'; remove it")


def draw(config: SamplesConfig, jobs: Sequence[Job], keep: Keep) -> None:
    """Draw every job's sample and hand it over. Raises what its engine raises; what was handed over stays so."""
    engines = {"transformers": _transformers, "vllm": _vllm, "openai": _openai}
    engines[config.engine](config, jobs, keep)


def _transformers(config: SamplesConfig, jobs: Sequence[Job], keep: Keep) -> None:
    assert config.model is not None
    policy = load_policy(config.model, config.seed)
    ids = _encode(config, jobs, policy.tokenizer)
    # the order of the whole job, so that a resumed one forms the same batches as an unbroken one
    order = sorted(jobs, key=lambda job: len(ids[job.row]))
    for chunk in _chunks(order, config.sample.batch):
        out = sample(policy, [ids[job.row] for job in chunk], [job.seed for job in chunk], config.sample)
        texts = policy.tokenizer.batch_decode([list(x) for x in out], skip_special_tokens=True)
        ended = [x[-1] in policy.end_ids for x in out]
        keep({job.index: Sampled(text, done) for job, text, done in zip(chunk, texts, ended, strict=True)})


def _vllm(config: SamplesConfig, jobs: Sequence[Job], keep: Keep) -> None:
    assert config.model is not None
    vllm, model = _import_vllm(), config.model
    check_path(model.path)
    if (Path(model.path) / "adapter_config.json").exists():
        raise ConfigError(
            f"{model.path}: holds adapters alone, which engine 'vllm' cannot load; use engine=transformers"
        )
    tokenizer = load_tokenizer(model)
    ids = _encode(config, jobs, tokenizer)
    with readable(model.path):
        llm = vllm.LLM(
            model=model.path, revision=model.revision, dtype=model.dtype, trust_remote_code=model.trust_remote_code
        )
    settings = {"temperature": config.sample.temperature, "max_tokens": config.sample.max_new_tokens}
    for chunk in _chunks(jobs, _VLLM_CHUNK):
        prompts = [{"prompt_token_ids": list(ids[job.row])} for job in chunk]
        params = [vllm.SamplingParams(seed=job.seed, **settings) for job in chunk]
        out = llm.generate(prompts, params, use_tqdm=False)
        texts = tokenizer.batch_decode([list(x.outputs[0].token_ids) for x in out], skip_special_tokens=True)
        ended = [x.outputs[0].finish_reason != "length" for x in out]
        keep({job.index: Sampled(text, done) for job, text, done in zip(chunk, texts, ended, strict=True)})


def _import_vllm() -> Any:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"engine = 'vllm': vLLM is not to be had here ({error}); pip install \"favor[vllm]\", or use another engine"
        ) from None
    return vllm


def _openai(config: SamplesConfig, jobs: Sequence[Job], keep: Keep) -> None:
    assert config.server is not None
    requests = [partial(_request, config, config.server, job) for job in jobs]
    parallel(config.server, requests, lambda i, reply: keep({jobs[i].index: Sampled(reply.text, reply.ended)}))


def _request(config: SamplesConfig, server: ServerConfig, job: Job) -> Reply:
    limit, temperature, seed = config.sample.max_new_tokens, config.sample.temperature, job.seed % _SEEDS
    if config.tokens.template == "plain":
        try:
            prompt = plain_prompt(job.prompt)
        except RowError as error:
            raise DataError(f"{config.prompts}, row {job.row}: {error}; fix the row") from None
        return complete(server, prompt, max_tokens=limit, temperature=temperature, seed=seed)
    prompt = job.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return chat(server, messages, max_tokens=limit, temperature=temperature, seed=seed)


def _encode(config: SamplesConfig, jobs: Sequence[Job], tokenizer: Any) -> dict[int, tuple[int, ...]]:
    """Row -> token ids of its prompt."""
    prompts = list({job.row: job.prompt for job in jobs}.items())
    ids = encode_prompts(config.prompts, prompts, tokenizer, config.tokens)
    return {row: x for (row, _), x in zip(prompts, ids, strict=True)}


def _chunks(jobs: Sequence[Job], size: int) -> list[Sequence[Job]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]
