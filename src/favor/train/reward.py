"""A reward model: one scalar head on a causal LM, trained by Bradley-Terry on prompt trees.

In: RewardTrainConfig (a recipe). Out: a run folder whose model transformers loads as a sequence classifier, and
held-out accuracy and calibration. Next: ppo.py.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from favor.config import STRICT, Resume, Run, Seed, dump
from favor.data.prepare import check_sources
from favor.data.read import DataConfig
from favor.data.settings import kwargs_are_read
from favor.data.splits import Splits, extremes, outlines
from favor.data.tokenize import TokensConfig
from favor.data.types import Batch, TokenTree
from favor.errors import ConfigError
from favor.eval.figures import Calibration, calibrate, pair_names, pair_records, pairs
from favor.losses.pairwise import bradley_terry, centering, rao_kupper_tie
from favor.model.batched import measured
from favor.model.heads import load_scalar_model, response_scores, settle_scores
from favor.model.load import Policy, TrainedModel, precise
from favor.ranks import RanksConfig, World
from favor.run import write_json, write_jsonl
from favor.train.loggers import LoggedConfig
from favor.train.loop import LoopConfig, SaveConfig, can_be_split, make_training, turns
from favor.train.optim import AdamW, OptimConfig
from favor.train.packs import looked_at, settled
from favor.train.reference import identity
from favor.train.session import OpenSession, Session, TrainingState, load_splits, recipe_hash, resumes, running
from favor.train.step import Objective, step
from favor.train.watch import HeldOut

# sums over the pairs of a batch, and its number of ties
_STATS = ("pairs", "correct", "gap", "score_chosen", "score_rejected", "ties")


class BradleyTerryConfig(BaseModel):
    """Section [bradley_terry]: what a pair, and a tie, teaches a reward model."""

    model_config = STRICT
    margin_scale: float = Field(default=0.0, ge=0)
    """How much of the data's margins (or score differences) a winner must win by."""
    tie_width: float | None = Field(default=None, gt=0)
    """Learn from ties too, by Rao & Kupper with theta = exp(tie_width); 0.5 is a good start."""
    centering: float = Field(default=0.0, ge=0)
    """Weight of (r_w + r_l)^2, which holds scores around zero."""


class RewardTrainConfig(BaseModel):
    """A recipe for `favor reward`."""

    model_config = STRICT
    _kwargs = model_validator(mode="after")(kwargs_are_read)
    _split = model_validator(mode="after")(can_be_split)
    run: Run
    seed: Seed = 0
    resume: Resume = False
    model: TrainedModel
    data: DataConfig
    tokens: TokensConfig = TokensConfig()
    bradley_terry: BradleyTerryConfig = BradleyTerryConfig()
    optim: OptimConfig = AdamW(lr=1e-5)
    train: LoopConfig = LoopConfig()
    ranks: RanksConfig = RanksConfig()
    save: SaveConfig = SaveConfig()
    watch: LoggedConfig = LoggedConfig()


def train_reward(config: RewardTrainConfig, open_session: OpenSession) -> Calibration | None:
    """Train a reward model; held-out figures go to eval.json. Raises the errors of every part."""
    check_sources(config.data)
    config = config.model_copy(update={"resume": resumes(config.run, config.resume)})
    logger, recipe = config.watch.logger, dump(config)
    with running(config.run, recipe, resume=config.resume, open_session=open_session, logger=logger) as session:
        return _learn(config, session)


def _learn(config: RewardTrainConfig, session: Session) -> Calibration | None:
    policy = load_scalar_model(config.model, config.seed, config.ranks.shard, fresh=True)
    splits = load_splits(config.data, config.tokens, policy, session)
    splits.need_comparisons()
    _check_options(config.bradley_terry, splits)
    every = (*extremes(splits.train), *extremes(splits.eval))
    policy, why = settle_scores(policy, config.model.layout, splits.train[:2], also=every, train=True)
    session.self_check(policy, why)
    few = [[splits.train[i] for i in some] for some in looked_at(config.train, range(len(splits.train)))]
    packs = settled(config.train, config.model, policy, few, session, resume=config.resume)
    config = config.model_copy(update={"train": packs})
    held_out = [tree for tree in splits.eval if tree.comparisons]
    budget, world = config.train.budget, session.world

    made: list[tuple[np.ndarray, np.ndarray]] = []

    def measure() -> dict[str, object]:
        made.append(gaps(precise(policy), held_out, budget, world))
        return _held_out_figures(calibrate(*made[-1]))

    watched = HeldOut(measure, session) if held_out else None
    _loop(config, policy, splits, session, watched)
    if not held_out:
        return None
    if not made:
        # resumed after its last step
        measure()
    gap_P, prompt_P = made[-1]
    found = calibrate(gap_P, prompt_P)
    if session.world.is_main:
        write_jsonl(session.folder.pairs, pair_records(pair_names(held_out), prompt_P, gap_P))
        write_json(session.folder.evaluation, {"calibration": asdict(found)})
    session.say(f"held-out accuracy {found.accuracy:.3f} on {found.pairs} pairs, ECE {found.ece:.3f}")
    return found


def _held_out_figures(found: Calibration) -> dict[str, object]:
    """Of a calibration what metrics.jsonl keeps."""
    counts = {"pairs": found.pairs, "prompts": found.prompts}
    return {"loss": found.loss, "accuracy": found.accuracy, "accuracy_interval": found.accuracy_interval, **counts}


def _loop(
    config: RewardTrainConfig, policy: Policy, splits: Splits, session: Session, held_out: HeldOut | None
) -> None:
    width = config.bradley_terry.tie_width
    used = [i for i, tree in enumerate(outlines(splits.train)) if tree.comparisons or (width is not None and tree.ties)]
    inputs = recipe_hash(config) | identity(policy, config.tokens) | {"data": splits.identity}
    training = make_training(config, policy, used, session)
    objective = make_objective(config.bradley_terry, policy)
    if held_out:
        held_out.first(resume=config.resume)
    with contextlib.closing(turns(training, "reward", TrainingState(inputs=inputs))) as steps:
        for turn in steps:
            cut = training.micro_batches([splits.train[i] for i in turn.indices])
            done = step(training.learner, cut, objective)
            turn.done()
            record = turn.figures(done, cut) | _means(done.sums)
            turn.record(record, f"loss {record['loss']:.4f}  acc {record['accuracy']:.2f}  gap {record['gap']:+.3f}")
            if held_out:
                held_out.after(turn.state.step, training.num_steps)
            turn.save_or_stop()


def make_objective(config: BradleyTerryConfig, policy: Policy) -> Objective:
    """Bradley-Terry over pairs (and ties when asked), summed; the items counted are comparisons by weight."""
    width = config.tie_width

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        score_R = response_scores(policy, batch)
        chosen_P, rejected_P = score_R[batch.chosen_P], score_R[batch.rejected_P]
        item_P = bradley_terry(chosen_P - rejected_P, config.margin_scale * batch.margin_P + (width or 0.0))
        item_P = item_P + config.centering * centering(chosen_P, rejected_P)
        total = (item_P * batch.weight_P).sum()
        if width is not None:
            a_U, b_U = score_R[batch.tie_U2[:, 0]], score_R[batch.tie_U2[:, 1]]
            item_U = rao_kupper_tie(a_U - b_U, width) + config.centering * centering(a_U, b_U)
            total = total + (item_U * batch.weight_U).sum()
        return total, _sums(chosen_P.detach(), rejected_P.detach(), batch)

    def count(batch: Batch) -> tuple[float]:
        ties = 0.0 if width is None else float(batch.weight_U.double().sum())
        return (float(batch.weight_P.double().sum()) + ties,)

    return Objective(loss, count, _STATS)


def gaps(policy: Policy, trees: Sequence[TokenTree], budget: int, world: World) -> tuple[np.ndarray, np.ndarray]:
    """r(chosen) - r(rejected) of every pair, and the index of its prompt."""
    score_R = measured(policy, trees, lambda batch: response_scores(policy, batch), budget, world).numpy()
    chosen_P, rejected_P, tree_P = pairs(trees)
    return score_R[chosen_P] - score_R[rejected_P], tree_P


def _check_options(config: BradleyTerryConfig, splits: Splits) -> None:
    """An option that the data cannot feed is an error, not a silence."""
    if config.margin_scale and not any(c.gaps for tree in outlines(splits.train) for c in tree.comparisons):
        raise ConfigError("bradley_terry.margin_scale is set, but no row has a margin or scores; remove it")
    if config.tie_width is not None and not any(tree.ties for tree in outlines(splits.train)):
        raise ConfigError(
            "bradley_terry.tie_width is set, but the data holds no ties (tie = true, or equal scores); remove it"
        )


def _sums(chosen_P: Tensor, rejected_P: Tensor, batch: Batch) -> dict[str, Tensor]:
    gap_P = chosen_P - rejected_P
    return {
        "pairs": torch.ones_like(gap_P).sum(),
        "correct": ((gap_P.sign() + 1) / 2).sum(),
        "gap": gap_P.sum(),
        "score_chosen": chosen_P.sum(),
        "score_rejected": rejected_P.sum(),
        "ties": torch.ones_like(batch.weight_U).sum(),
    }


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    pairs = max(1.0, sums["pairs"])
    named = {name: sums[name] / pairs for name in ("gap", "score_chosen", "score_rejected")}
    return {"accuracy": sums["correct"] / pairs, **named}
