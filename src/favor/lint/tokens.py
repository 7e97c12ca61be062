"""Checks with a tokenizer: special tokens in text, template round trip, ends of turn, what truncation takes.

In: Rows, a tokenizer, [tokens]. Out: Findings. Next: noise.py.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from favor.data.tokenize import TokenReport, TokensConfig, tokenize
from favor.data.types import Comparison, PromptTree
from favor.errors import DataError
from favor.lint.brief import lost_share
from favor.lint.settings import Finding, LintSettings, Row


def token_findings(
    rows: Sequence[Row], tokenizer: Any, tokens: TokensConfig, end_ids: frozenset[int], settings: LintSettings
) -> list[Finding]:
    """Tokenise every row as training would; whatever it would refuse, cut or render differently is a finding."""
    read = [row for row in rows if row.judgment is not None]
    if not read:
        return []
    trees = [as_tree(row, index) for index, row in enumerate(read)]
    try:
        kept, report = tokenize(trees, tokenizer, tokens, end_ids, "drop")
    except DataError as error:
        return [Finding("error", "tokens", str(error))]
    by_kind: dict[str, list[tuple[Row, str]]] = defaultdict(list)
    for (index, reason), kind in zip(report.dropped, report.kinds, strict=True):
        by_kind[kind].append((read[index], reason))
    for tree in kept:
        if said := _doubled(tree.prompt_ids, tree.response_ids, tokenizer, end_ids):
            by_kind["doubled_special"].append((read[tree.row], said))
    return [
        *_listed(by_kind, settings),
        *_truncated(by_kind.get("truncation", ()), report, settings),
        *_counted(report),
    ]


def as_tree(row: Row, index: int) -> PromptTree:
    """A row as a tree of its own; `rows` leads back to it."""
    assert row.judgment is not None
    judgment = row.judgment
    comparisons, ties = (tuple(map(Comparison, found)) for found in (judgment.orders, judgment.ties))
    return PromptTree(
        judgment.prompt, judgment.responses, comparisons, (index,), row.source, judgment.tools, ties, judgment.cut
    )


def _doubled(
    prompt: Sequence[int], responses: Sequence[Sequence[int]], tokenizer: Any, end_ids: frozenset[int]
) -> str | None:
    first = tokenizer.bos_token_id
    if isinstance(first, int) and first not in end_ids and list(prompt[:2]) == [first, first]:
        return "the prompt begins with two beginning-of-sequence tokens"
    if any(len(ids) > 1 and ids[-1] in end_ids and ids[-2] in end_ids for ids in responses):
        return "a response ends with two end-of-turn tokens"
    return None


def _listed(by_kind: dict[str, list[tuple[Row, str]]], settings: LintSettings) -> list[Finding]:
    found: list[Finding] = []
    for name, sentence in (
        ("special_text", "rows hold the text of a special token"),
        ("round_trip", "rows do not come through the template and the tokenizer as they are"),
        ("equal_ids", "rows compare responses that become the same tokens"),
        ("doubled_special", "rows have a doubled special token"),
    ):
        if hits := by_kind.get(name):
            examples = tuple(f"{row.source}, row {row.number}: {said}" for row, said in hits[: settings.examples])
            where = tuple(row.where for row, _ in hits)
            found.append(Finding("error", name, f"{len(hits)} {sentence}", where, examples))
    return found


def _truncated(dropped: Sequence[tuple[Row, str]], report: TokenReport, settings: LintSettings) -> list[Finding]:
    touched = len(dropped) + report.prompts_cut + report.responses_cut
    if not touched:
        return []
    share = touched / max(1, report.trees)
    text = (
        f"{len(dropped)} of {report.trees} rows are longer than tokens.max_tokens and would be left out, "
        f"{report.prompts_cut} prompts and {report.responses_cut} responses would be cut: {lost_share(report)}"
    )
    severity = "warning" if share > settings.cut_share else "note"
    return [Finding(severity, "truncation", text, tuple(row.where for row, _ in dropped))]


def _counted(report: TokenReport) -> list[Finding]:
    """What the template does to rows that training takes."""
    counts = {
        "missing_end": (
            report.appended_end,
            "responses get no end-of-turn token from the chat template; favor adds the tokenizer's",
        ),
        "trimmed": (report.responses_trimmed, "responses lose the blanks around their text in the chat template"),
        "tools": (report.tools_unread, "prompts have tools that the chat template leaves out"),
    }
    return [Finding("note", name, f"{count} {sentence}") for name, (count, sentence) in counts.items() if count]
