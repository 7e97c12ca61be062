"""The two sides of a win rate: responses read from a file, or sampled from a model and kept.

In: SideConfig of a and b, and the prompts. Out: a list of responses per side for every prompt both can answer.
Next: winrate.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, field_validator, model_validator

from favor.config import STRICT
from favor.data.formats.fields import RowError, brief
from favor.data.prompts import encode_prompts, prompt_of, sample_seeds, sample_text
from favor.data.sources import read_objects
from favor.data.tokenize import TokensConfig
from favor.data.types import Text
from favor.errors import DataError
from favor.guard import seal
from favor.model.load import ModelConfig, load_policy
from favor.model.sample import SampleConfig, sample
from favor.run import append, cut_torn_line
from favor.winrate.judges import path_as_section
from favor.winrate.judgments import read_sealed, text_key

# Batches between two writes of the responses: what a killed run loses.
_BATCHES = 4


class SideConfig(BaseModel):
    """Section [a] or [b]: `model` (a path, or a section as [model]) to sample from, or `file` with responses.

    A row of `file` has a prompt and responses (a list), response or completion, as `favor sample` writes them.
    """

    model_config = STRICT
    model: ModelConfig | None = None
    file: str | None = None

    @field_validator("model", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return path_as_section(value)

    @model_validator(mode="after")
    def _one_source(self) -> "SideConfig":
        if (self.model is None) == (self.file is None):
            found = "neither" if self.model is None else "both"
            raise ValueError(f"name a model to sample from or a file of responses, found {found}; set one of the two")
        return self

    @property
    def name(self) -> str:
        """The path, for tables."""
        return self.model.path if self.model else str(self.file)


@dataclass(frozen=True)
class Placed:
    """A prompt with its place and row in the file it comes from; the place is what its random streams depend on."""

    place: int
    row: int
    prompt: Text

    @property
    def key(self) -> str:
        """Equal for equal prompts, be they text or a single user turn."""
        return text_key(self.prompt)


@dataclass(frozen=True)
class Sampling:
    """How the responses of a model side are made."""

    prompts: str
    tokens: TokensConfig
    sample: SampleConfig
    each: int
    seed: int


def read_responses(source: str, split: str) -> dict[str, tuple[Text, list[str]]]:
    """Prompt key -> (prompt, responses) of a file; rows of one prompt are put together. Raises DataError with the row."""
    found: dict[str, tuple[Text, list[str]]] = {}
    for number, row in read_objects(source, split):
        where = f"{source}, row {number}"
        try:
            text = prompt_of(row)
        except RowError as error:
            raise DataError(f"{where}: {error}; every row needs a prompt, text or messages") from None
        found.setdefault(text_key(text), (text, []))[1].extend(_responses(row, where))
    if not found:
        raise DataError(f"{source}: nothing to use: it holds no rows; give rows with prompt and responses")
    return found


def sampled_responses(
    side: ModelConfig, asked: Sequence[Placed], how: Sampling, kept_in: Path, progress: Callable[[int, int], None]
) -> dict[str, list[str]]:
    """Prompt key -> responses of a model; what `kept_in` has is not sampled again, and what is new is added to it."""
    cut_torn_line(kept_in)
    known: dict[str, list[str]] = {text_key(row["prompt"]): row["responses"] for row in read_sealed(kept_in)}
    missing = [item for item in asked if item.key not in known]
    if not missing:
        return known
    policy = load_policy(side)
    ids = encode_prompts(how.prompts, [(item.row, item.prompt) for item in missing], policy.tokenizer, how.tokens)
    size, total = max(1, _BATCHES * how.sample.batch // how.each), len(missing) * how.each
    for start in range(0, len(missing), size):
        part = missing[start : start + size]
        prompts = [prompt for prompt in ids[start : start + size] for _ in range(how.each)]
        seeds = sample_seeds(how.seed, [item.place for item in part], how.each)
        out = sample(policy, prompts, seeds, how.sample, lambda done: progress(done, total))
        texts = policy.tokenizer.batch_decode([list(x) for x in out], skip_special_tokens=True)
        for i, item in enumerate(part):
            known[item.key] = texts[i * how.each : (i + 1) * how.each]
            append(kept_in, seal({"prompt": item.prompt, "responses": known[item.key]}))
    return known


def _responses(row: dict[str, Any], where: str) -> list[str]:
    name = next((name for name in ("responses", "response", "completion") if name in row), None)
    if name is None:
        raise DataError(f"{where}: columns ({', '.join(sorted(row))}): no responses, response or completion; add one")
    values: list[Any] = row[name] if name == "responses" and isinstance(row[name], list) else [row[name]]
    try:
        texts = [sample_text(value, name) for value in values]
    except RowError as error:
        raise DataError(
            f"{where}: {name} is {brief(row[name], 80)} ({error}); give text, or a list of texts as responses"
        ) from None
    if not texts:
        raise DataError(f"{where}: {name} is {brief(row[name], 80)}; give text, or a list of texts as responses")
    return texts
