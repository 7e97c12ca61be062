"""Which process am I of how many. One process needs no launcher; several come from torchrun.

In: torchrun's environment variables. Out: World. Next: reduce.py.
"""

import contextlib
import os
from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.distributed as dist


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
    """Join the process group when torchrun started us (gloo on CPU, nccl on GPU) and leave it at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield World(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def current() -> World:
    """The group that `world` has joined; one process without one."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else World()


def barrier(members: World) -> None:
    """Wait for every rank."""
    if members.size > 1:
        dist.barrier()
