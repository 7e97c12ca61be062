"""`favor sample`: responses to the prompts of a file, as JSON lines; a killed run continues where it stopped.

In: SamplesConfig. Out: one line per prompt: {"prompt", "responses", "ended"[, "scores"]}; the file appears when all is done.
Next: engines.py.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from favor.data.prompts import NumberedPrompts, read_prompts, sample_seeds
from favor.data.types import Text
from favor.errors import ConfigError
from favor.eval.engines import Job, SamplesConfig, draw
from favor.eval.partial import Sampled, open_partial
from favor.run import write_text
from favor.scoring.source import RewardConfig, check_scorer, make_scorer

Progress = Callable[[str, int, int], None]
# What has no part in a sample's text: a run may continue with other values of these.
_NO_PART: dict[str, Any] = {
    **dict.fromkeys(("out", "prompts", "split", "max_prompts", "samples_per_prompt", "best_of", "reward"), True),
    "sample": {"batch"},
    "server": {"api_key_env", "timeout_s", "retries", "concurrency", "backoff_s"},
}


class Drawn(NamedTuple):
    """A prompt and everything that was sampled for it; `ended` says which samples came to their end."""

    prompt: Text
    texts: list[str]
    ended: list[bool]


def write_samples(config: SamplesConfig, progress: Progress) -> int:
    """Sample and write; returns the number of responses. A prompt's samples depend on its place and the seed alone.

    Raises DataError for a row without a usable prompt, CheckpointError for an unusable model, ConfigError for a
    partial file of other settings, ServerError when a server gives up; what was sampled until then is kept.
    """
    if config.reward is not None:
        check_scorer(config.reward)
    found = draw_all(config, progress)
    if config.reward is None:
        rows: list[dict[str, Any]] = [
            {"prompt": each.prompt, "responses": each.texts, "ended": each.ended} for each in found
        ]
    else:
        assert config.best_of is not None
        scores = score(found, config.reward)
        rows = [_best(each, mine, config.best_of) for each, mine in zip(found, scores, strict=True)]
    write_rows(Path(config.out), rows)
    return len(rows) * config.samples_per_prompt


def draw_all(config: SamplesConfig, progress: Progress) -> list[Drawn]:
    """Every prompt's samples: those kept by an earlier run, and the rest drawn and kept now."""
    prompts, each = read_prompts(config.prompts, config.split, config.max_prompts), config.num_drawn
    _check_out(Path(config.out))
    kept = open_partial(Path(config.out), _fingerprint(config, prompts))
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
        draw(config, jobs, keep)
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


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the finished file whole; the partial one is then no longer needed."""
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    out.with_name(out.name + ".partial").unlink(missing_ok=True)


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


def _fingerprint(config: SamplesConfig, prompts: NumberedPrompts) -> str:
    """A hash of everything that determines the samples: settings, prompts, how many, and a local model's files."""
    content = [
        config.model_dump(mode="json", exclude=_NO_PART),
        config.num_drawn,
        [prompt for _, prompt in prompts],
        _files(Path(config.model.path)) if config.model else [],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a model folder's files: a model trained anew must not continue the samples of the old one."""
    stats = [(path.name, path.stat()) for path in sorted(folder.glob("*")) if path.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; name a file with out=FILE")
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent}: no such folder; make it, or choose another out=FILE")
