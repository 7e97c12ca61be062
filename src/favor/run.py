"""The run folder: the names of everything in it, who may write there, atomic writes, append-only lines. No torch here.

In: a path and plain records. Out: files that are either whole or absent. Next: guard.py.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from favor import guard
from favor.errors import CheckpointError, ConfigError, writing

# what a start writes before anything is made of it, by name; the reference store is checked before it is reused
_OPENING = {
    "config.toml",
    "data.json",
    "metrics.jsonl",
    "inputs.json",
    "winrate-settings.json",
    "prompts.jsonl",
    ".lock",
    guard.MARK,
}
_REUSED = {"reference.safetensors"}


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps things; every reader and writer takes the names from here."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved recipe (TOML)."""
        return self.root / "config.toml"

    @property
    def lock(self) -> Path:
        """Held by the process that writes here; says who that is."""
        return self.root / ".lock"

    @property
    def inputs(self) -> Path:
        """Hashes of what entered, where no checkpoint keeps them (JSON)."""
        return self.root / "inputs.json"

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


@contextlib.contextmanager
def start(root: Path, config_text: str, *, resume: bool, main: bool = True) -> Generator[RunFolder]:
    """Open a run folder and hold it: a new one is created, an old one needs `resume` and the same recipe.

    Only the main rank looks and writes. Raises ConfigError when the folder holds a run and `resume` is false or something that is
    not favor's, when there is nothing to resume, when the recipe differs, or while another process holds the folder.
    """
    folder = RunFolder(root)
    if not main:
        yield folder
        return
    if resume and not folder.config.exists():
        raise ConfigError(f"{root}: nothing to resume (no config.toml); start the run without resume=true")
    with opened(folder):
        if resume:
            _same_recipe(folder.config, config_text)
            cut_torn_line(folder.metrics)
        else:
            # a start that failed before anything was made may be repeated
            if holds_work(folder):
                raise ConfigError(
                    f"{root}: already holds a run; continue it with resume=true or choose another run=FOLDER"
                )
            folder.metrics.unlink(missing_ok=True)
            write_config(folder, config_text)
        yield folder


def write_config(folder: RunFolder, text: str) -> None:
    """The resolved recipe, and first the mark by which the folder is known to be favor's: of this recipe and the one before."""
    before = [guard.file_hash(folder.config)] if folder.config.exists() else []
    write_json(folder.root / guard.MARK, {"recipes": [*before, guard.sha(text)]})
    write_text(folder.config, text)


@contextlib.contextmanager
def opened(folder: RunFolder) -> Generator[None]:
    """Create a folder where there is none, hold it, and remove what killed processes left.

    A block that fails before anything is made takes back what it created, never what was there before.

    Raises ConfigError when it cannot be used, holds files but no run of favor, or is held by another process.
    """
    root = folder.root
    created = [path for path in (root, *root.parents) if not path.exists()]
    make_folder(root)
    try:
        if not guard.is_ours(root):
            marked = (root / guard.MARK).exists() and folder.config.exists()
            why = "its config.toml is not the one that favor wrote" if marked else "holds files, but no run of favor"
            raise ConfigError(f"{root}: {why}; choose another run=FOLDER")
        with guard.held(folder.lock, str(root)):
            guard.sweep(root)
            before = frozenset(path.name for path in root.iterdir())
            done = False
            try:
                yield
                done = True
            finally:
                if not done:
                    _take_back(folder, before)
    finally:
        # folders that stayed empty
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()


def holds_work(folder: RunFolder) -> bool:
    """Whether something was made of a start."""
    return _made(folder.root, _OPENING | _REUSED)


def _made(root: Path, opening: set[str]) -> bool:
    """Whether there is more than what every start writes, or a step."""
    files = [path for path in root.rglob("*") if not path.is_dir()]
    if (
        any(path.name not in opening and not guard.temporary(path) for path in files)
        or RunFolder(root).checkpoints.exists()
    ):
        return True
    metrics = RunFolder(root).metrics
    return metrics.exists() and '"kind": "step"' in read_text(metrics)


def _take_back(folder: RunFolder, before: frozenset[str]) -> None:
    if _made(folder.root, _OPENING):
        return
    for path in folder.root.iterdir():
        if path.name not in before and path != folder.lock:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def same_inputs(folder: RunFolder, now: Mapping[str, str]) -> None:
    """Keep the hashes of what enters, by name; on a later start compare them.

    Raises CheckpointError naming what has changed since the run began.
    """
    if folder.inputs.exists():
        refuse_changed(str(folder.root), read_json(folder.inputs), now)
    else:
        write_json(folder.inputs, dict(now))


def refuse_changed(where: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises CheckpointError naming every input whose hash differs."""
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        raise CheckpointError(
            f"{where}: began with another {', another '.join(changed)}; resume with what the run started with, "
            "or start a new run"
        )


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises ConfigError if a file is in the way or it may not be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be used as a folder ({error.strerror}); choose another run=FOLDER") from None


def _same_recipe(path: Path, config_text: str) -> None:
    def settings(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("resume =")]

    before, now = settings(read_text(path)), settings(config_text)
    changed = [line for line in now if line not in before] + [line for line in before if line not in now]
    if changed:
        raise ConfigError(
            f"{path}: the run was started with another recipe (differs in: {'; '.join(changed[:3])}); "
            "resume with the same settings or start a new run"
        )


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line: whole, or not at all when the disk is full."""
    append_text(path, json.dumps(record, ensure_ascii=False) + "\n")


def append_text(path: Path, text: str) -> None:
    """Append text and hand it to the operating system; on an error the file is as it was."""
    with writing(path), path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            rest = text.encode("utf-8", "backslashreplace")
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def cut_torn_line(path: Path) -> None:
    """Cut off a torn last line (a killed writer), so that the next line does not continue it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        raw = file.read()
        file.truncate(raw.rfind(b"\n") + 1)


def read_text(path: Path) -> str:
    """A text file; bytes that are not UTF-8 show as such rather than raise."""
    return path.read_text("utf-8", "replace")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError when it is damaged."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged, not the JSON that was written ({error}); delete it and run the command that writes it again"
        ) from None
    return found


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a torn last line (a killed writer) is passed over.

    Raises CheckpointError when any earlier line is not JSON.
    """
    # not splitlines: a text may hold U+2028, which JSON leaves as it is
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8", "surrogatepass"))
            if not isinstance(record, dict):
                raise ValueError("no object")
            records.append(record)
        except ValueError:
            if number < len(lines):
                raise CheckpointError(
                    f"{path}, line {number}: not JSON; the file was damaged, remove that line"
                ) from None
    return records


@contextlib.contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """Fill a file aside, fsync, rename it into place; on an error nothing of it remains and an older file stays."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file")
    aside = guard.aside(path)
    try:
        with writing(path):
            yield aside
            fsync(aside)
            aside.replace(path)
            fsync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(text, "utf-8", "backslashreplace", newline="")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Fill a folder aside and rename it into place; on an error nothing of it remains.

    Every file is fsynced before the rename, so after a crash the folder is whole or absent. An older
    folder of that name is replaced.
    """
    aside = guard.aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(path):
            aside.mkdir(parents=True)
            yield aside
            for file in sorted(aside.rglob("*")):
                fsync(file)
            remove_folder(path)
            aside.replace(path)
            fsync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there; a kill meanwhile leaves it whole or gone."""
    if path.exists():
        old = guard.aside(path.with_name(path.name + ".old"))
        path.replace(old)
        shutil.rmtree(old)


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
