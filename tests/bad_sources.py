"""The commands over the corpus of bad sources: none may end in a traceback, change a file or read anything wrongly.

Run as a program it prints the table: `make bad-sources`.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# as the command line does, before transformers is imported
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import tiny
from source_cases import Source, cases

COMMANDS = ("train", "train, drop", "train, drop, cache", "lint", "score", "sample")
# seconds after which a command counts as hanging
_PATIENCE = 120
_opened: dict[str, Callable[[], None]] = {}


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str
    crash: str


class HangsError(BaseException):
    """A command does not end; nothing catches this."""


class Verdict(NamedTuple):
    """What became of one source under one command, and what was wrong with that."""

    kind: str
    wrong: tuple[str, ...]


@cache
def _watched() -> None:
    # a hook cannot be taken away again
    sys.addaudithook(_watch)


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _opened and event == "open" and (change := _opened.pop(str(args[0]), None)):
        change()


def favor(words: list[str], here: Path) -> Ran:
    """The command line in this process, in a folder, with the strict output streams of a real terminal."""
    from favor.cli import main

    def hangs(*_: object) -> None:
        raise HangsError(f"no end after {_PATIENCE} s")

    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace")]
    code, crash, before, argv = 0, "", Path.cwd(), sys.argv
    alarm = signal.signal(signal.SIGALRM, hangs)
    os.chdir(here)
    sys.argv = ["favor", *words]
    signal.alarm(_PATIENCE)
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:  # noqa: BLE001 (whatever gets out is what is looked for)
        at = traceback.extract_tb(error.__traceback__)[-1]
        crash = f"{type(error).__name__}: {str(error)[:80]!r} at {Path(at.filename).name}:{at.lineno}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        os.chdir(before)
        sys.argv = argv
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "replace"))
    return Ran(code, *texts, crash)


def words(command: str, source: Source, model: Path) -> list[str]:
    data = str(source.data)
    loaded = [f"model.path={model}", "model.dtype=float32"]
    # as TOML text, for names that TOML would take apart
    quoted = data if data.isprintable() and data.strip() else json.dumps(data, ensure_ascii=False)
    if command == "lint":
        fix = [] if not source.good else ["lint.fix=clean.jsonl"]
        return [
            "lint",
            f"data.train={quoted}",
            loaded[0],
            "lint.out=lint.json",
            "lint.page=lint.html",
            *fix,
            *source.more,
        ]
    if command == "score":
        return ["score", f"data={quoted}", "out=scores.jsonl", "reward.kind=callable", "reward.path=length.py:score"]
    if command == "sample":
        return [
            "sample",
            f"prompts={quoted}",
            "out=samples.jsonl",
            *(f"engine.{word}" for word in loaded),
            "sample.max_new_tokens=1",
            "engine.batch=64",
        ]
    more = ["data.bad_rows=drop"] if "drop" in command else []
    more += ["data.cache=true"] if "cache" in command else []
    return ["train", "run=run", f"data.train={quoted}", *loaded, "train.max_steps=1", *more, *source.more]


def judge(command: str, source: Source, ran: Ran, here: Path) -> Verdict:
    """What happened, and everything that should not have."""
    if ran.crash:
        return Verdict("traceback", (ran.crash,))
    kind = "refused" if ran.code == 2 else "dropped" if source.bad or source.late else "read"
    wrong = list(_message(ran)) if ran.code == 2 else []
    if source.refused:
        wrong += _refused(ran, source.refused)
    elif command == "lint":
        wrong += _linted(source, ran, here)
    elif command in ("score", "sample"):
        wrong += _passed(command, source, ran, here)
    else:
        wrong += _trained(command, source, ran, here)
    return Verdict(kind, tuple(wrong))


def _message(ran: Ran) -> "list[str]":
    """One line for people, with a remedy."""
    lines = ran.err.strip().split("\n")
    told = len(lines) == 1 and lines[0].startswith("favor: ") and lines[0].isprintable() and "; " in lines[0]
    return [] if told else [f"no message of one line with a remedy: {ran.err[-300:]!r}"]


def _refused(ran: Ran, parts: "tuple[str, ...]") -> "list[str]":
    if ran.code != 2:
        return [f"exit code {ran.code}, expected a refusal"]
    return [f"the message does not say {part!r}: {ran.err[:300]!r}" for part in parts if part not in ran.err]


def _trained(command: str, source: Source, ran: Ran, here: Path) -> "list[str]":
    rows = {**source.late, **source.bad}
    if rows and "drop" not in command:
        first = min(source.bad or source.late)
        number = (f"row {first}",) if Path(source.data).is_file() else ("row ",)
        return _refused(ran, (*number, rows[first]))
    if not source.good:
        return _refused(ran, (f"all {len(rows)} rows are bad",) if source.bad else ())
    if not source.compares:
        return _refused(ran, ("nothing to learn from",)) + _contents(source)
    if ran.code:
        return [f"exit code {ran.code}, expected 0: {ran.err[-300:]!r}"]
    report = json.loads((here / "run/data.json").read_text("utf-8"))["train"]
    wrong = _differs("bad rows", dict(report["read"]["dropped"]), source.bad)
    wrong += _differs("rows left out in tokenising", dict(report["tokens"]["dropped"]), source.late)
    every = len(source.good) + len(source.late)
    counts = {"num_rows": every + len(source.bad)}
    if None not in source.good.values():
        counts |= {"num_trees": every, "num_responses": 2 * every, "num_comparisons": every}
    found = {name: report["read"][name] for name in counts}
    return wrong + ([] if found == counts else [f"counts {found}, expected {counts}"]) + _contents(source)


def _differs(what: str, found: Mapping[int, str], expected: Mapping[int, str]) -> "list[str]":
    if found.keys() != expected.keys():
        extra, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
        return [f"{what}: {extra[:9]} besides, {missing[:9]} not among them: {[found[e] for e in extra[:2]]}"]
    return [f"row {at}: {found[at]!r} does not say {part!r}" for at, part in expected.items() if part not in found[at]]


def _contents(source: Source) -> "list[str]":
    """Every good row has the words that were written into it."""
    from favor.data.read import DataConfig, read_splits

    if source.during or source.late:
        return []
    settings = {
        key.removeprefix("data."): value if value.isalpha() else json.loads(value)
        for key, _, value in (m.partition("=") for m in source.more)
    }
    trees, _ = read_splits(DataConfig.model_validate({"train": str(source.data), "bad_rows": "drop"} | settings))[
        "train"
    ]
    found = {tree.rows[0]: (tree.prompt, tree.responses) for tree in trees}
    same = found.keys() == source.good.keys() and all(told in (None, found[at]) for at, told in source.good.items())
    return [] if same else [f"rows read as {found}"]


def _linted(source: Source, ran: Ran, here: Path) -> "list[str]":
    bad = {**source.late, **source.bad}
    if ran.code != (1 if bad else 0):
        return [f"exit code {ran.code}, expected {int(bool(bad))}: {ran.err[-200:]!r}"]
    findings = json.loads((here / "lint.json").read_text("utf-8"))["findings"]
    found = {row for f in findings if f["severity"] == "error" for _, row in f["rows"]}
    wrong = [] if found == bad.keys() else [f"error findings on rows {sorted(found)}, expected {sorted(bad)}"]
    usable = len(source.good) + len(source.late)
    summary = next(f["message"] for f in findings if f["kind"] == "read")
    if not summary.startswith(f"{usable + len(source.bad)} rows, {usable} of them usable"):
        wrong.append(f"summary {summary!r}, expected {usable} of {usable + len(source.bad)}")
    if source.good:
        kept = len((here / "clean.jsonl").read_text("utf-8").split("\n")) - 1
        wrong += [] if kept == len(source.good) else [f"{kept} rows in the clean copy, expected {len(source.good)}"]
    return wrong


def _passed(command: str, source: Source, ran: Ran, here: Path) -> "list[str]":
    """Commands without data.bad_rows: whatever is read is read whole."""
    every = len(source.good) + len(source.bad) + len(source.late)
    if ran.code == 2:
        return [] if (source.bad or source.late) and "row " in ran.err else [f"refused: {ran.err[-200:]!r}"]
    lines = (here / f"{command}s.jsonl").read_text("utf-8").count("\n")
    # a bad row may have a good prompt, and the same as another row
    right = 0 < lines <= every if command == "sample" and source.bad else lines == every
    return [] if right else [f"{lines} lines, expected {every}"]


def applies(command: str, source: Source) -> bool:
    return command not in ("score", "sample") or not source.more


def snapshot(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        found[str(path)] = (
            path.read_bytes() if stat.S_ISREG(mode) else (stat.S_IFMT(mode), path.is_symlink() and path.readlink())
        )
    return found


def outcome(name: str, command: str, here: Path, model: Path) -> Verdict | None:
    """One source under one command, in an empty folder; None where the command cannot be asked."""
    source = cases()[name](here / "in")
    if not applies(command, source):
        return None
    out = here / "out"
    out.mkdir()
    (out / "length.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    before = snapshot(here / "in")
    if source.during:
        _opened[str(source.during[0])] = source.during[1]
    os.environ["FAVOR_CACHE"] = str(here / "cache")
    try:
        ran = favor(words(command, source, model), out)
    finally:
        _opened.clear()
    verdict = judge(command, source, ran, out)
    if not source.during and snapshot(here / "in") != before:
        verdict = verdict._replace(kind="changed file")
    return verdict


def corpus(commands: "tuple[str, ...]" = COMMANDS, names: "list[str] | None" = None) -> dict[tuple[str, str], Verdict]:
    """(source, command) -> verdict."""
    _watched()
    before = os.environ.get("FAVOR_CACHE")
    found: dict[tuple[str, str], Verdict] = {}
    with tempfile.TemporaryDirectory() as work:
        model = tiny.save(Path(work) / "model")
        for name in names or cases():
            for command in commands:
                here = Path(work) / "here"
                (here / "in").mkdir(parents=True)
                verdict = outcome(name, command, here, model)
                shutil.rmtree(here)
                if verdict is not None:
                    found[name, command] = verdict
    os.environ.pop("FAVOR_CACHE", None)
    os.environ.update({} if before is None else {"FAVOR_CACHE": before})
    return found


def main() -> None:
    """Print the table, and everything that is wrong."""
    from rich.console import Console
    from rich.table import Table

    found = corpus()
    table = Table(
        "command", "sources", "refused", "dropped", "read", "traceback", "changed file", "wrong", "badly told"
    )
    for command in COMMANDS:
        mine = [verdict for (_, c), verdict in found.items() if c == command]
        kinds = Counter(verdict.kind for verdict in mine)
        wrong = sum(bool(v.wrong) and v.kind in ("read", "dropped") for v in mine)
        told = sum(bool(v.wrong) and v.kind == "refused" for v in mine)
        columns = ("refused", "dropped", "read", "traceback", "changed file")
        table.add_row(command, str(len(mine)), *(str(kinds[kind]) for kind in columns), str(wrong), str(told))
    console = Console(width=140)
    console.print(table)
    for (name, command), verdict in found.items():
        for text in verdict.wrong:
            console.print(f"{verdict.kind}: {name} | {command}: {text}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
