"""Every command that takes a recipe, but for `favor train` and those of preferring.py: its settings, and what it does with them.

In: a validated recipe, the terminal. Out: files and lines for the user. What a command needs is imported when it runs.
Next: cli.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from favor import closing
from favor.closing import Done, typed
from favor.command import KEPT, Command, Terminal, continued, say_precision
from favor.pages import served, write_report
from favor.preferring import PREFERRING, VOTES, labelled
from favor.run import RunFolder

if TYPE_CHECKING:
    from favor.data.settings import DataConfig
    from favor.doctor.settings import Sign


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


def _frontier() -> Command:
    """Reward against KL of DPO, IPO, KTO, PPO and the baselines on one task: the paper's experiment."""
    from favor_frontier.page import frontier_table
    from favor_frontier.recipe import FrontierConfig
    from favor_frontier.run import frontier

    from favor.train.session import in_session

    def run(config: FrontierConfig, terminal: Terminal) -> Done:
        say_precision("float32")
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
        say_precision(*config.dtypes)
        with continued():
            figures = winrate(config, console.print, terminal.progress)
        console.print(winrate_table(figures))
        return closing.winrate(config.run, figures)

    return Command(WinrateConfig, run)


def _diff() -> Command:
    """What changed between two models on the same prompts; a gate has exit code 0 where it passes, 1 fails, 3 is not settled."""
    from favor.diff.page import headline
    from favor.diff.run import diff
    from favor.diff.settings import DiffConfig
    from favor.report.table import diff_table

    def run(config: DiffConfig, terminal: Terminal) -> Done:
        say_precision(config.a.dtype, config.b.dtype)
        figures = diff(config, terminal.console.print, terminal.progress, terminal.recipe)
        terminal.console.print(diff_table(figures))
        for note in figures["left_out"]:
            terminal.console.print(note, style="yellow", markup=False)
        return closing.compared(headline(figures), figures, {"out": config.out, "page": config.page})

    return Command(DiffConfig, run)


def _audit() -> Command:
    """Measure a judge's biases and its agreement with people; a win rate from few labels, and soft labels."""
    from favor.audit.run import audit
    from favor.audit.settings import AuditConfig
    from favor.report.table import audit_table

    def run(config: AuditConfig, terminal: Terminal) -> Done:
        console = terminal.console
        say_precision(*config.dtypes)
        with continued():
            figures = audit(config, console.print, terminal.progress)
        console.print(audit_table(figures))
        for finding in figures["findings"]:
            console.print(finding["said"], style="yellow" if finding["level"] == "found" else "", markup=False)
        return closing.audited(config.run, figures)

    return Command(AuditConfig, run)


def _realign() -> Command:
    """One trained model at any strength: reference and policy mixed at decoding, on a page with a slider; bake a choice."""
    from favor.realign.run import RealignConfig, realign
    from favor.report.table import family_table

    def run(config: RealignConfig, terminal: Terminal) -> Done:
        figures = realign(config, terminal.console.print, terminal.progress, terminal.recipe)
        terminal.console.print(family_table(figures))
        folder = RunFolder(Path(config.run))
        paths = {"figures": config.out or str(folder.realign), "page": config.page or str(folder.realign_page)}
        return closing.realigned(figures, paths)

    return Command(RealignConfig, run)


def _loop() -> Command:
    """Online preference learning: in rounds, sample from the model, rank by a reward, train, continue from there."""
    from favor.online import OnlineConfig, Round, loop
    from favor.train.session import in_session

    def run(config: OnlineConfig, terminal: Terminal) -> Done:
        say_precision(config.model.dtype)
        kept = f"{KEPT}, with resume=true"
        in_session(lambda opened: loop(config, opened, terminal.progress), kept, terminal.console)
        last = str(Round(config.rounds, config).train.root)
        return closing.training(last, [_sampling(last), ["report", last]])

    return Command(OnlineConfig, run)


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
            return labelled(config.db, ["chat", f"run={config.run}", f"db={config.db}"])

        return served(lambda: chat(config, terminal.speech.address), VOTES, terminal.speech, done)

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


def _conform() -> Command:
    """Try a trainer (favor's, TRL's, yours) on small cases with known results; exit code 1 when one fails."""
    from favor.conform.settings import ConformConfig

    def run(config: ConformConfig, terminal: Terminal) -> Done:
        from favor.conform.run import conform, results_table

        found = conform(config, terminal.progress)
        terminal.console.print(results_table(found))
        return closing.conformed({name: result._asdict() for name, result in found.items()}, config.out, config.page)

    return Command(ConformConfig, run)


def _data(config: "Recipe") -> list[str]:
    """The training rows of a recipe as words; rows of several sources are named in a recipe only."""
    return [f"data.train={config.data.train}"] if config.data.train is not None else ["RECIPE.toml"]


def _sampling(run: str) -> list[str]:
    return ["sample", f"run={run}", "prompts=FILE", "out=samples.jsonl"]


OTHERS: Mapping[str, Callable[[], Command]] = {
    **PREFERRING,
    "sft": _sft,
    "reward": _reward,
    "ppo": _ppo,
    "frontier": _frontier,
    "eval": _eval,
    "winrate": _winrate,
    "diff": _diff,
    "audit": _audit,
    "realign": _realign,
    "loop": _loop,
    "export": _export,
    "chat": _chat,
    "demo": _demo,
    "doctor": _doctor,
    "conform": _conform,
}
