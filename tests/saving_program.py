"""`favor` that is killed while its second checkpoint is being written and training goes on. Run by test_saving.py."""

import os
import signal
import threading

from favor.cli import main
from favor.train import checkpoint, loop

CALLS, WRITING = [], threading.Event()
SAVE_FILE, RECORD = checkpoint.save_file, loop.Turn.record


def half(tensors, path):
    """The first file of the second checkpoint never ends."""
    CALLS.append(path)
    SAVE_FILE(tensors, path)
    if len(CALLS) == 3:
        os.truncate(path, path.stat().st_size // 2)
        WRITING.set()
        threading.Event().wait()


def record(turn, *given):
    """Killed when the step after it is recorded."""
    RECORD(turn, *given)
    if turn.state.step == 5:
        assert WRITING.wait(60)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    checkpoint.save_file, loop.Turn.record = half, record
    main()
