"""The reward model of RLHF: a scalar head on a causal LM, trained by Bradley-Terry on prompt trees.

In: RewardTrainConfig (a recipe). Out: a run folder whose model transformers loads as a sequence classifier, and
held-out accuracy and calibration. Next: ppo.py.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from favor.config import STRICT, Seed, dump
from favor.data.batches import LoaderState, Order
from favor.data.prepare import Splits, check_sources
from favor.data.read import DataConfig
from favor.data.tokenize import TokensConfig
from favor.data.types import Batch, TokenTree
from favor.errors import ConfigError
from favor.eval.calibration import Calibration, calibrate
from favor.losses.reward import bradley_terry, centering, rao_kupper_tie
from favor.model.batched import measured, pairs
from favor.model.heads import load_scalar_model, response_scores, settle_scores
from favor.model.load import ModelConfig, Policy, precise, precision_of
from favor.ranks import World
from favor.run import write_json
from favor.train.checkpoint import TrainingState
from favor.train.loop import LoopConfig, finish, micro_batches, num_steps, resume, save_or_stop
from favor.train.optim import OptimConfig, learning_rate, make_optimizer, set_learning_rate
from favor.train.reference import identity
from favor.train.session import Bar, Session, load_splits, recipe_hash, running
from favor.train.step import Machine, Objective, step
from favor.train.view import where

STATS = ("pairs", "correct", "gap", "score_chosen", "score_rejected", "ties")


class BradleyTerryConfig(BaseModel):
    """Section [reward] of `favor reward`.

    margin_scale: how much of the data's margins (or score differences) a winner must win by. ties: learn from
    ties too, with theta = exp(tie_width) of Rao & Kupper. centering: weight of (r_w + r_l)^2.
    """

    model_config = STRICT
    margin_scale: float = Field(default=0.0, ge=0)
    ties: bool = False
    tie_width: float = Field(default=0.5, gt=0)
    centering: float = Field(default=0.0, ge=0)


class RewardTrainConfig(BaseModel):
    """A recipe for `favor reward`."""

    model_config = STRICT
    run: str
    seed: Seed = 0
    resume: bool = False
    model: ModelConfig
    data: DataConfig
    tokens: TokensConfig = TokensConfig()
    reward: BradleyTerryConfig = BradleyTerryConfig()
    optim: OptimConfig = OptimConfig(lr=1e-5)
    train: LoopConfig = LoopConfig()


def train_reward(config: RewardTrainConfig, open_session: Callable[[Path], Session]) -> Calibration | None:
    """Train a reward model; held-out figures go to eval.json. Raises the errors of every part."""
    check_sources(config.data)
    with running(config.run, dump(config), resume=config.resume, open_session=open_session) as session:
        return _learn(config, session)


def _learn(config: RewardTrainConfig, session: Session) -> Calibration | None:
    policy = load_scalar_model(config.model, config.seed, fresh=True)
    splits = load_splits(config.data, config.tokens, policy, session)
    splits.need_comparisons()
    _check_options(config.reward, splits)
    policy, why = settle_scores(policy, config.model.layout, splits.train, also=splits.eval, train=True)
    session.event(0, "self_check", f"precision: {precision_of(policy.compute_dtype)}; layout: {why}")
    _loop(config, policy, splits, session)
    held_out = where(splits.eval, lambda tree: bool(tree.comparisons))
    if not held_out:
        return None
    found = calibrate(*gaps(precise(policy), held_out, config.train.max_tokens_per_pack, session.world))
    write_json(session.folder.evaluation, {"calibration": found.as_json()})
    session.say(f"held-out accuracy {found.accuracy:.3f} on {found.pairs} pairs, ECE {found.ece:.3f}")
    return found


def make_objective(config: BradleyTerryConfig, policy: Policy) -> Objective:
    """Bradley-Terry over pairs (and ties when asked), summed; the items counted are comparisons by weight."""
    width = config.tie_width if config.ties else 0.0

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        score_R = response_scores(policy, batch)
        chosen_P, rejected_P = score_R[batch.chosen_P], score_R[batch.rejected_P]
        item_P = bradley_terry(chosen_P - rejected_P, config.margin_scale * batch.margin_P + width)
        item_P = item_P + config.centering * centering(chosen_P, rejected_P)
        total = (item_P * batch.weight_P).sum()
        if config.ties:
            a_U, b_U = score_R[batch.tie_U2[:, 0]], score_R[batch.tie_U2[:, 1]]
            item_U = rao_kupper_tie(a_U - b_U, width) + config.centering * centering(a_U, b_U)
            total = total + (item_U * batch.weight_U).sum()
        return total, _stats(chosen_P.detach(), rejected_P.detach(), batch)

    def count(batch: Batch) -> tuple[float]:
        ties = float(batch.weight_U.double().sum()) if config.ties else 0.0
        return (float(batch.weight_P.double().sum()) + ties,)

    return Objective(loss, count, STATS)


def gaps(policy: Policy, trees: Sequence[TokenTree], budget: int, world: World) -> tuple[np.ndarray, np.ndarray]:
    """r(chosen) - r(rejected) of every pair, and the index of its prompt."""
    score_R = measured(policy, trees, lambda batch: response_scores(policy, batch), budget, world).numpy()
    chosen_P, rejected_P, tree_P = pairs(trees)
    return score_R[chosen_P] - score_R[rejected_P], tree_P


def _check_options(config: BradleyTerryConfig, splits: Splits) -> None:
    """An option that the data cannot feed is an error, not a silence."""
    if config.margin_scale and not any(c.gaps for tree in splits.train for c in tree.comparisons):
        raise ConfigError("reward.margin_scale is set, but no row has a margin or scores; remove it")
    if config.ties and not any(tree.ties for tree in splits.train):
        raise ConfigError("reward.ties is true, but the data holds no ties (tie = true, or equal scores); remove it")
    # not whether it was set: a resolved recipe sets everything
    if not config.ties and config.tie_width != BradleyTerryConfig().tie_width:
        raise ConfigError("reward.tie_width is read only with reward.ties=true; set that or remove it")


def _stats(chosen_P: Tensor, rejected_P: Tensor, batch: Batch) -> dict[str, Tensor]:
    gap_P = chosen_P - rejected_P
    return {
        "pairs": torch.full_like(gap_P, 1.0).sum(),
        "correct": ((gap_P.sign() + 1) / 2).sum(),
        "gap": gap_P.sum(),
        "score_chosen": chosen_P.sum(),
        "score_rejected": rejected_P.sum(),
        "ties": torch.full_like(batch.weight_U, 1.0).sum(),
    }


def _loop(config: RewardTrainConfig, policy: Policy, splits: Splits, session: Session) -> None:
    loop, parameters = config.train, policy.trainable()
    optimizer = make_optimizer(config.optim, parameters)
    inputs = recipe_hash(config) | identity(policy, config.tokens) | {"data": splits.identity}
    state = TrainingState(inputs=inputs)
    machine = Machine(parameters, optimizer, config.optim.clip, policy.device, session.world)
    trees = where(splits.train, lambda tree: bool(tree.comparisons or (config.reward.ties and tree.ties)))
    if config.resume:
        state = resume(machine, state, session, len(trees))
    objective, total = make_objective(config.reward, policy), num_steps(loop, len(trees))
    order = Order(len(trees), loop.batch_prompts, config.seed, loop.shuffle)
    began = time.monotonic() - state.seconds
    with session.stop.looked_at(), Bar(session, "reward", total, state.step) as bar:
        for indices, place in order.batches(LoaderState(state.epoch, state.position)):
            if state.step >= total:
                break
            step_began = time.monotonic()
            rate = learning_rate(config.optim, state.step, total)
            set_learning_rate(optimizer, rate)
            cut = micro_batches([trees[i] for i in indices], policy, loop.max_tokens_per_pack, session.world)
            done = step(machine, cut, objective)
            now = time.monotonic()
            state = state.after_step(place, now - began)
            pairs, tokens = max(1.0, done.sums["pairs"]), sum(batch.num_tokens for batch in cut)
            record = {
                "loss": done.sums["loss"],
                "accuracy": done.sums["correct"] / pairs,
                **{name: done.sums[name] / pairs for name in STATS[2:5]},
                "grad_norm": done.grad_norm,
                "lr": rate,
                "unique_tokens": tokens,
                "seconds": state.seconds,
                "tokens_per_s": tokens / (now - step_began),
            }
            session.record({"kind": "step", "step": state.step, "epoch": state.epochs(order.num_trees), **record})
            bar.advance(1, f"loss {record['loss']:.4f}  acc {record['accuracy']:.2f}  gap {record['gap']:+.3f}")
            save_or_stop(loop, machine, state, total, session)
    finish(policy, state, session)
