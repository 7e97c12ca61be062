"""`favor lint`: read preference files and report their faults, without a model.

In: LintConfig. Out: findings. Next: lint.py.
"""

from pydantic import BaseModel, ConfigDict

from favor.data.lint import Finding, leaks, lint
from favor.data.read import LEFT_OUT, DataConfig, ReadReport, read_parts
from favor.data.types import PromptTree

_LISTED = 10


class LintConfig(BaseModel):
    """A recipe for `favor lint`: the section [data]. A whole training recipe serves too; its other sections are not looked at."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    data: DataConfig


def check(config: LintConfig) -> list[Finding]:
    """Every finding of the training part, the held-out part, and between them. Raises DataError as read() does.

    Bad rows are findings here, not errors: all of them are wanted at once.
    """
    data = config.data.model_copy(update={"bad_rows": "drop"})
    parts = read_parts(data)
    trees, report = parts["train"]
    found = [*_bad_rows(report), *_merged(report), *lint(trees)]
    if "eval" in parts:
        held_out, held_out_report = parts["eval"]
        found += [*_bad_rows(held_out_report), *lint(held_out), *leaks(trees, held_out)]
    return [*found, _summary(trees, report)]


def _bad_rows(report: ReadReport) -> list[Finding]:
    dropped = [(each.source, row, reason) for each in report.each for row, reason in each.dropped]
    listed = [
        Finding("error", "bad row", f"{source}, row {row}: {reason}", (row,))
        for source, row, reason in dropped[:_LISTED]
    ]
    more = len(report.dropped) - _LISTED
    if more > 0:
        rows = tuple(row for row, _ in report.dropped[_LISTED:])
        listed.append(Finding("error", "bad row", f"{report.source}: and {more} more", rows))
    return listed


def _merged(report: ReadReport) -> list[Finding]:
    if report.repeated_comparisons == 0:
        return []
    text = f"{report.repeated_comparisons} comparisons stand more than once; their weights add up"
    return [Finding("warning", "repeated", text, ())]


def _summary(trees: list[PromptTree], report: ReadReport) -> Finding:
    text = f"{report.num_rows} rows, {len(trees)} prompts, {report.num_responses} responses, {report.num_comparisons} comparisons"
    values = report.as_json()
    text += "".join(f", {values[key]} {label}" for key, label in LEFT_OUT.items() if values[key])
    return Finding("note", "read", text, ())
