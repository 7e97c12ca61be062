"""`favor sample`: responses to the prompts of a file, as JSON lines; a killed run continues where it stopped.

In: SamplesConfig. Out: one line per prompt: {"prompt", "responses", "ended"[, "scores"]}; the file appears when all is done.
Next: engines.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from favor import output
from favor.data.prompts import NumberedPrompts, read_prompts, sample_seeds
from favor.data.types import Text
from favor.eval.partial import Sampled, open_partial, partial_of
from favor.generate.engines import Job, SamplesConfig, draw
from favor.guard import content, sha
from favor.output import Output
from favor.rewards.source import RewardConfig, check_scorer, identity, make_scorer

Progress = Callable[[str, int, int], None]
# What has no part in a sample's text: a run may continue with other values of these.
_NO_PART: dict[str, Any] = {
    **dict.fromkeys(("out", "prompts", "split", "max_prompts", "samples_per_prompt", "best_of", "reward"), True),
    "overwrite": True,
    "sample": {"batch"},
    "server": {"api_key_env", "timeout_s", "retries", "concurrency", "backoff_s"},
}


class Drawn(NamedTuple):
    """A prompt and everything that was sampled for it; `ended` says which samples came to their end."""

    prompt: Text
    texts: list[str]
    ended: list[bool]


def write_samples(config: SamplesConfig, progress: Progress, recipe: Path | None = None) -> int:
    """Sample and write; returns the number of responses. A prompt's samples depend on its place and the seed alone.

    A file that the same settings made before stays as it is. recipe: where the settings come from.

    Raises DataError for a row without a usable prompt,
    CheckpointError for an unusable model, ConfigError for an `out` or a partial file of other settings, ServerError
    when a server gives up; what was sampled until then is kept.
    """
    if config.reward is not None:
        check_scorer(config.reward)
    with output.claimed(claim(config), [*inputs_of(config), recipe and str(recipe)]) as out:
        prompts = read_prompts(config.prompts, config.split, config.max_prompts)
        out = replace(out, settings=made_from(config, prompts, config.reward))
        return already(out, progress) or _sample(config, prompts, out, progress)


def _sample(config: SamplesConfig, prompts: NumberedPrompts, out: Output, progress: Progress) -> int:
    found = draw_all(config, prompts, progress)
    if config.reward is None:
        rows: list[dict[str, Any]] = [
            {"prompt": each.prompt, "responses": each.texts, "ended": each.ended} for each in found
        ]
    else:
        assert config.best_of is not None
        scores = score(found, config.reward)
        rows = [_best(each, mine, config.best_of) for each, mine in zip(found, scores, strict=True)]
    count = len(rows) * config.samples_per_prompt
    write_rows(out, rows, count)
    return count


def claim(config: SamplesConfig) -> Output:
    """The file that the samples go into."""
    path = Path(config.out)
    return Output(path, "out", config.overwrite, meanwhile=(partial_of(path),))


def inputs_of(config: SamplesConfig) -> list[str | None]:
    """What the recipe reads."""
    return [config.prompts, config.model.path if config.model else None, config.reward.path if config.reward else None]


def made_from(config: SamplesConfig, prompts: NumberedPrompts, reward: RewardConfig | None) -> dict[str, str]:
    """Hashes of everything that determines the finished file, by name."""
    counts = {"samples_per_prompt": config.samples_per_prompt, "best_of": config.best_of}
    scored = {"reward": identity(reward)} if reward else {}
    return _determines(config, prompts) | output.hashes(counts | scored)


def already(out: Output, progress: Progress) -> Any:
    """The result that is remembered of a finished file of the same settings, said to the user; else None."""
    result = output.finished(out)
    if result is not None:
        partial_of(out.path).unlink(missing_ok=True)
        progress(f"{out.path}: made before with the same settings, kept (overwrite=true makes it again)", 1, 1)
    return result


def draw_all(config: SamplesConfig, prompts: NumberedPrompts, progress: Progress) -> list[Drawn]:
    """Every prompt's samples: those kept by an earlier run, and the rest drawn and kept now."""
    each = config.num_drawn
    fingerprint = sha(json.dumps([_determines(config, prompts), each], sort_keys=True))
    kept = open_partial(Path(config.out), fingerprint, overwrite=config.overwrite)
    texts = dict(kept.found)
    seeds = sample_seeds(config.seed, range(len(prompts)), each)
    jobs = [Job(i, *prompts[i // each], seed) for i, seed in enumerate(seeds) if i not in texts]

    def keep(new: Mapping[int, Sampled]) -> None:
        kept.keep(new)
        texts.update(new)
        progress("samples", len(new), len(seeds))

    if jobs:
        if texts:
            progress("samples", len(texts), len(seeds))
        try:
            draw(config, jobs, keep)
        finally:
            if not texts:
                kept.path.unlink(missing_ok=True)
    groups = [[texts[i * each + k] for k in range(each)] for i in range(len(prompts))]
    return [
        Drawn(prompt, [one.text for one in group], [one.ended for one in group])
        for (_, prompt), group in zip(prompts, groups, strict=True)
    ]


def score(found: Sequence[Drawn], reward: RewardConfig) -> list[list[float]]:
    """The score of every sample, prompt by prompt."""
    prompts = [each.prompt for each in found for _ in each.texts]
    scores = iter(make_scorer(reward)(prompts, [text for each in found for text in each.texts]))
    return [[next(scores) for _ in each.texts] for each in found]


def write_rows(out: Output, rows: Sequence[Mapping[str, Any]], result: Any) -> None:
    """Write the finished file whole; the partial one is then no longer needed."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    output.write(out, {out.path: text}, result)
    partial_of(out.path).unlink(missing_ok=True)


def _best(found: Drawn, scores: Sequence[float], best_of: int) -> dict[str, Any]:
    """The best of every `best_of` samples (the first of equals), with its score."""
    groups = [range(start, start + best_of) for start in range(0, len(scores), best_of)]
    best = [max(group, key=lambda i: (scores[i], -i)) for group in groups]
    return {
        "prompt": found.prompt,
        "responses": [found.texts[i] for i in best],
        "scores": [scores[i] for i in best],
        "ended": [found.ended[i] for i in best],
    }


def _determines(config: SamplesConfig, prompts: NumberedPrompts) -> dict[str, str]:
    """Hashes of everything that determines the samples: settings, prompts, and a local model's files."""
    return output.hashes(
        config.model_dump(mode="json", exclude=_NO_PART)
        | {"content of prompts": [prompt for _, prompt in prompts]}
        | {"content of model": content(config.model.path) if config.model else None}
    )
