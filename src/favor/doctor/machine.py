"""The machine: processors, cores, memory, disks; what limits a container sets to them.

In: the operating system's figures. Out: Signs. Next: speed.py.
"""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from favor.doctor.settings import Sign, size
from favor.errors import refused
from favor.model.room import Room, numbers
from favor.run import cache_folder

# bytes a weight of training in full (weights, gradients, two moments of AdamW) and of adapters (the frozen weights), float32
FULL, LORA = 16, 4
# free bytes of a disk below which nothing can be kept, and below which a model of 1B parameters with a checkpoint does not fit
_NO_DISK, _LITTLE_DISK = 64 << 20, 20 << 30
# what is written to see whether a disk takes anything
_TRIED = 1 << 20
# cores busy with something else from which times are not those of this machine alone
_BUSY = 0.5


def cores() -> int:
    """Cores that this process may use: those it may run on, within what its container allows."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota, period = numbers("cpu.max", "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
    return max(1, min(allowed, -(-quota // period))) if quota > 0 and period > 0 else allowed


def processor() -> Sign:
    """The cores, what else they do, and how many threads the environment allows."""
    count, here = cores(), f"{_name()}, {cores()} of {psutil.cpu_count() or 1} cores for favor"
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) != count:
        less = "some stay idle" if int(threads) < count else "threads wait for each other"
        return Sign("note", "CPU", f"{here}; OMP_NUM_THREADS={threads}, so {less}", f"unset it, or set it to {count}")
    load = psutil.getloadavg()[0]
    if load > _BUSY * count:
        said = f"{here}; in the last minute {load:.1f} programs wanted one, so what is measured below is too slow"
        return Sign("note", "CPU", said, "ask again when the machine is idle")
    return Sign("ok", "CPU", here)


def _name() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if sys.platform == "linux" else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def room_said(room: Room) -> Sign:
    """How large a model fits."""
    full, lora = (room.free / each / 1e9 for each in (FULL, LORA))
    fits = f"up to about {full:.2g}B parameters train in full, {lora:.2g}B with LoRA (estimate)"
    said = f"{size(room.free)} of {size(room.total)} free: {fits}"
    figures = {"free": room.free, "total": room.total}
    if full >= 0.15:
        return Sign("ok", room.name, said, figures=figures)
    todo = (
        "that is little even for a model of 135M parameters: end other programs, or train adapters (model.lora.rank=16)"
    )
    return Sign("note", room.name, said, todo, figures)


def disks(hub_cache: Path) -> Iterator[Sign]:
    """Where runs and both caches lie: how much is free, and whether anything can be written."""
    places: Mapping[str, tuple[Path, str]] = {
        "disk of runs": (Path("runs"), "free some space, or give run= a place elsewhere"),
        "disk of favor's cache": (cache_folder(), "free some space, or set FAVOR_CACHE to a place elsewhere"),
        "disk of the hub's cache": (hub_cache, "free some space, or set HF_HOME to a place elsewhere"),
    }
    return (_disk(topic, place, todo) for topic, (place, todo) in places.items())


def _disk(topic: str, place: Path, todo: str) -> Sign:
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.is_dir())
    try:
        free = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(_TRIED))
    except OSError as error:
        return Sign("broken", topic, refused(error, there), todo)
    said, figures = f"{size(free)} free at {place}", {"free": free}
    if free < _NO_DISK:
        return Sign("broken", topic, said, todo, figures)
    if free < _LITTLE_DISK:
        little = f"{said}; a model of 1B parameters takes 4 GB, each of its checkpoints 12 GB"
        return Sign("note", topic, little, todo, figures)
    return Sign("ok", topic, said, figures=figures)
