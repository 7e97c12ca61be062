"""Which process am I of how many, and sums over all of them. One process needs no launcher; several come from torchrun.

In: torchrun's environment variables; tensors of this rank. Out: World; sums over all ranks. Next: train/step.py.
"""

import contextlib
import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from favor.config import STRICT
from favor.errors import ConfigError, LostError, first_line

# how weights are spread: on every rank, split over all of them, or over those of each machine
Shard: TypeAlias = Literal["none", "full", "hybrid"]
# what gloo says when the process at the other end is gone, or silent for half an hour; nccl has an error of its own
_GONE = ("reset by peer", "closed by peer", "broken pipe", "connection refused", "timed out", "timeout")
_TRIES = "TORCHELASTIC_RESTART_COUNT"
_REMEDY = "start several processes with torchrun, or unset WORLD_SIZE to train in one (SLURM and others set it)"


class RanksConfig(BaseModel):
    """Section [ranks]: how the processes of a run, started with torchrun, hold the model."""

    model_config = STRICT
    shard: Shard = "none"
    """full: each holds a part of weights, gradients and optimizer state; hybrid: of those within its machine; none: all of them."""


@dataclass(frozen=True)
class World:
    """Rank and number of processes."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """The one process that writes files and talks to people."""
        return self.rank == 0


@contextlib.contextmanager
def world() -> Generator[World]:
    """Join the process group when torchrun started us (gloo for CPU tensors, nccl for a GPU's) and leave it at the end.

    Raises ConfigError when the environment speaks of several processes and does not say how they find each other, and
    LostError when one of them ends before the block does.
    """
    size = _number("WORLD_SIZE", 1) if os.environ.get("WORLD_SIZE", "").strip() else 1
    if size == 1:
        yield World()
        return
    if _number("RANK", 0) >= size:
        raise ConfigError(f"RANK is {os.environ['RANK']} but WORLD_SIZE is {size}, and ranks count from 0; {_REMEDY}")
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise ConfigError(f"WORLD_SIZE is {size} but {missing[0]} is not set; {_REMEDY}")
    _number("MASTER_PORT", 1)
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_rank())
    joined = False
    try:
        _join()
        joined = True
        yield World(dist.get_rank(), size)
    except RuntimeError as error:
        said = lost(error)
        if said is None:
            raise
        raise LostError(
            f"another process of this run ended, or cannot be reached, so this one ends too ({said}); what the other one "
            "said says why, unless it was killed, as for its memory. Continue from the newest checkpoint with resume=true"
        ) from None
    finally:
        if joined:
            dist.destroy_process_group()


def _join() -> None:
    store, rank, size = next(rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps what the processes told each other before it started them anew: every try has names of its own
        store = dist.PrefixStore(f"try-{os.environ.get(_TRIES, '0')}", store)
    # nccl knows tensors of a GPU alone
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def lost(error: Exception) -> str | None:
    """How another process was lost; None for an error that says something else."""
    said = str(error).lower()
    if "/gloo/" in said:
        return next((words for words in _GONE if words in said), None)
    return first_line(error) if isinstance(error, dist.DistError) else None


def started_again() -> bool:
    """Whether torchrun started the run anew after one of its processes died (`torchrun --max-restarts`)."""
    return os.environ.get(_TRIES, "0") != "0"


def _number(name: str, least: int) -> int:
    """A whole number of the launcher's. Raises ConfigError when it is missing or none."""
    text = os.environ.get(name, "").strip()
    if not text.isdecimal() or int(text) < least:
        found = f"is {text!r}" if text else "is not set"
        size = os.environ["WORLD_SIZE"]
        raise ConfigError(f"WORLD_SIZE is {size!r} but {name} {found}, expected a number from {least} up; {_REMEDY}")
    return int(text)


def _local_rank() -> int:
    rank, have = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if rank >= have:
        raise ConfigError(f"LOCAL_RANK is {rank} but torch sees {have} GPUs; start one process for each GPU")
    return rank


def current() -> World:
    """The group that `world` has joined; one process without one."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else World()


def on_main(members: World, work: Callable[[], object]) -> None:
    """Run a function on the main rank, while the others wait."""
    if members.is_main:
        work()
    barrier(members)


def barrier(members: World) -> None:
    """Wait for every rank."""
    if members.size > 1:
        dist.barrier()


def sum_(tensor: Tensor, members: World) -> Tensor:
    """Sum a tensor over ranks, in place; returns it."""
    if members.size > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(number: int, members: World) -> int:
    """The largest of the ranks' numbers, so that all of them decide alike."""
    tensor = torch.tensor([number])
    if members.size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def from_main(number: int, members: World) -> int:
    """The main rank's number: of a folder that several machines share another one may see what it was a minute ago."""
    tensor = torch.tensor([number])
    if members.size > 1:
        dist.broadcast(tensor, 0)
    return int(tensor)


def sum_gradients_(parameters: Iterable[nn.Parameter], members: World) -> None:
    """Sum gradients over ranks, in place. A parameter this rank did not touch counts as zero.

    Sums, not means: the loss was divided by the global count before the backward. Those of parameters that are split over
    ranks were summed in the backward.
    """
    if members.size == 1:
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
