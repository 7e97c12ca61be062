"""`favor winrate`: two models, or two files of responses, compared by a judge.

In: WinrateConfig. Out: winrate.json and winrate-samples.jsonl; judgments and sampled responses are kept in the run folder,
so a repeated or continued run makes only what is missing. Next: sides.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT, Seed, dump
from favor.data.prompts import read_prompts
from favor.data.tokenize import TokensConfig
from favor.errors import ConfigError, DataError
from favor.guard import content
from favor.model.sample import SampleConfig
from favor.run import RunFolder, holds_work, is_ours, opened, read_json, write_config, write_json, write_text
from favor.winrate.judges import Duel, JudgeConfig, check_judge, describe
from favor.winrate.judgments import judge_all
from favor.winrate.sides import Placed, Sampling, SideConfig, read_responses, sampled_responses
from favor.winrate.stats import JudgedPair, win_figures

_SHOWN = 20
Progress = Callable[[str, int, int], None]


class WinrateConfig(BaseModel):
    """A recipe for `favor winrate`: [a] against [b], judged by [judge]; everything goes into the folder `run`.

    `prompts` is any file favor reads; without it the prompts of both sides' files count. The k-th responses to a prompt
    are compared with each other, up to `samples_per_prompt`. Models on both sides sample with the same random streams.
    """

    model_config = STRICT
    run: str
    a: SideConfig
    b: SideConfig
    judge: JudgeConfig
    prompts: str | None = None
    split: str = "train"
    max_prompts: int | None = Field(default=None, ge=1)
    tokens: TokensConfig = TokensConfig()
    sample: SampleConfig = SampleConfig()
    samples_per_prompt: int = Field(default=1, ge=1, le=1000)
    seed: Seed = 0

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "WinrateConfig":
        if self.a.model or self.b.model:
            if self.prompts is None:
                raise ValueError("prompts is not set, and a model needs prompts to answer; give prompts=FILE")
            return self
        sampling = (("tokens", self.tokens), ("sample", self.sample), ("seed", self.seed))
        unread = [name for name, value in sampling if value != WinrateConfig.model_fields[name].default]
        if unread:
            raise ValueError(f"{unread[0]} is not read: both sides are files and nothing is sampled; remove it")
        return self

    @property
    def sides(self) -> dict[str, SideConfig]:
        """Both sides by name."""
        return {"a": self.a, "b": self.b}


@dataclass(frozen=True)
class _Pair:
    """The k-th responses of both sides to a prompt."""

    place: int
    duel: Duel

    @property
    def swapped(self) -> Duel:
        return Duel(self.duel.prompt, self.duel.second, self.duel.first)


def winrate(config: WinrateConfig, say: Callable[[str], None], progress: Progress) -> dict[str, Any]:
    """Compare, write winrate.json and winrate-samples.jsonl into the run folder, and return the figures.

    Raises ConfigError when the folder holds something else, or responses made with other settings; DataError,
    CheckpointError or ServerError when an input cannot be used. Verdicts made until then are kept.
    """
    files = {name: read_responses(side.file, config.split) for name, side in config.sides.items() if side.file}
    asked, left_out = _common(config, files)
    check_judge(config.judge)
    folder = RunFolder(Path(config.run))
    if (
        folder.config.exists()
        and not folder.winrate_settings.exists()
        and (holds_work(folder) or not is_ours(folder.root))
    ):
        raise ConfigError(f"{config.run}: already holds a run of another kind; choose another run=FOLDER")
    with opened(folder):
        return _compare(config, (asked, left_out, files), say, progress)


def _compare(
    config: WinrateConfig,
    found: tuple[list[Placed], dict[str, int], dict[str, Any]],
    say: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    asked, left_out, files = found
    folder = _settle(config)
    responses = {name: {key: texts for key, (_, texts) in rows.items()} for name, rows in files.items()}
    for name, side in config.sides.items():
        if side.model:
            how = Sampling(str(config.prompts), config.tokens, config.sample, config.samples_per_prompt, config.seed)
            advance = _labelled(progress, f"samples of {name}")
            responses[name] = sampled_responses(side.model, asked, how, folder.responses(name), advance)
    pairs = [
        _Pair(item.place, Duel(item.prompt, *texts))
        for item in asked
        for texts in zip(responses["a"][item.key][: config.samples_per_prompt], responses["b"][item.key], strict=False)
    ]
    for name in config.sides:
        left_out[f"responses_of_{name}"] = sum(len(responses[name][item.key]) for item in asked) - len(pairs)
    duels = [duel for pair in pairs for duel in (pair.duel, pair.swapped)]
    verdicts = judge_all(config.judge, duels, folder.judgments, say, _labelled(progress, "judgments"))
    judged = [
        JudgedPair(pair.place, verdicts[2 * i], verdicts[2 * i + 1], len(pair.duel.first), len(pair.duel.second))
        for i, pair in enumerate(pairs)
    ]
    return _write(config, folder, pairs, judged, left_out)


def _write(
    config: WinrateConfig, folder: RunFolder, pairs: list[_Pair], judged: list[JudgedPair], left_out: dict[str, int]
) -> dict[str, Any]:
    figures = {
        "a": config.a.name,
        "b": config.b.name,
        "judge": describe(config.judge),
        **win_figures(judged).as_json(),
        "left_out": left_out,
    }
    first_of_prompt = {
        pair.place: (pair.duel, result.outcome) for pair, result in reversed([*zip(pairs, judged, strict=True)])
    }
    shown = [first_of_prompt[place] for place in sorted(first_of_prompt)][:_SHOWN]
    records = [{"prompt": d.prompt, "a": d.first, "b": d.second, "verdict": outcome} for d, outcome in shown]
    write_text(folder.winrate_samples, "".join(json.dumps(record) + "\n" for record in records))
    write_json(folder.winrate, figures)
    return figures


def _common(config: WinrateConfig, files: dict[str, Any]) -> tuple[list[Placed], dict[str, int]]:
    """The prompts both sides can answer, and how many were left out because a file has no response to them."""
    if config.prompts:
        # with models on both sides every prompt can be answered, so none beyond the limit is needed
        limit = None if files else config.max_prompts
        numbered = read_prompts(config.prompts, config.split, limit)
    else:
        union = {key: prompt for rows in files.values() for key, (prompt, _) in rows.items()}
        numbered = list(enumerate(union.values(), 1))
    base = [Placed(place, row, prompt) for place, (row, prompt) in enumerate(numbered)]
    left_out = {f"prompts_without_{name}": sum(item.key not in rows for item in base) for name, rows in files.items()}
    asked = [item for item in base if all(item.key in rows for rows in files.values())]
    if not asked:
        names = " and ".join(name for name in (config.prompts, config.a.file, config.b.file) if name)
        raise DataError(f"{names}: have no prompt in common; give files of responses to the same prompts")
    return asked[: config.max_prompts], left_out


def _settle(config: WinrateConfig) -> RunFolder:
    """The run folder with this recipe. Responses and figures in it must be of the same sides and settings."""
    folder = RunFolder(Path(config.run))
    settings = {name: _settings(config, side) for name, side in config.sides.items()}
    before = read_json(folder.winrate_settings) if folder.winrate_settings.exists() else settings
    for name in config.sides:
        # a start that failed before anything was made may be put right and repeated
        if folder.responses(name).exists() or folder.winrate.exists():
            found = before.get(name)
            _same(name, found if isinstance(found, dict) else {}, settings[name], config.run)
    write_config(folder, dump(config))
    write_json(folder.winrate_settings, settings)
    return folder


def _same(side: str, before: dict[str, Any], now: dict[str, Any], run: str) -> None:
    changed = [
        f"{side}.{name}: {before.get(name)!r} before, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{run}: holds responses made with other settings ({'; '.join(changed[:3])}); use the same settings, or choose "
            "another run=FOLDER"
        )


def _settings(config: WinrateConfig, side: SideConfig) -> dict[str, Any]:
    """What the responses of a side depend on; the prompts by content, so that a file may move but not change."""
    if side.model is None:
        return {"file": side.file}
    return {
        "model": side.model.path,
        "revision": side.model.revision,
        "content of the model": content(side.model.path),
        "content of prompts": content(str(config.prompts)) or config.prompts,
        "split": config.split,
        "seed": config.seed,
        "samples_per_prompt": config.samples_per_prompt,
        "tokens": config.tokens.model_dump(mode="json", include={"template", "special_text"}),
        "sample": config.sample.model_dump(mode="json", exclude={"batch"}),
    }


def _labelled(progress: Progress, label: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(label, done, total)
