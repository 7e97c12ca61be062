"""Checkpoints: weights, optimizer and place in the data, as safetensors and JSON; whole or absent, and under a hash.

In: the training state at the end of a step. Out: a folder `step-000040`, and the state back from it bit
for bit, or a refusal. Next: preference.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple, cast

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from favor.config import STRICT
from favor.data.batches import LoaderState
from favor.errors import CheckpointError, without_places
from favor.guard import file_hash, sha
from favor.model.load import Policy
from favor.run import atomic_folder, refuse_changed, remove_folder
from favor.train.step import Learner

_POLICY, _OPTIMIZER, _REFERENCE, _STATE = "policy", "optimizer", "reference", "state.json"
Share = Annotated[float, Field(ge=0)]


class TrainingState(BaseModel):
    """Where training stands after `step` optimizer steps, and what it came from.

    inputs: name -> hash of everything that enters. kl, below: the last KL probe and the displacement window. metrics:
    how long metrics.jsonl was, and its hash.
    """

    model_config = STRICT
    step: int = Field(default=0, ge=0)
    epoch: int = Field(default=0, ge=0)
    position: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0)
    inputs: dict[str, str] = {}
    kl_coef: float | None = Field(default=None, ge=0)
    kl: dict[str, float] = {}
    below: tuple[tuple[Share, Share], ...] = ()
    metrics: tuple[int, str] = (0, "")

    def after_step(self, place: LoaderState, seconds: float) -> "TrainingState":
        """The state one step later; `place` is where the loader then stands."""
        update = {"step": self.step + 1, "epoch": place.epoch, "position": place.position, "seconds": seconds}
        return self.model_copy(update=update)

    def epochs(self, num_trees: int) -> float:
        """Epochs done, with their fraction."""
        return self.epoch + self.position / num_trees


class _Sealed(BaseModel):
    """state.json: the state, SHA-256 of the files beside it, and of all of this."""

    model_config = STRICT
    state: TrainingState
    files: dict[str, str]
    sha256: str = ""

    def seal(self) -> str:
        """What `sha256` must be."""
        return sha(self.model_copy(update={"sha256": ""}).model_dump_json())


class Stored(NamedTuple):
    """A sound checkpoint: its files hold what was written."""

    path: Path
    state: TrainingState
    policy: dict[str, Tensor]
    moments: dict[str, Tensor]
    reference: dict[str, Tensor]


def save(folder: Path, learner: Learner, state: TrainingState, keep: int) -> Path:
    """Write `folder/step-NNNNNN` aside, fsync, rename; then remove all but the newest `keep` checkpoints up to this one."""
    path = folder / f"step-{state.step:06d}"
    moments = {
        f"{key}.{name}": value
        for name, parameter in learner.parameters.items()
        for key, value in learner.optimizer.state[parameter].items()
    }
    parts = {_POLICY: learner.parameters, _OPTIMIZER: moments, _REFERENCE: learner.moving}
    with atomic_folder(path) as aside:
        files: dict[str, str] = {}
        for name, tensors in parts.items():
            if tensors or name != _REFERENCE:
                file = aside / f"{name}.safetensors"
                save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, file)
                files[file.name] = file_hash(file)
        sealed = _Sealed(state=state, files=files)
        sealed = sealed.model_copy(update={"sha256": sealed.seal()})
        (aside / _STATE).write_text(sealed.model_dump_json(indent=2) + "\n", "utf-8")
    found = checkpoints(folder)
    kept = [old for old in found if _step(old) <= state.step][-keep:]
    # later ones were damaged, or this run would stand where they are
    for old in found:
        if old not in kept:
            remove_folder(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = folder.glob("step-*") if folder.exists() else ()
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=_step)


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
        parts = {name: load_file(path / name) for name in sealed.files}
        return Stored(
            path, sealed.state, *(parts.get(f"{n}.safetensors", {}) for n in (_POLICY, _OPTIMIZER, _REFERENCE))
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({' '.join(str(error).split())[:200]})") from None


def restore(stored: Stored, learner: Learner, expected: TrainingState) -> TrainingState:
    """Put weights and optimizer state back in place.

    Raises CheckpointError when the checkpoint comes from other inputs, naming them, or does not fit the weights.
    """
    refuse_changed(str(stored.path), stored.state.inputs, expected.inputs)
    _check_fit(f"{stored.path}, weights", stored.policy, learner.parameters)
    _check_fit(f"{stored.path}, reference", stored.reference, learner.moving)
    moments = _moments(stored, learner.parameters)
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            parameter.copy_(stored.policy[name])
        for name, tensor in learner.moving.items():
            tensor.copy_(stored.reference[name])
    for name, parameter in learner.parameters.items():
        mine = moments[name]
        learner.optimizer.state[parameter] = {k: v if v.dim() == 0 else v.to(parameter.device) for k, v in mine.items()}
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
        if wanted is None or (value.dim() and value.shape != wanted.shape) or not value.isfinite().all():
            raise CheckpointError(
                f"{stored.path}: optimizer state '{key}' does not fit; delete this folder to resume from the one before"
            )
        found[name][kind] = value
    if len({frozenset(mine) for mine in found.values() if mine}) > 1 or bool(stored.state.step) != any(found.values()):
        raise CheckpointError(
            f"{stored.path}: optimizer state is missing; delete this folder to resume from the one before"
        )
    return found


def save_model(policy: Policy, folder: Path) -> None:
    """The final model folder, as transformers (or PEFT, for adapters) loads it, with its tokenizer."""
    with atomic_folder(folder) as aside:
        policy.model.save_pretrained(aside)
        # of a full disk the tokenizers library says so by a bare Exception: our own write of the same bytes meets it first
        probe = aside / "tokenizer.json"
        probe.write_text(cast(PreTrainedTokenizerFast, policy.tokenizer).backend_tokenizer.to_str(pretty=True), "utf-8")
        probe.unlink()
        policy.tokenizer.save_pretrained(aside)
        card = aside / "README.md"
        if card.exists():
            # PEFT's names the base model by its path on this machine; adapter_config.json needs it, readers do not
            card.write_text(without_places(card.read_text("utf-8"), [policy.source]), "utf-8")
