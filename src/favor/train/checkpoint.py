"""Checkpoints: weights, optimizer and place in the data, as safetensors and JSON; whole or absent.

In: the training state at the end of a step. Out: a folder `step-000040`, and the state back from it bit
for bit. Next: preference.py.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from favor.config import STRICT
from favor.data.loader import LoaderState
from favor.errors import CheckpointError
from favor.model.load import Policy
from favor.run import atomic_folder

_BESIDE = "reference.safetensors"


class TrainingState(BaseModel):
    """Where training stands after `step` optimizer steps."""

    model_config = STRICT
    step: int = 0
    epoch: int = 0
    position: int = 0
    seconds: float = 0.0
    reference: str = ""
    data: str = ""
    kl_coef: float | None = None

    def after_step(self, place: LoaderState, seconds: float) -> "TrainingState":
        """The state one step later; `place` is where the loader then stands."""
        update = {"step": self.step + 1, "epoch": place.epoch, "position": place.position, "seconds": seconds}
        return self.model_copy(update=update)

    def epochs(self, num_trees: int) -> float:
        """Epochs done, with their fraction."""
        return self.epoch + self.position / num_trees


def save(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    keep: int,
    beside: Mapping[str, Tensor],
) -> Path:
    """Write `folder/step-NNNNNN` aside, fsync, rename; then remove all but the newest `keep` checkpoints.

    beside: weights that move without being trained, such as TR-DPO's reference.
    """
    path = folder / f"step-{state.step:06d}"
    with atomic_folder(path) as aside:
        save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, aside / "policy.safetensors")
        save_file(_optimizer_tensors(parameters, optimizer), aside / "optimizer.safetensors")
        if beside:
            save_file({name: t.detach().cpu().contiguous() for name, t in beside.items()}, aside / _BESIDE)
        (aside / "state.json").write_text(state.model_dump_json(indent=2) + "\n", "utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.exists() else []


def load(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    expected: TrainingState,
    beside: Mapping[str, Tensor],
) -> TrainingState:
    """Put weights and optimizer state back in place.

    Raises CheckpointError when the checkpoint is damaged or belongs to another reference or other data.
    """
    try:
        state = TrainingState.model_validate_json((path / "state.json").read_text("utf-8"))
        policy, moments = load_file(path / "policy.safetensors"), load_file(path / "optimizer.safetensors")
        moved = load_file(path / _BESIDE) if beside else {}
    except (OSError, ValueError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: damaged checkpoint ({error}); delete this folder to resume from the one before"
        ) from None
    for name in ("reference", "data"):
        if getattr(state, name) != getattr(expected, name):
            raise CheckpointError(f"{path}: was written with another {name}; resume with what the run started with")
    if policy.keys() != parameters.keys():
        raise CheckpointError(
            f"{path}: holds other weights than this model; resume with the model the run started with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(policy[name])
        for name, tensor in beside.items():
            tensor.copy_(moved[name])
    _restore(parameters, optimizer, moments)
    return state


def save_model(policy: Policy, folder: Path) -> None:
    """The final model folder, as transformers (or PEFT, for adapters) loads it, with its tokenizer."""
    with atomic_folder(folder) as aside:
        policy.model.save_pretrained(aside)
        policy.tokenizer.save_pretrained(aside)


def _optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def _restore(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    for name, parameter in parameters.items():
        mine: dict[str, Any] = {
            key.removesuffix(f".{name}"): value
            for key, value in moments.items()
            if key.endswith(f".{name}") and "." not in key.removesuffix(f".{name}")
        }
        optimizer.state[parameter] = {k: v if v.dim() == 0 else v.to(parameter.device) for k, v in mine.items()}
