"""Ranks that are threads of this process, for what they must decide alike: quick, where processes would take seconds each."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from favor.ranks import World


class Threads:
    """torch.distributed for two threads: what one rank asks, the other must ask next. Stands in for `favor.ranks.dist`."""

    ReduceOp = dist.ReduceOp

    def __init__(self):
        self._gate, self._asked, self._here = threading.Barrier(2, timeout=5), [None, None], threading.local()

    def run(self, work):
        """`work(world)` on both: what each returned, or the exception it raised."""

        def one(rank):
            self._here.rank = rank
            return work(World(rank, 2))

        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(one, rank) for rank in range(2)]
        return [each.exception() or each.result() for each in both]

    def get_rank(self):
        return self._here.rank

    def get_world_size(self):
        return 2

    def is_available(self):
        return True

    is_initialized = is_available

    def _together(self, what, tensor):
        self._asked[self._here.rank] = (what, tensor.clone())
        self._gate.wait()
        asked = list(self._asked)
        self._gate.wait()
        assert asked[0][0] == asked[1][0], f"one rank asks {asked[0][0]}, the other {asked[1][0]}"
        return torch.stack([value for _, value in asked])

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM):
        both = self._together("all_reduce", tensor)
        tensor.copy_(both.sum(0) if op == dist.ReduceOp.SUM else both.amax(0))

    def broadcast(self, tensor, src):
        tensor.copy_(self._together("broadcast", tensor)[src])

    def barrier(self):
        self._together("barrier", torch.zeros(()))
