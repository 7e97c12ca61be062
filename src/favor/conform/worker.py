"""The process in which a trainer runs: one run after the other, so that its imports are paid once; whatever it does stays here.

In: an adapter, a folder with a job.json in each of its folders. Out: a result.json and a log.txt beside each. Next: run.py.

    python -m favor.conform.worker ADAPTER FOLDER
"""

import contextlib
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from favor.errors import FavorError, clipped
from favor.rewards.user import find_function
from favor.run import read_json, write_json

# letters of a message that is kept
_LONGEST = 300


def work(adapter: Path, folder: Path, rank: int = 0) -> None:
    """Every run of the folder that has no result yet, in the order of its names."""
    train: Callable[..., Any] | None = None
    for job in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (job / "result.json").exists():
            continue
        with _captured(job / ("log.txt" if rank == 0 else f"log-{rank}.txt")):
            result: dict[str, Any] = {}
            try:
                train = train or find_function(f"{adapter}:train")
                result = _result(train, job)
            except FavorError as error:
                # what the adapter raised, where it is no error of favor's own
                wrapped = str(error).startswith(f"{adapter}:train: failed")
                inner = error.__context__ if wrapped and error.__context__ else error
                said = " ".join(str(inner).split()).replace(f"{folder}/", "")
                result = {"error": type(inner).__name__, "said": clipped(said, _LONGEST)}
        if rank == 0:
            write_json(job / "result.json", result)


def _result(train: Callable[..., Any], job: Path) -> dict[str, Any]:
    """Where the model lies and its losses. Raises what the trainer raises, as FavorError."""
    asked, told = read_json(job / "job.json"), {}
    losses: list[float] = []
    for more in asked["calls"]:
        told = train(asked["model"], asked["rows"], str(job / "trained"), asked["settings"] | more) or {}
        losses += [float(loss) for loss in told.get("losses") or ()]
    return {"model": told.get("model"), "losses": losses}


@contextlib.contextmanager
def _captured(log: Path) -> Generator[None]:
    """What is written to stdout and stderr goes into the file, also by libraries that write to the descriptors."""
    kept = [os.dup(number) for number in (1, 2)]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            # of loggers that hold the streams themselves
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ.get("RANK", "0")))
