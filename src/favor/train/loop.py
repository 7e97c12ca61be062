"""The shell of every training loop: the steps still to take, their rate, records, checkpoints, a clean stop, the end.

In: a recipe, what learns and how many trees there are. Out: one Turn per optimizer step. Next: step.py.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, Field

from favor.config import STRICT
from favor.data.batches import LoaderState, Order, build, computed_tokens, plan
from favor.data.types import Batch, TokenTree
from favor.errors import CheckpointError
from favor.guard import length_and_hash
from favor.model.load import Policy
from favor.ranks import World, barrier, largest
from favor.run import fsync
from favor.stop import StoppedError
from favor.train import checkpoint
from favor.train.checkpoint import TrainingState
from favor.train.optim import OptimConfig, learning_rate, set_learning_rate
from favor.train.session import Bar, Session
from favor.train.step import Learner, Stepped


class LoopConfig(BaseModel):
    """Section [train]: sizes. A prompt brings all its comparisons into the same optimizer batch."""

    model_config = STRICT
    batch_prompts: int = Field(default=16, ge=1)
    """Prompts in an optimizer batch, over all ranks."""
    max_tokens_per_pack: int = Field(default=1024, ge=1)
    """Tokens computed at once on a rank; it bounds memory and changes no result."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the prompts."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, even within an epoch."""
    shuffle: bool = True
    """Whether every epoch has an order of its own, drawn from the seed."""


class SaveConfig(BaseModel):
    """Section [save]: checkpoints, from which a stopped run resumes bit for bit."""

    model_config = STRICT
    every: int = Field(default=50, ge=0)
    """Steps between checkpoints; 0: only when the run is told to stop."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept, the newest ones."""


class Recipe(Protocol):
    """What a training command's recipe says to its loop."""

    seed: int
    resume: bool
    optim: OptimConfig
    train: LoopConfig
    save: SaveConfig


@dataclass(frozen=True)
class Training:
    """What a loop works with: its recipe, the policy, what learns of it, how many trees there are, the surroundings."""

    recipe: Recipe
    policy: Policy
    learner: Learner
    num_trees: int
    session: Session

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return num_steps(self.recipe.train, self.num_trees)

    def micro_batches(self, trees: Sequence[TokenTree]) -> list[Batch]:
        """This rank's share of an optimizer batch, cut to the token budget."""
        return micro_batches(trees, self.policy, self.recipe.train.max_tokens_per_pack, self.session.world)


@dataclass
class Turn:
    """An optimizer step under way: which trees it takes. `state` is where training stands, `seconds` what the step took."""

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
        now = time.monotonic()
        self.state = self.state.after_step(self.place, now - self.run_began)
        self.seconds = now - self.began

    def keep(self, **moved: object) -> None:
        """Remember what a resumed run needs to continue from here: fields of the state."""
        self.state = self.state.model_copy(update=moved)

    def record(self, figures: Mapping[str, object], shown: str) -> None:
        """A line of metrics.jsonl, and of the progress."""
        state = self.state
        record = {"kind": "step", "step": state.step, "epoch": state.epochs(self.training.num_trees), "lr": self.rate}
        self.training.session.record(record | {"seconds": state.seconds} | dict(figures))
        self.bar.advance(1, shown)

    def figures(self, done: Stepped, cut: Sequence[Batch]) -> dict[str, float]:
        """What every loop says of a step."""
        tokens = sum(batch.num_tokens for batch in cut)
        figures = {"loss": done.sums["loss"], "grad_norm": done.grad_norm, "unique_tokens": tokens}
        return figures | {"tokens_per_s": tokens / self.seconds}

    def save_or_stop(self) -> None:
        """Save when it is due; on a stop signal save and raise StoppedError."""
        save_or_stop(self.training, self.state)


def turns(training: Training, label: str, state: TrainingState) -> Generator[Turn]:
    """The optimizer steps from the newest checkpoint (with `resume`, else from `state`) to the last; then the final model.

    The caller computes a step, calls `done`, `record` and `save_or_stop`, and closes the generator whatever happens.
    """
    recipe, session = training.recipe, training.session
    if recipe.resume:
        state = resume(training, state)
    order = Order(training.num_trees, recipe.train.batch_prompts, recipe.seed, recipe.train.shuffle)
    run_began = time.monotonic() - state.seconds
    with session.stop.looked_at(), Bar(session, label, training.num_steps, state.step) as bar:
        for indices, place in order.batches(LoaderState(state.epoch, state.position)):
            if state.step >= training.num_steps:
                break
            rate = learning_rate(recipe.optim, state.step, training.num_steps)
            set_learning_rate(training.learner.optimizer, rate)
            turn = Turn(indices, rate, state, place, bar, training, run_began, time.monotonic())
            yield turn
            state = turn.state
    finish(training.policy, state, session)


def num_steps(config: LoopConfig, num_trees: int) -> int:
    """Optimizer steps of the whole run."""
    whole = config.epochs * -(-num_trees // config.batch_prompts)
    return whole if config.max_steps is None else min(whole, config.max_steps)


def micro_batches(trees: Sequence[TokenTree], policy: Policy, budget: int, world: World) -> list[Batch]:
    """This rank's share of an optimizer batch, cut to the token budget."""
    sizes = [computed_tokens(tree, policy.layout) for tree in trees]
    bins = plan(sizes, budget, world.size)[world.rank :: world.size]
    return [build([trees[i] for i in members], policy.layout) for members in bins if members]


def resume(training: Training, expected: TrainingState) -> TrainingState:
    """Continue from the newest sound checkpoint, or from the start when a run stopped before its first one.

    Raises CheckpointError when there are checkpoints and none is sound, or when it belongs to other inputs.
    """
    session = training.session
    stored = newest_sound(session)
    if stored is None:
        session.event(0, "resume", "resume: no checkpoint yet, starting from the first step")
        return expected
    if stored.state.position >= training.num_trees:
        raise CheckpointError(
            f"{stored.path}: stands at prompt {stored.state.position} of {training.num_trees}; resume with the data it began with"
        )
    state = checkpoint.restore(stored, training.learner, expected)
    if session.world.is_main and length_and_hash(session.folder.metrics, state.metrics[0]) != state.metrics:
        said = f"warning: {session.folder.metrics} is not what was written until step {state.step}: its curves may be wrong"
        session.event(state.step, "damaged", f"{said} or have holes; weights and optimizer are as they were")
    session.event(state.step, "resume", f"resumed after step {state.step} from {stored.path}")
    return state


def newest_sound(session: Session) -> checkpoint.Stored | None:
    """The newest checkpoint that holds what was written; a damaged one is passed over, and that is said.

    Raises CheckpointError when there are some and all are damaged.
    """
    found = checkpoint.checkpoints(session.folder.checkpoints)
    for path in reversed(found):
        try:
            return checkpoint.read(path)
        except CheckpointError as error:
            if path == found[0]:
                raise CheckpointError(
                    f"{error}; no sound checkpoint is left: delete {session.folder.checkpoints} to resume from the first step"
                ) from None
            session.event(0, "damaged", f"warning: {error}; going back to the checkpoint before")
    return None


def save_or_stop(training: Training, state: TrainingState) -> None:
    """Save when it is due; on a stop signal save and raise StoppedError."""
    session, save, total = training.session, training.recipe.save, training.num_steps
    number = largest(session.stop.signal_number or 0, session.world, training.learner.device)
    due = save.every > 0 and state.step % save.every == 0 and state.step < total
    if due or number:
        if session.world.is_main:
            # what a checkpoint comes after must not be lost with the power
            fsync(session.folder.metrics)
            now = state.model_copy(update={"metrics": length_and_hash(session.folder.metrics)})
            checkpoint.save(session.folder.checkpoints, training.learner, now, save.keep)
        barrier(session.world)
    if number:
        raise StoppedError(f"stopped after step {state.step} of {total}; continue with resume=true", number)


def finish(policy: Policy, state: TrainingState, session: Session) -> None:
    """Write the final model."""
    if session.world.is_main:
        checkpoint.save_model(policy, session.folder.model)
    session.event(state.step, "finished", f"trained {state.step} steps; model in {session.folder.model}")
    barrier(session.world)
