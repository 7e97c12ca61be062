"""Faults of preference data that training would not notice: pure checks on prompt trees and reports.

In: PromptTrees, a TokenReport. Out: findings, each with the rows concerned. Next: ../data/prepare.py.
"""

from collections.abc import Iterator, Sequence

from favor.data.prepare import Checks
from favor.data.tokenize import TokenReport
from favor.data.types import Finding, PromptTree, Text

_LONGER_SHARE = 0.6
_CUT_SHARE = 0.05


def lint(trees: Sequence[PromptTree]) -> list[Finding]:
    """All checks on text: contradictions, length bias, stub responses, surrounding blanks."""
    found = [_contradictions(trees), _longer(trees), _short(trees), _blanks(trees)]
    return [finding for finding in found if finding is not None]


def leaks(train: Sequence[PromptTree], held_out: Sequence[PromptTree]) -> list[Finding]:
    """Prompts that occur in both parts: held-out figures would flatter."""
    known = {_plain(tree.prompt) for tree in train}
    rows = tuple(tree.rows[0] for tree in held_out if _plain(tree.prompt) in known)
    if not rows:
        return []
    return [
        Finding("warning", "leak", f"{len(rows)} held-out prompts are in the training part too {_rows(rows)}", rows)
    ]


def lint_tokens(report: TokenReport) -> list[Finding]:
    """How much of the data truncation takes."""
    touched = report.trees_dropped + report.prompts_cut + report.responses_cut
    if touched == 0:
        return []
    share = touched / report.trees
    rows = tuple(row for row, _ in report.dropped)
    text = (
        f"of {report.trees} prompts {report.trees_dropped} were dropped and {report.prompts_cut} cut; "
        f"{report.responses_cut} responses were cut: {lost_share(report)}"
    )
    return [Finding("warning" if share > _CUT_SHARE else "note", "truncation", text, rows)]


def lost_share(report: TokenReport) -> str:
    """The share of tokens and of comparisons that truncation takes."""
    tokens, pairs = report.tokens_lost / max(1, report.tokens), report.pairs_lost / max(1, report.pairs)
    return f"{tokens:.1%} of the tokens and {pairs:.1%} of the comparisons are lost"


def _contradictions(trees: Sequence[PromptTree]) -> Finding | None:
    rows: list[int] = []
    for tree in trees:
        better = {(a, b) for c in tree.comparisons for i, a in enumerate(c.order) for b in c.order[i + 1 :]}
        if any((b, a) in better for a, b in better):
            rows.append(tree.rows[0])
    if not rows:
        return None
    text = f"{len(rows)} prompts hold a pair judged both ways {_rows(rows)}"
    return Finding("error", "contradiction", text, tuple(rows))


def _longer(trees: Sequence[PromptTree]) -> Finding | None:
    lengths = [
        (len(_plain(tree.responses[c.order[0]])), len(_plain(tree.responses[c.order[-1]])))
        for tree in trees
        for c in tree.comparisons
    ]
    if not lengths:
        return None
    share = sum(best > worst for best, worst in lengths) / len(lengths)
    severity = "warning" if share > _LONGER_SHARE or share < 1 - _LONGER_SHARE else "note"
    return Finding(severity, "length", f"the preferred response is the longer one in {share:.0%} of comparisons", ())


def _short(trees: Sequence[PromptTree]) -> Finding | None:
    rows = tuple(t.rows[0] for t in trees if any(len(_plain(r).split()) < 2 for r in t.responses))
    text = f"{len(rows)} prompts have a response of a single word {_rows(rows)}"
    return Finding("note", "stub", text, rows) if rows else None


def _blanks(trees: Sequence[PromptTree]) -> Finding | None:
    rows = tuple(t.rows[0] for t in trees if any(_plain(r) != _plain(r).rstrip() for r in t.responses))
    text = f"{len(rows)} prompts have a response that ends in blanks {_rows(rows)}"
    return Finding("note", "blanks", text, rows) if rows else None


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(_contents(text))


def _contents(messages: Sequence[dict[str, object]]) -> Iterator[str]:
    for message in messages:
        yield str(message.get("content") or "")


def _rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:5]))
    return f"(row{'s' if len(rows) > 1 else ''} {shown}{', ...' if len(rows) > 5 else ''})"


def _split(trees: Sequence[PromptTree], report: TokenReport) -> list[Finding]:
    return [*lint(trees), *lint_tokens(report)]


CHECKS = Checks(_split, leaks)
