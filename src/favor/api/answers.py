"""`favor.value`, `ask`, `audit`, `realign` and `conform`: questions about labels, judges, policies and trainers.

In: models, rows and judges in memory or by name, settings as keywords. Out: figures, or rows with figures. What runs is what
the command line runs. Next: parts.py.
"""

from pathlib import Path
from typing import Any, NamedTuple

from favor.api.inputs import Given, lay, lay_in_run
from favor.api.keywords import put
from favor.api.parts import (
    Asked,
    fresh,
    judge_of,
    keywords_of,
    recipe_of,
    run_of,
    speaking,
    staged,
    with_reward,
)
from favor.api.show import calling
from favor.config import checked
from favor.run import RunFolder, read_jsonl


class Answer(NamedTuple):
    """Rows (of `favor.value` a line a pair, of `favor.ask` the pairs to label) and figures of the whole."""

    rows: list[dict[str, Any]]
    figures: dict[str, Any]


def value(
    model: Any,
    rows: Any,
    *,
    eval: Any = None,  # noqa: A002
    trusted: Any = None,
    out: Any = None,
    tokenizer: Any = None,
    quiet: bool = False,
    **settings: Any,
) -> Answer:
    """What each pair is worth to a model, and how many labels are wrong; rows as `favor value` writes them to value.out.

    model, rows, eval: as in `favor.train`. trusted: pairs of the same kind whose labels are right. out: a file to keep.
    settings: those of `favor value --settings` (`models=20, clean="clean.jsonl"`). Raises DataError for under twenty prompts.
    """
    from favor.report.table import worth_table
    from favor.value.run import value as valuing
    from favor.value.settings import ValueConfig

    with staged(ValueConfig) as given, calling(quiet=quiet) as (console, advance):
        kept = given.place / "value.jsonl" if out is None else Path(out)
        asked = Asked(model, rows, eval, None, tokenizer, quiet, settings)
        tree = recipe_of(ValueConfig, asked, given, "favor.value")
        put(tree, "value.out", str(kept), "favor.value")
        if trusted is not None:
            put(tree, "value.trusted", given.rows("trusted", trusted), "favor.value")
        config = checked(ValueConfig, tree, "favor.value")
        lay(given)
        figures = valuing(config, advance)
        console.print(worth_table(figures))
        return Answer([{**line, "source": given.named(line["source"])} for line in read_jsonl(kept)], figures)


def ask(
    model: Any,
    pool: Any,
    labels: Any = None,
    *,
    out: Any,
    tokenizer: Any = None,
    quiet: bool = False,
    **settings: Any,
) -> Answer:
    """The pairs of a pool to label next, and whether the labels so far are enough; the rows are those of the file `out`.

    model: as in `favor.train`. pool: answers without labels, rows or a file. labels: preferences so far, rows or a file. out: the
    file for `favor label`; what was asked is remembered in `history` (asked.jsonl). settings: those of `favor ask --settings`
    (`count=50, overwrite=True`). Raises DataError once every pair has been asked about.
    """
    from favor.ask.run import ask as asking
    from favor.ask.settings import AskConfig

    with staged(AskConfig) as given, calling(quiet=quiet) as (_, advance):
        asked = Asked(model, labels, None, None, tokenizer, quiet, settings)
        tree = recipe_of(AskConfig, asked, given, "favor.ask", out=str(out))
        put(tree, "pool", given.rows("pool", pool), "favor.ask")
        config = checked(AskConfig, tree, "favor.ask")
        lay(given)
        figures = asking(config, advance)
        return Answer(read_jsonl(Path(config.out)), figures)


def audit(
    rows: Any, judge: Any, human: Any = None, *, out: Any = None, quiet: bool = False, **settings: Any
) -> dict[str, Any]:
    """Is a judge to be trusted? The content of audit.json: flips, position, length, its own answers, agreement, soft labels.

    rows: preferences, or rows of prompt, first and second. judge: as in `favor.winrate`. human: preferences that people gave; the
    same object as rows where their labels are people's. out: the folder that keeps verdicts and soft labels; without it a fresh
    one, runs/audit-N. settings: those of `favor audit --settings`; ["failed"] lists the figures beyond `fail_on`.
    """
    from favor.audit.run import audit as auditing
    from favor.audit.settings import AuditConfig
    from favor.report.table import audit_table

    root = fresh("runs/audit") if out is None else Path(out)
    given = Given(RunFolder(root).given)
    with speaking(AuditConfig, given), calling(quiet=quiet) as (console, advance):
        tree = keywords_of(AuditConfig, settings, "favor.audit", run=str(root))
        tree["judge"] = judge_of(judge, given, kept=out is not None)
        put(tree, "data", given.rows("rows", rows), "favor.audit")
        if human is not None:
            put(tree, "human", tree["data"] if human is rows else given.rows("human", human), "favor.audit")
        config = checked(AuditConfig, tree, "favor.audit")
        lay_in_run(root, given)
        figures = auditing(config, console.print, advance)
        console.print(audit_table(figures))
    return figures


def realign(run: Any, data: Any = None, *, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """One trained policy at several strengths: reward, KL, accuracy and length for each lambda, as in realign.json.

    run: a Run or its folder; its realign.json and realign.html are made anew. data: other held-out rows. settings: those of
    `favor realign --settings` (`lambdas=[0.5, 1, 2], bake=0.5, bake_to="model"`). Raises as `favor.evaluate`.
    """
    from favor.realign.run import RealignConfig
    from favor.realign.run import realign as mixing
    from favor.report.table import family_table

    with staged(RealignConfig) as given, calling(quiet=quiet) as (console, advance):
        settings = dict(with_reward(settings, given))
        tree = keywords_of(RealignConfig, settings, "favor.realign", run=str(run_of(run).path))
        if data is not None:
            tree["data"] = given.rows("held-out", data)
        config = checked(RealignConfig, tree, "favor.realign")
        lay(given)
        figures = mixing(config, console.print, advance)
        console.print(family_table(figures))
    return figures


def conform(adapter: Any, *, quiet: bool = False, **settings: Any) -> dict[str, dict[str, Any]]:
    """A trainer through the cases of `favor conform`: case -> what was found and what was right.

    adapter: favor, trl, one_file, or a Python file that defines train(model, rows, out, settings); it runs in processes of its
    own. settings: those of `favor conform --settings` (`cases=["padding"], page="conform.html"`).
    """
    from favor.conform.run import conform as trying
    from favor.conform.run import results_table
    from favor.conform.settings import ConformConfig

    with calling(quiet=quiet) as (console, advance):
        tree = keywords_of(ConformConfig, settings, "favor.conform")
        put(tree, "adapter", str(adapter), "favor.conform")
        found = trying(checked(ConformConfig, tree, "favor.conform"), advance)
        console.print(results_table(found))
    return {name: result._asdict() for name, result in found.items()}
