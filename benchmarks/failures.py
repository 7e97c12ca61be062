"""The pictures of docs/failures.md: each fault is made on purpose and drawn beside a sound run of the same pairs.

    python benchmarks/failures.py [--out FOLDER]

Start and pairs are those of starting_values.py at 3 layers. Writes docs/failures/NAME.svg and prints what the runs said of
themselves: their notes and warnings.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from starting_values import NO_CHECKPOINTS, PLAIN, Inputs, fine_tuned, inputs

import favor
from favor.report.curves import curve
from favor.report.plot import standalone
from favor.report.records import collect
from favor.run import RunFolder, read_jsonl, write_jsonl

PICTURES = Path(__file__).parent.parent / "docs/failures"
SOUND = {"lr": 2e-4, "epochs": 2, "warmup": 0.1, "beta": 0.1}
SMALL = 48


class Fault(NamedTuple):
    """What differs from the sound run, how the run is called in the picture, and which curve shows it."""

    settings: Mapping[str, Any]
    label: str
    curve: str
    pairs: int | None = None


FAULTS = {
    "too-slow": Fault({"lr": 1e-6}, "lr 1e-6", "Loss"),
    "warm-up": Fault({"warmup": 100}, "100 steps of warm-up", "Learning rate"),
    "too-fast": Fault({"lr": 5e-3}, "lr 5e-3", "Sampled KL (how far the model moved)"),
    "by-heart": Fault({"epochs": 14}, f"{SMALL} pairs, 14 epochs", "Preference accuracy", SMALL),
    "both-fall": Fault({"lr": 6e-4, "epochs": 4}, "lr 6e-4, 4 epochs", "Implicit rewards"),
    "small-beta": Fault({"beta": 0.01}, "beta 0.01", "Sampled KL (how far the model moved)"),
}


def main() -> None:
    """Train what is missing, draw everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/starting-values"), help="folder of all runs")
    out = parser.parse_args().out
    given = inputs(out)
    start = fine_tuned("3 layers", given, out)
    sound = trained(start, given, "sound", Fault({}, "sound", ""))
    PICTURES.mkdir(exist_ok=True)
    for name, fault in FAULTS.items():
        run = trained(start, given, fault.label, fault)
        drawn = curve([collect(run), collect(sound)], fault.curve, "step")
        (PICTURES / f"{name}.svg").write_text(standalone(drawn.svg), "utf-8")
        print(f"{name}: {'; '.join(said(run)) or 'nothing was said'}")


def trained(start: Path, given: Inputs, label: str, fault: Fault) -> Path:
    """The run of a fault; one that is there is kept."""
    run = RunFolder(start.parent / "failures" / label)
    pairs = given.pairs
    if fault.pairs is not None:
        pairs = given.pairs.with_name(f"train-{fault.pairs}.jsonl")
        write_jsonl(pairs, read_jsonl(given.pairs)[: fault.pairs])
    if not run.model.exists():
        settings: dict[str, Any] = {**SOUND, **fault.settings}
        beta = settings.pop("beta")
        favor.train(
            str(start / "model"),
            str(pairs),
            eval=str(given.test),
            out=run.root,
            resume=run.config.exists(),
            dtype="float32",
            tokens=PLAIN,
            loss={"kind": "dpo", "beta": beta},
            watch={"kl": {"every": 5, "prompts": 16, "tokens": 32}, "eval": {"every": 5}},
            save=NO_CHECKPOINTS,
            **settings,
        )
    return run.root


def said(run: Path) -> list[str]:
    """The notes and warnings of a run."""
    events = [record for record in read_jsonl(RunFolder(run).metrics) if record["kind"] == "event"]
    return [str(e["message"]) for e in events if str(e["message"]).startswith(("note:", "warning:"))]


if __name__ == "__main__":
    main()
