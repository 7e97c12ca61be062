"""The commands that make, check and value preferences: their settings, and what they do with them.

In: a validated recipe, the terminal. Out: files and lines for the user. What a command needs is imported when it runs.
Next: commands.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from favor import closing
from favor.closing import Done, typed
from favor.command import Command, Terminal, continued, say_precision
from favor.pages import served

VOTES = "every vote that was answered is kept; run the same command again to go on"


def _score() -> Command:
    """Score a file's responses by any reward; on preferences, its accuracy and calibration."""
    from favor.eval.score import ScoreConfig, score
    from favor.report.table import figures_table

    def run(config: ScoreConfig, terminal: Terminal) -> Done:
        if config.reward.kind in ("model", "implicit"):
            say_precision("float32")
        figures = score(config, terminal.progress, terminal.recipe)
        if figures is not None:
            terminal.console.print(figures_table(figures))
        print(f"scores in {config.out}")
        reward = [word for word in terminal.overrides if word.startswith("reward.")]
        return closing.scores(config.data, config.out, figures, reward)

    return Command(ScoreConfig, run)


def _sample() -> Command:
    """Sample responses to the prompts of a file, as JSON lines; the same command again continues a stopped run."""
    from favor.generate.engines import dtypes
    from favor.generate.samples import SamplesConfig, write_samples

    def run(config: SamplesConfig, terminal: Terminal) -> Done:
        say_precision(*dtypes(config.engine))
        with continued():
            count = write_samples(config, terminal.progress, terminal.recipe)
        print(f"{count} samples in {config.out}")
        return closing.samples(config.out, count)

    return Command(SamplesConfig, run)


def _prefer() -> Command:
    """Make preferences: sample several responses per prompt and rank them by a reward."""
    from favor.generate.engines import dtypes
    from favor.generate.prefer import PreferConfig, prefer

    def run(config: PreferConfig, terminal: Terminal) -> Done:
        say_precision(*dtypes(config.engine))
        with continued():
            made = prefer(config, terminal.progress, terminal.recipe)
        print(f"{made}; preferences in {config.out}")
        return closing.preferences(config.out, asdict(made))

    return Command(PreferConfig, run)


def _lint() -> Command:
    """Look for faults in preference data; exit code 1 when a finding is as severe as lint.fail_on (error)."""
    from favor.lint.run import fails, findings_table, lint
    from favor.lint.settings import LintConfig

    def run(config: LintConfig, terminal: Terminal) -> Done:
        if config.reward is not None or config.lint.doubt:
            say_precision("float32")
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
        say_precision("float32")
        figures = value(config, terminal.progress, terminal.recipe)
        terminal.console.print(worth_table(figures))
        return closing.worth(headline(figures), figures, config.value.model_dump())

    return Command(ValueConfig, run)


def _ask() -> Command:
    """The pairs to label next for a model, from those without labels; and whether the labels so far are enough."""
    from favor.ask.run import ask
    from favor.ask.settings import AskConfig

    def run(config: AskConfig, terminal: Terminal) -> Done:
        say_precision("float32")
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
            VOTES,
            terminal.speech,
            lambda: labelled(config.db, ["label", f"db={config.db}"]),
        )

    return Command(LabelConfig, run)


def labelled(db: str, again: Sequence[str]) -> Done:
    """After a page that takes votes: how many there are, how to go on, how to get them out."""
    from favor.label import store

    following = (typed(*again), typed("label", f"db={db}", "out=labels.jsonl"))
    # a signal may come before there is anything
    if not Path(db).exists():
        return Done(("no answers yet",), {"answers": 0}, {}, following)
    with store.opened(Path(db), new=False) as opened:
        count = len(store.votes(opened))
    return Done((f"{count} answers in {db}",), {"answers": count}, {"labels": db}, following)


PREFERRING: Mapping[str, Callable[[], Command]] = {
    "score": _score,
    "sample": _sample,
    "prefer": _prefer,
    "lint": _lint,
    "value": _value,
    "ask": _ask,
    "label": _label,
}
