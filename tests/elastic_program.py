"""`favor` under torchrun, in which the last process kills itself after the third optimizer step. Run by test_elastic.py.

By then the checkpoint after the second step is written. Words: where to note the time of that, then favor's own.
"""

import os
import signal
import sys
import time
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from favor.cli import main


def dies(note, written):
    """Only on torchrun's first try."""
    taken = []

    def hook(*_):
        taken.append(1)
        if len(taken) == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            while not written.exists():
                time.sleep(0.01)
            note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(hook)


if __name__ == "__main__":
    place, *words = sys.argv[1:]
    if place and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        run = next(word.removeprefix("run=") for word in words if word.startswith("run="))
        dies(Path(place), Path(run) / "checkpoints/step-000002")
    sys.argv[1:] = words
    main()
