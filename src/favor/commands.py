"""Every command that takes a recipe, but for `favor train`: its settings, and what it does with them.

In: a validated recipe, the terminal. Out: files and lines for the user. What a command needs is imported when it runs.
Next: cli.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from favor import closing
from favor.closing import Done
from favor.run import RunFolder

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pydantic import BaseModel
    from rich.console import Console

    from favor.data.settings import DataConfig
    from favor.stop import StopRequest

KEPT = "what was made so far is kept; run the same command again"


@dataclass(frozen=True)
class Terminal:
    """Where a command runs: the recipe file it was given, the console, lines of progress."""

    recipe: Path | None
    console: "Console"
    progress: "Callable[[str, int, int], None]"


@dataclass(frozen=True)
class Command:
    """What a command is: its settings, and what it does with them; None: it has said all there is to say."""

    config: "type[BaseModel]"
    run: Callable[[Any, Terminal], Done | None]


class Recipe(Protocol):
    """A command's recipe that names preferences."""

    @property
    def data(self) -> "DataConfig":
        """Section [data]."""
        ...


def _sft() -> Command:
    """Fine-tune on the preferred responses (or on plain SFT rows)."""
    from favor.train.session import in_session
    from favor.train.sft import SftConfig, sft

    def run(config: SftConfig, terminal: Terminal) -> Done:
        in_session(lambda opened: sft(config, opened), console=terminal.console)
        start = f"model.path={RunFolder(Path(config.run)).model}"
        return closing.training(config.run, [["train", start, *_data(config), "run=runs/dpo"], ["report", config.run]])

    return Command(SftConfig, run)


def _reward() -> Command:
    """Train a reward model on preferences (Bradley-Terry), with held-out accuracy and calibration."""
    from favor.train.reward import RewardTrainConfig, train_reward
    from favor.train.session import in_session

    def run(config: RewardTrainConfig, terminal: Terminal) -> Done:
        in_session(lambda opened: train_reward(config, opened), console=terminal.console)
        scoring = ["score", "data=FILE", f"run={config.run}", "out=scores.jsonl"]
        return closing.training(config.run, [scoring, ["report", config.run]])

    return Command(RewardTrainConfig, run)


def _ppo() -> Command:
    """Train on a reward by PPO (or RLOO, GRPO): the system that DPO is compared with."""
    from favor.train.ppo import PpoConfig, train_ppo
    from favor.train.session import in_session

    def run(config: PpoConfig, terminal: Terminal) -> Done:
        in_session(lambda opened: train_ppo(config, opened), console=terminal.console)
        return closing.training(config.run, [_sampling(config.run), ["report", config.run]])

    return Command(PpoConfig, run)


def _score() -> Command:
    """Score a file's responses by any reward; on preferences, its accuracy and calibration."""
    from favor.eval.score import ScoreConfig, score
    from favor.report.table import figures_table

    def run(config: ScoreConfig, terminal: Terminal) -> Done:
        if config.reward.kind in ("model", "implicit"):
            _say_precision("float32")
        figures = score(config, terminal.progress, terminal.recipe)
        if figures is not None:
            terminal.console.print(figures_table(figures))
        print(f"scores in {config.out}")
        return closing.scores(config.out, figures)

    return Command(ScoreConfig, run)


def _frontier() -> Command:
    """Reward against KL of DPO, IPO, KTO, PPO and the baselines on one task: the paper's experiment."""
    from favor_frontier.page import frontier_table
    from favor_frontier.recipe import FrontierConfig
    from favor_frontier.run import frontier

    from favor.train.session import in_session

    def run(config: FrontierConfig, terminal: Terminal) -> Done:
        _say_precision("float32")
        figures = in_session(lambda opened: frontier(config, opened), console=terminal.console)
        terminal.console.print(frontier_table(figures))
        page = write_report([Path(config.run)])
        print(f"report: {page}")
        return Done((), figures, {"figures": str(RunFolder(Path(config.run)).frontier), "report": str(page)})

    return Command(FrontierConfig, run)


def _eval() -> Command:
    """Held-out preference accuracy, margins, sampled KL and samples of a finished run."""
    from favor.eval.evaluate import EvalConfig, evaluate
    from favor.report.table import figures_table

    def run(config: EvalConfig, terminal: Terminal) -> Done:
        figures = evaluate(config, terminal.console.print, terminal.progress)
        terminal.console.print(figures_table(figures))
        return closing.evaluation(config.run, figures)

    return Command(EvalConfig, run)


def _winrate() -> Command:
    """Two models, or files of responses, compared by a judge: win rates with position and length taken out."""
    from favor.report.table import winrate_table
    from favor.winrate.run import WinrateConfig, winrate

    def run(config: WinrateConfig, terminal: Terminal) -> Done:
        console = terminal.console
        _say_precision(*config.dtypes)
        with _continued():
            figures = winrate(config, console.print, terminal.progress)
        console.print(winrate_table(figures))
        return closing.winrate(config.run, figures)

    return Command(WinrateConfig, run)


def _sample() -> Command:
    """Sample responses to the prompts of a file, as JSON lines; the same command again continues a stopped run."""
    from favor.generate.engines import dtypes
    from favor.generate.samples import SamplesConfig, write_samples

    def run(config: SamplesConfig, terminal: Terminal) -> Done:
        _say_precision(*dtypes(config.engine))
        with _continued():
            count = write_samples(config, terminal.progress, terminal.recipe)
        print(f"{count} samples in {config.out}")
        return closing.samples(config.out, count)

    return Command(SamplesConfig, run)


def _prefer() -> Command:
    """Make preferences: sample several responses per prompt and rank them by a reward."""
    from favor.generate.engines import dtypes
    from favor.generate.prefer import PreferConfig, prefer

    def run(config: PreferConfig, terminal: Terminal) -> Done:
        _say_precision(*dtypes(config.engine))
        with _continued():
            made = prefer(config, terminal.progress, terminal.recipe)
        print(f"{made}; preferences in {config.out}")
        return closing.preferences(config.out, asdict(made))

    return Command(PreferConfig, run)


def _loop() -> Command:
    """Online preference learning: in rounds, sample from the model, rank by a reward, train, continue from there."""
    from favor.online import OnlineConfig, Round, loop
    from favor.train.session import in_session

    def run(config: OnlineConfig, terminal: Terminal) -> Done:
        _say_precision(config.model.dtype)
        kept = f"{KEPT}, with resume=true"
        in_session(lambda opened: loop(config, opened, terminal.progress), kept, terminal.console)
        last = str(Round(config.rounds, config).train.root)
        return closing.training(last, [_sampling(last), ["report", last]])

    return Command(OnlineConfig, run)


def _lint() -> Command:
    """Look for faults in preference data; exit code 1 when a finding is as severe as lint.fail_on (error)."""
    from favor.lint.run import fails, findings_table, lint
    from favor.lint.settings import LintConfig

    def run(config: LintConfig, terminal: Terminal) -> Done:
        if config.reward is not None or config.lint.doubt:
            _say_precision("float32")
        findings = lint(config, terminal.recipe)
        terminal.console.print(findings_table(findings))
        words = [str(terminal.recipe)] if terminal.recipe else _data(config)
        return closing.findings(findings, words, config.lint.fix, failed=fails(config, findings))

    return Command(LintConfig, run)


def _label() -> Command:
    """Compare answers in the browser, several people beside each other; with out=FILE, write what they said for `favor train`."""
    from favor.label.settings import LabelConfig
    from favor.stop import stop_signals

    def run(config: LabelConfig, terminal: Terminal) -> None:
        from favor.label.run import label

        with stop_signals("every vote that was answered is kept; run the same command again to go on"):
            # not through the console, which would wrap the address
            label(config, partial(print, flush=True), terminal.recipe)

    return Command(LabelConfig, run)


def _export() -> Command:
    """Make a run's model ready for others: merged, bfloat16 or GGUF, with a model card; on the hub where push asks for it."""
    from favor.export.run import ExportConfig, export, told

    def run(config: ExportConfig, terminal: Terminal) -> Done:
        made = export(config, terminal.console.print)
        print(told(made))
        figures = {"difference": made.difference, "tokens": made.tokens, "address": made.address}
        return Done((), figures, {"exported": str(made.folder)})

    return Command(ExportConfig, run)


def _chat() -> Command:
    """Ask a run in the browser, before and after side by side; a vote is a label in the file of `favor label`."""
    from favor.chat.settings import ChatConfig
    from favor.stop import stop_signals

    def run(config: ChatConfig, terminal: Terminal) -> None:  # noqa: ARG001
        from favor.chat.run import chat

        with stop_signals("every vote that was answered is kept; run the same command again to go on"):
            # not through the console, which would wrap the address
            chat(config, partial(print, flush=True))

    return Command(ChatConfig, run)


def _demo() -> Command:
    """The main job on the embedded model and data: SFT, DPO, evaluation, report."""
    from favor.demo import DemoConfig, demo
    from favor.train.session import in_session

    def run(config: DemoConfig, terminal: Terminal) -> Done:
        console = terminal.console
        root = in_session(lambda opened: demo(config, opened, console, terminal.progress), console=console)
        run = str(root / "dpo")
        done = closing.training(run, [_sampling(run)])
        return replace(done, paths={**done.paths, "report": str(RunFolder(Path(run)).report)})

    return Command(DemoConfig, run)


def _data(config: "Recipe") -> list[str]:
    """The training rows of a recipe as words; rows of several sources are named in a recipe only."""
    return [f"data.train={config.data.train}"] if config.data.train is not None else ["RECIPE.toml"]


def _sampling(run: str) -> list[str]:
    return ["sample", f"run={run}", "prompts=FILE", "out=samples.jsonl"]


OTHERS: Mapping[str, Callable[[], Command]] = {
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
    "label": _label,
    "export": _export,
    "chat": _chat,
    "demo": _demo,
}


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared with the first.")],
    out: Annotated[Path | None, typer.Option(help="Write the page here.")] = None,
) -> None:
    """Write a page: of one run its report.html, of several a compare.html in the first folder, which leaves their pages alone."""
    print(f"report: {write_report(runs, out)}")


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of these runs, into the first one's folder without `out`; returns its path.

    Raises CheckpointError where there is no run, ConfigError when `out` holds anything but such a page.
    """
    from favor_frontier.page import SECTIONS

    from favor.report.compare import write_comparison
    from favor.report.frame import replaceable
    from favor.report.page import write_page
    from favor.report.records import collect

    found = [collect(run, SECTIONS) for run in runs]
    folder, several = RunFolder(runs[0]), len(runs) > 1
    path = out or (folder.comparison if several else folder.report)
    replaceable(path, "comparison" if several else "run")
    if several:
        write_comparison(found, path)
    else:
        write_page(found[0], path)
    return path


def watch(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    port: Annotated[int, typer.Option(help="The port on 127.0.0.1; 0 takes a free one.")] = 0,
) -> None:
    """Show the report of a run in the browser while it trains; the page follows what the run writes."""
    from favor_frontier.page import SECTIONS

    from favor.live.run import follow
    from favor.report.page import page_html
    from favor.report.records import collect
    from favor.stop import stop_signals

    with stop_signals("the run itself goes on"):
        follow(run, lambda: page_html(collect(run, SECTIONS)), port, partial(print, flush=True))


def runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs are.")] = Path("runs"),
    sort: Annotated[str, typer.Option(help="name, loss, accuracy or time; the best or newest first.")] = "name",
    settings: Annotated[bool, typer.Option("--settings", help="Show the settings that differ, too.")] = False,
) -> None:
    """List the runs of a folder: state, steps, loss, held-out accuracy, time; with --settings, how they differ."""
    from favor.report.runs import show

    show(folder, sort, settings=settings)


def init(
    model: Annotated[str, typer.Option(help="A model folder or a hub id.")],
    data: Annotated[str, typer.Option(help="A file of preferences.")],
    out: Annotated[Path, typer.Option(help="The recipe to write; it must not be there yet.")] = Path("recipe.toml"),
) -> None:
    """Write a commented recipe for your model and your file."""
    from favor.init import write_recipe

    command = write_recipe(model, data, out)
    print(f"recipe: {out}; run it by: favor {command} {out}")


def from_trl(
    file: Annotated[Path, typer.Argument(help="A script with a DPOConfig, a dict, or the YAML or JSON of one.")],
) -> None:
    """Print a configuration of TRL as a recipe, with comments on what has no equal; the file is read, never run."""
    from favor.trl.recipe import recipe_of

    print(recipe_of(file), end="")


def _continued() -> "AbstractContextManager[StopRequest]":
    """Signals in a command that keeps what it has made and takes it up again."""
    from favor.stop import stop_signals

    return stop_signals(f"{KEPT} to continue")


def _say_precision(*dtypes: str) -> None:
    """What the command's models are computed in; training commands and eval say it themselves."""
    from favor.model.load import precision_of

    for dtype in dict.fromkeys(dtypes):
        print(f"precision: {precision_of(dtype)}")
