"""`favor train`.

In: what `favor conform` asks. Out: the folder of the trained model and its losses.
"""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from favor.config import load
from favor.ranks import on_main, world
from favor.run import RunFolder, read_jsonl, write_jsonl
from favor.stop import StoppedError, StopRequest
from favor.train.preference import TrainConfig
from favor.train.preference import train as prefer
from favor.train.session import Session

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def train(model: str, rows: list[dict[str, Any]], out: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Accumulation is a pack for every prompt: favor cuts a batch by tokens, not by pairs."""
    data, stop = Path(f"{out}.jsonl"), StopRequest()
    with world() as members:
        on_main(members, lambda: write_jsonl(data, rows))
        asked = {
            "run": out,
            "model.path": model,
            "model.device": "cpu",
            "data.train": data,
            "loss.beta": settings["beta"],
            "optim.lr": settings["lr"],
            "optim.clip": settings["clip"],
            "train.batch_prompts": settings["batch"],
            "train.epochs": settings["epochs"],
            "train.max_tokens_per_pack": 1 if settings["accumulation"] > 1 else "auto",
            "train.shuffle": "false",
            "tokens.max_tokens": settings["max_length"] or 1024,
            "seed": settings["seed"],
            "resume": str(settings.get("resume", False)).lower(),
        }
        config = load(TrainConfig, None, [f"{key}={value}" for key, value in asked.items()])

        def tell(record: Mapping[str, object]) -> None:
            if record["kind"] == "step" and record["step"] == settings.get("stop_after"):
                stop.signal_number = signal.SIGTERM

        try:
            prefer(config, lambda root: Session(RunFolder(root), members, Console(), stop, tell))
        except StoppedError:
            return {}
    steps = [record["loss"] for record in read_jsonl(RunFolder(Path(out)).metrics) if record["kind"] == "step"]
    return {"model": str(RunFolder(Path(out)).model), "losses": steps}
