"""`favor winrate`: two models, or two files of responses, compared by a judge.

In: WinrateConfig. Out: winrate.json and winrate-samples.jsonl; verdicts and sampled responses are kept in the run folder,
so a repeated or continued run makes only what is missing. Next: judges.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, model_validator

from favor.config import STRICT, Run, Seed, dump
from favor.data.formats import RowError
from favor.data.prompts import prompt_of, read_prompts, sample_seeds
from favor.data.settings import Columns
from favor.data.sources import read_objects
from favor.data.types import Text
from favor.errors import ConfigError, DataError
from favor.generate.engines import Job, SampledModel, SpecialText, Template, TransformersEngine, draw
from favor.generate.samples import MaxPrompts, Progress, SamplesPerPrompt, Split, read_sealed, responses_of
from favor.guard import content, seal
from favor.model.sample import SampleConfig
from favor.run import (
    RunFolder,
    append,
    cut_torn_line,
    holds_work,
    is_ours,
    opened,
    read_json,
    write_config,
    write_json,
    write_jsonl,
)
from favor.server import Reply
from favor.winrate.judges import JUDGES, Duel, JudgeConfig, ModelJudge, RewardJudge, verdicts
from favor.winrate.stats import JudgedPair, win_figures

_SHOWN = 20


class SideConfig(BaseModel):
    """Section [a] or [b]: a model, or a file of responses."""

    model_config = STRICT
    model: SampledModel | None = None
    file: str | None = None
    """Rows with a prompt and responses (a list), response or completion, as `favor sample` writes them."""

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


class WinrateConfig(BaseModel):
    """A recipe for `favor winrate`. Models on both sides sample with the same random streams."""

    model_config = STRICT
    run: Run
    a: SideConfig
    b: SideConfig
    judge: JudgeConfig
    prompts: str | None = None
    """Any file favor reads; without it the prompts of both sides' files count."""
    split: Split = "train"
    columns: Columns = {}
    max_prompts: MaxPrompts = None
    template: Template = "auto"
    special_text: SpecialText = "refuse"
    sample: SampleConfig = SampleConfig()
    samples_per_prompt: SamplesPerPrompt = 1
    seed: Seed = 0

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "WinrateConfig":
        if self.columns and self.prompts is None:
            raise ValueError("columns is not read: it is of prompts=FILE, which is not set; remove it")
        if self.a.model or self.b.model:
            if self.prompts is None:
                raise ValueError("prompts is not set, and a model needs prompts to answer; give prompts=FILE")
            return self
        sampling = ("template", "special_text", "sample", "seed")
        default = {name: field.default for name, field in WinrateConfig.model_fields.items()}
        unread = [name for name, value in self if name in sampling and value != default[name]]
        if unread:
            raise ValueError(f"{unread[0]} is not read: both sides are files and nothing is sampled; remove it")
        return self

    @property
    def sides(self) -> dict[str, SideConfig]:
        """Both sides by name."""
        return {"a": self.a, "b": self.b}

    @property
    def dtypes(self) -> list[str]:
        """What the models that are loaded compute in."""
        models = [side.model for side in self.sides.values()]
        models += [self.judge.model] if isinstance(self.judge, ModelJudge) else []
        return [model.dtype for model in models if model] + ["float32"] * isinstance(self.judge, RewardJudge)


@dataclass(frozen=True)
class Asked:
    """A prompt that both sides answer, with its place and row in the file; the place is what its random streams depend on."""

    place: int
    row: int
    prompt: Text

    @property
    def key(self) -> str:
        """Equal for equal prompts, be they text or a single user turn."""
        return text_key(self.prompt)


def winrate(config: WinrateConfig, say: Callable[[str], None], progress: Progress) -> dict[str, Any]:
    """Compare, write winrate.json and winrate-samples.jsonl into the run folder, and return the figures.

    Raises ConfigError when the folder holds something else, or responses made with other settings; DataError,
    CheckpointError or ServerError when an input cannot be used. Verdicts made until then are kept.
    """
    files = {name: read_responses(side.file, config.split) for name, side in config.sides.items() if side.file}
    asked, left_out = _common(config, files)
    JUDGES[config.judge.kind].check(config.judge)
    folder = RunFolder(Path(config.run))
    started = folder.config.exists() and not folder.winrate_settings.exists()
    if started and (holds_work(folder) or not is_ours(folder.root)):
        raise ConfigError(f"{config.run}: already holds a run of another kind; choose another run=FOLDER")
    with opened(folder):
        _settle(config, folder)
        responses = {name: {key: texts for key, (_, texts) in rows.items()} for name, rows in files.items()}
        for name in config.sides:
            if name not in files:
                responses[name] = sampled_responses(config, name, asked, folder.responses(name), progress)
        pairs = [
            (item.place, Duel(item.prompt, *texts))
            for item in asked
            for texts in zip(
                responses["a"][item.key][: config.samples_per_prompt], responses["b"][item.key], strict=False
            )
        ]
        for name in config.sides:
            left_out[f"responses_of_{name}"] = sum(len(responses[name][item.key]) for item in asked) - len(pairs)
        return _judge(config, folder, pairs, left_out, say, progress)


def read_responses(source: str, split: str) -> dict[str, tuple[Text, list[str]]]:
    """Prompt key -> (prompt, responses) of a file; rows of one prompt are put together. Raises DataError with the row."""
    found: dict[str, tuple[Text, list[str]]] = {}
    for number, row in read_objects(source, split):
        try:
            prompt = prompt_of(row)
            found.setdefault(text_key(prompt), (prompt, []))[1].extend(responses_of(row))
        except RowError as error:
            raise DataError(f"{source}, row {number}: {error}; every row needs a prompt and responses") from None
    if not found:
        raise DataError(f"{source}: nothing to use: it holds no rows; give rows with prompt and responses")
    return found


def sampled_responses(
    config: WinrateConfig, side: str, asked: Sequence[Asked], kept_in: Path, progress: Progress
) -> dict[str, list[str]]:
    """Prompt key -> responses of a model; what `kept_in` has is not sampled again, and what is new is added to it."""
    cut_torn_line(kept_in)
    known: dict[str, list[str]] = {text_key(row["prompt"]): row["responses"] for row in read_sealed(kept_in)}
    missing, each = [item for item in asked if item.key not in known], config.samples_per_prompt
    if not missing:
        return known
    seeds = sample_seeds(config.seed, [item.place for item in missing], each)
    jobs = [Job(i, missing[i // each].row, missing[i // each].prompt, seed) for i, seed in enumerate(seeds)]
    texts: dict[int, str] = {}

    def keep(new: Mapping[int, Reply]) -> None:
        texts.update({index: one.text for index, one in new.items()})
        for item in sorted({index // each for index in new}):
            mine = [texts[i] for i in range(item * each, (item + 1) * each) if i in texts]
            if len(mine) == each:
                known[missing[item].key] = mine
                append(kept_in, seal({"prompt": missing[item].prompt, "responses": mine}))
        progress(f"samples of {side}", len(new), len(jobs))

    model = config.sides[side].model
    assert model is not None
    engine = TransformersEngine(
        model=model, template=config.template, special_text=config.special_text, batch=config.sample.batch
    )
    draw(engine, str(config.prompts), jobs, config.sample, keep)
    return known


def text_key(prompt: Text) -> str:
    """Equal for equal prompts, be they text or a single user turn."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return json.dumps(turns, sort_keys=True)


def _judge(
    config: WinrateConfig,
    folder: RunFolder,
    pairs: Sequence[tuple[int, Duel]],
    left_out: dict[str, int],
    say: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Both orders of every pair are judged; the figures are written."""
    duels = [duel for _, pair in pairs for duel in (pair, Duel(pair.prompt, pair.second, pair.first))]
    found = verdicts(config.judge, duels, folder.judgments, say, lambda done, total: progress("judgments", done, total))
    judged = [
        JudgedPair(place, *both, len(pair.first), len(pair.second))
        for (place, pair), both in zip(pairs, zip(found[::2], found[1::2], strict=True), strict=True)
    ]
    figures = {
        "a": config.a.name,
        "b": config.b.name,
        "judge": f"{config.judge.kind} {JUDGES[config.judge.kind].name(config.judge)}",
    }
    figures |= {**asdict(win_figures(judged)), "left_out": left_out}
    first = {place: (duel, pair.outcome) for (place, duel), pair in reversed([*zip(pairs, judged, strict=True)])}
    shown = [first[place] for place in sorted(first)][:_SHOWN]
    write_jsonl(
        folder.winrate_samples,
        [{"prompt": duel.prompt, "a": duel.first, "b": duel.second, "verdict": outcome} for duel, outcome in shown],
    )
    write_json(folder.winrate, figures)
    return figures


def _common(config: WinrateConfig, files: Mapping[str, Any]) -> tuple[list[Asked], dict[str, int]]:
    """The prompts both sides can answer, and how many were left out because a file has no response to them."""
    if config.prompts:
        # with models on both sides every prompt can be answered, so none beyond the limit is needed
        numbered = read_prompts(config.prompts, config.split, None if files else config.max_prompts, config.columns)
    else:
        union = {key: prompt for rows in files.values() for key, (prompt, _) in rows.items()}
        numbered = list(enumerate(union.values(), 1))
    base = [Asked(place, row, prompt) for place, (row, prompt) in enumerate(numbered)]
    left_out = {f"prompts_without_{name}": sum(item.key not in rows for item in base) for name, rows in files.items()}
    asked = [item for item in base if all(item.key in rows for rows in files.values())]
    if not asked:
        names = " and ".join(name for name in (config.prompts, config.a.file, config.b.file) if name)
        raise DataError(f"{names}: have no prompt in common; give files of responses to the same prompts")
    return asked[: config.max_prompts], left_out


def _settle(config: WinrateConfig, folder: RunFolder) -> None:
    """This recipe into the run folder. Responses and figures in it must be of the same sides and settings."""
    settings = {name: _settings(config, side) for name, side in config.sides.items()}
    before = read_json(folder.winrate_settings) if folder.winrate_settings.exists() else settings
    for side, now in settings.items():
        # a start that failed before anything was made may be put right and repeated
        if not (folder.responses(side).exists() or folder.winrate.exists()):
            continue
        then = found if isinstance(found := before.get(side), dict) else {}
        changed = [
            f"{side}.{name}: {then.get(name)!r} before, {now.get(name)!r} now"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if changed:
            raise ConfigError(
                f"{config.run}: holds responses made with other settings ({'; '.join(changed[:3])}); use the same settings, "
                "or choose another run=FOLDER"
            )
    write_config(folder, dump(config))
    write_json(folder.winrate_settings, settings)


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
        "tokens": {"template": config.template, "special_text": config.special_text},
        "sample": config.sample.model_dump(mode="json", exclude={"batch"}),
    }
