"""`favor prefer`: preferences from samples: draw several responses per prompt, score them, write rankings.

In: PreferConfig. Out: rows that `favor train` reads as rankings ("prompt", "responses", "scores",
"ended"), and what was left out. Next: samples.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, Field

from favor.config import STRICT, Overwrite, Seed
from favor.data.settings import Columns
from favor.errors import DataError
from favor.generate.engines import Decoding, Engine
from favor.generate.samples import (
    MaxPrompts,
    Out,
    Progress,
    PromptsFile,
    Responses,
    SamplesConfig,
    Split,
    make_file,
    scored,
)
from favor.rewards.source import RewardConfig


class PreferConfig(BaseModel):
    """A recipe for `favor prefer`: sampling is that of `favor sample`."""

    model_config = STRICT
    out: Out
    prompts: PromptsFile
    split: Split = "train"
    columns: Columns = {}
    engine: Engine
    sample: Decoding = Decoding()
    samples_per_prompt: int = Field(default=4, ge=2, le=1000)
    """Responses per prompt, of which a ranking is made."""
    reward: RewardConfig
    max_prompts: MaxPrompts = None
    seed: Seed = 0
    overwrite: Overwrite = False


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
    sampling = SamplesConfig.model_validate(config.model_dump(exclude={"reward"}))
    return Preferred(**make_file(sampling, config.reward, partial(_rankings, config), progress, recipe))


def _rankings(config: PreferConfig, found: list[Responses]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows, and what became of the samples."""
    told = [_not_blank(each) for each in found]
    if not any(each.texts for each in told):
        raise DataError(f"{config.prompts}: every sample is blank; look at the model and the chat template")
    scores = scored(told, config.reward)
    kept = [_distinct(each.texts) for each in told]
    values = [[mine[i] for i in places] for mine, places in zip(scores, kept, strict=True)]
    rows = [
        each.row(places, mine)
        for each, mine, places, distinct in zip(told, scores, kept, values, strict=True)
        if len(set(distinct)) > 1
    ]
    drawn, num_told = (sum(len(each.texts) for each in some) for some in (found, told))
    report = Preferred(
        prompts=len(found),
        samples=drawn,
        rows=len(rows),
        comparisons=sum(a > b for mine in values for a in mine for b in mine),
        duplicates=num_told - sum(map(len, kept)),
        blank=drawn - num_told,
        all_equal=sum(len(mine) < 2 for mine in values),
        all_tied=sum(len(mine) > 1 and len(set(mine)) == 1 for mine in values),
        mean_score=fmean(x for mine in scores for x in mine),
    )
    if not rows:
        raise DataError(
            f"{config.out}: not written, no prompt has a preference ({report}); the samples are kept: use a reward that "
            "tells them apart, or draw more samples, longer ones or at a higher temperature"
        )
    return rows, asdict(report)


def _not_blank(found: Responses) -> Responses:
    told = [i for i, text in enumerate(found.texts) if text.strip()]
    return Responses(found.prompt, [found.texts[i] for i in told], [found.ended[i] for i in told])


def _distinct(texts: Sequence[str]) -> list[int]:
    """Places of the responses, the first of those that differ in nothing but the white space around them."""
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        first.setdefault(text.strip(), place)
    return list(first.values())
