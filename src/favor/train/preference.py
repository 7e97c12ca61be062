"""The main loop of the DPO family: from preferences to a better model. Newcomers start here.

In: TrainConfig (a recipe). Out: a run folder with the trained model. The path of one preference from here:
data/read -> data/tokenize -> data/pack -> data/loader -> model/logprobs -> losses/pairwise -> train/step.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from favor import losses
from favor.config import STRICT, dump
from favor.data import pack
from favor.data.loader import LoaderState, Order, batches
from favor.data.read import DataConfig
from favor.data.tokenize import TokensConfig
from favor.data.types import Batch, TokenTree
from favor.dist.reduce import sum_
from favor.dist.world import World
from favor.errors import ConfigError, NumericsError
from favor.eval.divergence import kl_of_samples
from favor.losses import LossConfig
from favor.model.layout import settle
from favor.model.load import ModelConfig, Policy, load_policy
from favor.model.logprobs import response_logps
from favor.model.sample import SampleConfig, decode, sample
from favor.run import start
from favor.scoring.source import RewardConfig, Scorer, make_scorer
from favor.train import reference
from favor.train.checkpoint import TrainingState
from favor.train.data import Splits, load_splits
from favor.train.loop import LoopConfig, finish, micro_batches, num_steps, resume, save_or_stop
from favor.train.optim import OptimConfig, learning_rate, make_optimizer, set_learning_rate
from favor.train.reference import Reference, ReferenceConfig
from favor.train.session import Bar, Session
from favor.train.step import Machine, Objective, Stepped, step

STATS = (
    "pairs",
    "correct",
    "margin",
    "reward_chosen",
    "reward_rejected",
    "logp_chosen_per_token",
    "logp_rejected_per_token",
    "chosen_below_reference",
)


class WatchConfig(BaseModel):
    """Section [watch]: what is measured while training. 0 switches a cadence off."""

    model_config = STRICT
    eval_every: int = Field(default=0, ge=0)
    kl_every: int = Field(default=0, ge=0)
    kl_prompts: int = Field(default=16, ge=2)
    kl_tokens: int = Field(default=48, ge=1)
    displacement_threshold: float = Field(default=0.75, gt=0, le=1)


class TrainConfig(BaseModel):
    """A recipe for `favor train`. [reward], if there, scores the samples of the KL probe; it trains nothing."""

    model_config = STRICT
    run: str
    seed: int = Field(default=0, ge=0)
    resume: bool = False
    model: ModelConfig
    data: DataConfig
    tokens: TokensConfig = TokensConfig()
    loss: LossConfig = LossConfig()
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


def train(config: TrainConfig, open_session: Callable[[Path], Session]) -> None:
    """Train a policy on preferences. Raises the errors of every part; nothing half-written is left behind."""
    folder = start(Path(config.run), dump(config), resume=config.resume)
    session = open_session(folder.root)
    policy = load_policy(config.model, config.seed)
    splits = load_splits(config.data, config.tokens, policy, session, need_comparisons=True)
    policy, why = settle(policy, config.model.layout, splits.train)
    session.event(0, "self_check", f"layout: {why}")
    references, alive = _references(config, policy, splits, session)
    scorer = make_scorer(config.reward) if config.reward else None
    _loop(config, policy, splits, Beside(references, alive, scorer), session)


@dataclass(frozen=True)
class Beside:
    """What stands beside the policy: the reference of every split, a live one where it is needed, a scorer of probes."""

    references: Mapping[str, Reference]
    alive: Callable[[Batch], Tensor] | None
    scorer: Scorer | None


def make_objective(
    config: LossConfig, policy: Policy, ref_logps: Callable[[Batch], Tensor], zero: float = 0.0
) -> Objective:
    """The loss of a batch, summed over its comparisons, with the statistics of its pairs. zero: KTO's z0."""

    def loss(batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        pi_R, ref_R = response_logps(policy, batch), ref_logps(batch)
        item, weight = losses.per_comparison(config, pi_R - ref_R, batch, zero)
        return (item * weight).sum(), pair_stats(pi_R.detach(), ref_R, batch, config.beta)

    return Objective(loss, lambda batch: losses.total_weight(config, batch), STATS)


def pair_stats(pi_R: Tensor, ref_R: Tensor, batch: Batch, beta: float) -> dict[str, Tensor]:
    """Sums over the pairs of a batch (docs/metrics.md defines each name). A margin of exactly 0 counts as half right."""
    reward_R, per_token_R = beta * (pi_R - ref_R), pi_R / batch.length_R
    chosen_P, rejected_P = reward_R[batch.chosen_P], reward_R[batch.rejected_P]
    margin_P = chosen_P - rejected_P
    return {
        "pairs": torch.full_like(margin_P, 1.0).sum(),
        "correct": ((margin_P.sign() + 1) / 2).sum(),
        "margin": margin_P.sum(),
        "reward_chosen": chosen_P.sum(),
        "reward_rejected": rejected_P.sum(),
        "logp_chosen_per_token": per_token_R[batch.chosen_P].sum(),
        "logp_rejected_per_token": per_token_R[batch.rejected_P].sum(),
        "chosen_below_reference": (chosen_P < 0).double().sum(),
    }


def _references(
    config: TrainConfig, policy: Policy, splits: Splits, session: Session
) -> tuple[dict[str, Reference], Callable[[Batch], Tensor] | None]:
    """The reference of every split, and the live one that the KL probe and KTO's z0 need (else None)."""
    parts = splits.by_name if config.watch.eval_every else {"train": splits.train}
    identity = reference.fingerprint(policy, config.tokens, parts)
    asked = config.watch.kl_every > 0 or losses.LOSSES[config.loss.name].needs_zero
    alive = reference.live(policy, identity["weights"]) if config.reference.mode == "live" or asked else None
    needed = alive.logps if alive is not None and asked else None
    if config.reference.mode == "live":
        if config.reference.store is not None:
            raise ConfigError("reference.store is set but reference.mode is 'live', which stores nothing; remove one")
        assert alive is not None
        return dict.fromkeys(parts, alive), needed
    path = Path(config.reference.store) if config.reference.store else session.folder.reference
    began, found = time.monotonic(), path.exists()

    def build(trees: Sequence[TokenTree]) -> Tensor:
        with Bar(session, "reference", len(trees)) as bar, reference.frozen(policy) as ref:
            budget = config.train.max_tokens_per_pack
            return reference.all_logps(ref, trees, budget, session.world, bar.advance)

    stored = reference.stored(policy, parts, identity, path, build, session.world)
    seconds = time.monotonic() - began
    message = f"reference: {'reused' if found else 'stored in'} {path} ({seconds:.1f} s)"
    session.event(0, "reference", message, seconds=seconds)
    return stored, needed


def _loop(
    config: TrainConfig,
    policy: Policy,
    splits: Splits,
    beside: Beside,
    session: Session,
) -> None:
    """Optimizer steps from the newest checkpoint to the end, then the final model."""
    loop, watch, references = config.train, config.watch, beside.references
    parameters = policy.trainable()
    optimizer = make_optimizer(config.optim, parameters)
    state = TrainingState(reference=references["train"].identity, data=splits.identity)
    machine = Machine(parameters, optimizer, config.optim.clip, policy.device, session.world)
    if config.resume:
        state = resume(machine, state, session)
    total = num_steps(loop, len(splits.train))
    order = Order(len(splits.train), loop.batch_prompts, config.seed, loop.shuffle)
    below: deque[tuple[float, float]] = deque(maxlen=max(1, 64 // loop.batch_prompts))
    kl: dict[str, float] = {}
    began = time.monotonic() - state.seconds

    with Bar(session, "train", total, state.step) as bar:
        for indices, place in batches(order, LoaderState(state.epoch, state.position)):
            if state.step >= total:
                break
            trees = [splits.train[i] for i in indices]
            step_began = time.monotonic()
            rate = learning_rate(config.optim, state.step, total)
            set_learning_rate(optimizer, rate)
            cut = micro_batches(trees, policy, loop.max_tokens_per_pack, session.world)
            zero = _zero(config, policy, beside.alive, trees, session.world)
            done = step(machine, cut, make_objective(config.loss, policy, references["train"].logps, zero))
            if state.step == 0:
                _check_first_loss(config, policy, trees, done)
            now = time.monotonic()
            state = state.after_step(place, now - began)
            if watch.kl_every and state.step % watch.kl_every == 0:
                kl = _probe(config, policy, beside, splits)
            record = _step_record(done, state, order, cut, now - step_began)
            session.record(record | {"lr": rate} | kl)
            bar.advance(1, figures(record | kl))
            _watch_displacement(session, below, done, state.step, watch.displacement_threshold)
            if watch.eval_every and state.step % watch.eval_every == 0:
                _evaluate(config, policy, splits, references, state.step, session)
            save_or_stop(loop, machine, state, total, session)
    finish(policy, state, session)


def _check_first_loss(config: TrainConfig, policy: Policy, trees: Sequence[TokenTree], done: Stepped) -> None:
    """Before the first update policy and reference are equal, so the loss must be its closed form."""
    batch = pack.build(trees, policy.layout)
    closed_C = losses.at_reference(config.loss, batch)
    weight_C = batch.weight_Q if losses.LOSSES[config.loss.name].kind == "rankings" else batch.weight_P
    expected = float((closed_C * weight_C).sum() / weight_C.double().sum())
    tolerance = (1e-5 if policy.compute_dtype == torch.float32 else 5e-2) * max(1.0, expected)
    if abs(done.sums["loss"] - expected) > tolerance:
        raise NumericsError(
            f"step 0: the loss is {done.sums['loss']:.8f} but must be {expected:.8f} while policy and reference are equal; "
            "the reference is not this model: delete the reference store, or set reference.mode=live"
        )


def _step_record(
    done: Stepped, state: TrainingState, order: Order, cut: Sequence[Batch], seconds: float
) -> dict[str, object]:
    sums, pairs = done.sums, done.sums["pairs"]
    tokens = sum(batch.num_tokens for batch in cut)
    means = {name: sums[name] / pairs for name in STATS[2:]}
    return {
        "kind": "step",
        "step": state.step,
        "epoch": state.epochs(order.num_trees),
        "loss": sums["loss"],
        "accuracy": sums["correct"] / pairs,
        **means,
        "grad_norm": done.grad_norm,
        "pairs": int(pairs),
        "unique_tokens": tokens,
        "naive_tokens": sum(batch.num_naive_tokens for batch in cut),
        "seconds": state.seconds,
        "pairs_per_s": pairs / seconds,
        "tokens_per_s": tokens / seconds,
    }


def figures(record: Mapping[str, object]) -> str:
    """The progress line's figures, from a step record."""
    shown = {
        "loss": ("loss", ".4f"),
        "accuracy": ("acc", ".2f"),
        "margin": ("margin", "+.3f"),
        "kl": ("KL", ".2f"),
        "reward": ("reward", ".3f"),
        "pairs_per_s": ("pairs/s", ".2f"),
        "tokens_per_s": ("unique tok/s", ".0f"),
    }
    return "  ".join(f"{label} {record[key]:{spec}}" for key, (label, spec) in shown.items() if key in record)


def _zero(
    config: TrainConfig,
    policy: Policy,
    alive: Callable[[Batch], Tensor] | None,
    trees: Sequence[TokenTree],
    world: World,
) -> float:
    """KTO's z0 = max(0, mean of log pi(y'|x) - log ref(y'|x)), y' a response to the next prompt of the optimizer batch.

    0 for other losses, and for a batch of one prompt, which has no mismatched response.
    """
    if not losses.LOSSES[config.loss.name].needs_zero or len(trees) < 2:
        return 0.0
    assert alive is not None
    strangers = [
        replace(tree, response_ids=trees[i - 1].response_ids[:1], complete=(True,), comparisons=(), ties=())
        for i, tree in enumerate(trees)
    ]
    ratio = torch.zeros(1, dtype=torch.float64, device=policy.device)
    with torch.no_grad():
        for cut in micro_batches(strangers, policy, config.train.max_tokens_per_pack, world):
            batch = cut.to(policy.device)
            ratio += (response_logps(policy, batch) - alive(batch)).sum()
    return max(0.0, float(sum_(ratio, world)) / len(trees))


def _probe(config: TrainConfig, policy: Policy, beside: Beside, splits: Splits) -> dict[str, float]:
    """Sampled KL, and the samples' score, on the first prompts of the held-out part (of the training part without one)."""
    assert beside.alive is not None
    name = "eval" if splits.eval else "train"
    trees = splits.by_name[name][: config.watch.kl_prompts]
    settings = SampleConfig(max_new_tokens=config.watch.kl_tokens)
    prompts = [tree.prompt_ids for tree in trees]
    ids = sample(policy, prompts, [config.seed * 1_000_003 + i for i in range(len(prompts))], settings)
    kl = kl_of_samples(policy, beside.alive, prompts, ids, settings)
    found = {"kl": kl.mean, "kl_se": kl.se}
    if beside.scorer is not None:
        texts = decode(policy, ids)
        scores = beside.scorer([splits.prompts[name][tree.row] for tree in trees], texts)
        found["reward"] = sum(scores) / len(scores)
    return found


def _watch_displacement(
    session: Session, below: deque[tuple[float, float]], done: Stepped, at_step: int, threshold: float
) -> None:
    """Warn when, over the last pairs, too many chosen responses have become less likely than under the reference."""
    was_over = len(below) == below.maxlen and _share(below) > threshold
    below.append((done.sums["chosen_below_reference"], done.sums["pairs"]))
    share = _share(below)
    if len(below) == below.maxlen and share > threshold and not was_over:
        session.event(
            at_step,
            "displacement",
            f"warning: {share:.0%} of the last pairs have a chosen response less likely than under the reference "
            f"(threshold {threshold:.0%}); a larger loss.beta, a smaller optim.lr or SFT on the chosen first holds it up",
        )


def _share(below: deque[tuple[float, float]]) -> float:
    return sum(b for b, _ in below) / max(1.0, sum(n for _, n in below))


def _evaluate(
    config: TrainConfig,
    policy: Policy,
    splits: Splits,
    references: Mapping[str, Reference],
    at_step: int,
    session: Session,
) -> None:
    """Held-out loss, accuracy and margin, by the training objective without gradients."""
    objective = make_objective(config.loss, policy, references["eval"].logps)
    sums: dict[str, float] = dict.fromkeys(("loss", *STATS), 0.0)
    weight = 0.0
    with torch.no_grad():
        for batch in micro_batches(splits.eval, policy, config.train.max_tokens_per_pack, World()):
            loss, stats = objective.loss(batch.to(policy.device))
            weight += objective.count(batch)
            sums["loss"] += float(loss)
            for name in STATS:
                sums[name] += float(stats[name])
    pairs = sums["pairs"]
    record = {"loss": sums["loss"] / weight, "accuracy": sums["correct"] / pairs, "margin": sums["margin"] / pairs}
    session.record({"kind": "eval", "step": at_step, **record})
    session.say(f"held-out at step {at_step}: " + figures(record))
