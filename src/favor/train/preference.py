"""The main loop of the DPO family: from preferences to a better model. Newcomers start here.

In: TrainConfig (a recipe). Out: a run folder with the trained model. At first read `train`, `_train`, `_loop`, `make_objective`
alone: the rest serves options. docs/path.md lists the ten files from a preference to its gradient. Next: ../data/types.py.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, model_validator
from torch import Tensor

from favor.config import STRICT, Resume, Run, Seed, dump
from favor.data.batches import build
from favor.data.prepare import check_sources
from favor.data.read import DataConfig
from favor.data.settings import kwargs_are_read
from favor.data.splits import Splits, extremes, outlines
from favor.data.tokenize import TokensConfig
from favor.data.types import Batch, TokenTree, sampled_tree, unseen
from favor.errors import ConfigError, NumericsError
from favor.losses import table as losses
from favor.losses.table import LossConfig, make_loss, needs
from favor.losses.view import RATIOS, Scored
from favor.model.batched import measured
from favor.model.layout import settle
from favor.model.load import Policy, TrainedModel, load_policy, precise
from favor.model.logprobs import mean_overlap, response_logps, scored_logps, sum_tokens
from favor.ranks import RanksConfig, World
from favor.rewards.source import RewardConfig, check_scorer, make_scorer
from favor.rewards.source import identity as reward_identity
from favor.run import same_inputs
from favor.train import coupled, reference
from favor.train.guards import Guard, make_guard, result
from favor.train.health import HealthConfig, refusal, with_likelihood
from favor.train.loop import (
    LoopConfig,
    SaveConfig,
    Training,
    Turn,
    can_be_split,
    make_training,
    micro_batches,
    turns,
)
from favor.train.optim import AdamW, OptimConfig
from favor.train.packs import looked_at, settled
from favor.train.reference import Reference, ReferenceConfig
from favor.train.session import Bar, OpenSession, Session, TrainingState, load_splits, recipe_hash, resumes, running
from favor.train.stats import STATS, batch_sums, displacement, means, shown, usable
from favor.train.step import Objective, Stepped, step
from favor.train.watch import HeldOut, References, WatchConfig, evaluate, measurable, probe

# Prompts over which the displacement of the chosen is watched.
_WATCHED = 64


class TrainConfig(BaseModel):
    """A recipe for `favor train`. [reward], if there, scores the samples of the KL probe; it trains nothing."""

    model_config = STRICT
    _kwargs = model_validator(mode="after")(kwargs_are_read)
    _split = model_validator(mode="after")(can_be_split)
    run: Run
    seed: Seed = 0
    resume: Resume = False
    model: TrainedModel
    data: DataConfig
    tokens: TokensConfig = TokensConfig()
    loss: LossConfig = make_loss()
    optim: OptimConfig = AdamW()
    reference: ReferenceConfig = ReferenceConfig()
    train: LoopConfig = LoopConfig()
    ranks: RanksConfig = RanksConfig()
    save: SaveConfig = SaveConfig()
    watch: WatchConfig = WatchConfig()
    health: HealthConfig | None = None
    reward: RewardConfig | None = None

    @model_validator(mode="after")
    def _watched_is_there(self) -> "TrainConfig":
        if self.reward is not None and self.watch.kl is None:
            raise ValueError("[reward] scores the samples of the KL probe; set watch.kl.every, or remove it")
        if self.watch.eval is not None and self.data.eval is None and self.data.hold_out is None:
            raise ValueError("[watch.eval] measures held-out data; name data.eval or data.hold_out.share, or remove it")
        return self

    @model_validator(mode="after")
    def _health_can_be_seen(self) -> "TrainConfig":
        held_out, moves = self.data.eval is not None or self.data.hold_out is not None, self.reference.sync is not None
        if self.health and (said := refusal(self.health, self.loss, held_out=held_out, moves=moves)):
            raise ValueError(said)
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> "TrainConfig":
        needed = needs(self.loss)
        if not needed.reference and self.reference != ReferenceConfig():
            raise ValueError(f"loss '{losses.terms(self.loss)[0].kind}' reads no reference; remove section [reference]")
        if needed.tokens and self.reference.mode != "live":
            raise ValueError("loss.ld_alpha needs the reference's log-probs of every token; set reference.mode=live")
        if self.reference.sync is not None and self.model.lora is not None:
            raise ValueError(
                "[reference.sync] moves a copy of the weights, but a LoRA policy's reference is its own base; "
                "train all weights, or remove it"
            )
        return self


def train(config: TrainConfig, open_session: OpenSession) -> None:
    """Train a policy on preferences. Raises the errors of every part; nothing half-written is left behind."""
    check_sources(config.data)
    if config.reward is not None:
        check_scorer(config.reward)
    config = config.model_copy(update={"resume": resumes(config.run, config.resume)})
    logger, recipe = config.watch.logger, dump(config)
    with running(config.run, recipe, resume=config.resume, open_session=open_session, logger=logger) as session:
        _train(config, session)


class Begun(NamedTuple):
    """What training begins with. config: with the number of tokens of a pack; used: indices of the trees it trains on."""

    config: TrainConfig
    policy: Policy
    splits: Splits
    used: Sequence[int]


def _train(config: TrainConfig, session: Session) -> None:
    config, policy, splits, used = begin(config, session)
    # hashing the weights takes its time: once, for the store and for what entered
    identity = reference.identity(policy, config.tokens)
    references = make_references(config, policy, splits, identity, session)
    ref = references.of["train"]
    inputs = recipe_hash(config) | identity | {"reference": ref.identity, "data": splits.identity}
    inputs |= {"reward": reward_identity(config.reward)} if config.reward else {}
    if session.world.is_main:
        # what is measured later must be against this reference
        same_inputs(session.folder, inputs)
    # TR-DPO's reference moves with the policy, so checkpoints keep it
    moving = ref.weights if config.reference.sync else {}
    training = make_training(config, policy, used, session, moving=moving)
    _loop(config, training, splits, references, TrainingState(inputs=inputs))


def begin(config: TrainConfig, session: Session) -> Begun:
    """Load the policy, read the data, and settle how they are computed."""
    policy = load_policy(config.model, config.seed, config.ranks.shard, sees=True)
    if policy.sight is not None and (config.watch.kl or config.health):
        raise ConfigError("[watch.kl] and [health] take samples, which favor does not with pictures; remove them")
    splits = load_splits(config.data, config.tokens, policy, session)
    # trees without an item of the loss (a prompt whose answers only tie) are read and not trained on
    used = usable(config.loss, outlines(splits.train), config.data.training)
    if config.health and "likelihood" in config.health.done:
        # what may be added must have something to learn from, too
        usable(with_likelihood(config.loss, 1.0), outlines(splits.train), config.data.training)
    # trees where they are exact for this model and these lengths, else one row per response
    policy, why = settle(policy, config.model.layout, splits.train[:2], also=_computed(config, splits), train=True)
    session.self_check(policy, why)
    few = [[splits.train[i] for i in some] for some in looked_at(config.train, used)]
    packs = settled(config.train, config.model, policy, few, session, resume=config.resume)
    return Begun(config.model_copy(update={"train": packs}), policy, splits, used)


def _computed(config: TrainConfig, splits: Splits) -> Iterator[TokenTree]:
    """The longest of what is computed: trees of both splits, samples of probes, KTO's mismatched pairs."""
    yield from extremes(splits.train)
    yield from extremes(splits.eval)
    for asked in (config.watch.kl, config.health):
        trees = splits.eval or splits.train
        if asked is not None:
            yield from (sampled_tree(tree.prompt_ids, asked.tokens) for tree in trees[: asked.prompts])
    if needs(config.loss).zero:
        # a length alone: no pictures belong to what is made up here
        few = [unseen(tree) for tree in extremes(splits.train)]
        prompt = max((tree.prompt_ids for tree in few), key=len)
        yield sampled_tree(prompt, max(len(response) for tree in few for response in tree.response_ids))


def compares_live(config: TrainConfig) -> bool:
    """Whether something reads a reference that computes beside the policy: a live one, the KL probe, looks, KTO's z0."""
    return config.reference.mode == "live" or bool(config.watch.kl or config.health) or needs(config.loss).zero


def make_references(
    config: TrainConfig, policy: Policy, splits: Splits, identity: Mapping[str, str], session: Session
) -> References:
    """The reference of every split and, where the KL probe or KTO's z0 need it, a live one; a scorer of probes.

    What training compares with is computed as the policy is while it trains; what is measured, in float32.
    """
    needed, is_live = needs(config.loss), config.reference.mode == "live"
    parts = splits.by_name
    # LoRA: the policy with its adapters off; all weights: a frozen copy, made only where something reads it
    live = exact = None
    if compares_live(config):
        base = reference.base_of(policy, moves=config.reference.sync is not None)
        live, exact = (reference.live(each, identity["weights"]) for each in (base, precise(base)))
    if not needed.reference:
        of = dict.fromkeys(parts, reference.none())
    elif is_live:
        assert live is not None
        assert exact is not None
        of = {name: exact if name == "eval" else live for name in parts}
    else:
        of = _stored(config, policy, parts, identity, session)
    scorer = make_scorer(config.reward) if config.reward else None
    return References(of, live and live.logps, exact and exact.logps, scorer)


def _stored(
    config: TrainConfig,
    policy: Policy,
    parts: Mapping[str, Sequence[TokenTree]],
    identity: Mapping[str, str],
    session: Session,
) -> dict[str, Reference]:
    """The reference store, built or reused."""
    path = Path(config.reference.store) if config.reference.store else session.folder.reference
    began, reused = time.monotonic(), path.exists()

    def build(trees: Sequence[TokenTree]) -> Tensor:
        computed, budget = precise(policy) if trees is parts.get("eval") else policy, config.train.budget
        with Bar(session, "reference", len(trees)) as bar, reference.frozen(computed) as ref:
            return measured(ref, trees, lambda batch: response_logps(ref, batch), budget, session.world, bar.advance)

    stored = reference.stored(policy, parts, identity, path, build, session.world)
    seconds = time.monotonic() - began
    message = f"reference: {'reused' if reused else 'stored in'} {path} ({seconds:.1f} s)"
    session.event(0, "reference", message, seconds=seconds)
    return stored


def _loop(
    config: TrainConfig, training: Training, splits: Splits, references: References, state: TrainingState
) -> None:
    """Optimizer steps from the newest checkpoint to the end, then the final model."""
    policy, session = training.policy, training.session
    watch, sync = config.watch, config.reference.sync
    if held_out := _held_out(config, policy, references, splits, session):
        held_out.first(resume=config.resume)
    guard, kept = _guard(config, training, references, splits, held_out)
    with contextlib.closing(turns(training, "train", state, kept)) as steps:
        for turn in steps:
            config = _looked_at_first(guard, config, turn)
            # the same on every rank; each computes its own share of the micro-batches
            trees = [splits.train[i] for i in turn.indices]
            cut, objective = plan_step(config, policy, references, trees, session.world)
            done = step(training.learner, cut, objective)
            # before the first update policy and reference were one model, so the loss is known: ln 2 for DPO
            if turn.state.step == 0 and (expected := at_reference(config.loss, trees)) is not None:
                _check_first_loss(policy, expected, done)
            turn.done()
            now = turn.state.step
            if sync and now % sync.every == 0:
                reference.sync(references.of["train"], training.learner.parameters, sync.weight)
            if watch.kl and now % watch.kl.every == 0:
                turn.keep(kl=probe(watch.kl, config.seed, policy, references, splits, session.world))
            record = _step_record(turn, done, cut) | turn.state.kl
            turn.record(record, shown(record))
            _watch_displacement(config, turn, done)
            if held_out:
                held_out.after(now, training.num_steps)
            if guard:
                guard.after(turn)
            turn.save_or_stop()


def _held_out(
    config: TrainConfig, policy: Policy, references: References, splits: Splits, session: Session
) -> HeldOut | None:
    """What measures the held-out part; None where nothing, or nothing that the loss can be taken of, is held out."""
    loss, asked, trees = config.loss, config.watch.eval, splits.eval
    if not trees or not measurable(loss, trees, session, asked=bool(asked or config.health)):
        return None
    ref, budget = references.of["eval"], config.train.budget
    return HeldOut(
        lambda: evaluate(loss, policy, ref, trees, budget, session.world), session, asked.every if asked else None
    )


def _guard(
    config: TrainConfig, training: Training, references: References, splits: Splits, held_out: HeldOut | None
) -> tuple[Guard | None, Callable[[TrainingState], TrainingState]]:
    """What looks at the model as it trains, where [health] asks for it, and what gives the state that is kept at the end."""
    if config.health is None:
        return None, lambda state: state
    guard = make_guard(config.health, config.loss, training, references, splits.eval)
    return guard, partial(result, guard, held_out)


def _looked_at_first(guard: Guard | None, config: TrainConfig, turn: Turn) -> TrainConfig:
    """The recipe as this step trains it; before the first step a look is taken."""
    if guard is None:
        return config
    guard.first(turn)
    return config.model_copy(update={"loss": guard.loss(turn.state)})


def make_objective(config: LossConfig, policy: Policy, reference: Reference, zero: float = 0.0) -> Objective:
    """The losses of a batch, each summed over its items, with the statistics of its pairs. zero: KTO's z0."""

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        # logp_R of both models; the loss sees pairs of them, the statistics too
        scored = score(config, policy, reference, batch, zero)
        return losses.term_sums(config, scored, batch), batch_sums(config, scored, batch)

    return Objective(loss, lambda batch: losses.item_weight(config, batch), STATS, len(losses.terms(config)))


def score(config: LossConfig, policy: Policy, reference: Reference, batch: Batch, zero: float = 0.0) -> Scored:
    """Log-probs of policy (with a graph) and reference, with what the loss needs beside."""
    # most losses read one sum per response; only LD-DPO reads single tokens, and WPO the overlap
    needed = needs(config)
    overlap_R = mean_overlap(policy, batch) if needed.overlap else None
    if not needed.tokens:
        return Scored(response_logps(policy, batch), reference.logps(batch), overlap_R=overlap_R, zero=zero)
    assert reference.tokens is not None
    pi_E, ref_E = scored_logps(policy, batch), reference.tokens(batch)
    pi_M, ref_M = (value_E.double()[batch.member_edge_M] for value_E in (pi_E, ref_E))
    return Scored(sum_tokens(batch, pi_E), sum_tokens(batch, ref_E), pi_M, ref_M, overlap_R, zero)


def plan_step(
    config: TrainConfig, policy: Policy, references: References, trees: Sequence[TokenTree], world: World
) -> tuple[list[Batch], Objective]:
    """Micro-batches and objective of one optimizer batch, in one pass or in two."""
    budget, ref, needed, zero = config.train.budget, references.of["train"], needs(config.loss), 0.0
    if needed.zero:
        assert references.live is not None
        zero = coupled.kto_zero(policy, references.live, trees, budget, world)
    # one pass: a pair's loss needs that pair alone. Two: AOT sorts, BCO centres, over the whole optimizer batch
    if not needed.two_passes:
        return micro_batches(trees, policy, budget, world), make_objective(config.loss, policy, ref, zero)
    whole = coupled.gather(config.loss, policy, ref, trees, budget, world)
    whole = whole._replace(scored=replace(whole.scored, zero=zero))
    stats = batch_sums(config.loss, *whole)
    objective = coupled.surrogate(config.loss, policy, whole, stats, world)
    return micro_batches(coupled.branches(trees), policy, budget, world), objective


def at_reference(config: LossConfig, trees: Sequence[TokenTree]) -> float | None:
    """The loss of an optimizer batch whose policy is the reference; None where the loss reads more than their ratio."""
    if not all(
        term.loss.reads() & RATIOS and term.settings.get("wpo", "off") == "off" for term in losses.terms(config)
    ):
        return None
    whole = build(trees, "tree")
    # policy = reference: every log-ratio is 0, and so are the log-probs as far as the loss can see
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


def _step_record(turn: Turn, done: Stepped, cut: Sequence[Batch]) -> dict[str, float]:
    found = means(done.sums)
    naive = sum(batch.num_naive_tokens for batch in cut)
    speed = {"pairs_per_s": found["pairs"] / turn.seconds} if found["pairs"] else {}
    return turn.figures(done, cut) | found | {"naive_tokens": naive} | speed


def _watch_displacement(config: TrainConfig, turn: Turn, done: Stepped) -> None:
    window = max(1, _WATCHED // config.train.batch_prompts)
    below, warning = displacement(turn.state.below, done.sums, window, config.reference.displacement_threshold)
    turn.keep(below=below)
    if warning is not None:
        turn.training.session.event(turn.state.step, "displacement", warning)
