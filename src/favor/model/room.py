"""How much memory a model may use: the machine's, within what a container allows; what becomes of memory that is freed.

In: the operating system's figures. Out: Room. Next: size.py.
"""

import ctypes
import platform
from pathlib import Path
from typing import NamedTuple

import psutil

_CGROUP = Path("/sys/fs/cgroup")


class Room(NamedTuple):
    """Memory for a model, bytes: all there is and what is free; the name of where it is."""

    total: int
    free: int
    name: str


def memory() -> Room:
    """The machine's memory, or what its container allows of it; what the system keeps of files counts as free."""
    found = psutil.virtual_memory()
    limit, used = numbers("memory.max", "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    if limit > 0 and used == 0:
        used, _ = numbers("memory.current")
    if not 0 < limit < found.total:
        return Room(found.total, found.available, "memory")
    kept = _kept_of_files("memory.stat", "memory/memory.stat")
    return Room(limit, min(found.available, limit - used + kept), "memory that this container may use")


def peak() -> int:
    """Most bytes that this process held until now (Linux; elsewhere what it holds now)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    # not ru_maxrss, which a process takes over from the one that starts it
    return next(
        int(line.split()[1]) << 10 for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM")
    )


def memory_settings() -> None:
    """Let glibc keep freed memory (Linux): large CPU tensors are then not paged in again at every step."""
    _glibc(mapped_from=1 << 30, kept=(1 << 31) - 1)


def give_back_freed() -> None:
    """Let glibc return every large tensor that is freed: what is collected for a moment, in ever other sizes, would add up."""
    _glibc(mapped_from=1 << 20, kept=1 << 20)


def _glibc(*, mapped_from: int, kept: int) -> None:
    """Where tensors begin to have memory of their own, and how much of the rest stays when it is freed; bytes."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc.mallopt(m_mmap_threshold, mapped_from)
    libc.mallopt(m_trim_threshold, kept)


def numbers(both: str, *apart: str) -> tuple[int, int]:
    """Two numbers of control groups, of one file (version 2) or two (version 1); 0 for `max` and for what is not there."""
    words = _words(both) or [word for path in apart for word in _words(path)[:1]]
    first, second, *_ = [*(int(word) if word.lstrip("-").isdigit() else 0 for word in words[:2]), 0, 0]
    return first, second


def _words(path: str) -> list[str]:
    try:
        return (_CGROUP / path).read_text("utf-8").split()
    except OSError:
        return []


def _kept_of_files(*places: str) -> int:
    for path in places:
        words = _words(path)
        if "inactive_file" in words:
            return int(words[words.index("inactive_file") + 1])
    return 0
