"""`favor eval`: a trained policy against its reference on held-out preferences and by samples.

In: EvalConfig, usually just a run folder. Out: eval.json and samples.jsonl. Next: margins.py.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from favor.config import STRICT, Seed
from favor.data.read import DataConfig, read, read_splits
from favor.data.tokenize import tokenize
from favor.data.types import Batch, PromptTree, TokenTree
from favor.errors import ConfigError, DataError
from favor.eval.divergence import kl_of_samples
from favor.eval.intervals import mean_interval
from favor.eval.margins import pair_figures
from favor.losses.table import beta_of, make_loss
from favor.model.layout import sampled_tree, settle
from favor.model.load import Policy, precision_of
from favor.model.logprobs import response_logps
from favor.model.sample import SampleConfig, decode, sample
from favor.rewards.model import RunRecipe, load_pair, read_run
from favor.run import RunFolder, opened, write_json, write_text

Scorer = Callable[[Sequence[str]], Sequence[float]]


class EvalConfig(BaseModel):
    """A recipe for `favor eval`. What is not set comes from the run: its model, reference, held-out data, beta. In float32.

    `run` is a folder made by `favor train`. `data`, `reference` and `beta` replace what the run used.
    """

    model_config = STRICT
    run: str
    reference: str | None = None
    data: str | None = None
    beta: float | None = Field(default=None, gt=0)
    seed: Seed = 0
    sample: SampleConfig = SampleConfig()
    max_tokens_per_pack: int = Field(default=2048, ge=1)
    max_rows: int | None = Field(default=None, ge=1)
    sample_prompts: int = Field(default=20, ge=0)
    samples_per_prompt: int = Field(default=2, ge=1, le=1000)


@dataclass(frozen=True)
class Subject:
    """What is evaluated, with everything settled."""

    policy: Policy
    reference: Policy
    texts: Sequence[PromptTree]
    trees: list[TokenTree]
    beta: float


def evaluate(
    config: EvalConfig,
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
    scorer: tuple[str, Scorer] | None = None,
) -> dict[str, Any]:
    """Write eval.json and samples.jsonl into the run folder and return the figures.

    `scorer` is (name, function text -> score); with it the samples of policy and reference are compared, paired
    by prompt. Raises CheckpointError, DataError or ConfigError when something cannot be used.
    """
    folder = RunFolder(Path(config.run))
    _, recipe = read_run(config.run)
    with opened(folder):
        return _evaluate(config, _subject(config, recipe, say), progress, scorer)


def _evaluate(
    config: EvalConfig,
    subject: Subject,
    progress: Callable[[str, int, int], None],
    scorer: tuple[str, Scorer] | None,
) -> dict[str, Any]:
    folder = RunFolder(Path(config.run))
    total = len(subject.trees)
    pairs = pair_figures(
        subject.policy,
        _logps(subject.reference),
        subject.trees,
        subject.beta,
        config.max_tokens_per_pack,
        lambda done: progress("held-out pairs", done, total),
    )
    precision = precision_of(subject.policy.compute_dtype)
    figures: dict[str, Any] = {"beta": subject.beta, "precision": precision, **pairs.as_json(), "kl": None}
    if config.sample_prompts:
        records, figures["kl"], figures["length"] = _samples(config, subject, progress)
        if scorer:
            figures["score"] = _score(records, scorer, config)
        write_text(folder.samples, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    write_json(folder.evaluation, figures)
    return figures


def _subject(config: EvalConfig, recipe: RunRecipe, say: Callable[[str], None]) -> Subject:
    # a share held out is a share of the rows that training read
    limit = config.max_rows or (recipe.data.get("max_rows") if recipe.data.get("eval_share") else None)
    data = DataConfig.model_validate({**recipe.data, "max_rows": limit})
    if config.data is None and data.eval is None and not data.eval_share:
        raise ConfigError(f"{config.run}: the run had no data.eval; name held-out preferences with data=FILE")
    texts, report = read(config.data, data, data.eval_split) if config.data else read_splits(data)["eval"]
    policy, reference = load_pair(config.run, config.reference)
    trees, _ = tokenize(texts, policy.tokenizer, recipe.tokens, policy.end_ids, data.bad_rows)
    trees = [tree for tree in trees if tree.comparisons]
    if not trees:
        raise DataError(f"{report.source}: no comparison to evaluate on; give chosen and rejected, a ranking or scores")
    drawn = [sampled_tree(tree.prompt_ids, config.sample.max_new_tokens) for tree in trees[: config.sample_prompts]]
    policy, why = settle(policy, recipe.model.layout, trees, also=drawn)
    reference, _ = settle(reference, policy.layout, trees, also=drawn)
    say(f"precision: {precision_of(policy.compute_dtype)}; layout: {why}")
    return Subject(policy, reference, texts, trees, config.beta or recipe.loss.get("beta", beta_of(make_loss())))


def _logps(policy: Policy) -> Callable[[Batch], Tensor]:
    def logps(batch: Batch) -> Tensor:
        with torch.no_grad():
            return response_logps(policy, batch)

    return logps


def _samples(
    config: EvalConfig, subject: Subject, progress: Callable[[str, int, int], None]
) -> tuple[list[dict[str, Any]], dict[str, float | None] | None, dict[str, float]]:
    """Samples of both models for the first held-out prompts, by the same random streams, KL from the policy's, mean lengths.

    KL is None when the temperature is not 1: the samples are then not the policy's own distribution.
    """
    trees, each = subject.trees[: config.sample_prompts], config.samples_per_prompt
    prompts = [tree.prompt_ids for tree in trees for _ in range(each)]
    seeds = [config.seed * 1_000_003 + i for i in range(len(prompts))]
    text_of = {(tree.source, tree.rows[0]): tree.prompt for tree in subject.texts}
    records: list[dict[str, Any]] = [{"prompt": text_of[tree.source, tree.row]} for tree in trees]
    kl, lengths = None, dict[str, float]()
    for name, policy in (("reference", subject.reference), ("policy", subject.policy)):
        ids = sample(policy, prompts, seeds, config.sample, lambda done: progress("samples", done, 2 * len(prompts)))
        lengths[name] = sum(map(len, ids)) / len(ids)
        texts = decode(policy, ids)
        for i, record in enumerate(records):
            record[name] = texts[i * each : (i + 1) * each]
        if name == "policy" and config.sample.temperature == 1.0:
            kl = kl_of_samples(policy, _logps(subject.reference), prompts, ids, config.sample).as_json()
    return records, kl, lengths


def _score(records: list[dict[str, Any]], scorer: tuple[str, Scorer], config: EvalConfig) -> dict[str, Any]:
    """Score every sample and compare the means over prompts; scores that are all 0 or 1 are shares."""
    name, function = scorer
    for record in records:
        for side in ("reference", "policy"):
            record[f"{side}_scores"] = [float(x) for x in function(record[side])]
    scores = {side: np.array([r[f"{side}_scores"] for r in records]).ravel() for side in ("reference", "policy")}
    prompts = np.repeat(np.arange(len(records)), config.samples_per_prompt)
    shares = all(np.isin(values, (0, 1)).all() for values in scores.values())
    side, both = ((0.0, 1.0), (-1.0, 1.0)) if shares else (None, None)
    policy = mean_interval(scores["policy"], clusters=prompts, bounds=side)
    reference = mean_interval(scores["reference"], clusters=prompts, bounds=side)
    difference = mean_interval(scores["policy"] - scores["reference"], clusters=prompts, bounds=both)
    return {
        "name": name,
        "reference": reference.mean,
        "reference_interval": reference.ends,
        "policy": policy.mean,
        "policy_interval": policy.ends,
        "difference": difference.mean,
        "interval": difference.ends,
        "num_prompts": len(records),
        "samples_per_prompt": config.samples_per_prompt,
    }
