"""`favor.train`, `favor.sft`, `favor.reward`, and `favor.lint` of the rows that they would train on.

In: a model and rows in memory or by name, settings as keywords. Out: a Run, or findings. What runs is what the command line
runs. Next: parts.py.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from favor.api.inputs import Given, lay, lay_in_run
from favor.api.keywords import in_python
from favor.api.parts import Asked, fresh, recipe_of, speaking, staged, with_reward
from favor.api.run import Run
from favor.api.show import calling
from favor.config import checked
from favor.data.types import Finding
from favor.errors import ConfigError
from favor.guard import remove
from favor.lint.settings import LintConfig
from favor.ranks import current, on_main
from favor.run import RunFolder, holds_work, read_json
from favor.train.session import OpenSession, Session, in_session


def train(
    model: Any,
    rows: Any,
    *,
    eval: Any = None,  # noqa: A002
    out: Any = None,
    tokenizer: Any = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train on preferences by DPO or a loss of its family; the same as `favor train` with the same settings, to the digit.

    Args:
        model: a folder, a hub id, a Run, or a loaded transformers or PEFT model. A loaded one is saved into the run's folder
            (adapters folded in) and stays as it is. Or a dict of section [model].
        rows: preferences in any format of docs/formats.md: a list of dicts, a Dataset, a DataFrame, or the names of files.
        eval: held-out rows, or the share of the prompts to hold out (0.1).
        out: the run folder; without it a fresh one, runs/train-N.
        tokenizer: of a loaded model, where it does not come from a folder or the hub.
        quiet: print nothing.
        settings: those of `favor train --settings`: by name where one setting has it (`beta=0.1, lr=5e-6, epochs=2`), by
            section else (`loss={"kind": "ipo"}`). `resume=True` continues a run. Rows under other names are mapped by
            `columns={"prompt": "question", "chosen": "better", "rejected": "worse"}`.

    Raises:
        ConfigError: settings that cannot work, or a run folder that is taken. DataError: rows. CheckpointError: the model.
        NumericsError: a self-check. StoppedError: after Ctrl-C, with a checkpoint.
    """
    from favor.train import preference

    asked = Asked(model, rows, eval, out, tokenizer, quiet, settings)
    return _trained("train", preference.TrainConfig, preference.train, asked)


def sft(
    model: Any,
    rows: Any,
    *,
    eval: Any = None,  # noqa: A002
    out: Any = None,
    tokenizer: Any = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Fine-tune on the preferred responses, or on rows of prompt and completion. Arguments and errors as `favor.train`."""
    from favor.train import sft as tuning

    asked = Asked(model, rows, eval, out, tokenizer, quiet, settings)
    return _trained("sft", tuning.SftConfig, tuning.sft, asked)


def reward(
    model: Any,
    rows: Any,
    *,
    eval: Any = None,  # noqa: A002
    out: Any = None,
    tokenizer: Any = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train a reward model on preferences (Bradley-Terry). Arguments and errors as `favor.train`."""
    from favor.train import reward as rewarding

    asked = Asked(model, rows, eval, out, tokenizer, quiet, settings)
    return _trained("reward", rewarding.RewardTrainConfig, rewarding.train_reward, asked)


def lint(
    rows: Any,
    *,
    eval: Any = None,  # noqa: A002
    model: Any = None,
    tokenizer: Any = None,
    quiet: bool = False,
    **settings: Any,
) -> list[Finding]:
    """Look for faults in preferences; the most severe findings come first, each with its rows and examples.

    rows, eval: as in `favor.train`. model: its tokenizer and template are tried on the rows. settings: those of
    `favor lint --settings`. Raises DataError when there is nothing to read.
    """
    from favor.lint.run import findings_table
    from favor.lint.run import lint as look

    with staged(LintConfig) as given, calling(quiet=quiet) as (console, _):
        asked = Asked(model, rows, eval, None, tokenizer, quiet, with_reward(settings, given))
        config = checked(LintConfig, recipe_of(LintConfig, asked, given, "favor.lint"), "favor.lint")
        lay(given)
        found = [_in_python(finding, given) for finding in look(config)]
        console.print(findings_table(found))
    return found


def _trained(name: str, schema: Any, work: Callable[[Any, OpenSession], object], asked: Asked) -> Run:
    where = f"favor.{name}"
    root = fresh(f"runs/{name}") if asked.out is None else Path(asked.out)
    given = Given(RunFolder(root).given)
    with speaking(schema, given), calling(quiet=asked.quiet) as (console, _):
        config = checked(schema, recipe_of(schema, asked, given, where, run=str(root)), where)
        in_session(lambda opened: _run(lambda own: work(config, own), opened, root, given), console=console)
    return Run(root)


def _run(work: Callable[[OpenSession], object], open_session: OpenSession, root: Path, given: Given) -> None:
    """Lay out what is in memory, and train; of a start that fails nothing remains, so it may be repeated with other rows."""
    folder, members = RunFolder(root), current()
    hashes: dict[str, str] = {}
    on_main(members, lambda: hashes.update(lay_in_run(root, given)))
    try:
        work(partial(_held, open_session, hashes))
    except BaseException:
        if members.is_main and not holds_work(folder):
            remove(folder.given)
            with contextlib.suppress(OSError):
                root.rmdir()
        raise


def _held(open_session: OpenSession, hashes: dict[str, str], path: Path) -> Session:
    """The session of a folder that is held now, and for a moment was not. Raises ConfigError when another was faster."""
    folder = RunFolder(path)
    if hashes and read_json(folder.given / folder.mark.name) != hashes:
        raise ConfigError(f"{path}: another process started a run here at the same time; choose another out=")
    return open_session(path)


def _in_python(finding: Finding, given: Given) -> Finding:
    def said(text: str) -> str:
        return in_python(LintConfig, given.named(text))

    rows = tuple((given.named(source), row) for source, row in finding.rows)
    examples = tuple(map(said, finding.examples))
    return finding._replace(message=said(finding.message), rows=rows, examples=examples)
