"""Checks with a tokenizer: special tokens in text, template round trip, ends of turn, what truncation takes.

In: Rows, a tokenizer, [tokens]. Out: Findings. Next: noise.py.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from favor.data.formats import RowError
from favor.data.tokenize import TokenReport, TokensConfig, encode_prompt, tokenize
from favor.data.types import Comparison, PromptTree
from favor.errors import DataError
from favor.lint.brief import lost_share
from favor.lint.settings import Finding, LintSettings, Row, shown, words_of

# what a refusal by the tokenizer is about -> the finding it belongs to
_KINDS = (("special token", "special_text"), ("max_tokens", "truncation"))


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
    for index, reason in report.dropped:
        kind = next((name for mark, name in _KINDS if mark in reason), "round_trip")
        by_kind[kind].append((read[index], reason))
    for tree in kept:
        if said := _not_back(read[tree.row], tree.response_ids, tokenizer, end_ids):
            by_kind["round_trip"].append((read[tree.row], said))
        elif said := _doubled(tree.prompt_ids, tree.response_ids, tokenizer, end_ids):
            by_kind["doubled_special"].append((read[tree.row], said))
    by_kind["round_trip"] += _lost_turns(read, tokenizer, tokens)
    return [*_listed(by_kind, settings), *_truncated(by_kind.get("truncation", ()), report, settings), *_ends(report)]


def as_tree(row: Row, index: int) -> PromptTree:
    """A row as a tree of its own; `rows` leads back to it."""
    assert row.judgment is not None
    judgment = row.judgment
    comparisons = tuple(Comparison(order) for order in judgment.orders)
    return PromptTree(
        judgment.prompt, judgment.responses, comparisons, (index,), row.source, judgment.tools, cut=judgment.cut
    )


def _not_back(row: Row, responses: Sequence[Sequence[int]], tokenizer: Any, end_ids: frozenset[int]) -> str | None:
    """Decoding a response's ids must give its text back (unless it was cut)."""
    assert row.judgment is not None
    texts = [words_of(r) for r in row.judgment.responses]
    for ids in responses:
        body = list(ids[:-1]) if ids and ids[-1] in end_ids else list(ids)
        back = tokenizer.decode(body, skip_special_tokens=False)
        if not any(back.strip() == text.strip() or text.strip().startswith(back.strip()) for text in texts):
            return f"a response comes back from the tokenizer as {shown(back, 80)!r}"
    return None


def _doubled(
    prompt: Sequence[int], responses: Sequence[Sequence[int]], tokenizer: Any, end_ids: frozenset[int]
) -> str | None:
    first = tokenizer.bos_token_id
    if isinstance(first, int) and first not in end_ids and list(prompt[:2]) == [first, first]:
        return "the prompt begins with two beginning-of-sequence tokens"
    if any(len(ids) > 1 and ids[-1] in end_ids and ids[-2] in end_ids for ids in responses):
        return "a response ends with two end-of-turn tokens"
    return None


def _lost_turns(rows: Sequence[Row], tokenizer: Any, tokens: TokensConfig) -> list[tuple[Row, str]]:
    """Turns whose text the chat template leaves out."""
    found: list[tuple[Row, str]] = []
    for row in rows:
        assert row.judgment is not None
        if isinstance(row.judgment.prompt, str):
            continue
        try:
            text = tokenizer.decode(encode_prompt(row.judgment.prompt, tokenizer, tokens))
        except RowError:
            continue  # refused above, with its reason
        lost = [m for m in row.judgment.prompt if str(m.get("content") or "").strip() not in text]
        if lost:
            found.append((row, f"the template leaves out the turn {shown(str(lost[0].get('content')), 60)!r}"))
    return found


def _listed(by_kind: dict[str, list[tuple[Row, str]]], settings: LintSettings) -> list[Finding]:
    found: list[Finding] = []
    for name, sentence in (
        ("special_text", "rows hold the text of a special token"),
        ("round_trip", "rows do not come through the template and the tokenizer as they are"),
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


def _ends(report: TokenReport) -> list[Finding]:
    if not report.appended_end:
        return []
    text = f"the chat template ends {report.appended_end} responses without an end-of-turn token; favor adds the tokenizer's"
    return [Finding("note", "missing_end", text)]
