"""`favor prefer`: preferences from samples: draw several responses per prompt, score them, write rankings.

In: PreferConfig. Out: rows that `favor train` reads as rankings ("prompt", "responses", "scores",
"ended"), and what was left out. Next: samples.py.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, Field, model_validator

from favor import output
from favor.config import STRICT, Seed
from favor.data.prompts import read_prompts
from favor.data.tokenize import TokensConfig
from favor.errors import DataError
from favor.generate.engines import Engine, SamplesConfig, check_engine
from favor.generate.samples import Drawn, Progress, already, claim, draw_all, inputs_of, made_from, score, write_rows
from favor.model.load import ModelConfig
from favor.model.sample import SampleConfig
from favor.output import Output
from favor.rewards.source import RewardConfig, check_scorer, reads
from favor.server import ServerConfig


class PreferConfig(BaseModel):
    """A recipe for `favor prefer`. Engines and sampling are those of `favor sample`; [reward] says what is better."""

    model_config = STRICT
    out: str
    prompts: str
    split: str = "train"
    engine: Engine = "transformers"
    model: ModelConfig | None = None
    server: ServerConfig | None = None
    tokens: TokensConfig = TokensConfig()
    sample: SampleConfig = SampleConfig()
    samples_per_prompt: int = Field(default=4, ge=2, le=1000)
    reward: RewardConfig
    max_prompts: int | None = Field(default=None, ge=1)
    seed: Seed = 0
    overwrite: bool = False

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "PreferConfig":
        check_engine(self.engine, self.model, self.server, self.model_dump(exclude_unset=True))
        return self


@dataclass(frozen=True)
class Preferred:
    """What became of the samples. `comparisons` counts the pairs of a prompt whose scores differ.

    `duplicates` and `blank` are samples left out; `all_equal` and `all_tied` are prompts left out because nothing
    distinguishes their responses. `mean_score` is over all samples but the blank.
    """

    prompts: int
    samples: int
    rows: int
    comparisons: int
    duplicates: int
    blank: int
    all_equal: int
    all_tied: int
    mean_score: float

    def __str__(self) -> str:
        return (
            f"{self.rows} of {self.prompts} prompts with {self.comparisons} comparisons, mean score {self.mean_score:.4g}; "
            f"left out: {self.all_equal} prompts whose responses are all equal, {self.all_tied} whose scores all tie, "
            f"{self.duplicates} duplicate and {self.blank} blank of {self.samples} samples"
        )


def prefer(config: PreferConfig, progress: Progress, recipe: Path | None = None) -> Preferred:
    """Sample, score and write. Raises what `favor sample` raises, and DataError when no prompt has a preference.

    Samples of a run that failed or was stopped are kept and continued; they are then scored again.
    """
    check_scorer(config.reward)
    sampling = _sampling(config)
    inputs = [*inputs_of(sampling), *reads(config.reward), recipe and str(recipe)]
    with output.claimed(claim(sampling), inputs) as out:
        prompts = read_prompts(config.prompts, config.split, config.max_prompts)
        out = replace(out, settings=made_from(sampling, prompts, config.reward))
        if (before := already(out, progress)) is not None:
            return Preferred(**before)
        return _prefer(config, draw_all(sampling, prompts, progress), out)


def _prefer(config: PreferConfig, found: list[Drawn], out: Output) -> Preferred:
    told = [_not_blank(each) for each in found]
    if not any(each.texts for each in told):
        raise DataError(f"{config.prompts}: every sample is blank; look at the model and the chat template")
    scores = score(told, config.reward)
    kept = [_distinct(each, mine) for each, mine in zip(told, scores, strict=True)]
    pairs = [{each.texts[i]: mine[i] for i in places} for each, mine, places in zip(told, scores, kept, strict=True)]
    rows: list[dict[str, Any]] = [
        {
            "prompt": each.prompt,
            "responses": list(values),
            "scores": list(values.values()),
            "ended": [each.ended[i] for i in places],
        }
        for each, places, values in zip(told, kept, pairs, strict=True)
        if len(set(values.values())) > 1
    ]
    num_told = sum(len(each.texts) for each in told)
    report = Preferred(
        prompts=len(found),
        samples=sum(len(each.texts) for each in found),
        rows=len(rows),
        comparisons=sum(_comparisons(list(values.values())) for values in pairs),
        duplicates=num_told - sum(map(len, pairs)),
        blank=sum(len(each.texts) for each in found) - num_told,
        all_equal=sum(len(values) < 2 for values in pairs),
        all_tied=sum(len(values) > 1 and len(set(values.values())) == 1 for values in pairs),
        mean_score=fmean(x for mine in scores for x in mine),
    )
    if not rows:
        raise DataError(
            f"{config.out}: not written, no prompt has a preference ({report}); the samples are kept: use a reward that "
            "tells them apart, or draw more samples, longer ones or at a higher temperature"
        )
    write_rows(out, rows, asdict(report))
    return report


def _sampling(config: PreferConfig) -> SamplesConfig:
    """The same recipe without its reward: what is to be drawn."""
    given = config.model_dump(exclude={"reward"}, exclude_unset=True)
    return SamplesConfig.model_validate(given | {"samples_per_prompt": config.samples_per_prompt})


def _not_blank(found: Drawn) -> Drawn:
    told = [i for i, text in enumerate(found.texts) if text.strip()]
    return Drawn(found.prompt, [found.texts[i] for i in told], [found.ended[i] for i in told])


def _distinct(found: Drawn, scores: list[float]) -> list[int]:
    """Places of the responses, the first of those that differ in nothing but the white space around them."""
    assert len(scores) == len(found.texts)
    first: dict[str, int] = {}
    for place, text in enumerate(found.texts):
        first.setdefault(text.strip(), place)
    return list(first.values())


def _comparisons(scores: list[float]) -> int:
    return sum(a > b for a in scores for b in scores)
