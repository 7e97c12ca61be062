"""Supervised fine-tuning on the preferred (or only) responses: the start the DPO paper gives its policy.

In: SftConfig (a recipe); the data may be SFT rows or preferences. Out: a run folder with the tuned model.
Next: preference.py.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from favor.config import STRICT, Seed, dump
from favor.data.batches import LoaderState, Order
from favor.data.prepare import check_sources
from favor.data.read import DataConfig
from favor.data.tokenize import TokensConfig
from favor.data.types import Batch, TokenTree
from favor.errors import DataError
from favor.model.layout import settle
from favor.model.load import ModelConfig, Policy, load_policy, precision_of
from favor.model.logprobs import response_logps
from favor.train.checkpoint import TrainingState
from favor.train.loop import LoopConfig, finish, micro_batches, num_steps, resume, save_or_stop
from favor.train.optim import OptimConfig, learning_rate, make_optimizer, set_learning_rate
from favor.train.reference import identity
from favor.train.session import Bar, Session, load_splits, recipe_hash, running
from favor.train.step import Machine, Objective, step
from favor.train.view import View


class SftConfig(BaseModel):
    """A recipe for `favor sft`."""

    model_config = STRICT
    run: str
    seed: Seed = 0
    resume: bool = False
    model: ModelConfig
    data: DataConfig
    tokens: TokensConfig = TokensConfig()
    optim: OptimConfig = OptimConfig(lr=2e-5)
    train: LoopConfig = LoopConfig()


def sft(config: SftConfig, open_session: Callable[[Path], Session]) -> None:
    """Maximise the likelihood of preferred responses: loss = -(sum of token log-probs) / (number of tokens), nats a token."""
    check_sources(config.data)
    with running(config.run, dump(config), resume=config.resume, open_session=open_session) as session:
        _tune(config, session)


def _tune(config: SftConfig, session: Session) -> None:
    policy = load_policy(config.model, config.seed)
    splits = load_splits(config.data, config.tokens, policy, session)
    trees = preferred_only(splits.train)
    if not trees:
        raise DataError(
            f"{config.data.training}: no response to learn from, each is rejected by some row; give preferred ones"
        )
    policy, why = settle(policy, config.model.layout, trees, train=True)
    session.event(0, "self_check", f"precision: {precision_of(policy.compute_dtype)}; layout: {why}")
    inputs = recipe_hash(config) | identity(policy, config.tokens) | {"data": splits.identity}
    _loop(config, policy, trees, inputs, session)


def preferred_only(trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
    """Keep the responses that some comparison ranks first and none ranks lower; all of them where nothing is compared."""
    counts = np.fromiter((len(_best(tree)) for tree in trees), np.int64, len(trees))
    places = np.flatnonzero(counts)
    first = np.cumsum(counts) - counts

    def change(tree: TokenTree, i: int) -> TokenTree:
        best = _best(tree)
        responses = tuple(tree.response_ids[k] for k in best)
        complete = tuple(tree.complete[k] for k in best)
        return TokenTree(tree.prompt_ids, responses, complete, (), int(first[places[i]]), tree.row)

    return View(trees, places, change)


def _best(tree: TokenTree) -> Sequence[int]:
    first = {comparison.order[0] for comparison in tree.comparisons}
    lower = {index for comparison in tree.comparisons for index in comparison.order[1:]}
    first |= {thumb.response for thumb in tree.thumbs if thumb.good}
    lower |= {thumb.response for thumb in tree.thumbs if not thumb.good}
    return sorted(first - lower) if tree.comparisons or tree.thumbs else range(len(tree.response_ids))


def make_objective(policy: Policy) -> Objective:
    """Negative log-likelihood, summed over response tokens; the items counted are tokens."""

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        nll = -response_logps(policy, batch).sum()
        return nll, {"tokens": batch.length_R.double().sum()}

    return Objective(loss, lambda batch: (float(batch.length_R.sum()),), ("tokens",))


def _loop(
    config: SftConfig, policy: Policy, trees: Sequence[TokenTree], inputs: dict[str, str], session: Session
) -> None:
    loop, parameters = config.train, policy.trainable()
    optimizer = make_optimizer(config.optim, parameters)
    state = TrainingState(inputs=inputs)
    machine = Machine(parameters, optimizer, config.optim.clip, policy.device, session.world)
    if config.resume:
        state = resume(machine, state, session, len(trees))
    objective, total = make_objective(policy), num_steps(loop, len(trees))
    order = Order(len(trees), loop.batch_prompts, config.seed, loop.shuffle)
    began = time.monotonic() - state.seconds
    with session.stop.looked_at(), Bar(session, "sft", total, state.step) as bar:
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
            tokens = sum(batch.num_tokens for batch in cut)
            record = {
                "loss": done.sums["loss"],
                "grad_norm": done.grad_norm,
                "lr": rate,
                "unique_tokens": tokens,
                "seconds": state.seconds,
                "tokens_per_s": tokens / (now - step_began),
            }
            session.record({"kind": "step", "step": state.step, "epoch": state.epochs(order.num_trees), **record})
            bar.advance(1, f"loss {record['loss']:.4f}  unique tok/s {record['tokens_per_s']:.0f}")
            save_or_stop(loop, machine, state, total, session)
    finish(policy, state, session)
