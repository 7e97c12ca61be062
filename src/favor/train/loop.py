"""The shell of every training loop: the steps still to take, their rate, records, checkpoints, a clean stop, the end.

In: a recipe, what learns, and from what. Out: one Turn per optimizer step. Next: step.py.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, Protocol, TypeVar, cast

from pydantic import BaseModel, Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from favor.config import STRICT
from favor.data.batches import LoaderState, Order, build, plan
from favor.data.types import Batch, TokenTree
from favor.errors import without_places
from favor.model import split
from favor.model.four_bits import write_mark
from favor.model.load import ModelConfig, Policy
from favor.ranks import RanksConfig, World, barrier, largest
from favor.run import atomic_folder, read_jsonl
from favor.stop import StoppedError
from favor.train import checkpoint, notes
from favor.train.optim import OptimConfig, learning_rate, make_optimizer, warmup
from favor.train.session import Bar, Session, TrainingState
from favor.train.step import Learner, Stepped


class LoopConfig(BaseModel):
    """Section [train]: sizes. A prompt brings all its comparisons into the same optimizer batch."""

    model_config = STRICT
    batch_prompts: int = Field(default=16, ge=1)
    """Prompts in an optimizer batch, over all ranks."""
    max_tokens_per_pack: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Tokens computed at once on a rank; it changes no result. auto: 1,024, more where prompts open alike and memory allows."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the prompts."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps, even within an epoch."""
    shuffle: bool = True
    """Whether every epoch has an order of its own, drawn from the seed."""

    @property
    def budget(self) -> int:
        """max_tokens_per_pack as a number, which packs.py makes of auto before anything is computed."""
        assert self.max_tokens_per_pack != "auto", "packs.settled comes first"
        return self.max_tokens_per_pack


class SaveConfig(BaseModel):
    """Section [save]: checkpoints, from which a stopped run resumes bit for bit."""

    model_config = STRICT
    every: int = Field(default=50, ge=0)
    """Steps between checkpoints; 0: only when the run is told to stop."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept, the newest ones; those of stops too."""


class Recipe(Protocol):
    """What a training command's recipe says to its loop."""

    seed: int
    resume: bool
    model: ModelConfig
    optim: OptimConfig
    train: LoopConfig
    ranks: RanksConfig
    save: SaveConfig


R = TypeVar("R", bound=Recipe)


def can_be_split(recipe: R) -> R:
    """The recipe as it is. Raises ValueError for what weights that are split over ranks do not go with yet."""
    if recipe.ranks.shard != "none" and recipe.optim.kind == "adamw8bit":
        raise ValueError(
            "optim.kind = 'adamw8bit' keeps one size for 256 numbers of a whole weight, which ranks.shard cuts; "
            "set optim.kind=adamw, or ranks.shard=none"
        )
    return recipe


@dataclass(frozen=True)
class Training:
    """What a loop works with: its recipe, the policy, what learns of it, the indices of what trains, the surroundings."""

    recipe: Recipe
    policy: Policy
    learner: Learner
    used: Sequence[int]
    session: Session

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return num_steps(self.recipe.train, len(self.used))

    def micro_batches(self, trees: Sequence[TokenTree]) -> list[Batch]:
        """This rank's share of an optimizer batch, cut to the token budget."""
        return micro_batches(trees, self.policy, self.recipe.train.budget, self.session.world)


def make_training(
    recipe: Recipe,
    policy: Policy,
    used: Sequence[int],
    session: Session,
    *,
    beside: Mapping[str, nn.Parameter] = MappingProxyType({}),
    moving: Mapping[str, Tensor] = MappingProxyType({}),
) -> Training:
    """What [optim] teaches: the policy's weights and those `beside` it. moving: as in Learner."""
    parameters = {**policy.trainable(), **beside}
    optimizer = make_optimizer(recipe.optim, parameters)
    learner = Learner(
        parameters, optimizer, recipe.optim.clip, policy.device, session.world, moving, policy.root is not None
    )
    return Training(recipe, policy, learner, used, session)


@dataclass
class Turn:
    """An optimizer step under way: the indices of what it takes. `state` is where training stands, `seconds` what the step took."""

    indices: list[int]
    rate: float
    state: TrainingState
    place: LoaderState
    bar: Bar
    training: Training
    run_began: float
    began: float
    seconds: float = 0.0

    def done(self) -> None:
        """The weights have moved."""
        now, place = time.monotonic(), self.place
        self.seconds = now - self.began
        self.keep(step=self.state.step + 1, epoch=place.epoch, position=place.position, seconds=now - self.run_began)

    def keep(self, **moved: object) -> None:
        """Remember what a resumed run needs to continue from here: fields of the state."""
        self.state = self.state.model_copy(update=moved)

    def record(self, figures: Mapping[str, object], shown: str) -> None:
        """A line of metrics.jsonl, and of the progress."""
        state = self.state
        epoch = state.epoch + state.position / len(self.training.used)
        record = {"kind": "step", "step": state.step, "epoch": epoch, "lr": self.rate, "seconds": state.seconds}
        self.training.session.record(record | dict(figures))
        self.bar.advance(1, shown)

    def figures(self, done: Stepped, cut: Sequence[Batch]) -> dict[str, float]:
        """What every loop says of a step."""
        tokens = sum(batch.num_tokens for batch in cut)
        figures = {"loss": done.sums["loss"], "grad_norm": done.grad_norm, "unique_tokens": tokens}
        return figures | {"tokens_per_s": tokens / self.seconds}

    def save_or_stop(self) -> None:
        """Save when it is due; on a stop signal save and raise StoppedError.

        Raises what went wrong in writing a checkpoint, as soon as it is known.
        """
        training, state = self.training, self.state
        session, save, total = training.session, training.recipe.save, training.num_steps
        session.background.look()
        number = largest(session.stop.signal_number or 0, session.world)
        due = save.every > 0 and state.step % save.every == 0
        best = state.health.best is not None and state.health.best.step == state.step
        if number or ((due or best) and state.step < total):
            checkpoint.save(session, training.learner, state, save.keep)
        if number:
            session.background.wait()
            # a launcher ends all processes when one does
            barrier(session.world)
            raise StoppedError(f"stopped after step {state.step} of {total}; continue with resume=true", number)


def turns(
    training: Training,
    label: str,
    state: TrainingState,
    result: Callable[[TrainingState], TrainingState] = lambda state: state,
) -> Generator[Turn]:
    """The optimizer steps from the newest checkpoint (with `resume`, else from `state`) to the last; then the final model.

    The caller computes a step, calls `done`, `record` and `save_or_stop`, and closes the generator whatever happens.
    result: puts the weights that are kept into the policy, and returns their state.
    """
    recipe, session, used = training.recipe, training.session, training.used
    if recipe.resume:
        state = checkpoint.resume(session, training.learner, state, len(used))
    total = training.num_steps
    if state.step == 0:
        for name, said in length_notes(recipe, total):
            session.event(0, name, said)
    order = Order(len(used), recipe.train.batch_prompts, recipe.seed, recipe.train.shuffle)
    run_began = time.monotonic() - state.seconds
    ended, looked_at = session.background.ended(session.say), session.stop.looked_at()
    with looked_at, ended, Bar(session, label, total, state.step) as bar:
        for indices, place in order.batches(LoaderState(state.epoch, state.position)):
            if state.step >= total or state.health.stopped:
                break
            rate = learning_rate(recipe.optim, state.step, total) * state.health.rate
            for group in training.learner.optimizer.param_groups:
                group["lr"] = rate
            turn = Turn([used[i] for i in indices], rate, state, place, bar, training, run_began, time.monotonic())
            yield turn
            state = turn.state
    _note(training, state.step)
    finish(training.policy, result(state), session)


def length_notes(recipe: Recipe, total: int) -> Iterator[tuple[str, str]]:
    """(name, note) for what is odd about the length of a run of `total` steps, before its first."""
    found = {
        "warmup": notes.warmup(warmup(recipe.optim, total), total),
        "max_steps": notes.unreached(recipe.train.max_steps, total, recipe.train.epochs),
    }
    return ((name, said) for name, said in found.items() if said)


def _note(training: Training, step: int) -> None:
    """What the curves say at the end of a run, where it is worth a line."""
    session = training.session
    if session.world.is_main:
        steps = [record for record in read_jsonl(session.folder.metrics) if record["kind"] == "step"]
        # a reference that follows brings the loss back to where it began
        for name, said in notes.at_the_end(steps, moving=bool(training.learner.moving)):
            session.event(step, name, said)


def num_steps(config: LoopConfig, num_trees: int) -> int:
    """Optimizer steps of the whole run."""
    whole = config.epochs * -(-num_trees // config.batch_prompts)
    return whole if config.max_steps is None else min(whole, config.max_steps)


def micro_batches(trees: Sequence[TokenTree], policy: Policy, budget: int, world: World) -> list[Batch]:
    """This rank's share of an optimizer batch, cut to the token budget."""
    bins = plan(trees, policy.layout, budget, world.size)
    mine = [build([trees[i] for i in members], policy.layout) for members in bins[world.rank :: world.size] if members]
    if policy.root is not None:
        # split weights are collected by all ranks together: all run as many passes as the main rank, if only over one small tree
        rounds = sum(map(bool, bins[:: world.size])) - len(mine)
        least = min(trees, key=lambda tree: tree.num_tokens)
        mine += [replace(build([least], policy.layout), idle=True)] * rounds
    return mine


def finish(policy: Policy, state: TrainingState, session: Session) -> None:
    """Write the final model."""
    if session.world.is_main:
        save_model(policy, session.folder.model)
    elif policy.root is not None:
        split.save(policy, None)
    counted = f"{state.step} step{'s' * (state.step != 1)}"
    session.event(state.step, "finished", f"trained {counted}; model in {session.folder.model}")
    barrier(session.world)


def save_model(policy: Policy, folder: Path) -> None:
    """The final model folder, as transformers (or PEFT, for adapters) loads it, with its tokenizer."""
    with atomic_folder(folder) as aside:
        if policy.root is None:
            policy.model.save_pretrained(aside)
        else:
            split.save(policy, aside)
        if policy.weights == "nf4":
            write_mark(aside)
        # of a full disk the tokenizers library says so by a bare Exception: our own write of the same bytes meets it first
        probe = aside / "tokenizer.json"
        probe.write_text(cast(PreTrainedTokenizerFast, policy.tokenizer).backend_tokenizer.to_str(pretty=True), "utf-8")
        probe.unlink()
        policy.tokenizer.save_pretrained(aside)
        if policy.sight is not None:
            policy.sight.processor.save_pretrained(aside)
        card = aside / "README.md"
        if card.exists():
            # PEFT's names the base model by its path on this machine; adapter_config.json needs it, readers do not
            card.write_text(without_places(card.read_text("utf-8"), [policy.source]), "utf-8")
