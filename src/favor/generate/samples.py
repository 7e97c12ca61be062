"""`favor sample`: responses to the prompts of a file, as JSON lines; a killed run continues where it stopped.

In: SamplesConfig. Out: one line per prompt: {"prompt", "responses", "ended"[, "scores"]}; the file appears when all is done,
until then `<out>.partial` keeps what there is. Here is the one writer and reader of such files. Next: engines.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, model_validator

from favor import output
from favor.config import STRICT, Overwrite, Seed
from favor.data.formats import RowError
from favor.data.formats.fields import brief
from favor.data.prompts import NumberedPrompts, read_prompts, sample_seeds, sample_text
from favor.data.settings import Columns
from favor.data.types import Text
from favor.errors import CheckpointError, ConfigError
from favor.generate.engines import Decoding, Engine, Job, ServerEngine, draw
from favor.guard import content, is_sealed, seal, sha
from favor.output import Output
from favor.rewards.source import RewardConfig, check_scorer, identity, make_scorer, reads
from favor.run import append_text, jsonl, read_jsonl, write_jsonl
from favor.server import Reply

Progress = Callable[[str, int, int], None]
# settings that several commands share
Out = Annotated[str, Field(description="The file that is written.")]
PromptsFile = Annotated[str, Field(description="Any file favor reads; its prompt column (text or messages) counts.")]
Split = Annotated[str, Field(description="The split, where the source has several.")]
MaxPrompts = Annotated[int | None, Field(ge=1, description="Use only the first N distinct prompts.")]
SamplesPerPrompt = Annotated[int, Field(ge=1, le=1000, description="Responses per prompt.")]
# What has no part in a sample's text: a run may continue with other values of these.
_NO_PART: dict[str, Any] = {
    **dict.fromkeys(
        ("out", "prompts", "split", "columns", "max_prompts", "samples_per_prompt", "best_of", "reward"), True
    ),
    "overwrite": True,
    "engine": {"batch": True, "server": {"api_key_env", "timeout_s", "retries", "concurrency", "backoff_s"}},
}


class SamplesConfig(BaseModel):
    """A recipe for `favor sample`."""

    model_config = STRICT
    out: Out
    prompts: PromptsFile
    split: Split = "train"
    columns: Columns = {}
    engine: Engine
    sample: Decoding = Decoding()
    samples_per_prompt: SamplesPerPrompt = 1
    best_of: int | None = Field(default=None, ge=1, le=1000)
    """Of every N samples, keep the one with the highest [reward]."""
    reward: RewardConfig | None = None
    max_prompts: MaxPrompts = None
    seed: Seed = 0
    overwrite: Overwrite = False

    @model_validator(mode="after")
    def _best_of_what(self) -> "SamplesConfig":
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

    @property
    def model(self) -> str | None:
        """The path of a model that is loaded here."""
        return None if isinstance(self.engine, ServerEngine) else self.engine.model.path


class Responses(NamedTuple):
    """A prompt and responses to it; `ended` says which came to their end. A line of a file of samples."""

    prompt: Text
    texts: list[str]
    ended: list[bool]

    def row(self, kept: Sequence[int], scores: Sequence[float] | None = None) -> dict[str, Any]:
        """The line for the file, of the responses at the places `kept`."""
        found = {"prompt": self.prompt, "responses": [self.texts[i] for i in kept]}
        scored = {} if scores is None else {"scores": [scores[i] for i in kept]}
        return found | scored | {"ended": [self.ended[i] for i in kept]}


def responses_of(row: Mapping[str, Any]) -> list[str]:
    """The texts of a row with responses (a list or one), response or completion. Raises RowError."""
    name = next((name for name in ("responses", "response", "completion") if name in row), None)
    if name is None:
        raise RowError(f"columns ({', '.join(sorted(row))}): no responses, response or completion; add one")
    values: list[Any] = row[name] if name == "responses" and isinstance(row[name], list) else [row[name]]
    advice = f"{name} is {brief(row[name], 80)}; give text, or a list of texts as responses"
    try:
        texts = [sample_text(value, name) for value in values]
    except RowError as error:
        raise RowError(f"{advice} ({error})") from None
    if not texts:
        raise RowError(advice)
    return texts


def write_samples(config: SamplesConfig, progress: Progress, recipe: Path | None = None) -> int:
    """Sample and write; returns the number of responses. A prompt's samples depend on its place and the seed alone.

    A file that the same settings made before stays as it is. recipe: where the settings come from.

    Raises DataError for a row without a usable prompt,
    CheckpointError for an unusable model, ConfigError for an `out` or a partial file of other settings, ServerError
    when a server gives up; what was sampled until then is kept.
    """

    def rows(found: list[Responses]) -> tuple[list[dict[str, Any]], int]:
        if config.reward is None or config.best_of is None:
            rows = [each.row(range(len(each.texts))) for each in found]
        else:
            scores = scored(found, config.reward)
            rows = [each.row(_best(mine, config.best_of), mine) for each, mine in zip(found, scores, strict=True)]
        return rows, len(rows) * config.samples_per_prompt

    return make_file(config, config.reward, rows, progress, recipe)


def make_file(
    config: SamplesConfig,
    reward: RewardConfig | None,
    rows: Callable[[list[Responses]], tuple[list[dict[str, Any]], Any]],
    progress: Progress,
    recipe: Path | None,
) -> Any:
    """Sample, and write the file that `rows` (its lines, what is to be remembered) makes of the samples; returns the latter."""
    if reward is not None:
        check_scorer(reward)
    path = Path(config.out)
    claim = Output(path, "out", config.overwrite, meanwhile=(_partial(path),))
    inputs = [config.prompts, config.model, *(reads(reward) if reward else ()), recipe and str(recipe)]
    with output.claimed(claim, inputs) as out:
        prompts = read_prompts(config.prompts, config.split, config.max_prompts, config.columns)
        counts = {"samples_per_prompt": config.samples_per_prompt, "best_of": config.best_of}
        made_from = output.hashes(counts | ({"reward": identity(reward)} if reward else {}))
        out = replace(out, settings=_determines(config, prompts) | made_from)
        result = already(out, progress)
        if result is None:
            lines, result = rows(draw_all(config, prompts, progress))
            output.write(out, {path: jsonl(lines)}, result)
            # the partial one is no longer needed
            _partial(path).unlink(missing_ok=True)
        return result


def _best(scores: Sequence[float], best_of: int) -> list[int]:
    """The place of the best of every `best_of` samples, the first of equals."""
    return [
        max(range(start, start + best_of), key=lambda i: (scores[i], -i)) for start in range(0, len(scores), best_of)
    ]


def already(out: Output, progress: Progress) -> Any:
    """The result that is remembered of a finished file of the same settings, said to the user; else None."""
    result = output.finished(out)
    if result is not None:
        for path in out.meanwhile:
            path.unlink(missing_ok=True)
        progress(f"{out.path}: made before with the same settings, kept (overwrite=true makes it again)", 1, 1)
    return result


def draw_all(config: SamplesConfig, prompts: NumberedPrompts, progress: Progress) -> list[Responses]:
    """Every prompt's samples: those kept by an earlier run, and the rest drawn and kept now."""
    each, path = config.num_drawn, _partial(Path(config.out))
    fingerprint = sha(json.dumps([_determines(config, prompts), each], sort_keys=True))
    found = _open_partial(path, fingerprint, overwrite=config.overwrite)
    seeds = sample_seeds(config.seed, range(len(prompts)), each)
    jobs = [Job(i, *prompts[i // each], seed) for i, seed in enumerate(seeds) if i not in found]

    def keep(new: Mapping[int, Reply]) -> None:
        # in one write, so that a kill loses at most what was not handed over yet
        append_text(path, jsonl(_line(index, one) for index, one in new.items()))
        found.update(new)
        progress("samples", len(new), len(seeds))

    if found and jobs:
        progress("samples", len(found), len(seeds))
    try:
        if jobs:
            draw(config.engine, config.prompts, jobs, config.sample, keep)
    finally:
        if not found:
            path.unlink(missing_ok=True)
    groups = [[found[i * each + k] for k in range(each)] for i in range(len(prompts))]
    return [
        Responses(prompt, [one.text for one in group], [one.ended for one in group])
        for (_, prompt), group in zip(prompts, groups, strict=True)
    ]


def scored(found: Sequence[Responses], reward: RewardConfig) -> list[list[float]]:
    """The score of every sample, prompt by prompt."""
    prompts = [each.prompt for each in found for _ in each.texts]
    scores = iter(make_scorer(reward)(prompts, [text for each in found for text in each.texts]))
    return [[next(scores) for _ in each.texts] for each in found]


def read_sealed(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that grows, if there is one. Raises CheckpointError naming a line that is not what was written."""
    records = read_jsonl(path) if path.exists() else []
    for number, record in enumerate(records, 1):
        if not is_sealed(record):
            raise CheckpointError(
                f"{path}, line {number}: damaged, not what was written; remove that line to make it again"
            )
    return records


def _determines(config: SamplesConfig, prompts: NumberedPrompts) -> dict[str, str]:
    """Hashes of everything that determines the samples: settings, prompts, and a local model's files."""
    return output.hashes(
        config.model_dump(mode="json", exclude=_NO_PART)
        | {"content of prompts": [prompt for _, prompt in prompts]}
        | {"content of model": content(config.model) if config.model else None}
    )


def _partial(out: Path) -> Path:
    """The unfinished part of a file: a line with the hash of everything that determines the texts, then one per sample."""
    return out.parent / f"{out.name}.partial"


def _line(index: int, one: Reply) -> dict[str, Any]:
    return seal({"index": index, **one._asdict()})


def _open_partial(path: Path, fingerprint: str, *, overwrite: bool) -> dict[int, Reply]:
    """Continue a partial file, or start one; with `overwrite` also in place of another's.

    Raises ConfigError when there is one with another fingerprint, or when it is not such a file.
    """
    found: dict[int, Reply] = {}
    wrong = "damaged, or not a partial file of ours;"
    try:
        first, *lines = read_sealed(path) or [{"fingerprint": fingerprint}]
        if first["fingerprint"] == fingerprint:
            found = {int(line["index"]): Reply(str(line["text"]), bool(line["ended"])) for line in lines}
            wrong = ""
        else:
            wrong = "was started with other settings, prompts or weights; run with those again to continue, or"
    except (CheckpointError, OSError, KeyError, TypeError):
        pass
    if wrong and not overwrite:
        raise ConfigError(f"{path}: {wrong} delete it, or choose another out=FILE")
    # written anew, because a kill may have torn the last line
    write_jsonl(path, [seal({"fingerprint": fingerprint}), *(_line(i, one) for i, one in found.items())])
    return found
