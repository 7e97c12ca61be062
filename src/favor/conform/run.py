"""`favor conform`: a trainer through the cases.

In: ConformConfig. Out: a Result for every case; JSON, a page. Next: settings.py.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TypeAlias

from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

from favor import output
from favor.conform.cases import Job, cases, needed
from favor.conform.judge import Bench, Result, Right, Seen, result_of, way_of
from favor.conform.oracle import Expected, Scored, change, expected, load, weights_of
from favor.conform.page import page
from favor.conform.processes import Advance, carry_out
from favor.conform.settings import ConformConfig, adapter_file, launch_words
from favor.conform.subjects import make_subjects
from favor.errors import first_line
from favor.output import Output
from favor.run import read_json, write_json

Jobs: TypeAlias = Mapping[str, Job]
Found: TypeAlias = dict[str, Result]
# carries out the jobs of a folder: their folder, how many ranks
Carry: TypeAlias = Callable[[Path, int], None]
_COLOURS = {"holds": "green", "fails": "red", "refused": "", "not tried": "yellow"}


def conform(config: ConformConfig, progress: Advance) -> Found:
    """Every case's result, by its name. Raises ConfigError for an adapter that is none, and outputs that are not ours."""
    path = adapter_file(config.adapter)
    launch = launch_words(path)
    asked = {"out": config.out, "page": config.page}
    outputs = [Output(Path(at), key, config.overwrite) for key, at in asked.items() if at is not None]

    def carry(folder: Path, ranks: int) -> None:
        if ranks == 1 or launch:
            carry_out(path, folder, launch if ranks > 1 else (), config.timeout_s, progress)

    claimed = output.all_claimed(outputs, [str(path)])
    with claimed, tempfile.TemporaryDirectory(prefix="favor-conform-") as folder:
        subjects = Path(folder) / "subjects"
        make_subjects(subjects)
        jobs = settled(needed(config.cases), subjects)
        seen = carried_out(Path(folder), subjects, jobs, carry)
        found = results(seen, oracle(subjects, jobs), config.cases)
        texts = {"out": as_json(config.adapter, found), "page": page(config.adapter, found)}
        for out in outputs:
            output.write(out, {out.path: texts[out.key]}, None)
    return found


def settled(jobs: Jobs, subjects: Path) -> dict[str, Job]:
    """The jobs with the norms at which they clip: between those of the first gradient and of the second."""

    def steps(job: Job) -> Job:
        if not job.between:
            return job
        first, second, *_ = expected(subjects / job.subject, job.rows, job.steps).norms
        return replace(job, steps=replace(job.steps, clip=(first * second) ** 0.5))

    return {name: steps(job) for name, job in jobs.items()}


def oracle(subjects: Path, jobs: Jobs) -> Right:
    """What is right for each job, computed once for each way of scoring."""

    @cache
    def right(job: str, scored: Scored) -> Expected:
        return expected(subjects / jobs[job].subject, jobs[job].rows, jobs[job].steps, scored)

    return right


def carried_out(folder: Path, subjects: Path, jobs: Jobs, carry: Carry) -> dict[str, Seen]:
    """Run them all, those of one process first, and read what they left."""
    for name, job in jobs.items():
        at = folder / f"ranks-{job.ranks}" / name
        at.mkdir(parents=True)
        settings = asdict(job.steps) | {"ranks": job.ranks}
        asked = {"model": str(subjects / job.subject), "rows": job.rows, "settings": settings, "calls": job.calls}
        write_json(at / "job.json", asked)
    for ranks in sorted({job.ranks for job in jobs.values()}):
        carry(folder / f"ranks-{ranks}", ranks)
    starts = {
        subject: weights_of(load(subjects / subject)) for subject in sorted({job.subject for job in jobs.values()})
    }

    def seen(name: str, job: Job) -> Seen:
        at = folder / f"ranks-{job.ranks}" / name
        if not (at / "result.json").exists():
            return Seen(None, (), "", "NotImplementedError", "the adapter has no LAUNCH for several processes")
        told, log = read_json(at / "result.json"), at / "log.txt"
        said = log.read_text("utf-8", "replace") if log.exists() else ""
        if "error" in told:
            return Seen(None, (), said, told["error"], told["said"])
        try:
            moved = change(starts[job.subject], weights_of(load(Path(told["model"])))) if told["model"] else None
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            return Seen(None, (), said, "Ended", f"{told['model']}: cannot be loaded ({first_line(error)})")
        return Seen(moved, told["losses"], said)

    return {name: seen(name, job) for name, job in jobs.items()}


def results(seen: Mapping[str, Seen], right: Right, names: Sequence[str]) -> Found:
    """Every case that was asked for, judged."""
    bench = Bench(seen, right, way_of(seen["step"], right))
    return {case.name: result_of(bench, case.jobs, case.judged, refusal=case.refusal) for case in cases(names)}


def as_json(adapter: str, found: Found) -> str:
    """The results with what each case says."""
    listed = [
        {"case": case.name, "must_hold": case.holds} | found[case.name]._asdict()
        for case in cases()
        if case.name in found
    ]
    return json.dumps({"adapter": adapter, "cases": listed}, indent=2, ensure_ascii=False) + "\n"


def results_table(found: Found) -> Table:
    """For a terminal."""
    table = Table("case", "what must hold", "", "found", show_lines=False)
    for case in cases():
        if (result := found.get(case.name)) is not None:
            tolerance = f"; tolerance {result.tolerance}" if result.tolerance else ""
            more = f" (right: {result.right}{tolerance})" if result.status == "fails" and result.right else ""
            status = Text(result.status, style=_COLOURS[result.status])
            table.add_row(case.name, case.holds, status, Text(result.found + more))
    return table
