"""Checkpoints: weights, optimizer and place in the data, as safetensors and JSON; whole or absent, and under a hash.

In: the training state at the end of a step. Out: a folder `step-000040`, and the state back from it bit
for bit, or a refusal. Next: preference.py.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from favor.config import STRICT
from favor.errors import CheckpointError
from favor.guard import file_hash, length_and_hash, sha
from favor.model.room import memory, peak
from favor.parts import assign_, collected, in_files
from favor.ranks import World, barrier, from_main, largest
from favor.run import RunFolder, atomic_folder, fsync, refuse_changed, remove_folder
from favor.train import moments
from favor.train.session import Health, Session, TrainingState
from favor.train.step import Learner

_POLICY, _OPTIMIZER, _REFERENCE, _STATE = "policy", "optimizer", "reference", "state.json"
# how long a shared folder may show what it was; NFS keeps a listing for a minute
_STALE_S = 90.0


class _Sealed(BaseModel):
    """state.json: the state, SHA-256 of the files beside it, and of all of this."""

    model_config = STRICT
    state: TrainingState
    files: dict[str, str]
    sha256: str = ""

    def seal(self) -> str:
        """What `sha256` must be."""
        # a state without looks is sealed as before there were any
        unread = {"state": {"health"}} if self.state.health == Health() else None
        return sha(self.model_copy(update={"sha256": ""}).model_dump_json(exclude=unread))


class Stored(NamedTuple):
    """A sound checkpoint: its files hold what was written."""

    path: Path
    state: TrainingState
    policy: dict[str, Tensor]
    moments: dict[str, Tensor]
    reference: dict[str, Tensor]


def save(session: Session, learner: Learner, state: TrainingState, keep: int) -> None:
    """The main rank writes `step-NNNNNN` aside, fsyncs, renames; then removes all but the newest `keep` up to this one.

    That of the best look of [health] stays too. Where memory allows it copies what is saved, and a thread writes while training
    goes on; else training waits. Raises what went wrong in writing this one, if training waits, and the one before.
    """
    background = session.background
    background.wait()
    keeps = session.world.is_main
    copies = keeps and copy_bytes(learner, background.before) > 0
    if copies:
        background.before = background.before or peak()
    files = ((name, collected(tensors, keep=keeps, copy=copies)) for name, tensors in _files(learner))
    if not keeps:
        # weights that are split over ranks are put together by all of them
        list(files)
        return
    now = state.model_copy(update={"metrics": length_and_hash(session.folder.metrics)})
    if copies:
        background.begin(partial(_write, session.folder, list(files), now, keep))
    else:
        _write(session.folder, files, now, keep)


def copy_bytes(learner: Learner, before: int = 0) -> int:
    """Size of a copy of what is saved; 0 where it would take more than half of the memory that training leaves free.

    before: the most that the process held before it made a first copy; 0 when it has made none.
    """
    size = sum(t.numel() * t.element_size() for _, tensors in _files(learner) for t in tensors.values())
    # what training has held, it will hold again; later peaks have a copy in them, whose memory is kept or was given back
    most = max(before, peak() - size) if before else peak()
    grows = most - psutil.Process().memory_info().rss
    return size if 2 * (size + grows) <= memory().free else 0


def _write(folder: RunFolder, files: Iterable[tuple[str, dict[str, Tensor]]], state: TrainingState, keep: int) -> None:
    # what a checkpoint comes after must not be lost with the power
    fsync(folder.metrics)
    hashes: dict[str, str] = {}
    with atomic_folder(folder.checkpoints / _name(state.step)) as aside:
        for name, tensors in files:
            save_file(tensors, aside / name)
            hashes[name] = file_hash(aside / name)
        sealed = _Sealed(state=state, files=hashes)
        sealed = sealed.model_copy(update={"sha256": sealed.seal()})
        (aside / _STATE).write_text(sealed.model_dump_json(indent=2) + "\n", "utf-8")
    found = checkpoints(folder.checkpoints)
    kept = [old for old in found if _step(old) <= state.step][-keep:]
    if (best := state.health.best) is not None:
        kept.append(folder.checkpoints / _name(best.step))
    # later ones were damaged, or this run would stand where they are
    for old in found:
        if old not in kept:
            remove_folder(old)


def _files(learner: Learner) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The files of a checkpoint: what is in them as the ranks hold it."""
    remembered = {
        f"{key}.{name}": value
        for name, parameter in learner.parameters.items()
        for key, value in moments.kept(learner.optimizer.state[parameter]).items()
    }
    parts = {_POLICY: learner.parameters, _OPTIMIZER: remembered, _REFERENCE: learner.moving}
    for name, tensors in parts.items():
        if tensors or name != _REFERENCE:
            for file, keys in in_files(name, tensors):
                yield file, {key: tensors[key] for key in keys}


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = folder.glob("step-*") if folder.exists() else ()
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=_step)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read(path: Path) -> Stored:
    """A checkpoint's content. Raises CheckpointError when it is not, byte for byte, what was written."""
    try:
        sealed = _Sealed.model_validate_json((path / _STATE).read_bytes())
        if sealed.sha256 != sealed.seal():
            raise CheckpointError(f"{path}: damaged checkpoint ({_STATE} is not what was written)")
        for name, expected in sealed.files.items():
            if file_hash(path / name) != expected:
                raise CheckpointError(f"{path}: damaged checkpoint ({name} is not what was written)")
        parts: dict[str, dict[str, Tensor]] = {_POLICY: {}, _OPTIMIZER: {}, _REFERENCE: {}}
        for name in sealed.files:
            # policy.safetensors, or policy-00001-of-00003.safetensors
            parts[name.removesuffix(".safetensors").partition("-")[0]] |= load_file(path / name)
        return Stored(path, sealed.state, *parts.values())
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({' '.join(str(error).split())[:200]})") from None


def restore(stored: Stored, learner: Learner, expected: TrainingState) -> TrainingState:
    """Put weights and optimizer state back in place.

    Raises CheckpointError when the checkpoint comes from other inputs, naming them, or does not fit the weights.
    """
    refuse_changed(str(stored.path), stored.state.inputs, expected.inputs)
    _check_fit(f"{stored.path}, weights", stored.policy, learner.parameters)
    _check_fit(f"{stored.path}, reference", stored.reference, learner.moving)
    remembered = _moments(stored, learner.parameters)
    for name, parameter in learner.parameters.items():
        assign_(parameter, stored.policy[name])
    for name, tensor in learner.moving.items():
        assign_(tensor, stored.reference[name])
    for name, parameter in learner.parameters.items():
        learner.optimizer.state[parameter] = moments.restored(learner.optimizer, parameter, remembered[name])
    return stored.state


def _check_fit(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same names, shapes and types, and finite: nothing is broadcast, converted or left as it was."""
    wrong = sorted(found.keys() ^ wanted.keys())
    wrong += [
        n for n in wanted if n in found and (found[n].shape, found[n].dtype) != (wanted[n].shape, wanted[n].dtype)
    ]
    if wrong:
        raise CheckpointError(
            f"{what}: not those of this model ({wrong[0]}); resume with the model the run started with"
        )
    bad = next((name for name, tensor in found.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise CheckpointError(f"{what}: {bad} is not finite; delete this folder to resume from the one before")


def _moments(stored: Stored, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Optimizer state by parameter; every one that has any has the same, in its own shape."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, value in stored.moments.items():
        kind, _, name = key.partition(".")
        wanted = parameters.get(name)
        if wanted is None or not moments.fits(kind, value, wanted):
            raise CheckpointError(
                f"{stored.path}: optimizer state '{key}' does not fit; delete this folder to resume from the one before"
            )
        found[name][kind] = value
    if len({moments.names(mine) for mine in found.values() if mine}) > 1 or bool(stored.state.step) != any(
        found.values()
    ):
        raise CheckpointError(
            f"{stored.path}: optimizer state is missing; delete this folder to resume from the one before"
        )
    return found


def resume(session: Session, learner: Learner, expected: TrainingState, num_trees: int) -> TrainingState:
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
    state = restore(stored, learner, expected)
    if session.world.is_main and length_and_hash(session.folder.metrics, state.metrics[0]) != state.metrics:
        said = f"warning: {session.folder.metrics} is not what was written up to step {state.step}: its curves may be wrong"
        session.event(state.step, "damaged", f"{said} or have holes; weights and optimizer are as they were")
    session.event(state.step, "resume", f"resumed after step {state.step} from {stored.path}")
    return state


def newest_sound(session: Session) -> Stored | None:
    """The newest checkpoint that holds, for all ranks, what was written; a damaged one is passed over, and that is said.

    Raises CheckpointError when there are some and all are damaged.
    """
    session.background.wait()
    barrier(session.world)
    folder, world = session.folder.checkpoints, session.world
    found = checkpoints(folder)
    for before in reversed(range(from_main(len(found), world))):
        path = folder / _name(from_main(_step(found[before]) if world.is_main else 0, world))
        stored, problem = None, ""
        _appeared(path, world)
        try:
            stored = read(path)
        except CheckpointError as error:
            problem = str(error)
        if not largest(int(stored is None), world):
            return stored
        problem = problem or f"{path}: another process of this run cannot read it"
        if not before:
            also = "see that every machine has this folder, or " if world.size > 1 else ""
            raise CheckpointError(
                f"{problem}; no sound checkpoint is left: {also}delete {folder} to resume from the first step"
            )
        session.event(0, "damaged", f"warning: {problem}; going back to the checkpoint before")
    return None


def of_step(session: Session, step: int) -> Stored:
    """The checkpoint after a step, which is there. Raises CheckpointError when it is damaged."""
    session.background.wait()
    barrier(session.world)
    path = session.folder.checkpoints / _name(step)
    _appeared(path, session.world)
    return read(path)


def _appeared(path: Path, members: World) -> None:
    """Wait for what the main rank sees: of a folder that machines share another one may see what it was a minute ago."""
    until = time.monotonic() + _STALE_S
    while not members.is_main and not (path / _STATE).exists() and time.monotonic() < until:
        time.sleep(0.2)
