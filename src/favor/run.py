"""The run folder: the names of everything in it, atomic writes, append-only metrics. No torch here.

In: a path and plain records. Out: files that are either whole or absent. Next: data/types.py.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from favor.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps things; every reader and writer takes the names from here."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved recipe (TOML)."""
        return self.root / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line; `kind` says which: step, eval, event (docs/metrics.md)."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint, `step-000040`."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The final model folder, as transformers or PEFT loads it."""
        return self.root / "model"

    @property
    def reference(self) -> Path:
        """The reference store, unless the recipe names another place."""
        return self.root / "reference.safetensors"

    @property
    def data_report(self) -> Path:
        """What was read, merged, cut and dropped (JSON)."""
        return self.root / "data.json"

    @property
    def evaluation(self) -> Path:
        """Held-out figures (JSON), written by `favor eval`."""
        return self.root / "eval.json"

    @property
    def samples(self) -> Path:
        """Samples of reference and policy side by side (JSONL)."""
        return self.root / "samples.jsonl"

    @property
    def frontier(self) -> Path:
        """Reward against KL of every method (JSON), written by `favor frontier`."""
        return self.root / "frontier.json"

    @property
    def winrate(self) -> Path:
        """Win rates (JSON), written by `favor winrate`."""
        return self.root / "winrate.json"

    @property
    def winrate_samples(self) -> Path:
        """Responses of both sides beside each other, with the judge's verdict (JSONL)."""
        return self.root / "winrate-samples.jsonl"

    @property
    def winrate_settings(self) -> Path:
        """What the responses of both sides were made with (JSON)."""
        return self.root / "winrate-settings.json"

    @property
    def judgments(self) -> Path:
        """One line per judged (prompt, first, second)."""
        return self.root / "judgments.jsonl"

    def responses(self, side: str) -> Path:
        """Responses sampled for side `a` or `b` of a win rate (JSONL)."""
        return self.root / f"responses-{side}.jsonl"

    @property
    def report(self) -> Path:
        """The static page."""
        return self.root / "report.html"


def cache_folder() -> Path:
    """$FAVOR_CACHE, else $XDG_CACHE_HOME/favor, else ~/.cache/favor."""
    if chosen := os.environ.get("FAVOR_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "favor"


def start(root: Path, config_text: str, *, resume: bool) -> RunFolder:
    """Open a run folder: a new one is created, an old one needs `resume` and the same recipe.

    Raises ConfigError when the folder already holds a run and `resume` is false, when there is nothing
    to resume, or when the recipe differs from the one the run was started with.
    """
    folder = RunFolder(root)
    if resume:
        if not folder.config.exists():
            raise ConfigError(f"{root}: nothing to resume (no config.toml); start the run without resume=true")
        _same_recipe(folder.config, config_text)
        return folder
    if _has_steps(folder):
        raise ConfigError(f"{root}: already holds a run; continue it with resume=true or choose another run=FOLDER")
    make_folder(root)
    folder.metrics.unlink(missing_ok=True)
    write_text(folder.config, config_text)
    return folder


def _has_steps(folder: RunFolder) -> bool:
    """Whether training got anywhere: a start that failed before its first step may be repeated."""
    if folder.checkpoints.exists() or folder.model.exists():
        return True
    return folder.metrics.exists() and any(record.get("kind") == "step" for record in read_jsonl(folder.metrics))


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises ConfigError if a file is in the way or it may not be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be used as a folder ({error.strerror}); choose another run=FOLDER") from None


def _same_recipe(path: Path, config_text: str) -> None:
    def settings(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("resume =")]

    before, now = settings(path.read_text("utf-8")), settings(config_text)
    changed = [line for line in now if line not in before] + [line for line in before if line not in now]
    if changed:
        raise ConfigError(
            f"{path}: the run was started with another recipe (differs in: {'; '.join(changed[:3])}); "
            "resume with the same settings or start a new run"
        )


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line and flush it to the operating system."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a torn last line (a killed writer) is passed over.

    Raises CheckpointError when any earlier line is not JSON.
    """
    # not splitlines: a text may hold U+2028, which JSON leaves as it is
    lines = path.read_text("utf-8").removesuffix("\n").split("\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise CheckpointError(
                    f"{path}, line {number}: not JSON; the file was damaged, remove that line"
                ) from None
    return records


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: aside, fsync, rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Fill a folder aside and rename it into place; on an error nothing of it remains.

    Every file is fsynced before the rename, so after a crash the folder is whole or absent. An older
    folder of that name is replaced.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in sorted(aside.rglob("*")):
            fsync(file)
        if path.exists():
            shutil.rmtree(path)
        aside.replace(path)
        fsync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
