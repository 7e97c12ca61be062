"""The command line: `favor COMMAND recipe.toml key=value ...`. Heavy imports wait until a command runs.

In: words. Out: one call per command; errors become one line and an exit code. Next: train/preference.py.
"""

import contextlib
import io
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.console import Console

    from favor.stop import StopRequest
    from favor.train.session import Session

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE.toml] [KEY=VALUE]...", help="A recipe and settings that replace its own."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be trained; read the data, load no weights.")]
app = typer.Typer(
    help="favor: teach a language model what people favor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def train(words: Words = None, dry_run: DryRun = False) -> None:
    """Train on preferences: DPO and its family, on prompt trees."""
    from favor.config import load, split_arguments
    from favor.train.preference import TrainConfig
    from favor.train.preference import train as run

    config = load(TrainConfig, *split_arguments(words or []))
    if dry_run:
        from favor.train.dryrun import describe

        _print(describe(config))
        return
    _in_session(lambda open_session: run(config, open_session))


@app.command()
def sft(words: Words = None) -> None:
    """Fine-tune on the preferred responses (or on plain SFT rows)."""
    from favor.config import load, split_arguments
    from favor.train.sft import SftConfig
    from favor.train.sft import sft as run

    config = load(SftConfig, *split_arguments(words or []))
    _in_session(lambda open_session: run(config, open_session))


@app.command()
def reward(words: Words = None) -> None:
    """Train a reward model on preferences (Bradley-Terry), with held-out accuracy and calibration."""
    from favor.config import load, split_arguments
    from favor.train.reward import RewardTrainConfig, train_reward

    config = load(RewardTrainConfig, *split_arguments(words or []))
    _in_session(lambda open_session: train_reward(config, open_session))


@app.command()
def ppo(words: Words = None) -> None:
    """Train on a reward by PPO (or RLOO, GRPO): the system that DPO is compared with."""
    from favor.config import load, split_arguments
    from favor.train.ppo import PpoConfig, train_ppo

    config = load(PpoConfig, *split_arguments(words or []))
    _in_session(lambda open_session: train_ppo(config, open_session))


@app.command()
def score(words: Words = None) -> None:
    """Score a file's responses by any reward; on preferences, its accuracy and calibration."""
    from favor.config import load, split_arguments
    from favor.eval.score import ScoreConfig
    from favor.eval.score import score as run
    from favor.report.table import figures_table

    recipe, settings = split_arguments(words or [])
    config = load(ScoreConfig, recipe, settings)
    console = _console()
    if config.reward.kind in ("model", "implicit"):
        _say_precision("float32")
    figures = run(config, _progress(console), recipe)
    if figures is not None:
        console.print(figures_table(figures))
    _print(f"scores in {config.out}")


@app.command()
def frontier(words: Words = None) -> None:
    """Reward against KL of DPO, IPO, KTO, PPO and the baselines on one task: the paper's experiment."""
    from favor_frontier.page import SECTIONS, frontier_table
    from favor_frontier.recipe import FrontierConfig
    from favor_frontier.run import frontier as run

    from favor.config import load, split_arguments
    from favor.report.collect import collect
    from favor.report.page import write_page
    from favor.run import RunFolder

    config = load(FrontierConfig, *split_arguments(words or []))
    _say_precision("float32")
    found: list[dict[str, Any]] = []
    _in_session(lambda open_session: found.append(run(config, open_session)))
    _console().print(frontier_table(found[0]))
    page = RunFolder(Path(config.run)).report
    write_page([collect(Path(config.run), SECTIONS)], page)
    _print(f"report: {page}")


@app.command(name="eval")
def evaluate(words: Words = None) -> None:
    """Held-out preference accuracy, margins, sampled KL and samples of a finished run."""
    from favor.config import load, split_arguments
    from favor.eval.evaluate import EvalConfig
    from favor.eval.evaluate import evaluate as run
    from favor.report.table import figures_table

    config = load(EvalConfig, *split_arguments(words or []))
    console = _console()
    figures = run(config, console.print, _progress(console))
    console.print(figures_table(figures))


@app.command()
def winrate(words: Words = None) -> None:
    """Two models, or files of responses, compared by a judge: win rates with position and length taken out."""
    from favor.config import load, split_arguments
    from favor.report.table import winrate_table
    from favor.winrate.run import WinrateConfig
    from favor.winrate.run import winrate as run

    config = load(WinrateConfig, *split_arguments(words or []))
    console = _console()
    _say_precision(*config.dtypes)
    with _continued():
        console.print(winrate_table(run(config, console.print, _progress(console))))


@app.command()
def sample(words: Words = None) -> None:
    """Sample responses to the prompts of a file, as JSON lines; the same command again continues a stopped run."""
    from favor.config import load, split_arguments
    from favor.generate.engines import dtypes
    from favor.generate.samples import SamplesConfig, write_samples

    recipe, settings = split_arguments(words or [])
    config = load(SamplesConfig, recipe, settings)
    _say_precision(*dtypes(config.engine))
    with _continued():
        count = write_samples(config, _progress(_console()), recipe)
    _print(f"{count} samples in {config.out}")


@app.command()
def prefer(words: Words = None) -> None:
    """Make preferences: sample several responses per prompt and rank them by a reward."""
    from favor.config import load, split_arguments
    from favor.generate.engines import dtypes
    from favor.generate.prefer import PreferConfig
    from favor.generate.prefer import prefer as run

    recipe, settings = split_arguments(words or [])
    config = load(PreferConfig, recipe, settings)
    _say_precision(*dtypes(config.engine))
    with _continued():
        report = run(config, _progress(_console()), recipe)
    _print(f"{report}; preferences in {config.out}")


@app.command()
def loop(words: Words = None) -> None:
    """Online preference learning: in rounds, sample from the model, rank by a reward, train, go on from there."""
    from favor.config import load, split_arguments
    from favor.online import LoopRunConfig
    from favor.online import loop as run

    config = load(LoopRunConfig, *split_arguments(words or []))
    _say_precision(config.model.dtype)
    progress = _progress(_console())
    kept = "what was made so far is kept; run the same command again, with resume=true"
    _in_session(lambda open_session: run(config, open_session, progress), kept)


@app.command()
def lint(
    words: Words = None,
    fix: Annotated[str | None, typer.Option("--fix", help="Write a cleaned copy of the training rows here.")] = None,
) -> None:
    """Look for faults in preference data; exit code 1 when a finding is as severe as lint.fail_on (error)."""
    from favor.config import load, split_arguments
    from favor.lint.run import fails, findings_table
    from favor.lint.run import lint as run
    from favor.lint.settings import LintConfig

    if fix is not None:
        words = [*(words or []), f"lint.fix={fix}"]
    recipe, settings = split_arguments(words or [])
    config = load(LintConfig, recipe, settings)
    if config.reward is not None or config.lint.doubt:
        _say_precision("float32")
    findings = run(config, recipe)
    _console().print(findings_table(findings))
    if fails(config, findings):
        raise typer.Exit(1)


@app.command()
def report(runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")]) -> None:
    """Write report.html into the first run folder: curves, samples, numbers, settings."""
    from favor_frontier.page import SECTIONS

    from favor.report.collect import collect
    from favor.report.page import write_page
    from favor.run import RunFolder

    path = RunFolder(runs[0]).report
    write_page([collect(run, SECTIONS) for run in runs], path)
    _print(f"report: {path}")


@app.command()
def demo(words: Words = None) -> None:
    """The main job on the embedded model and data: SFT, DPO, evaluation, report."""
    from favor.config import load, split_arguments
    from favor.demo import DemoConfig
    from favor.demo import demo as run

    config = load(DemoConfig, *split_arguments(words or []))
    console = _console()
    _in_session(lambda open_session: run(config, open_session, console, _progress(console)))


def main() -> None:
    """Entry point: every error that is meant for people becomes one line on stderr, and so does every signal."""
    from favor import errors
    from favor.errors import FavorError
    from favor.stop import StoppedAtOnceError, stop_signals

    _quiet()
    sys.excepthook = errors.our_mistake
    try:
        with stop_signals("nothing unfinished was kept; run the same command again"):
            app()
    except FavorError as error:
        _end(str(error), error.exit_code)
    except StoppedAtOnceError as error:
        _end(str(error), error.exit_code, at_once=True)
    except errors.EXPECTED as error:
        said = errors.explained(error)
        if said is None:
            raise
        _end(said, FavorError.exit_code)
    finally:
        _flush()


def _end(message: str, code: int, *, at_once: bool = False) -> NoReturn:
    """The one line, without what nobody may see, and the exit code."""
    from favor.errors import clipped
    from favor.hide import without_secrets

    with contextlib.suppress(OSError):
        print(f"favor: {clipped(' '.join(without_secrets(message).splitlines()), 1400)}", file=sys.stderr)
    _flush()
    if at_once and threading.active_count() > 1:
        # the interpreter would wait for threads that wait for a server
        os._exit(code)
    sys.exit(code)


def _flush() -> None:
    """Write out what is left. A reader that has gone (`| head`) is no error, so nothing may be left for the exit either."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _continued() -> "AbstractContextManager[StopRequest]":
    """Signals in a command that keeps what it has made and takes it up again."""
    from favor.stop import stop_signals

    return stop_signals("what was made so far is kept; run the same command again to continue")


_NOTHING_KEPT = "no step was under way, so there was nothing to save; run the same command again"


def _in_session(run: "Callable[[Callable[[Path], Session]], object]", kept: str = _NOTHING_KEPT) -> None:
    """Call `run` with a way to open its session, inside the process group and the signal handlers.

    kept: what is said when a signal comes while no step is under way.
    """
    from favor.model.load import memory_settings
    from favor.ranks import world
    from favor.run import RunFolder
    from favor.stop import stop_signals
    from favor.train.session import Session

    memory_settings()
    console = _console()
    with world() as members, stop_signals(kept) as stop:
        run(lambda root: Session(RunFolder(root), members, console, stop))


def _quiet() -> None:
    """Progress bars and advice of libraries would drown our own lines; their errors still come through."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        # a terminal or locale that lacks a letter shows its number instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say_precision(*dtypes: str) -> None:
    """What the command's models are computed in; training commands and eval say it themselves."""
    from favor.model.load import precision_of

    for dtype in dict.fromkeys(dtypes):
        _print(f"precision: {precision_of(dtype)}")


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


def _print(text: str) -> None:
    print(text)


def _progress(console: "Console") -> Callable[[str, int, int], None]:
    """A line per kind of work that takes its time: (label, done since the last call, total)."""
    done_of: dict[str, int] = {}

    def advance(label: str, done: int, total: int) -> None:
        done_of[label] = done_of.get(label, 0) + done
        end = "\n" if done_of[label] >= total else "\r"
        if console.is_terminal or end == "\n":
            console.print(f"{label} {done_of[label]}/{total}", end=end)

    return advance


if __name__ == "__main__":
    main()
