"""What the loops share: their section, the cut into micro-batches, checkpoints, the end.

In: the state after a step. Out: checkpoints, the final model, a clean stop. Next: step.py.
"""

from collections.abc import Sequence

from pydantic import BaseModel, Field

from favor.config import STRICT
from favor.data import batches
from favor.data.types import Batch, TokenTree
from favor.errors import CheckpointError
from favor.guard import length_and_hash
from favor.model.load import Policy
from favor.ranks import World, barrier, largest
from favor.run import fsync
from favor.stop import StoppedError
from favor.train import checkpoint
from favor.train.checkpoint import TrainingState
from favor.train.session import Session
from favor.train.step import Machine


class LoopConfig(BaseModel):
    """Section [train]: sizes and cadences. A prompt brings all its comparisons into the same optimizer batch."""

    model_config = STRICT
    batch_prompts: int = Field(default=16, ge=1)
    max_tokens_per_pack: int = Field(default=1024, ge=1)
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    shuffle: bool = True
    save_every: int = Field(default=50, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)


def num_steps(config: LoopConfig, num_trees: int) -> int:
    """Optimizer steps of the whole run."""
    whole = config.epochs * -(-num_trees // config.batch_prompts)
    return whole if config.max_steps is None else min(whole, config.max_steps)


def micro_batches(trees: Sequence[TokenTree], policy: Policy, budget: int, world: World) -> list[Batch]:
    """This rank's share of an optimizer batch, cut to the token budget."""
    sizes = [batches.computed_tokens(tree, policy.layout) for tree in trees]
    bins = batches.plan(sizes, budget, world.size)[world.rank :: world.size]
    return [batches.build([trees[i] for i in members], policy.layout) for members in bins if members]


def resume(machine: Machine, expected: TrainingState, session: Session, num_trees: int) -> TrainingState:
    """Continue from the newest sound checkpoint, or from the start when a run stopped before its first one.

    Raises CheckpointError when there are checkpoints and none is sound, or when it belongs to other inputs.
    """
    stored = newest_sound(session)
    if stored is None:
        session.event(0, "resume", "resume: no checkpoint yet, starting from the first step")
        return expected
    if stored.state.position >= num_trees:
        raise CheckpointError(
            f"{stored.path}: stands at prompt {stored.state.position} of {num_trees}; resume with the data it began with"
        )
    state = checkpoint.restore(stored, machine.parameters, machine.optimizer, expected, machine.beside)
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


def save_or_stop(loop: LoopConfig, machine: Machine, state: TrainingState, total: int, session: Session) -> None:
    """Save when it is due; on a stop signal save and raise StoppedError."""
    number = largest(session.stop.signal_number or 0, session.world, machine.device)
    due = loop.save_every > 0 and state.step % loop.save_every == 0 and state.step < total
    if due or number:
        if session.world.is_main:
            # what a checkpoint comes after must not be lost with the power
            fsync(session.folder.metrics)
            now = state.model_copy(update={"metrics": length_and_hash(session.folder.metrics)})
            folder = session.folder.checkpoints
            checkpoint.save(folder, machine.parameters, machine.optimizer, now, loop.keep_checkpoints, machine.beside)
        barrier(session.world)
    if number:
        raise StoppedError(f"stopped after step {state.step} of {total}; continue with resume=true", number)


def finish(policy: Policy, state: TrainingState, session: Session) -> None:
    """Write the final model."""
    if session.world.is_main:
        checkpoint.save_model(policy, session.folder.model)
    session.event(state.step, "finished", f"trained {state.step} steps; model in {session.folder.model}")
    barrier(session.world)
