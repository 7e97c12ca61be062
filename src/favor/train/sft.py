"""Supervised fine-tuning on the preferred (or only) responses: the start the DPO paper gives its policy.

In: SftConfig (a recipe); the data may be SFT rows or preferences. Out: a run folder with the tuned model.
Next: preference.py.
"""

import contextlib
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, model_validator
from torch import Tensor

from favor.config import STRICT, Resume, Run, Seed, dump
from favor.data.prepare import check_sources
from favor.data.read import DataConfig
from favor.data.settings import kwargs_are_read
from favor.data.splits import Splits, outlines
from favor.data.tokenize import TokensConfig
from favor.data.types import Batch, TokenTree
from favor.errors import DataError
from favor.model.batched import measured
from favor.model.layout import settle
from favor.model.load import Policy, TrainedModel, load_policy, precise
from favor.model.logprobs import response_logps
from favor.ranks import RanksConfig
from favor.train.loggers import LoggedConfig
from favor.train.loop import LoopConfig, SaveConfig, Training, can_be_split, make_training, turns
from favor.train.optim import AdamW, OptimConfig
from favor.train.packs import looked_at, settled
from favor.train.reference import identity
from favor.train.session import OpenSession, Session, TrainingState, load_splits, recipe_hash, resumes, running
from favor.train.step import Objective, step
from favor.train.watch import HeldOut


class SftConfig(BaseModel):
    """A recipe for `favor sft`."""

    model_config = STRICT
    _kwargs = model_validator(mode="after")(kwargs_are_read)
    _split = model_validator(mode="after")(can_be_split)
    run: Run
    seed: Seed = 0
    resume: Resume = False
    model: TrainedModel
    data: DataConfig
    tokens: TokensConfig = TokensConfig()
    optim: OptimConfig = AdamW(lr=2e-5)
    train: LoopConfig = LoopConfig()
    ranks: RanksConfig = RanksConfig()
    save: SaveConfig = SaveConfig()
    watch: LoggedConfig = LoggedConfig()


def sft(config: SftConfig, open_session: OpenSession) -> None:
    """Maximise the likelihood of preferred responses: loss = -(sum of token log-probs) / (number of tokens), nats a token."""
    check_sources(config.data)
    config = config.model_copy(update={"resume": resumes(config.run, config.resume)})
    logger, recipe = config.watch.logger, dump(config)
    with running(config.run, recipe, resume=config.resume, open_session=open_session, logger=logger) as session:
        _tune(config, session)


def _tune(config: SftConfig, session: Session) -> None:
    policy = load_policy(config.model, config.seed, config.ranks.shard)
    splits = load_splits(config.data, config.tokens, policy, session)
    used = [i for i, tree in enumerate(outlines(splits.train)) if preferred(tree)]
    if not used:
        raise DataError(
            f"{config.data.training}: no response to learn from, each is rejected by some row; give preferred ones"
        )
    first = [preferred_only(splits.train[i]) for i in used[:2]]
    every = (preferred_only(tree) for tree in (*(splits.train[i] for i in used), *_held_out(splits)))
    policy, why = settle(policy, config.model.layout, first, also=every, train=True)
    session.self_check(policy, why)
    few = [[preferred_only(splits.train[i]) for i in some] for some in looked_at(config.train, used)]
    packs = settled(config.train, config.model, policy, few, session, resume=config.resume)
    config = config.model_copy(update={"train": packs})
    inputs = recipe_hash(config) | identity(policy, config.tokens) | {"data": splits.identity}
    training = make_training(config, policy, used, session)
    objective = make_objective(policy)
    held_out = HeldOut(lambda: _evaluate(training, splits), session) if _held_out(splits) else None
    if held_out:
        held_out.first(resume=config.resume)
    with contextlib.closing(turns(training, "sft", TrainingState(inputs=inputs))) as steps:
        for turn in steps:
            cut = training.micro_batches([preferred_only(splits.train[i]) for i in turn.indices])
            done = step(training.learner, cut, objective)
            turn.done()
            record = turn.figures(done, cut)
            turn.record(record, f"loss {record['loss']:.4f}  tokens/s {record['tokens_per_s']:.0f}")
            if held_out:
                held_out.after(turn.state.step, training.num_steps)
            turn.save_or_stop()


def _held_out(splits: Splits) -> list[TokenTree]:
    """Held-out trees with a response to learn from."""
    return [tree for tree in splits.eval if preferred(tree)]


def _evaluate(training: Training, splits: Splits) -> dict[str, object]:
    """Held-out loss in nats a token, in float32."""
    policy, trees = precise(training.policy), [preferred_only(tree) for tree in _held_out(splits)]
    budget, world = training.recipe.train.budget, training.session.world
    logp_R = measured(policy, trees, lambda batch: response_logps(policy, batch), budget, world)
    tokens = sum(tree.num_scored for tree in trees)
    return {"loss": -float(logp_R.sum()) / tokens, "tokens": tokens}


def preferred(tree: TokenTree) -> Sequence[int]:
    """Responses that some comparison ranks first and none ranks lower; all of them where nothing is compared."""
    first = {comparison.order[0] for comparison in tree.comparisons}
    lower = {index for comparison in tree.comparisons for index in comparison.order[1:]}
    first |= {thumb.response for thumb in tree.thumbs if thumb.good}
    lower |= {thumb.response for thumb in tree.thumbs if not thumb.good}
    return sorted(first - lower) if tree.comparisons or tree.thumbs else range(len(tree.response_ids))


def preferred_only(tree: TokenTree) -> TokenTree:
    """The tree with its preferred responses alone."""
    best = preferred(tree)
    responses, complete = tuple(tree.response_ids[k] for k in best), tuple(tree.complete[k] for k in best)
    return TokenTree(tree.prompt_ids, responses, complete, (), tree.first_response, tree.row)


def make_objective(policy: Policy) -> Objective:
    """Negative log-likelihood, summed over response tokens; the items counted are tokens."""

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        nll = -response_logps(policy, batch).sum()
        return nll, {"tokens": batch.length_R.double().sum()}

    return Objective(loss, lambda batch: (float(batch.length_R.sum()),), ("tokens",))
