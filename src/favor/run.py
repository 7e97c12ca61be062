"""The run folder: the name of everything in it and who may write there; files that are whole or absent. No torch here.

In: a path and plain records. Out: files. Next: guard.py.
"""

import contextlib
import json
import os
import shutil
import tomllib
from collections.abc import Generator, Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from favor import guard
from favor.errors import CheckpointError, ConfigError, StorageError, clipped, first_line, refused

_STEP = b'{"kind": "step", "step": '


@dataclass(frozen=True)
class _Inside:
    """A file or folder of a run folder, by its name."""

    name: str

    def __get__(self, folder: "RunFolder", owner: object = None) -> Path:
        return folder.root / self.name


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps things; every reader and writer takes the names from here."""

    root: Path
    mark = _Inside(".favor.json")  # by which favor knows the folder: hashes of the recipes that it wrote there
    lock = _Inside(".lock")  # held by the process that writes here; says who that is
    config = _Inside("config.toml")  # the resolved recipe
    given = _Inside("given")  # what Python held in memory: models, rows (JSONL), and in a .favor.json their hashes
    inputs = _Inside("inputs.json")  # hashes of what entered
    packs = _Inside("packs.json")  # how many tokens are computed at once, where the run chose it
    data_report = _Inside("data.json")  # what was read, merged, cut and dropped
    metrics = _Inside("metrics.jsonl")  # one object a line; `kind` says which: step, eval, event (docs/metrics.md)
    reference = _Inside("reference.safetensors")  # the reference store, unless the recipe names another place
    checkpoints = _Inside("checkpoints")  # one folder a checkpoint, `step-000040`
    model = _Inside("model")  # the final model, as transformers or PEFT loads it
    evaluation = _Inside("eval.json")  # held-out figures of `favor eval`
    pairs = _Inside("eval-pairs.jsonl")  # the held-out pairs one by one, by which runs are compared
    samples = _Inside("samples.jsonl")  # of reference and policy side by side
    prompts = _Inside("prompts.jsonl")  # those of a round of `favor loop`
    rounds = _Inside("rounds.jsonl")  # figures of every round of `favor loop`
    frontier = _Inside("frontier.json")  # reward against KL of every method
    realign = _Inside("realign.json")  # figures of `favor realign`
    realign_page = _Inside("realign.html")
    winrate = _Inside("winrate.json")  # figures of `favor winrate`
    winrate_settings = _Inside("winrate-settings.json")  # what the responses of both sides were made with
    winrate_samples = _Inside("winrate-samples.jsonl")  # responses of both sides, with the judge's verdict
    judgments = _Inside("judgments.jsonl")  # one line per judged (prompt, first, second)
    audit = _Inside("audit.json")  # figures of `favor audit`
    audit_page = _Inside("audit.html")
    soft_labels = _Inside("soft-labels.jsonl")  # the audited pairs with the probability that people prefer each answer
    report = _Inside("report.html")
    comparison = _Inside("compare.html")  # the same for several runs, this one first

    def responses(self, side: str) -> Path:
        """Responses sampled for side `a` or `b` of a win rate (JSONL)."""
        return self.root / f"responses-{side}.jsonl"


_A = RunFolder(Path())
# what may be there before a recipe is; a reference store is checked before it is reused
_BEFORE = {_A.mark.name, _A.lock.name, _A.reference.name}
# what a start writes before anything is made of it
_RECORDS = (
    *(_A.mark, _A.lock, _A.config, _A.inputs, _A.packs),
    *(_A.data_report, _A.metrics, _A.prompts, _A.winrate_settings),
)
_OPENING = frozenset(path.name for path in _RECORDS)


def cache_folder() -> Path:
    """$FAVOR_CACHE, else $XDG_CACHE_HOME/favor, else ~/.cache/favor."""
    if chosen := os.environ.get("FAVOR_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "favor"


@contextlib.contextmanager
def start(root: Path, config_text: str, *, resume: bool, main: bool = True) -> Generator[RunFolder]:
    """Hold a run folder, as `opened` does (only the main rank looks and writes), with this recipe in it.

    Raises ConfigError when it holds a run and `resume` is false, and with `resume` when there is none or its recipe differs.
    """
    folder = RunFolder(root)
    if not main:
        yield folder
        return
    if resume and not folder.config.exists():
        raise ConfigError(f"{root}: nothing to resume (no config.toml); start the run without resume=true")
    for path in (folder.checkpoints, folder.model):
        if path.is_file():
            raise ConfigError(f"{path}: is a file where a folder belongs; remove it, or choose another run=FOLDER")
    with opened(folder):
        if resume:
            _same_recipe(folder.config, config_text)
            cut_torn_line(folder.metrics)
        elif holds_work(folder):
            raise ConfigError(f"{root}: already holds a run; continue it with resume=true or choose another run=FOLDER")
        else:
            # a start that failed before anything was made may be repeated
            folder.metrics.unlink(missing_ok=True)
            write_config(folder, config_text)
        yield folder


def write_config(folder: RunFolder, text: str) -> None:
    """The resolved recipe, and first the mark by which the folder is known to be favor's: of this recipe and the one before."""
    before = [guard.file_hash(folder.config)] if folder.config.exists() else []
    write_json(folder.mark, {"recipes": [*before, guard.sha(text)]})
    write_text(folder.config, text)


@contextlib.contextmanager
def opened(folder: RunFolder) -> Generator[None]:
    """Create a folder where there is none, hold it, and remove what killed processes left.

    A block that fails before anything is made takes back what it created, never what was there before. Raises
    ConfigError when it cannot be used, holds files but no run of favor, or is held by another process.
    """
    root = folder.root
    created = [path for path in (root, *root.parents) if not path.exists()]
    make_folder(root)
    try:
        if not is_ours(root):
            marked = folder.mark.exists() and folder.config.exists()
            why = "its config.toml is not the one that favor wrote" if marked else "holds files, but no run of favor"
            raise ConfigError(f"{root}: {why}; choose another run=FOLDER")
        with guard.held(folder.lock, str(root)):
            guard.sweep(root)
            before = {folder.lock, *root.iterdir()}
            try:
                yield
            except BaseException:
                for path in [] if holds_work(folder, _OPENING) else {*root.iterdir()} - before:
                    guard.remove(path)
                raise
    finally:
        # folders that stayed empty
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()


def is_ours(root: Path) -> bool:
    """Whether a folder is favor's: its recipe is one that the mark beside it names, or there is only what a start leaves.

    Of a recipe that was changed since, or a run without a mark, checkpoints or steps speak.
    """
    folder = RunFolder(root)
    if not folder.config.exists():
        return all(
            path.name in _BEFORE
            or guard.temporary(path)
            or (path == folder.given and (path / folder.mark.name).exists())
            for path in root.iterdir()
        )
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if guard.file_hash(folder.config) in json.loads(folder.mark.read_bytes())["recipes"]:
            return True
    return any(folder.checkpoints.glob("step-*/state.json")) or _has_steps(folder)


def holds_work(folder: RunFolder, opening: Set[str] = _OPENING | _BEFORE) -> bool:
    """Whether something was made of a start: there is more than what every start writes, or a step."""
    files = (path for path in folder.root.rglob("*") if not path.is_dir() and folder.given not in path.parents)
    more = any(path.name not in opening and not guard.temporary(path) for path in files)
    return more or folder.checkpoints.exists() or _has_steps(folder)


def _has_steps(folder: RunFolder) -> bool:
    metrics = folder.metrics
    return metrics.is_file() and any(line.startswith(_STEP) for line in metrics.read_bytes().splitlines())


def same_inputs(folder: RunFolder, now: Mapping[str, str]) -> None:
    """Keep the hashes of what enters, by name; on a later start compare them. Raises as `refuse_changed` does."""
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
    before, now = _settings(path, read_text(path)), _settings(path, config_text)
    changed = [
        f"{key} {_shown(before, key)} then, {_shown(now, key)} now"
        for key in sorted((before.keys() | now.keys()) - {"resume"})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{path}: the run was started with another recipe ({'; '.join(changed[:3])}); "
            "resume with the same settings or start a new run"
        )


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return clipped(repr(settings[key])) if key in settings else "not set"


def _settings(path: Path, text: str) -> dict[str, Any]:
    try:
        return dotted(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is damaged ({error}); start a new run") from None


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line: whole, or not at all when the disk is full."""
    append_text(path, jsonl([record]))


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


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """Name the file in what the operating system, or safetensors for it, refuses. Raises StorageError."""
    try:
        yield
    except OSError as error:
        # what is written aside has a name that nobody knows
        mine = not isinstance(error.filename, str) or error.filename.startswith(str(path.parent))
        raise StorageError(refused(error, path if mine else Path(error.filename))) from None
    except SafetensorError as error:
        said = first_line(error)
        raise StorageError(f"{path}: cannot be written ({said}); free some space, or choose another place") from None


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
        return _object(path.read_bytes())
    except (ValueError, RecursionError) as error:
        said = f"damaged, not the JSON that was written ({error}); delete it and run the command that writes it again"
        raise CheckpointError(f"{path}: {said}") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a torn last line (a killed writer) is passed over. Raises CheckpointError for any other damage."""
    # not splitlines: a text may hold U+2028, which JSON leaves as it is
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_object(line.decode("utf-8", "surrogatepass")))
        except ValueError:
            if number < len(lines):
                raise CheckpointError(f"{path}, line {number}: not JSON, so damaged; remove that line") from None
    return records


def _object(raw: str | bytes) -> dict[str, Any]:
    found = json.loads(raw)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


@contextlib.contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """Fill a file aside and rename it into place: whole or absent. An older file stays until then, and on an error."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file")
    with _replaced(path) as aside:
        yield aside


@contextlib.contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Fill a folder aside and rename it into place, as `whole_file` does; an older folder of that name is replaced."""
    with _replaced(path) as aside:
        aside.mkdir(parents=True)
        yield aside


@contextlib.contextmanager
def _replaced(path: Path) -> Generator[Path]:
    """Everything is flushed before the rename, so it is whole after a crash too; on an error nothing of it remains."""
    aside = guard.aside(path)
    guard.remove(aside)
    try:
        with writing(path):
            yield aside
            for file in (aside, *sorted(aside.rglob("*"))):
                fsync(file)
            if path.is_dir():
                remove_folder(path)
            aside.replace(path)
            fsync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            guard.remove(aside)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(text, "utf-8", "backslashreplace", newline="")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, all of them or none."""
    write_text(path, jsonl(records))


def jsonl(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def dotted(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested records as one: section.key -> value."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        found |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


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
