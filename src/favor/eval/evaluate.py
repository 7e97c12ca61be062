"""`favor eval`: a trained policy against its reference on held-out preferences and by samples.

In: EvalConfig, usually just a run folder. Out: eval.json, eval-pairs.jsonl and samples.jsonl. Next: figures.py.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from favor.config import STRICT, Seed, checked
from favor.data.read import DataConfig, read, read_splits
from favor.data.tokenize import tokenize
from favor.data.types import Batch, PromptTree, TokenTree, sampled_tree
from favor.errors import ConfigError, DataError
from favor.eval.figures import kl_of_samples, pair_figures
from favor.eval.intervals import SHARE, mean_interval
from favor.generate.samples import Progress
from favor.model.layout import settle
from favor.model.load import Policy, precision_of
from favor.model.logprobs import response_logps
from favor.model.sample import SampleConfig, decode, sampled
from favor.ranks import RanksConfig, World
from favor.rewards.model import RunRecipe, load_pair, read_run
from favor.run import RunFolder, opened, write_json, write_jsonl

# the name of what scores samples, and text -> score
Scorer = tuple[str, Callable[[Sequence[str]], Sequence[float]]]
_SIDES = ("reference", "policy")
_ALONE = World()


class EvalConfig(BaseModel):
    """A recipe for `favor eval`. What is not set comes from the run. Everything is computed in float32."""

    model_config = STRICT
    run: str
    """A folder made by `favor train`."""
    reference: str | None = None
    """The model to compare with, instead of the one the run started from."""
    data: str | None = None
    """Held-out preferences, instead of the run's."""
    beta: float | None = Field(default=None, gt=0)
    """Scale of the implicit reward, instead of the run's loss.beta."""
    seed: Seed = 0
    """The samples' random streams."""
    sample: SampleConfig = SampleConfig()
    ranks: RanksConfig = RanksConfig()
    max_tokens_per_pack: int = Field(default=2048, ge=1)
    """Tokens computed at once: lower it if memory runs out."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only this many rows."""
    sample_prompts: int = Field(default=20, ge=0)
    """Sample the first N held-out prompts; 0 leaves out samples and KL."""
    samples_per_prompt: int = Field(default=2, ge=1, le=1000)
    """Samples of each model per prompt."""
    read_at: tuple[Annotated[float, Field(ge=1e-4)], ...] = (0.7, 1e-4)
    """Temperatures of one more answer a prompt each, for people to read; 0.0001 always takes the likeliest token."""

    @model_validator(mode="after")
    def _samples_are_taken(self) -> Self:
        unread = {"seed", "sample", "samples_per_prompt", "read_at"} & self.model_fields_set
        if self.sample_prompts == 0 and unread:
            raise ValueError(
                f"{min(unread)} would be ignored: sample_prompts=0 leaves out samples; remove one of the two"
            )
        return self


class Sources(BaseModel):
    """What of a run's recipe says where its rows came from."""

    model_config = STRICT
    data: DataConfig


@dataclass(frozen=True)
class Subject:
    """What is evaluated, with everything settled."""

    policy: Policy
    reference: Policy
    texts: Sequence[PromptTree]
    trees: list[TokenTree]
    beta: float
    world: World

    def reference_logps(self, batch: Batch) -> Tensor:
        """Log ref(y|x) of every response, nats [R]."""
        return response_logps(self.reference, batch)


def evaluate(
    config: EvalConfig,
    say: Callable[[str], None],
    progress: Progress,
    scorer: Scorer | None = None,
    members: World = _ALONE,
) -> dict[str, Any]:
    """Write eval.json, eval-pairs.jsonl and samples.jsonl into the run folder and return the figures.

    With a `scorer` the samples of policy and reference are compared, paired by prompt. `members` share
    the work, and their main one writes. Raises CheckpointError, DataError or ConfigError when something cannot be used.
    """
    folder, recipe = read_run(config.run)
    with opened(folder) if members.is_main else contextlib.nullcontext():
        return _evaluate(config, folder, subject_of(config, recipe, members, say, sees=True), progress, scorer)


def _evaluate(
    config: EvalConfig, folder: RunFolder, subject: Subject, progress: Progress, scorer: Scorer | None
) -> dict[str, Any]:
    policy, total = subject.policy, len(subject.trees)
    pairs = pair_figures(
        policy,
        subject.reference_logps,
        subject.trees,
        subject.beta,
        config.max_tokens_per_pack,
        lambda done: progress("held-out pairs", done, total),
        subject.world,
    )
    figures = {"beta": subject.beta, "precision": precision_of(policy.products), **pairs.as_json(), "kl": None}
    if config.sample_prompts:
        records, found = _samples(config, subject, progress)
        figures |= found
        if scorer:
            figures["score"] = score_samples(records, scorer)
        if subject.world.is_main:
            write_jsonl(folder.samples, records)
    if subject.world.is_main:
        write_jsonl(folder.pairs, pairs.each())
        write_json(folder.evaluation, figures)
    return figures


def subject_of(
    config: EvalConfig, recipe: RunRecipe, members: World, say: Callable[[str], None], *, sees: bool = False
) -> Subject:
    """Held-out trees of a run with both models, settled; sees: also with pictures. Raises as `evaluate` does."""
    # a share held out is a share of the rows that training read
    limit = config.max_rows or (recipe.data.get("max_rows") if recipe.data.get("hold_out") else None)
    kept = {key: value for key, value in recipe.data.items() if key != "max_rows"} | (
        {"max_rows": limit} if limit else {}
    )
    data = checked(Sources, {"data": kept}, str(RunFolder(Path(config.run)).config)).data
    if config.data is None and data.eval is None and data.hold_out is None:
        raise ConfigError(
            f"{config.run}: the run held nothing out (data.eval, data.hold_out.share); name held-out preferences with data=FILE"
        )
    policy, reference = load_pair(config.run, config.reference, config.ranks.shard, sees=sees)
    sees = policy.sight is not None
    if sees and config.sample_prompts:
        raise ConfigError(
            f"{config.run}: its model reads pictures, and no samples are taken with them; set sample_prompts=0"
        )
    named = config.data
    texts, report = read(named, data, data.eval_split, sees=sees) if named else read_splits(data, sees=sees)["eval"]
    trees, _ = tokenize(texts, policy.tokenizer, recipe.tokens, policy.end_ids, data.bad_rows, policy.sight)
    trees = [tree for tree in trees if tree.comparisons]
    if not trees:
        raise DataError(f"{report.source}: no comparison to evaluate on; give chosen and rejected, a ranking or scores")
    drawn = [sampled_tree(tree.prompt_ids, config.sample.max_new_tokens) for tree in trees[: config.sample_prompts]]
    policy, why = settle(policy, recipe.model.layout, trees, also=drawn)
    reference, _ = settle(reference, policy.layout, trees, also=drawn)
    say(f"precision: {precision_of(policy.products)}; layout: {why}")
    return Subject(policy, reference, texts, trees, config.beta or recipe.scale, members)


def _samples(config: EvalConfig, subject: Subject, progress: Progress) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Samples of both models for the first held-out prompts, by the same random streams, and their figures.

    KL from the policy's, mean lengths, and the share that came to their end.

    KL is None when the temperature is not 1: the samples are then not the policy's own distribution.
    """
    trees, each = subject.trees[: config.sample_prompts], config.samples_per_prompt
    prompts = [tree.prompt_ids for tree in trees for _ in range(each)]
    seeds = [config.seed * 1_000_003 + i for i in range(len(prompts))]
    drawn = _drawn(subject, prompts, seeds, config.sample, lambda done: progress("samples", done, 2 * len(prompts)))
    prompt_of = {(tree.source, tree.rows[0]): tree.prompt for tree in subject.texts}
    read = _read(config, subject, prompts[::each], seeds[::each], progress)
    records = [
        {"prompt": prompt_of[tree.source, tree.row]}
        | {name: drawn[name].texts[i * each : (i + 1) * each] for name in _SIDES}
        | {f"{name}_cut": drawn[name].cut[i * each : (i + 1) * each] for name in _SIDES}
        | {"read": [answers[i] for answers in read]}
        for i, tree in enumerate(trees)
    ]
    kl = None
    if config.sample.temperature == 1.0:
        both = (subject.policy, subject.reference_logps)
        kl = asdict(kl_of_samples(*both, prompts, drawn["policy"].ids, config.sample, subject.world))
    length = {name: sum(map(len, drawn[name].ids)) / len(prompts) for name in _SIDES}
    ended = {name: 1 - sum(drawn[name].cut) / len(prompts) for name in _SIDES}
    return records, {"kl": kl, "length": length, "ended": ended}


class Drawn(NamedTuple):
    """Samples of one model: ids, texts, and which reached the limit without an end."""

    ids: list[tuple[int, ...]]
    texts: list[str]
    cut: list[bool]


def _drawn(
    subject: Subject,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    config: SampleConfig,
    progress: Callable[[int], None],
) -> dict[str, Drawn]:
    """A sample of either model for each prompt, by the same random streams."""
    found: dict[str, Drawn] = {}
    for name, model in (("reference", subject.reference), ("policy", subject.policy)):
        ids = sampled(model, prompts, seeds, config, subject.world, progress)
        found[name] = Drawn(ids, decode(model.tokenizer, ids), [one[-1] not in model.end_ids for one in ids])
    return found


def _read(
    config: EvalConfig,
    subject: Subject,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    progress: Progress,
) -> list[list[dict[str, Any]]]:
    """For each temperature of read_at, an answer of either model to each prompt; no figure is made of them."""
    found: list[list[dict[str, Any]]] = []
    total = 2 * len(prompts) * len(config.read_at)
    for temperature in config.read_at:
        settings = config.sample.model_copy(update={"temperature": temperature})
        drawn = _drawn(subject, prompts, seeds, settings, lambda done: progress("answers to read", done, total))
        found.append(
            [
                {"temperature": temperature}
                | {name: drawn[name].texts[i] for name in _SIDES}
                | {f"{name}_cut": drawn[name].cut[i] for name in _SIDES}
                for i in range(len(prompts))
            ]
        )
    return found


def score_samples(records: list[dict[str, Any]], scorer: Scorer) -> dict[str, Any]:
    """Score every sample (into its record) and compare the means over prompts; scores that are all 0 or 1 are shares."""
    name, function = scorer
    for record in records:
        record.update({f"{side}_scores": [float(x) for x in function(record[side])] for side in _SIDES})
    scores = {side: np.array([record[f"{side}_scores"] for record in records]) for side in _SIDES}
    prompts, each = scores["policy"].shape
    place = np.repeat(np.arange(prompts), each)
    shares = all(np.isin(values, (0, 1)).all() for values in scores.values())
    side, both = (SHARE, (-1.0, 1.0)) if shares else (None, None)
    policy = mean_interval(scores["policy"].ravel(), clusters=place, bounds=side)
    reference = mean_interval(scores["reference"].ravel(), clusters=place, bounds=side)
    difference = mean_interval((scores["policy"] - scores["reference"]).ravel(), clusters=place, bounds=both)
    return {
        "name": name,
        **reference.named("reference"),
        **policy.named("policy"),
        "difference": difference.mean,
        "interval": difference.ends,
        "num_prompts": prompts,
        "samples_per_prompt": each,
    }
