"""Where to start: DPO over learning rates, betas and epochs, on one task, for three sizes of model.

    python benchmarks/starting_values.py [--out FOLDER] [SIZE ...]

The task is that of `favor frontier`: one-line film reviews, 320 pairs of a fresh and a rotten quote; judged on 80 held-out
pairs and on samples, by the classifier that neither saw. Sizes: SmolLM2-135M-Instruct, whole and cut to 3 and 10 of its
layers, each fine-tuned first on quotes of both kinds. A point that is there is kept, so it can be stopped and run again.
Writes points.jsonl and prints the table of docs/choose.md; docs/pictures.py draws it.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from favor_frontier.films import film_files
from favor_frontier.shrink import shrink
from markupsafe import Markup

import favor
from favor.demo import model_folder, review_files
from favor.eval.evaluate import EvalConfig, evaluate
from favor.report.plot import Axes, Line, chart, standalone
from favor.rewards.classifier import Judge, train_judge
from favor.run import RunFolder, cache_folder, read_jsonl, write_jsonl

BETA, BETAS = 0.1, (0.03, 0.5)
EPOCHS = 3
PAIRS, HELD_OUT, PROMPTS = 320, 80, 24
PLAIN = {"template": "plain"}
NO_CHECKPOINTS = {"every": 0}
# a set of values that nobody would keep, whatever the classifier says of it
MOST_KL, LEAST_ENDED = 20.0, 0.75
PICTURE = Path(__file__).parent.parent / "docs/starting-values.svg"
# nearer to the start, points stand on each other
LEAST_LABELLED = 0.5


class Size(NamedTuple):
    """Layers of the source that are kept (none: all, with its vocabulary), how it is fine-tuned, and the rates to try."""

    layers: tuple[int, ...]
    sft: Mapping[str, Any]
    rates: tuple[float, ...]
    # beta and epochs too, at the best rate
    further: bool = False


_SMALL_SFT = {"lr": 1e-3, "schedule": "cosine", "warmup": 5, "epochs": 2, "batch_prompts": 16}
SIZES = {
    "3 layers": Size((0, 1, 2), _SMALL_SFT, (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3), further=True),
    "10 layers": Size((0, 1, 2, 3, 4, 25, 26, 27, 28, 29), _SMALL_SFT, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)),
    "30 layers": Size((), {"lr": 1e-4, "warmup": 2, "batch_prompts": 8, "max_rows": 320}, (1e-5, 3e-5, 1e-4, 3e-4)),
}


class Values(NamedTuple):
    """What a point is trained with."""

    lr: float
    beta: float = BETA
    epochs: int = 1

    @property
    def name(self) -> str:
        """As a folder is called."""
        return f"lr-{self.lr:g}-beta-{self.beta:g}-epochs-{self.epochs}"


class Inputs(NamedTuple):
    """Files of the task."""

    sft: Path
    pairs: Path
    test: Path
    judge: Judge


def main() -> None:
    """Run the points that are missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", help=f"of {', '.join(SIZES)}; without them all")
    parser.add_argument("--out", type=Path, default=Path("runs/starting-values"), help="folder of all runs")
    args = parser.parse_args()
    given = inputs(args.out)
    points: list[dict[str, Any]] = []
    for name in args.sizes or SIZES:
        start = fine_tuned(name, given, args.out)
        found = [point(start, Values(rate), given) for rate in SIZES[name].rates]
        if SIZES[name].further:
            best = min(found, key=order)["lr"]
            tried = [*(Values(best, beta) for beta in BETAS), Values(best, epochs=EPOCHS)]
            found += [point(start, values, given) for values in tried]
        points += [{"size": name, **row} for row in found]
        write_jsonl(args.out / "points.jsonl", points)
    print("\n".join(table(points)))
    if not args.sizes:
        PICTURE.write_text(standalone(picture(points)), "utf-8")


def picture(points: list[dict[str, Any]]) -> Markup:
    """Score of samples against KL: a line a size, a point a learning rate."""
    lines: list[Line] = []
    for number, name in enumerate(SIZES):
        mine = [row for row in points if row["size"] == name and (row["beta"], row["epochs"]) == (BETA, 1)]
        mine.sort(key=lambda row: row["lr"])
        x, y = ([row[key] for row in mine] for key in ("kl", "score"))
        texts = [f"{row['lr']:g}" if row["kl"] > LEAST_LABELLED else "" for row in mine]
        lines.append(Line(x, y, name, number, marks=True, texts=texts, up=[row["score_interval"] for row in mine]))
    axes = Axes(
        "Score of samples against KL, by learning rate",
        "KL, nats an answer (square root)",
        "score of samples",
        640,
        360,
        "sqrt",
        inside=True,
    )
    return chart(axes, lines)


def order(row: Mapping[str, Any]) -> tuple[bool, float]:
    """Sorts points from the best on: those that stayed near and whose samples end, then by the score of the samples."""
    return row["kl"] > MOST_KL or row["ended"] < LEAST_ENDED, -row["score"]


def inputs(out: Path) -> Inputs:
    """The task's files, with the prompt of the fine-tuning in the pairs too."""
    cache = cache_folder()
    reviews, films = review_files(cache, print), film_files(cache, print)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", PAIRS), ("test", HELD_OUT)):
        found = read_jsonl(reviews / f"{name}.jsonl")[:rows]
        write_jsonl(out / f"{name}.jsonl", [row | {"prompt": _asked(row["prompt"])} for row in found])
    return Inputs(
        films / "sft.jsonl", out / "train.jsonl", out / "test.jsonl", train_judge(reviews / "classifier.jsonl")
    )


def _asked(prompt: str) -> str:
    film = prompt.removeprefix("Write a one-line review of the film ").removesuffix(".")
    return f"One-line review of the film {film}:\n"


def fine_tuned(name: str, given: Inputs, out: Path) -> Path:
    """The run folder of a size's start."""
    size, run = SIZES[name], RunFolder(out / name.replace(" ", "-") / "sft")
    source = model_folder(cache_folder(), print)
    if size.layers:
        source = _cut(source, size, given, run.root.parent / "base")
    if not run.model.exists():
        settings: dict[str, Any] = {"tokens": PLAIN, "dtype": "float32", "out": run.root, "resume": run.config.exists()}
        favor.sft(str(source), str(given.sft), **settings, **size.sft, save=NO_CHECKPOINTS)
    return run.root


def _cut(source: Path, size: Size, given: Inputs, out: Path) -> Path:
    if not out.exists():
        rows = [row for path in given[:3] for row in read_jsonl(path)]
        shrink(source, (text for row in rows for text in row.values() if isinstance(text, str)), size.layers, out)
    return out


def point(start: Path, values: Values, given: Inputs) -> dict[str, Any]:
    """Train and judge one set of values, unless that is done."""
    run = RunFolder(start.parent / values.name)
    kept = run.root / "point.json"
    if kept.exists():
        return json.loads(kept.read_text("utf-8"))
    began = time.monotonic()
    if not run.model.exists():
        favor.train(
            str(start / "model"),
            str(given.pairs),
            eval=str(given.test),
            out=run.root,
            resume=run.config.exists(),
            dtype="float32",
            tokens=PLAIN,
            loss={"kind": "dpo", "beta": values.beta},
            lr=values.lr,
            warmup=0.1,
            epochs=values.epochs,
            save=NO_CHECKPOINTS,
        )
    seconds = time.monotonic() - began
    asked = {"run": str(run.root), "sample_prompts": PROMPTS, "read_at": [], "sample": {"max_new_tokens": 32}}
    figures = evaluate(EvalConfig.model_validate(asked), print, _quiet, ("sentiment", given.judge.score))
    row = {**values._asdict(), "seconds": round(seconds), **_told(figures)}
    kept.write_text(json.dumps(row), "utf-8")
    return row


def _quiet(what: str, done: int, total: int) -> None:
    """No line for each batch of samples."""


def _told(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the table, of favor eval's."""
    score = figures["score"]
    return {
        "accuracy": figures["accuracy"],
        "accuracy_interval": figures["accuracy_interval"],
        "loss": figures["loss"],
        "kl": figures["kl"]["mean"],
        "kl_se": figures["kl"]["se"],
        "score": score["policy"],
        "score_interval": score["policy_interval"],
        "score_start": score["reference"],
        "ended": figures["ended"]["policy"],
        "length": figures["length"]["policy"],
    }


def table(points: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a line a point."""
    yield "| model | lr | beta | epochs | held-out accuracy | KL, nats | score of samples (start) | samples that end |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in points:
        accuracy, score = (
            f"{row[k]:.2f} [{row[k + '_interval'][0]:.2f}, {row[k + '_interval'][1]:.2f}]"
            for k in ("accuracy", "score")
        )
        values = f"{row['lr']:g} | {row['beta']:g} | {row['epochs']}"
        yield (
            f"| {row['size']} | {values} | {accuracy} | {row['kl']:.1f} ± {row['kl_se']:.1f} "
            f"| {score} ({row['score_start']:.2f}) | {row['ended']:.2f} |"
        )


if __name__ == "__main__":
    main()
