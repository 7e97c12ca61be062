"""Signals that end a command: Ctrl-C, SIGTERM, SIGHUP. A loop ends after its step; anything else ends at once.

In: signals. Out: StopRequest for loops to look at, or an exception. Next: train/session.py.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Generator
from dataclasses import dataclass
from types import FrameType

from favor.errors import FavorError

AFTER_THIS_STEP = "stopping after this step, with a checkpoint (again: at once)"


class StoppedError(FavorError):
    """Training was asked to stop by a signal and did so cleanly, with a checkpoint."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StoppedAtOnceError(BaseException):
    """A signal where no loop looks. No Exception, so that no library that catches those goes on as if nothing were."""

    def __init__(self, signal_number: int, kept: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {kept}")
        self.exit_code = 128 + signal_number


@dataclass
class StopRequest:
    """`signal_number` is set by the first signal while a loop looks between its steps; see `looked_at`."""

    signal_number: int | None = None
    told: str | None = None

    @contextlib.contextmanager
    def looked_at(self, told: str = AFTER_THIS_STEP) -> Generator[None]:
        """For the time of the block a first signal only sets the request, and the user is told `told`."""
        self.told = told
        try:
            yield
        finally:
            self.told = None


@contextlib.contextmanager
def stop_signals(kept: str) -> Generator[StopRequest]:
    """Ctrl-C, SIGTERM and SIGHUP end the block: between steps where a loop looks, else by StoppedAtOnceError.

    kept: what is left of the work then. A signal that is ignored (SIGHUP under nohup) stays ignored.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def handler(number: int, _frame: FrameType | None) -> None:
        # a terminal that has hung up refuses every line, and that must not cost the checkpoint
        for stream in terminals if number == signal.SIGHUP else []:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if request.told is None or request.signal_number is not None:
            seen = request.signal_number is not None
            raise StoppedAtOnceError(number, "nothing was saved since the last checkpoint" if seen else kept)
        request.signal_number = number
        # not print: the handler may have come in the middle of one
        with contextlib.suppress(OSError):
            os.write(2, f"favor: {request.told}\n".encode())

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield request
    finally:
        for number, old in before.items():
            signal.signal(number, old)
