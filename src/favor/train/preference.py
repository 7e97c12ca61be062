"""The main loop of the DPO family: from preferences to a better model. Newcomers start here.

In: TrainConfig (a recipe). Out: a run folder with the trained model. The path of one preference from here:
data/read -> data/tokenize -> data/batches -> model/logprobs -> losses/pairwise -> train/step.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import BaseModel, model_validator
from torch import Tensor

from favor.config import STRICT, Seed, dump
from favor.data import batches
from favor.data.batches import LoaderState, Order
from favor.data.prepare import Splits, check_sources
from favor.data.read import DataConfig
from favor.data.tokenize import TokensConfig
from favor.data.types import Batch, TokenTree
from favor.errors import NumericsError
from favor.losses import table as losses
from favor.losses.table import LossConfig, make_loss, needs
from favor.losses.view import RATIOS, Scored
from favor.model.batched import measured
from favor.model.layout import sampled_tree, settle
from favor.model.load import ModelConfig, Policy, load_policy, precise, precision_of
from favor.model.logprobs import response_logps
from favor.ranks import World
from favor.rewards.source import RewardConfig, check_scorer, make_scorer
from favor.rewards.source import identity as reward_identity
from favor.run import same_inputs
from favor.train import reference, twopass
from favor.train.checkpoint import TrainingState
from favor.train.loop import LoopConfig, finish, micro_batches, num_steps, resume, save_or_stop
from favor.train.optim import OptimConfig, learning_rate, make_optimizer, set_learning_rate
from favor.train.reference import Reference, ReferenceConfig
from favor.train.scored import kto_zero, score, usable
from favor.train.session import Bar, Session, load_splits, recipe_hash, running
from favor.train.step import Machine, Objective, Stepped, step
from favor.train.twopass import gather
from favor.train.watch import (
    STATS,
    Beside,
    WatchConfig,
    batch_stats,
    evaluate,
    figures,
    means,
    probe,
    watch_displacement,
)


class TrainConfig(BaseModel):
    """A recipe for `favor train`. [reward], if there, scores the samples of the KL probe; it trains nothing."""

    model_config = STRICT
    run: str
    seed: Seed = 0
    resume: bool = False
    model: ModelConfig
    data: DataConfig
    tokens: TokensConfig = TokensConfig()
    loss: LossConfig = make_loss()
    optim: OptimConfig = OptimConfig()
    reference: ReferenceConfig = ReferenceConfig()
    train: LoopConfig = LoopConfig()
    watch: WatchConfig = WatchConfig()
    reward: RewardConfig | None = None

    @model_validator(mode="after")
    def _reward_is_read(self) -> "TrainConfig":
        if self.reward is not None and not self.watch.kl_every:
            raise ValueError("[reward] scores the samples of the KL probe; set watch.kl_every, or remove it")
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> "TrainConfig":
        needed = needs(self.loss)
        if not needed.reference and self.reference != ReferenceConfig():
            raise ValueError(f"loss '{losses.terms(self.loss)[0].kind}' reads no reference; remove section [reference]")
        if needed.tokens and self.reference.mode != "live":
            raise ValueError("loss.ld_alpha needs the reference's log-probs of every token; set reference.mode=live")
        if self.reference.sync_every is not None and self.model.lora is not None:
            raise ValueError(
                "reference.sync_every moves a copy of the weights, but a LoRA policy's reference is its own base; "
                "train all weights, or remove it"
            )
        return self


def train(config: TrainConfig, open_session: Callable[[Path], Session]) -> None:
    """Train a policy on preferences. Raises the errors of every part; nothing half-written is left behind."""
    check_sources(config.data)
    if config.reward is not None:
        check_scorer(config.reward)
    with running(config.run, dump(config), resume=config.resume, open_session=open_session) as session:
        _train(config, session)


def _train(config: TrainConfig, session: Session) -> None:
    policy = load_policy(config.model, config.seed)
    splits = load_splits(config.data, config.tokens, policy, session)
    used = usable(config.loss, splits.train, config.data.training)
    policy, why = settle(policy, config.model.layout, splits.train, also=_beyond(config, splits), train=True)
    session.event(0, "self_check", f"precision: {precision_of(policy.compute_dtype)}; layout: {why}")
    beside = _beside(config, policy, splits, session)
    _loop(config, policy, splits, used, beside, session)


def _beyond(config: TrainConfig, splits: Splits) -> Iterator[TokenTree]:
    """What is computed beside the training trees: held-out ones, samples of probes, KTO's mismatched pairs."""
    yield from splits.eval
    if config.watch.kl_every:
        trees = splits.eval or splits.train
        yield from (sampled_tree(tree.prompt_ids, config.watch.kl_tokens) for tree in trees[: config.watch.kl_prompts])
    if needs(config.loss).zero:
        prompt = max((tree.prompt_ids for tree in splits.train), key=len)
        yield sampled_tree(prompt, max(len(response) for tree in splits.train for response in tree.response_ids))


def make_objective(config: LossConfig, policy: Policy, reference: Reference, zero: float = 0.0) -> Objective:
    """The losses of a batch, each summed over its items, with the statistics of its pairs. zero: KTO's z0."""

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        scored = score(config, policy, reference, batch, zero)
        return losses.term_sums(config, scored, batch), batch_stats(config, scored, batch)

    return Objective(loss, lambda batch: losses.item_weight(config, batch), STATS, len(losses.terms(config)))


def _beside(config: TrainConfig, policy: Policy, splits: Splits, session: Session) -> Beside:
    """The reference of every split and, where the KL probe or KTO's z0 need it, a live one; a scorer of probes.

    What training compares with is computed as the policy is while it trains; what is measured, in float32.
    """
    needed, is_live = needs(config.loss), config.reference.mode == "live"
    parts = splits.by_name if config.watch.eval_every else {"train": splits.train}
    identity = reference.fingerprint(policy, config.tokens, parts)
    alive = measured = None
    if is_live or config.watch.kl_every or needed.zero:
        base = reference.base_of(policy)
        alive = reference.live(base, identity["weights"])
        measured = reference.live(precise(base), identity["weights"])
    if not needed.reference:
        references = dict.fromkeys(parts, reference.none())
    elif is_live:
        assert alive is not None
        assert measured is not None
        references = {name: measured if name == "eval" else alive for name in parts}
    else:
        references = _stored(config, policy, (splits, parts, identity), session)
    scorer = make_scorer(config.reward) if config.reward else None
    return Beside(references, alive and alive.logps, measured and measured.logps, scorer)


def _stored(
    config: TrainConfig,
    policy: Policy,
    asked: tuple[Splits, Mapping[str, Sequence[TokenTree]], Mapping[str, str]],
    session: Session,
) -> dict[str, Reference]:
    """The reference store, built or reused. asked: the data, the parts of it that are needed, the fingerprint."""
    splits, parts, identity = asked
    path = Path(config.reference.store) if config.reference.store else session.folder.reference
    began, found = time.monotonic(), path.exists()

    def build(trees: Sequence[TokenTree]) -> Tensor:
        computed = precise(policy) if trees is splits.eval else policy
        with Bar(session, "reference", len(trees)) as bar, reference.frozen(computed) as ref:
            budget = config.train.max_tokens_per_pack
            return measured(ref, trees, lambda batch: response_logps(ref, batch), budget, session.world, bar.advance)

    stored = reference.stored(policy, parts, identity, path, build, session.world)
    seconds = time.monotonic() - began
    message = f"reference: {'reused' if found else 'stored in'} {path} ({seconds:.1f} s)"
    session.event(0, "reference", message, seconds=seconds)
    return stored


def _loop(
    config: TrainConfig,
    policy: Policy,
    splits: Splits,
    used: Sequence[int],
    beside: Beside,
    session: Session,
) -> None:
    """Optimizer steps from the newest checkpoint to the end, then the final model. used: the trees the loss reads."""
    loop, watch, ref = config.train, config.watch, beside.references["train"]
    parameters = policy.trainable()
    optimizer = make_optimizer(config.optim, parameters)
    state = TrainingState(inputs=_inputs(config, policy, splits, ref))
    if session.world.is_main:
        # what is measured later must be against this reference
        same_inputs(session.folder, state.inputs)
    moving = ref.weights if config.reference.sync_every else {}
    machine = Machine(parameters, optimizer, config.optim.clip, policy.device, session.world, moving)
    if config.resume:
        state = resume(machine, state, session, len(used))
    total = num_steps(loop, len(used))
    order = Order(len(used), loop.batch_prompts, config.seed, loop.shuffle)
    below = deque(state.below, maxlen=max(1, 64 // loop.batch_prompts))
    kl = state.kl
    began = time.monotonic() - state.seconds

    with session.stop.looked_at(), Bar(session, "train", total, state.step) as bar:
        for indices, place in order.batches(LoaderState(state.epoch, state.position)):
            if state.step >= total:
                break
            trees = [splits.train[used[i]] for i in indices]
            step_began = time.monotonic()
            rate = learning_rate(config.optim, state.step, total)
            set_learning_rate(optimizer, rate)
            cut, objective = plan_step(config, policy, beside, trees, session.world)
            expected = at_reference(config.loss, trees) if state.step == 0 else None
            done = step(machine, cut, objective)
            if expected is not None:
                _check_first_loss(policy, expected, done)
            now = time.monotonic()
            state = state.after_step(place, now - began)
            if config.reference.sync_every and state.step % config.reference.sync_every == 0:
                reference.sync(ref, parameters, config.reference.sync_weight)
            if watch.kl_every and state.step % watch.kl_every == 0:
                kl = probe(watch, config.seed, policy, beside, splits, session.world)
            record = _step_record(done, state, order, cut, now - step_began)
            session.record(record | {"lr": rate} | kl)
            bar.advance(1, figures(record | kl))
            watch_displacement(session, below, done, state.step, watch.displacement_threshold)
            if watch.eval_every and state.step % watch.eval_every == 0 and splits.eval:
                settings = (loop.max_tokens_per_pack, session.world)
                found = evaluate(config.loss, policy, beside.references["eval"], splits.eval, settings)
                session.record({"kind": "eval", "step": state.step, **found})
                session.say(f"held-out at step {state.step}: " + figures(found))
            state = state.model_copy(update={"kl": kl, "below": tuple(below)})
            save_or_stop(loop, machine, state, total, session)
    finish(policy, state, session)


def _inputs(config: TrainConfig, policy: Policy, splits: Splits, ref: Reference) -> dict[str, str]:
    """Hashes of everything that enters, by name."""
    found = recipe_hash(config) | reference.identity(policy, config.tokens)
    found |= {"reference": ref.identity, "data": splits.identity}
    return found | ({"reward": reward_identity(config.reward)} if config.reward else {})


def plan_step(
    config: TrainConfig, policy: Policy, beside: Beside, trees: Sequence[TokenTree], world: World
) -> tuple[list[Batch], Objective]:
    """Micro-batches and objective of one optimizer batch, in one pass or in two."""
    budget, ref = config.train.max_tokens_per_pack, beside.references["train"]
    zero = kto_zero(config.loss, policy, beside.alive, trees, (budget, world))
    if not needs(config.loss).two_passes:
        return micro_batches(trees, policy, budget, world), make_objective(config.loss, policy, ref, zero)
    scored, whole = gather(config.loss, policy, ref, trees, (budget, world))
    scored = replace(scored, zero=zero)
    stats = batch_stats(config.loss, scored, whole)
    objective = twopass.surrogate(config.loss, policy, (scored, whole), stats, world)
    return micro_batches(twopass.branches(trees), policy, budget, world), objective


def at_reference(config: LossConfig, trees: Sequence[TokenTree]) -> float | None:
    """The loss of an optimizer batch whose policy is the reference; None where the loss reads more than their ratio."""
    if not all(
        term.loss.reads() & RATIOS and term.settings.get("wpo", "off") == "off" for term in losses.terms(config)
    ):
        return None
    whole = batches.build(trees, "tree")
    zeros_R = torch.zeros(whole.num_responses, dtype=torch.float64)
    zeros_M = torch.zeros(int(whole.length_R.sum()), dtype=torch.float64)
    sums = losses.term_sums(config, Scored(zeros_R, zeros_R, zeros_M, zeros_M), whole)
    counts = torch.tensor(losses.item_weight(config, whole), dtype=torch.float64)
    return float((sums / counts.clamp_min(1e-12)).sum())


def _check_first_loss(policy: Policy, expected: float, done: Stepped) -> None:
    """Before the first update policy and reference are equal, so the loss must be its value there (ln 2 for DPO)."""
    tolerance = (1e-5 if policy.compute_dtype == torch.float32 else 5e-2) * max(1.0, abs(expected))
    if abs(done.sums["loss"] - expected) > tolerance:
        raise NumericsError(
            f"step 0: the loss is {done.sums['loss']:.8f} but must be {expected:.8f} while policy and reference are equal; "
            "the reference is not this model: delete the reference store, or set reference.mode=live"
        )


def _step_record(
    done: Stepped, state: TrainingState, order: Order, cut: Sequence[Batch], seconds: float
) -> dict[str, object]:
    found = means(done.sums)
    tokens = sum(batch.num_tokens for batch in cut)
    return {
        "kind": "step",
        "step": state.step,
        "epoch": state.epochs(order.num_trees),
        "loss": done.sums["loss"],
        **found,
        "grad_norm": done.grad_norm,
        "unique_tokens": tokens,
        "naive_tokens": sum(batch.num_naive_tokens for batch in cut),
        "seconds": state.seconds,
        **({"pairs_per_s": found["pairs"] / seconds} if found["pairs"] else {}),
        "tokens_per_s": tokens / seconds,
    }
