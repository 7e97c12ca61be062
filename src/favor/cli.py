"""The command line: `favor COMMAND recipe.toml key=value ...`. Heavy imports wait until a command runs.

In: words. Out: one call per command; errors become one line and an exit code. Next: train/preference.py.
"""

import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pydantic import BaseModel
    from rich.console import Console

    from favor.stop import StopRequest
    from favor.train.session import Session

T = TypeVar("T")

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE.toml] [KEY=VALUE]...", help="A recipe and settings that replace its own."),
]
Listed = Annotated[
    bool, typer.Option("--settings", help="List the settings: key, type, default, what is allowed, a sentence each.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be trained; read the data, load no weights.")]
Fix = Annotated[str | None, typer.Option("--fix", help="Write a cleaned copy of the training rows here.")]
app = typer.Typer(
    help="favor: teach a language model what people favor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True)
class Terminal:
    """Where a command runs: the recipe file it was given, the console, lines of progress."""

    recipe: Path | None
    console: "Console"
    progress: "Callable[[str, int, int], None]"


@dataclass(frozen=True)
class Command:
    """What a command is: its settings, and what it does with them; True: exit code 1."""

    config: "type[BaseModel]"
    run: Callable[[Any, Terminal], object]


def _train() -> Command:
    from favor.train.preference import TrainConfig, train

    return Command(TrainConfig, lambda c, t: _in_session(lambda opened: train(c, opened)))


def _dry_run() -> Command:
    from favor.train.dryrun import describe
    from favor.train.preference import TrainConfig

    return Command(TrainConfig, lambda c, t: print(describe(c)))


def _sft() -> Command:
    """Fine-tune on the preferred responses (or on plain SFT rows)."""
    from favor.train.sft import SftConfig, sft

    return Command(SftConfig, lambda c, t: _in_session(lambda opened: sft(c, opened)))


def _reward() -> Command:
    """Train a reward model on preferences (Bradley-Terry), with held-out accuracy and calibration."""
    from favor.train.reward import RewardTrainConfig, train_reward

    return Command(RewardTrainConfig, lambda c, t: _in_session(lambda opened: train_reward(c, opened)))


def _ppo() -> Command:
    """Train on a reward by PPO (or RLOO, GRPO): the system that DPO is compared with."""
    from favor.train.ppo import PpoConfig, train_ppo

    return Command(PpoConfig, lambda c, t: _in_session(lambda opened: train_ppo(c, opened)))


def _score() -> Command:
    """Score a file's responses by any reward; on preferences, its accuracy and calibration."""
    from favor.eval.score import ScoreConfig, score
    from favor.report.table import figures_table

    def run(config: ScoreConfig, terminal: Terminal) -> None:
        if config.reward.kind in ("model", "implicit"):
            _say_precision("float32")
        figures = score(config, terminal.progress, terminal.recipe)
        if figures is not None:
            terminal.console.print(figures_table(figures))
        print(f"scores in {config.out}")

    return Command(ScoreConfig, run)


def _frontier() -> Command:
    """Reward against KL of DPO, IPO, KTO, PPO and the baselines on one task: the paper's experiment."""
    from favor_frontier.page import frontier_table
    from favor_frontier.recipe import FrontierConfig
    from favor_frontier.run import frontier

    def run(config: FrontierConfig, terminal: Terminal) -> None:
        _say_precision("float32")
        terminal.console.print(frontier_table(_in_session(lambda open_session: frontier(config, open_session))))
        report([Path(config.run)])

    return Command(FrontierConfig, run)


def _eval() -> Command:
    """Held-out preference accuracy, margins, sampled KL and samples of a finished run."""
    from favor.eval.evaluate import EvalConfig, evaluate
    from favor.report.table import figures_table

    return Command(EvalConfig, lambda c, t: t.console.print(figures_table(evaluate(c, t.console.print, t.progress))))


def _winrate() -> Command:
    """Two models, or files of responses, compared by a judge: win rates with position and length taken out."""
    from favor.report.table import winrate_table
    from favor.winrate.run import WinrateConfig, winrate

    def run(config: WinrateConfig, terminal: Terminal) -> None:
        console = terminal.console
        _say_precision(*config.dtypes)
        with _continued():
            console.print(winrate_table(winrate(config, console.print, terminal.progress)))

    return Command(WinrateConfig, run)


def _sample() -> Command:
    """Sample responses to the prompts of a file, as JSON lines; the same command again continues a stopped run."""
    from favor.generate.engines import dtypes
    from favor.generate.samples import SamplesConfig, write_samples

    def run(config: SamplesConfig, terminal: Terminal) -> None:
        _say_precision(*dtypes(config.engine))
        with _continued():
            count = write_samples(config, terminal.progress, terminal.recipe)
        print(f"{count} samples in {config.out}")

    return Command(SamplesConfig, run)


def _prefer() -> Command:
    """Make preferences: sample several responses per prompt and rank them by a reward."""
    from favor.generate.engines import dtypes
    from favor.generate.prefer import PreferConfig, prefer

    def run(config: PreferConfig, terminal: Terminal) -> None:
        _say_precision(*dtypes(config.engine))
        with _continued():
            report = prefer(config, terminal.progress, terminal.recipe)
        print(f"{report}; preferences in {config.out}")

    return Command(PreferConfig, run)


def _loop() -> Command:
    """Online preference learning: in rounds, sample from the model, rank by a reward, train, continue from there."""
    from favor.online import LoopRunConfig, loop

    def run(config: LoopRunConfig, terminal: Terminal) -> None:
        _say_precision(config.model.dtype)
        kept = "what was made so far is kept; run the same command again, with resume=true"
        _in_session(lambda open_session: loop(config, open_session, terminal.progress), kept)

    return Command(LoopRunConfig, run)


def _lint() -> Command:
    from favor.lint.run import fails, findings_table, lint
    from favor.lint.settings import LintConfig

    def run(config: LintConfig, terminal: Terminal) -> bool:
        if config.reward is not None or config.lint.doubt:
            _say_precision("float32")
        findings = lint(config, terminal.recipe)
        terminal.console.print(findings_table(findings))
        return fails(config, findings)

    return Command(LintConfig, run)


def _demo() -> Command:
    """The main job on the embedded model and data: SFT, DPO, evaluation, report."""
    from favor.demo import DemoConfig, demo

    return Command(DemoConfig, lambda c, t: _in_session(lambda opened: demo(c, opened, t.console, t.progress)))


# every command that takes a recipe; what it needs is imported when it runs
COMMANDS: Mapping[str, Callable[[], Command]] = {
    "train": _train,
    "sft": _sft,
    "reward": _reward,
    "ppo": _ppo,
    "score": _score,
    "frontier": _frontier,
    "eval": _eval,
    "winrate": _winrate,
    "sample": _sample,
    "prefer": _prefer,
    "loop": _loop,
    "lint": _lint,
    "demo": _demo,
}


def _call(make: Callable[[], Command], words: Sequence[str], *, listed: bool) -> None:
    """Run a command on its words, or list its settings."""
    from favor.config import load, read, split_arguments

    command, (recipe, overrides), console = make(), split_arguments(words), _console()
    if listed:
        from favor.settings import settings, table

        console.print(table(settings(command.config, read(recipe, overrides))))
        return
    if command.run(load(command.config, recipe, overrides), Terminal(recipe, console, _progress(console))) is True:
        raise typer.Exit(1)


def _plain(name: str) -> None:
    def command(words: Words = None, settings: Listed = False) -> None:
        _call(COMMANDS[name], words or [], listed=settings)

    app.command(name, help=COMMANDS[name].__doc__)(command)


@app.command()
def train(words: Words = None, settings: Listed = False, dry_run: DryRun = False) -> None:
    """Train on preferences: DPO and its family, on prompt trees."""
    _call(_dry_run if dry_run else _train, words or [], listed=settings)


@app.command()
def lint(words: Words = None, settings: Listed = False, fix: Fix = None) -> None:
    """Look for faults in preference data; exit code 1 when a finding is as severe as lint.fail_on (error)."""
    _call(_lint, [*(words or []), *([f"lint.fix={fix}"] if fix is not None else [])], listed=settings)


for _name in (name for name in COMMANDS if name not in ("train", "lint")):
    _plain(_name)


@app.command()
def report(runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")]) -> None:
    """Write report.html into the first run folder: curves, samples, numbers, settings."""
    from favor_frontier.page import SECTIONS

    from favor.report.collect import collect
    from favor.report.page import write_page
    from favor.run import RunFolder

    path = RunFolder(runs[0]).report
    write_page([collect(run, SECTIONS) for run in runs], path)
    print(f"report: {path}")


@app.command()
def init(
    model: Annotated[str, typer.Option(help="A model folder or a hub id.")],
    data: Annotated[str, typer.Option(help="A file of preferences.")],
    out: Annotated[Path, typer.Option(help="The recipe to write; it must not be there yet.")] = Path("recipe.toml"),
) -> None:
    """Write a commented recipe for your model and your file."""
    from favor.init import write_recipe

    command = write_recipe(model, data, out)
    print(f"recipe: {out}; run it by: favor {command} {out}")


@app.command()
def schema(command: Annotated[str, typer.Argument(help="The command whose recipe it describes.")] = "train") -> None:
    """Print the JSON schema of a recipe, for editors that complete and check TOML."""
    import json

    from favor.errors import ConfigError

    if command not in COMMANDS:
        raise ConfigError(f"{command}: not a command with a recipe; name one of {', '.join(COMMANDS)}")
    print(json.dumps(COMMANDS[command]().config.model_json_schema(), indent=1))


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
        errors.end(str(error), error.exit_code)
    except StoppedAtOnceError as error:
        errors.end(str(error), error.exit_code, at_once=True)
    except errors.EXPECTED as error:
        said = errors.explained(error)
        if said is None:
            raise
        errors.end(said, FavorError.exit_code)
    finally:
        errors.flush()


def _continued() -> "AbstractContextManager[StopRequest]":
    """Signals in a command that keeps what it has made and takes it up again."""
    from favor.stop import stop_signals

    return stop_signals("what was made so far is kept; run the same command again to continue")


_NOTHING_KEPT = "no step was under way, so there was nothing to save; run the same command again"


def _in_session(run: "Callable[[Callable[[Path], Session]], T]", kept: str = _NOTHING_KEPT) -> T:
    """Call `run` with a way to open its session; kept: what is said when a signal comes while no step is under way."""
    from favor.model.load import memory_settings
    from favor.ranks import world
    from favor.run import RunFolder
    from favor.stop import stop_signals
    from favor.train.session import Session

    memory_settings()
    console = _console()
    with world() as members, stop_signals(kept) as stop:
        return run(lambda root: Session(RunFolder(root), members, console, stop))


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
        print(f"precision: {precision_of(dtype)}")


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


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
