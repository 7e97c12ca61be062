"""A trainer in a process of its own, which may crash, hang or end: that is a result, and the next run goes on in a new one.

In: an adapter, a folder of jobs. Out: a result.json in each. Next: worker.py.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from favor.run import write_json

Advance: TypeAlias = Callable[[str, int, int], None]
_LOOK_S = 0.05
# nothing is asked of a hub and nothing is told to one; lines of a command that is quiet are wanted here; results of a CPU
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "warning",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}


def carry_out(adapter: Path, folder: Path, launch: Sequence[str], timeout_s: float, progress: Advance) -> None:
    """Until every job has a result; one whose process ended, or took longer than timeout_s, gets that as its result."""
    jobs = sorted(path for path in folder.iterdir() if path.is_dir())
    label = "runs on two processes" if launch else "runs"
    words = [sys.executable, *launch, "-m", "favor.conform.worker", str(adapter), str(folder)]
    while _left(jobs):
        with (folder / "process.txt").open("ab") as log:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,
            )
        try:
            late = _watched(process, jobs, timeout_s, lambda done: progress(label, done, len(jobs)))
        finally:
            _end(process)
        if left := _left(jobs):
            ended = f"its process ended with exit code {process.returncode}"
            said = f"took longer than {timeout_s:g} s" if late else ended
            write_json(left[0] / "result.json", {"error": "Ended", "said": said})
            progress(label, 1, len(jobs))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """With all that it started: torchrun ends its processes, which have groups of their own, where it is asked first."""
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _watched(
    process: "subprocess.Popen[bytes]", jobs: Sequence[Path], timeout_s: float, tell: Callable[[int], None]
) -> bool:
    """Until it ends; whether it took too long over one job. tell: how many more are done."""
    count, since, running = len(_left(jobs)), time.monotonic(), True
    while running:
        # asked before the results are counted, so that none is missed
        running = process.poll() is None
        if (now := len(_left(jobs))) < count:
            tell(count - now)
            count, since = now, time.monotonic()
        if running and count and time.monotonic() - since > timeout_s:
            return True
        time.sleep(_LOOK_S if running else 0)
    return False


def _left(jobs: Sequence[Path]) -> list[Path]:
    return [job for job in jobs if not (job / "result.json").exists()]
