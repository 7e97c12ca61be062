"""Section [engine]: where samples come from, a model in this process, vLLM, or a server, behind one call.

In: an engine's settings and jobs, one per sample, each with its own seed. Out: samples, handed to `keep` as they come.
A further engine is a section of settings here, one function, and one row of ENGINES. Next: samples.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, Tag

from favor.config import STRICT, by_kind
from favor.data.formats import RowError
from favor.data.prompts import encode_prompts
from favor.data.render import plain_prompt
from favor.data.tokenize import TokensConfig
from favor.data.types import Text
from favor.errors import ConfigError, DataError
from favor.model.load import ModelConfig, load_policy, load_tokenizer
from favor.model.sample import SampleConfig, decode, sample
from favor.model.weights import check_path, readable
from favor.server import Reply, ServerConfig, answer, parallel

Template = Annotated[
    Literal["auto", "chat", "plain"],
    Field(
        description="How a prompt becomes text: by the chat template, as plain text, or by the template where there is one."
    ),
]
SpecialText = Annotated[
    Literal["refuse", "allow"], Field(description="Whether a prompt may contain the text of a special token.")
]
# Samples that vLLM is given at once: many, because it schedules them itself, yet a kill loses no more than these.
_VLLM_CHUNK = 1024
# Servers keep seeds in 32 bits; the prime below 2^31 leaves neighbours distinct.
_SEEDS = 2**31 - 1


def _never_trained(model: ModelConfig) -> ModelConfig:
    if model.lora is not None or model.gradient_checkpointing:
        raise ValueError("lora and gradient_checkpointing are for training, and this model only answers; remove them")
    return model


def _only_samples(model: ModelConfig) -> ModelConfig:
    if model.layout != "auto":
        raise ValueError("layout is how log-probs are computed, and this model only samples; remove it")
    return model


# `model=PATH` is short for `model.path=PATH`
_PathAlone = BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)
ModelAt = Annotated[
    ModelConfig,
    _PathAlone,
    AfterValidator(_never_trained),
    Field(description="The model: a path, or a section as [model]."),
]
SampledModel = Annotated[ModelAt, AfterValidator(_only_samples)]


class Decoding(BaseModel):
    """Section [sample], as far as every engine reads it."""

    model_config = STRICT
    max_new_tokens: int = Field(default=64, ge=1, le=1_000_000)
    """A response is cut after this many tokens."""
    temperature: float = Field(default=1.0, ge=1e-4)
    """Logits are divided by it; 1 samples from the model's own distribution."""


class TransformersEngine(BaseModel):
    """Section [engine], kind "transformers": a model in this process."""

    model_config = STRICT
    kind: Literal["transformers"] = "transformers"
    model: SampledModel
    template: Template = "auto"
    special_text: SpecialText = "refuse"
    batch: int = Field(default=32, ge=1)
    """Responses sampled at once: lower it if memory runs out."""


class VllmModel(BaseModel):
    """A model as vLLM loads it."""

    model_config = STRICT
    path: str
    """A folder or hub id."""
    revision: str | None = None
    """The hub's branch, tag or commit."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the weights are loaded as."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""


class VllmEngine(BaseModel):
    """Section [engine], kind "vllm": many samples fast, on a GPU; needs favor[vllm]."""

    model_config = STRICT
    kind: Literal["vllm"]
    model: Annotated[VllmModel, _PathAlone]
    template: Template = "auto"
    special_text: SpecialText = "refuse"


class ServerEngine(BaseModel):
    """Section [engine], kind "openai": any server that speaks the OpenAI protocol; it applies its own chat template."""

    model_config = STRICT
    kind: Literal["openai"]
    server: ServerConfig
    template: Template = "auto"


Engine: TypeAlias = Annotated[
    Annotated[TransformersEngine, Tag("transformers")]
    | Annotated[VllmEngine, Tag("vllm")]
    | Annotated[ServerEngine, Tag("openai")],
    by_kind("transformers"),
]


# of a SampleConfig its batch is not read
How: TypeAlias = Decoding | SampleConfig
Keep: TypeAlias = Callable[[Mapping[int, Reply]], None]


@dataclass(frozen=True)
class Job:
    """One sample to draw: its index among all, its prompt (with the row it came from) and its own seed."""

    index: int
    row: int
    prompt: Text
    seed: int


def draw(engine: Engine, source: str, jobs: Sequence[Job], how: How, keep: Keep) -> None:
    """Draw every job's sample and hand it over. `source` names the prompts' file in messages.

    Raises what its engine raises; what was handed over stays so.
    """
    ENGINES[engine.kind](engine, source, jobs, how, keep)


def _transformers(engine: TransformersEngine, source: str, jobs: Sequence[Job], how: How, keep: Keep) -> None:
    policy = load_policy(engine.model, frozen=True)
    ids = _encode(engine, source, jobs, policy.tokenizer)
    settings = SampleConfig(max_new_tokens=how.max_new_tokens, temperature=how.temperature, batch=engine.batch)
    # the order of the whole job, so that a resumed one forms the same batches as an unbroken one
    order = sorted(jobs, key=lambda job: len(ids[job.row]))
    for chunk in _chunks(order, engine.batch):
        out = sample(policy, [ids[job.row] for job in chunk], [job.seed for job in chunk], settings)
        ended = [x[-1] in policy.end_ids for x in out]
        samples = zip(chunk, decode(policy.tokenizer, out), ended, strict=True)
        keep({job.index: Reply(text, done) for job, text, done in samples})


def _vllm(engine: VllmEngine, source: str, jobs: Sequence[Job], how: How, keep: Keep) -> None:
    vllm, model = _import_vllm(), engine.model
    check_path(model.path)
    if (Path(model.path) / "adapter_config.json").exists():
        raise ConfigError(
            f"{model.path}: holds only adapters, which engine 'vllm' cannot load; use engine.kind=transformers"
        )
    tokenizer = load_tokenizer(ModelConfig(**model.model_dump()))
    ids = _encode(engine, source, jobs, tokenizer)
    with readable(model.path):
        llm = vllm.LLM(
            model=model.path, revision=model.revision, dtype=model.dtype, trust_remote_code=model.trust_remote_code
        )
    settings = {"temperature": how.temperature, "max_tokens": how.max_new_tokens}
    for chunk in _chunks(jobs, _VLLM_CHUNK):
        prompts = [{"prompt_token_ids": list(ids[job.row])} for job in chunk]
        params = [vllm.SamplingParams(seed=job.seed, **settings) for job in chunk]
        out = [reply.outputs[0] for reply in llm.generate(prompts, params, use_tqdm=False)]
        ended = [x.finish_reason != "length" for x in out]
        samples = zip(chunk, decode(tokenizer, [x.token_ids for x in out]), ended, strict=True)
        keep({job.index: Reply(text, done) for job, text, done in samples})


def _import_vllm() -> Any:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"engine.kind = 'vllm': vLLM is not installed here ({error}); pip install \"favor[vllm]\", or use another engine"
        ) from None
    return vllm


def _openai(engine: ServerEngine, source: str, jobs: Sequence[Job], how: How, keep: Keep) -> None:
    requests = [partial(_request, engine, source, job, how) for job in jobs]
    parallel(engine.server, requests, lambda i, reply: keep({jobs[i].index: reply}))


def _request(engine: ServerEngine, source: str, job: Job, how: How) -> Reply:
    limits: dict[str, Any] = {
        "max_tokens": how.max_new_tokens,
        "temperature": how.temperature,
        "seed": job.seed % _SEEDS,
    }
    if engine.template == "plain":
        try:
            return answer(engine.server, plain_prompt(job.prompt), **limits)
        except RowError as error:
            raise DataError(f"{source}, row {job.row}: {error}; fix the row") from None
    prompt = job.prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return answer(engine.server, turns, **limits)


def dtypes(engine: Engine) -> list[str]:
    """What the model that is loaded here computes in, if there is one."""
    return [] if isinstance(engine, ServerEngine) else [engine.model.dtype]


ENGINES: dict[str, Callable[[Any, str, Sequence[Job], How, Keep], None]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "openai": _openai,
}


def _encode(
    engine: TransformersEngine | VllmEngine, source: str, jobs: Sequence[Job], tokenizer: Any
) -> dict[int, tuple[int, ...]]:
    """Row -> token ids of its prompt."""
    prompts = list({job.row: job.prompt for job in jobs}.items())
    tokens = TokensConfig(template=engine.template, special_text=engine.special_text)
    ids = encode_prompts(source, prompts, tokenizer, tokens)
    return {row: x for (row, _), x in zip(prompts, ids, strict=True)}


def _chunks(jobs: Sequence[Job], size: int) -> list[Sequence[Job]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]
