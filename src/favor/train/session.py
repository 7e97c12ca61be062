"""What every training loop needs around it: progress line, stop request, metrics, and where it stands.

In: a run folder and a World. Out: a Session whose parts the loops call. Next: preference.py.
"""

import concurrent.futures
import contextlib
import importlib.util
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, TypeAlias, TypeVar

from pydantic import BaseModel, Field
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from favor.config import STRICT, dump
from favor.data.prepare import Vocabulary, prepare
from favor.data.read import DataConfig
from favor.data.splits import Splits
from favor.data.tokenize import TokensConfig
from favor.errors import FavorError
from favor.guard import sha
from favor.lint.cheap import CHECKS
from favor.model.load import Policy, precision_of
from favor.model.room import memory_settings
from favor.ranks import World, current, from_main, largest, on_main, started_again, world
from favor.run import RunFolder, append, start, write_json
from favor.stop import StopRequest, stop_signals
from favor.train.loggers import Logger, following

T = TypeVar("T")
_NOTHING_KEPT = "no step was under way, so there was nothing to save; run the same command again"
Share = Annotated[float, Field(ge=0)]


class Kept(BaseModel):
    """A look of [health] whose checkpoint may become the result: its step and figures."""

    model_config = STRICT
    step: int = Field(ge=1)
    accuracy: Share
    loss: float
    kl: float


class Health(BaseModel):
    """What the looks of [health] (train/health.py) have seen and decided.

    start: figures before the first step; of accuracy, the best look's. out: signs out of bounds at the last look. rate: what the
    learning rate is multiplied by; likelihood: whether its term is added; seconds: of all looks.
    """

    model_config = STRICT
    start: dict[str, float] = {}
    out: tuple[str, ...] = ()
    rate: float = Field(default=1.0, ge=0, le=1)
    likelihood: bool = False
    stopped: bool = False
    best: Kept | None = None
    seconds: float = Field(default=0.0, ge=0)


class TrainingState(BaseModel):
    """Where training stands after `step` optimizer steps, and what it came from.

    inputs: name -> hash of everything that enters. kl, below: the last KL probe and the displacement window. metrics:
    how long metrics.jsonl was, and its hash.
    """

    model_config = STRICT
    step: int = Field(default=0, ge=0)
    epoch: int = Field(default=0, ge=0)
    position: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0)
    inputs: dict[str, str] = {}
    kl_coef: float | None = Field(default=None, ge=0)
    kl: dict[str, float] = {}
    below: tuple[tuple[Share, Share], ...] = ()
    metrics: tuple[int, str] = (0, "")
    health: Health = Health()


class Background:
    """One piece of work in a thread while training goes on, such as writing a checkpoint; one at a time.

    before: the most memory that the process held before the first copy was made for it, bytes; 0 while there was none.
    """

    def __init__(self) -> None:
        self.before = 0
        self._work: concurrent.futures.Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Start it, after a `wait`."""
        assert self._work is None, "one at a time"
        thread = concurrent.futures.ThreadPoolExecutor(1)
        self._work = thread.submit(work)
        # the thread ends with it
        thread.shutdown(wait=False)

    def look(self) -> None:
        """Raises what went wrong in work that has ended; waits for none."""
        if self._work is not None and self._work.done():
            self.wait()

    def wait(self) -> None:
        """Until what is under way has ended. Raises what it raised."""
        if self._work is not None:
            # a signal may break this off, and it is under way still
            concurrent.futures.wait([self._work])
            done, self._work = self._work, None
            done.result()

    @contextlib.contextmanager
    def ended(self, say: Callable[[str], None]) -> Generator[None]:
        """After the block nothing is under way. What went wrong is raised, or said where the block itself failed."""
        try:
            yield
        except BaseException:
            try:
                self.wait()
            except (FavorError, OSError) as error:
                say(f"warning: {error}")
            raise
        self.wait()


@dataclass(frozen=True)
class Session:
    """The surroundings of one training run; files and lines are written by the main rank only."""

    folder: RunFolder
    world: World
    console: Console
    stop: StopRequest
    # what else is told of every record
    tell: Callable[[Mapping[str, object]], None] | None = None
    background: Background = field(default_factory=Background)

    def say(self, text: str) -> None:
        """One line for the user."""
        if self.world.is_main:
            style = "yellow" if text.startswith(("warning:", "note:")) else None
            self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def record(self, record: Mapping[str, object]) -> None:
        """Append to metrics.jsonl."""
        if self.world.is_main:
            append(self.folder.metrics, record)
            if self.tell is not None:
                self.tell(record)

    def event(self, step: int, name: str, message: str, **extra: object) -> None:
        """Something worth knowing beside the curves: printed and recorded."""
        self.say(message)
        self.record({"kind": "event", "step": step, "name": name, "message": message, **extra})

    def self_check(self, policy: Policy, layout: str) -> None:
        """How the model is computed, and why."""
        kept = (
            f"; {policy.kept_bytes / (1 << 30):.2f} GiB of weights {'kept' if policy.lora else 'read'} in {policy.weights}"
            if policy.kept_bytes
            else ""
        )
        self.event(0, "self_check", f"precision: {precision_of(policy.products)}{kept}; layout: {layout}")


OpenSession: TypeAlias = Callable[[Path], Session]


def in_session(run: Callable[[OpenSession], T], kept: str = _NOTHING_KEPT, console: Console | None = None) -> T:
    """Call `run` with a way to open its session; kept: what is said when a signal comes while no step is under way."""
    memory_settings()
    console = console or Console(highlight=False)
    with world() as members, stop_signals(kept) as stop:
        return run(lambda root: Session(RunFolder(root), members, console, stop))


def resumes(run: str, asked: bool) -> bool:
    """Whether a run continues: it was asked to, or torchrun started it anew and its folder is there. Equal on all ranks."""
    members = current()
    if asked:
        return True
    # over several machines torchrun counts a restart on those alone where a process died
    again = largest(int(started_again()), members)
    return bool(again and from_main(int(RunFolder(Path(run)).config.exists()), members))


def recipe_hash(config: BaseModel) -> dict[str, str]:
    """The resolved recipe as one of the things that enter a run, by name: all of it but the run's place and `resume`."""
    return {"recipe": sha(dump(config.model_copy(update={"run": "", "resume": False})))}


@contextlib.contextmanager
def running(
    run: str, recipe: str, *, resume: bool, open_session: OpenSession, logger: Logger | None = None
) -> Generator[Session]:
    """The session of a run whose folder this process holds. Raises what `run.start` raises, and for a logger that is missing."""
    with start(Path(run), recipe, resume=resume, main=current().is_main) as folder:
        session = open_session(folder.root)
        if logger is None or not session.world.is_main:
            yield session
        else:
            with following(logger, folder) as tell:
                yield replace(session, tell=tell)


def load_splits(data: DataConfig, tokens: TokensConfig, policy: Policy, session: Session) -> Splits:
    """The data of a run, its report in data.json. Raises DataError as `prepare` does."""
    vocabulary = Vocabulary(policy.tokenizer, policy.end_ids, policy.sight)
    splits = prepare(data, tokens, vocabulary, CHECKS, session.say, partial(on_main, session.world))
    if session.world.is_main:
        write_json(session.folder.data_report, splits.report)
    return splits


def moves(console: Console) -> bool:
    """Whether a line can be drawn anew: on a terminal, and in a notebook with ipywidgets."""
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


class Bar:
    """A progress line: steps, ETA and the figures of the last step. Plain lines when nobody watches a terminal."""

    def __init__(self, session: Session, label: str, total: int, start: int = 0) -> None:
        self._session = session
        self._label, self._total = label, total
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=session.console,
        )
        self._task: TaskID = self._progress.add_task(label, total=total, completed=start)
        self._figures = ""
        # the figures have a line of their own, so that 80 columns hold the time that is left
        self._live = Live(get_renderable=self._drawn, console=session.console, refresh_per_second=10)
        self._moves = session.world.is_main and moves(session.console)
        self._last_line = 0.0

    def __enter__(self) -> "Bar":
        if self._moves:
            self._live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._moves:
            # a notebook would keep the state of the last refresh
            self._live.refresh()
            self._live.stop()

    def _drawn(self) -> Group:
        figures = [Text(f"  {self._figures}", no_wrap=True, overflow="ellipsis")] if self._figures else []
        return Group(self._progress, *figures)

    def advance(self, amount: int, figures: str = "") -> None:
        """Move on and show the figures; without a terminal a line every few seconds says the same."""
        self._progress.update(self._task, advance=amount)
        self._figures = figures
        if moves(self._session.console):
            return
        task = self._progress.tasks[0]
        now = time.monotonic()
        if task.finished or now - self._last_line > 10:
            self._last_line = now
            eta = "" if task.time_remaining is None else f"  ETA {task.time_remaining:.0f} s"
            self._session.say(f"{self._label} {task.completed:.0f}/{self._total}{eta}  {figures}")
