"""`favor sample`: responses to the prompts of a file, as JSON lines.

In: SamplesConfig. Out: one line per prompt: {"prompt", "responses"}; the file appears when all is done. Next: ../model/sample.py.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from favor.config import STRICT
from favor.data.formats import RowError
from favor.data.read import read_objects
from favor.data.tokenize import TokensConfig, encode_prompt
from favor.data.types import Text
from favor.errors import DataError
from favor.model.load import ModelConfig, load_policy
from favor.model.sample import SampleConfig, sample
from favor.run import write_text


class SamplesConfig(BaseModel):
    """A recipe for `favor sample`. `prompts` is any file `favor` reads; its prompt column (text or messages) counts."""

    model_config = STRICT
    out: str
    prompts: str
    split: str = "train"
    model: ModelConfig
    tokens: TokensConfig = TokensConfig()
    sample: SampleConfig = SampleConfig()
    samples_per_prompt: int = Field(default=1, ge=1)
    max_prompts: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)


def write_samples(config: SamplesConfig, progress: Callable[[str, int, int], None]) -> int:
    """Sample and write; returns the number of samples. A prompt's samples depend on its place and the seed alone.

    Raises DataError for a row without a usable prompt, CheckpointError for an unusable model.
    """
    prompts = list(_prompts(config))
    policy = load_policy(config.model, config.seed)
    each, ids = config.samples_per_prompt, []
    for number, prompt in prompts:
        try:
            ids += [encode_prompt(prompt, policy.tokenizer, config.tokens)] * each
        except RowError as error:
            raise DataError(f"{config.prompts}, row {number}: {error}; mend the row") from None
    seeds = [config.seed * 1_000_003 + i for i in range(len(ids))]
    out = sample(policy, ids, seeds, config.sample, lambda done: progress("samples", done, len(ids)))
    texts = policy.tokenizer.batch_decode([list(x) for x in out], skip_special_tokens=True)
    lines = [
        json.dumps({"prompt": prompt, "responses": texts[i * each : (i + 1) * each]}, ensure_ascii=False)
        for i, (_, prompt) in enumerate(prompts)
    ]
    write_text(Path(config.out), "\n".join(lines) + "\n")
    return len(texts)


def _prompts(config: SamplesConfig) -> Iterator[tuple[int, Text]]:
    """Distinct prompts in order of appearance, with their row numbers."""
    seen: set[str] = set()
    for number, row in read_objects(config.prompts, config.split):
        prompt: Any = row.get("prompt")
        if not prompt or not isinstance(prompt, str | list):
            raise DataError(f"{config.prompts}, row {number}: no prompt (text or messages); every row needs one")
        key = json.dumps(prompt, sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        yield number, prompt if isinstance(prompt, str) else tuple(prompt)
        if config.max_prompts is not None and len(seen) >= config.max_prompts:
            return
