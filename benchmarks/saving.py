"""How long a step waits for a checkpoint: written by a thread while training goes on, and before it goes on.

    python benchmarks/saving.py [--repeats 5] [--prompts 8]

SmolLM2-135M-Instruct, all weights, AdamW, on the demo's film quotes. A turn: an ordinary step; a checkpoint that training waits
for, and a step; one in the background, the step beside it, and what is left of the writing after that.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from favor.config import load
from favor.demo import model_folder, review_files
from favor.losses.table import make_loss
from favor.model.layout import settle
from favor.model.load import load_policy
from favor.model.room import memory_settings, peak
from favor.ranks import World
from favor.run import RunFolder, cache_folder
from favor.stop import StopRequest
from favor.train import checkpoint
from favor.train.loop import make_training
from favor.train.preference import TrainConfig, make_objective
from favor.train.reference import none
from favor.train.session import Session, TrainingState, load_splits
from favor.train.step import step


def main() -> None:
    """Print seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    args = parser.parse_args()
    memory_settings()
    with tempfile.TemporaryDirectory() as place:
        found = turns(Path(place), args.repeats, args.prompts)
    for name, values in found.items():
        shown = ", ".join(f"{value:.2f}" for value in values)
        print(f"{name}: {statistics.median(values):.2f} ({shown})")


def turns(place: Path, repeats: int, prompts: int) -> dict[str, list[float]]:
    """Seconds and GiB by name, one for each turn."""
    cache, say = cache_folder(), Console().print
    words = [f"run={place}", f"model.path={model_folder(cache, say)}"]
    words += [f"data.train={review_files(cache, say) / 'train.jsonl'}", f"train.batch_prompts={prompts}"]
    config = load(TrainConfig, None, [*words, "train.max_tokens_per_pack=1024"])
    session = Session(RunFolder(place), World(), Console(quiet=True), StopRequest())
    session.folder.metrics.touch()
    policy = load_policy(config.model, 0)
    trees = load_splits(config.data, config.tokens, policy, session).train
    few = [trees[i] for i in range(prompts)]
    policy, _ = settle(policy, "auto", few, train=True)
    training = make_training(config, policy, range(len(trees)), session)
    objective = make_objective(make_loss(kind="simpo"), policy, none())
    cut = training.micro_batches(few)

    def save(number: int) -> float:
        return timed(lambda: checkpoint.save(session, training.learner, TrainingState(step=number), 2))

    def stepped() -> float:
        return timed(lambda: step(training.learner, cut, objective))

    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    stepped()
    sizes = checkpoint.copy_bytes
    for turn in range(repeats):
        note("a step, s", stepped())
        checkpoint.copy_bytes = lambda *unused: 0
        note("a checkpoint that training waits for, s", save(2 * turn + 1))
        note("the step after it, s", stepped())
        checkpoint.copy_bytes = sizes
        before = peak()
        note("a checkpoint in the background: training waits, s", save(2 * turn + 2))
        note("the step beside it, s", stepped())
        note("writing after that step, s", timed(session.background.wait))
        note("peak before a copy, GiB", before / 2**30)
        note("peak after it, GiB", peak() / 2**30)
    size = sum(p.numel() for p in training.learner.parameters.values()) * 12 / 2**30
    print(
        f"{torch.get_num_threads()} threads, {sum(b.num_tokens for b in cut)} tokens a step, {size:.2f} GiB a checkpoint"
    )
    return found


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
