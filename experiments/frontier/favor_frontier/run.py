"""`favor frontier`: the shared parts, then every point in a few processes, then the picture. Resumable point by point.

In: FrontierConfig. Out: frontier.json in the run folder. Next: recipe.py.
"""

import multiprocessing
import signal
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from favor.config import dump, load
from favor.guard import content
from favor.model.room import memory_settings
from favor.ranks import World
from favor.rewards.source import identity
from favor.run import RunFolder, append, same_inputs, write_json
from favor.stop import StoppedAtOnceError, StoppedError, StopRequest
from favor.train.session import OpenSession, Session, recipe_hash, running
from favor_frontier.point import make_bench, run_point
from favor_frontier.prepare import (
    Places,
    Task,
    fine_tune,
    label,
    learn_reward,
    scale_rewards,
    settle_task,
    store_reference,
)
from favor_frontier.recipe import FrontierConfig, Point, points, threads
from favor_frontier.summary import summarise


def frontier(config: FrontierConfig, open_session: OpenSession) -> dict[str, Any]:
    """Run what is missing and return the content of frontier.json. Raises the errors of every part.

    The same command continues an unfinished picture; another recipe needs another run folder.
    """
    resume = RunFolder(Path(config.run)).config.exists()
    with running(config.run, dump(config), resume=resume, open_session=open_session) as session:
        return _frontier(config, session, open_session)


def _frontier(config: FrontierConfig, session: Session, open_session: OpenSession) -> dict[str, Any]:
    folder = session.folder
    places, began = Places(folder.root), time.monotonic()
    task = settle_task(config, folder.root, session.say)
    named = {"model": str(task.model), "prompts": task.prompts, "eval_prompts": task.eval_prompts, "sft": task.sft}
    entered = {f"content of {name}": content(path) for name, path in named.items() if path is not None}
    found = {name: value for name, value in entered.items() if value is not None}
    same_inputs(folder, recipe_hash(config) | found | {"reward": identity(task.reward)})
    fine_tune(config, task, places, open_session)
    starts = [Point("start", 0, seed) for seed in config.seeds]
    told = "stopping when the points under way are done (again: at once)"
    with session.stop.looked_at(told), _Pool(config, task, session) as pool:
        # a reward model is measured on another seed's preferences, so these come first
        pool.run("label", starts)
        pool.run("reward", [*starts, *(replace(start, share=share) for start in starts for share in config.budgets)])
        pool.run("point", [*starts, *points(config)])
    found = summarise(config, places)
    append(folder.root / "timing.jsonl", {"seconds": time.monotonic() - began, "finished": found["finished"]})
    write_json(folder.frontier, found)
    return found


def work(recipe: Path, task: Task, kind: str, point: Point) -> str:
    """One job, in a process of its own: a seed's preferences, its learnt reward, or a point."""
    memory_settings()
    config = load(FrontierConfig, recipe)
    torch.set_num_threads(threads(config))
    places = Places(recipe.parent)

    def open_session(root: Path) -> Session:
        log = Console(file=(root / "log.txt").open("a", encoding="utf-8"), width=160)
        return Session(RunFolder(root), World(), log, StopRequest())

    if kind == "label":
        label(config, task, places, point.seed)
    elif kind == "reward":
        if point.share == 1:
            store_reference(task, places, point.seed, open_session)
        learn_reward(config, task, places, point.seed, point.share, open_session)
        scale_rewards(task, places, point.seed, point.share)
    else:
        run_point(config, task, places, point, make_bench(config, task, places), open_session)
    return point.name


def _leave_to_parent() -> None:
    """Ctrl-C and a hang-up reach every process of a terminal; the parent decides for all."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class _Pool:
    """A few processes that work through jobs, with a line for each that ends; a stop signal lets none start."""

    def __init__(self, config: FrontierConfig, task: Task, session: Session) -> None:
        self._recipe, self._task, self._session = Path(config.run) / "config.toml", task, session
        # a forked process would inherit torch's threads in an unusable state
        self._pool = ProcessPoolExecutor(config.jobs, multiprocessing.get_context("spawn"), _leave_to_parent)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        if kind is not None and issubclass(kind, StoppedAtOnceError):
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, kind: str, jobs: Sequence[Point]) -> None:
        """Finish all jobs of a kind. Raises the first job's error, or StoppedError after a stop signal."""
        began = time.monotonic()
        open_jobs = {self._pool.submit(work, self._recipe, self._task, kind, point) for point in jobs}
        while open_jobs:
            done, open_jobs = wait(open_jobs, timeout=1.0, return_when=FIRST_COMPLETED)
            for job in done:
                spent, left = time.monotonic() - began, len(open_jobs)
                self._session.say(f"{kind} {len(jobs) - left}/{len(jobs)}  {job.result()}  {spent:.0f} s")
            if (number := self._session.stop.signal_number) is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)
                raise StoppedError("stopped; the same command continues with the missing points", number)
