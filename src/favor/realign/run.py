"""`favor realign`: one trained policy and its reference mixed at decoding, for several strengths; a choice baked into weights.

In: RealignConfig, usually just a run folder. Out: realign.json with figures, samples and what was baked, and a page with a
slider. Next: measure.py.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from favor import output
from favor.config import STRICT, Overwrite, Seed
from favor.data.types import sampled_tree
from favor.errors import ConfigError
from favor.eval.evaluate import EvalConfig, Subject, subject_of
from favor.eval.figures import pairs
from favor.generate.samples import Progress
from favor.model.layout import settle
from favor.model.load import precision_of, weights_hash
from favor.model.sample import SampleConfig
from favor.output import Output
from favor.ranks import World
from favor.realign.bake import Baking, bake, check_bakeable
from favor.realign.measure import How, Plan, members, plan_of
from favor.realign.page import page
from favor.report.table import family_names
from favor.rewards.model import RunRecipe, load_pair, read_run
from favor.rewards.source import RewardConfig, check_scorer, make_scorer, reads
from favor.run import RunFolder, opened


class RealignConfig(BaseModel):
    """A recipe for `favor realign`. What is not set comes from the run. Everything is computed in float32, at temperature 1."""

    model_config = STRICT
    run: str
    """A folder made by `favor train`."""
    lambdas: Annotated[tuple[Annotated[float, Field(ge=0, le=100)], ...], Field(min_length=1)] = (
        *(0.0, 0.25, 0.5, 0.75),
        *(1.0, 1.25, 1.5, 2.0),
    )
    """Strengths to measure: 0 is the reference, 1 the policy, more goes beyond it."""
    sweep: tuple[str, ...] = ()
    """Runs from the same start with other betas, measured in the same way and shown beside."""
    data: str | None = None
    """Held-out preferences, instead of the run's."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only this many rows."""
    sample_prompts: int = Field(default=20, ge=1)
    """Sample the first N held-out prompts."""
    samples_per_prompt: int = Field(default=2, ge=1, le=1000)
    """Samples of each strength per prompt."""
    sample: SampleConfig = SampleConfig()
    seed: Seed = 0
    """The samples' random streams, the same for every strength."""
    reward: RewardConfig | None = None
    max_tokens_per_pack: int = Field(default=2048, ge=1)
    """Tokens computed at once: lower it if memory runs out."""
    bake: float | None = Field(default=None, ge=0, le=100)
    """Write the model of this strength as weights into bake_to; the gap to the exact family is measured."""
    bake_to: str | None = None
    """The model folder that bake writes; it must not be there yet."""
    out: str | None = None
    """The file of figures and samples; without it realign.json in the run folder."""
    page: str | None = None
    """The page; without it realign.html in the run folder."""
    overwrite: Overwrite = False

    @model_validator(mode="after")
    def _every_option_is_read(self) -> Self:
        if len(set(self.lambdas)) < len(self.lambdas):
            raise ValueError(f"lambdas holds a value twice ({', '.join(f'{x:g}' for x in self.lambdas)}); remove one")
        if self.sample.temperature != 1.0:
            raise ValueError("sample.temperature must stay 1: KL is of a model's own distribution; remove it")
        if (self.bake is None) != (self.bake_to is None):
            raise ValueError("bake and bake_to go together: give both, bake=LAMBDA bake_to=FOLDER, or neither")
        if self.overwrite and self.out is None and self.page is None:
            raise ValueError(
                "overwrite is read only with out or page: the run's own files are always made anew; remove it"
            )
        return self


def realign(
    config: RealignConfig, say: Callable[[str], None], progress: Progress, recipe: Path | None = None
) -> dict[str, Any]:
    """Measure, bake, write; returns the figures without the samples. recipe: where the settings come from.

    Raises CheckpointError for no finished run, ConfigError for what cannot be baked or written, or a run of the sweep that began
    elsewhere, DataError for rows that cannot be used, NumericsError for figures that are not finite.
    """
    folder, of_run = read_run(config.run)
    for run in config.sweep:
        read_run(run)
    if config.reward is not None:
        check_scorer(config.reward)
    if config.bake_to is not None:
        check_bakeable(folder.model, Path(config.bake_to))
    outputs = _outputs(config, folder)
    read = [config.data, str(folder.config), str(folder.model), recipe and str(recipe)]
    read += reads(config.reward) if config.reward else ()
    with opened(folder), output.all_claimed(outputs, read):
        figures, samples = _figures(config, folder, of_run, say, progress)
        whole = json.dumps(figures | {"samples": samples}, indent=2, ensure_ascii=False) + "\n"
        for out, text in zip(outputs, (whole, page(figures, samples)), strict=True):
            output.write(out, {out.path: text}, None)
    return figures


def _outputs(config: RealignConfig, folder: RunFolder) -> list[Output]:
    """The figures' file and the page; those of the run folder are made anew each time."""
    named = {"out": (config.out, folder.realign), "page": (config.page, folder.realign_page)}
    return [Output(Path(given or own), key, config.overwrite or given is None) for key, (given, own) in named.items()]


def _figures(
    config: RealignConfig, folder: RunFolder, recipe: RunRecipe, say: Callable[[str], None], progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The content of realign.json without samples; the samples, prompt by prompt."""
    names = ("run", "data", "max_rows", "sample_prompts", "sample", "max_tokens_per_pack")
    subject = subject_of(EvalConfig(**{name: vars(config)[name] for name in names}), recipe, World(), say)
    plan = plan_of(subject, config.sample, (config.sample_prompts, config.samples_per_prompt), config.seed)
    score = None if config.reward is None else make_scorer(config.reward)
    how = How(score, config.max_tokens_per_pack, progress, config.run)
    beta, found = subject.beta, members(subject, sorted(config.lambdas), plan, how)
    family = [{"lambda": one.weight, "beta": beta / one.weight if one.weight else None, **one.figures} for one in found]
    sweep: list[dict[str, Any]] = []
    for run in config.sweep:
        other, its_beta = _of_sweep(subject, run, plan)
        found += members(other, (1.0,), plan, how._replace(run=run))
        sweep.append({"run": run, "lambda": beta / its_beta, "beta": its_beta, **found[-1].figures})
    baked = None
    if config.bake is not None and config.bake_to is not None:
        to = Baking(folder.model, Path(config.bake_to), config.bake)
        baked = bake(subject, to, recipe.model, config.max_tokens_per_pack)
    figures = {
        "run": config.run,
        "beta": beta,
        "precision": precision_of(subject.policy.products),
        "pairs": len(pairs(subject.trees)[0]),
        "prompts": len(subject.trees),
        "sampled_prompts": len(plan.asked),
        "samples_per_prompt": config.samples_per_prompt,
        "max_new_tokens": config.sample.max_new_tokens,
        "seed": config.seed,
        "reward": config.reward and f"{config.reward.kind} {config.reward.path}",
        "family": family,
        "sweep": sweep,
        "baked": baked,
    }
    named = list(zip((name for name, _ in family_names(figures)), found, strict=True))
    samples = [
        {"prompt": prompt, "answers": [{"of": name, "samples": one.samples[i]} for name, one in named]}
        for i, prompt in enumerate(plan.asked)
    ]
    return figures, samples


def _of_sweep(subject: Subject, run: str, plan: Plan) -> tuple[Subject, float]:
    """Another run's policy in place of the subject's, and its beta. Raises ConfigError where it began at another model."""
    _, recipe = read_run(run)
    policy, start = load_pair(run, None)
    if weights_hash(start) != weights_hash(subject.reference):
        raise ConfigError(
            f"sweep: {run} began at another model ({recipe.model.path}), so its beta says nothing beside this run's; name runs "
            "from the same start"
        )
    drawn = [sampled_tree(prompt, plan.sample.max_new_tokens) for prompt in plan.prompts]
    policy, _ = settle(policy, subject.policy.layout, subject.trees, also=drawn)
    return replace(subject, policy=policy), recipe.scale
