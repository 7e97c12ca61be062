"""Every command that takes a recipe, but for `favor train`: its settings, and what it does with them.

In: a validated recipe, the terminal. Out: files and lines for the user. What a command needs is imported when it runs.
Next: cli.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from favor import closing
from favor.closing import Done, Speech, typed
from favor.pages import served, write_report
from favor.run import RunFolder

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pydantic import BaseModel
    from rich.console import Console

    from favor.data.settings import DataConfig
    from favor.doctor.settings import Sign
    from favor.stop import StopRequest

KEPT = "what was made so far is kept; run the same command again"
_VOTES = "every vote that was answered is kept; run the same command again to go on"


@dataclass(frozen=True)
class Terminal:
    """Where a command runs. recipe: the file it was given; words: what was typed; overrides: the settings in it, whole keys."""

    recipe: Path | None
    console: "Console"
    progress: "Callable[[str, int, int], None]"
    speech: Speech
    words: tuple[str, ...]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """What a command is: its settings, and what it does with them."""

    config: "type[BaseModel]"
    run: Callable[[Any, Terminal], Done]


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
        reward = [word for word in terminal.overrides if word.startswith("reward.")]
        return closing.scores(config.data, config.out, figures, reward)

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
        paths = {"figures": str(RunFolder(Path(config.run)).frontier), "report": str(page)}
        return Done(("every method at every strength, on one page",), figures, paths, (typed("report", config.run),))

    return Command(FrontierConfig, run)


def _eval() -> Command:
    """Held-out preference accuracy, margins, sampled KL and samples of a finished run."""
    from favor.eval.evaluate import EvalConfig, evaluate
    from favor.ranks import world
    from favor.report.table import figures_table

    def run(config: EvalConfig, terminal: Terminal) -> Done:
        with world() as members:
            figures = evaluate(config, terminal.console.print, terminal.progress, members=members)
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
        read = [word for word in terminal.overrides if word.partition(".")[0] in ("data", "tokens", "model")]
        words = [*([str(terminal.recipe)] if terminal.recipe else ()), *read]
        return closing.findings(findings, words, config.lint.fix, failed=fails(config, findings))

    return Command(LintConfig, run)


def _value() -> Command:
    """What each pair is worth to a model: how many labels are wrong, which, and a copy of the data without them."""
    from favor.report.table import worth_table
    from favor.value.page import headline
    from favor.value.run import value
    from favor.value.settings import ValueConfig

    def run(config: ValueConfig, terminal: Terminal) -> Done:
        _say_precision("float32")
        figures = value(config, terminal.progress, terminal.recipe)
        terminal.console.print(worth_table(figures))
        return closing.worth(headline(figures), figures, config.value.model_dump())

    return Command(ValueConfig, run)


def _ask() -> Command:
    """The pairs to label next for a model, from those without labels; and whether the labels so far are enough."""
    from favor.ask.run import ask
    from favor.ask.settings import AskConfig

    def run(config: AskConfig, terminal: Terminal) -> Done:
        _say_precision("float32")
        figures = ask(config, terminal.progress, terminal.recipe)
        return closing.asked(config.out, config.history, figures)

    return Command(AskConfig, run)


def _label() -> Command:
    """Compare answers in the browser, several people beside each other; with out=FILE, write what they said for `favor train`."""
    from favor.label.settings import LabelConfig

    def run(config: LabelConfig, terminal: Terminal) -> Done:
        from favor.label.export import export
        from favor.label.run import label

        if config.out is not None:
            told = export(config, terminal.recipe)
            done = closing.preferences(config.out, asdict(told))
            return replace(done, changed=(f"{config.out}: {told}",), paths={"labels": config.out})
        return served(
            lambda: label(config, print, terminal.speech.address),
            _VOTES,
            terminal.speech,
            lambda: _labelled(config.db, ["label", f"db={config.db}"]),
        )

    return Command(LabelConfig, run)


def _export() -> Command:
    """Make a run's model ready for others: merged, bfloat16 or GGUF, with a model card; on the hub where push asks for it."""
    from favor.export.run import ExportConfig, export, told

    def run(config: ExportConfig, terminal: Terminal) -> Done:
        made = export(config, terminal.console.print)
        print(told(made))
        figures = {"difference": made.difference, "tokens": made.tokens, "address": made.address}
        ollama = (made.folder / "Modelfile").exists()
        following = (
            f"ollama create NAME -f {made.folder / 'Modelfile'}" if ollama else typed("chat", f"run={config.run}")
        )
        changed = f"the model as others load it, in {made.folder}"
        return Done((changed,), figures, {"exported": str(made.folder)}, (following,))

    return Command(ExportConfig, run)


def _chat() -> Command:
    """Ask a run in the browser, before and after side by side; a vote is a label in the file of `favor label`."""
    from favor.chat.settings import ChatConfig

    def run(config: ChatConfig, terminal: Terminal) -> Done:
        from favor.chat.run import chat

        def done() -> Done:
            return _labelled(config.db, ["chat", f"run={config.run}", f"db={config.db}"])

        return served(lambda: chat(config, terminal.speech.address), _VOTES, terminal.speech, done)

    return Command(ChatConfig, run)


def _demo() -> Command:
    """The main job on the embedded model and data: SFT, DPO, evaluation, report."""
    from favor.demo import DemoConfig, demo
    from favor.train.session import in_session

    def run(config: DemoConfig, terminal: Terminal) -> Done:
        console = terminal.console
        root = in_session(lambda opened: demo(config, opened, console, terminal.progress), console=console)
        run = str(root / "dpo")
        done = closing.training(run, [["chat", f"run={run}"], _sampling(run)])
        return replace(done, paths={**done.paths, "report": str(RunFolder(Path(run)).report)})

    return Command(DemoConfig, run)


def _doctor() -> Command:
    """Say what this machine has, what is missing or broken, what would be slow, and what to do; exit code 1 when broken."""
    from favor.doctor.settings import DoctorConfig

    def run(config: DoctorConfig, terminal: Terminal) -> Done:
        from favor.doctor.run import signs

        found: list[Sign] = []
        for sign in signs(config):
            found.append(sign)
            colour = {"ok": "", "note": "yellow", "broken": "red"}[sign.level]
            terminal.console.print(sign.line(), style=colour, markup=False, soft_wrap=True)
        return closing.checked(found, asked=config.model or config.run)

    return Command(DoctorConfig, run)


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
    "value": _value,
    "ask": _ask,
    "label": _label,
    "export": _export,
    "chat": _chat,
    "demo": _demo,
    "doctor": _doctor,
}


def _labelled(db: str, again: Sequence[str]) -> Done:
    """After a page that takes votes: how many there are, how to go on, how to get them out."""
    from favor.label import store

    following = (typed(*again), typed("label", f"db={db}", "out=labels.jsonl"))
    # a signal may come before there is anything
    if not Path(db).exists():
        return Done(("no answers yet",), {"answers": 0}, {}, following)
    with store.opened(Path(db), new=False) as opened:
        count = len(store.votes(opened))
    return Done((f"{count} answers in {db}",), {"answers": count}, {"labels": db}, following)


def _continued() -> "AbstractContextManager[StopRequest]":
    """Signals in a command that keeps what it has made and takes it up again."""
    from favor.stop import stop_signals

    return stop_signals(f"{KEPT} to continue")


def _say_precision(*dtypes: str) -> None:
    """What the command's models are computed in; training commands and eval say it themselves."""
    from favor.model.load import precision_of

    for dtype in dict.fromkeys(dtypes):
        print(f"precision: {precision_of(dtype)}")
