"""Checks with a tokenizer, a reward or a model: tokens as training would make them, labels that are doubted.

In: Rows that can be used, and what to ask. Out: Hits and Findings. Next: run.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from favor.data.formats import Judgment
from favor.data.tokenize import TokenReport, TokensConfig, tokenize, tokenized
from favor.data.types import Batch, Comparison, Finding, PromptTree, Text, TokenTree
from favor.errors import DataError
from favor.lint.cheap import Hit, Told, shown, truncation
from favor.lint.rows import Row
from favor.lint.settings import KINDS
from favor.model.batched import measured
from favor.model.layout import settle
from favor.model.load import Policy, precise
from favor.model.logprobs import response_logps
from favor.rewards.source import Scorer

# fewer labels say nothing about a reward
_ENOUGH = 10
# tokens of a forward
_BUDGET = 4096


class Gap(NamedTuple):
    """By how much the best response of an order is scored above its worst."""

    row: Row
    value: float
    chosen: str
    rejected: str


def token_checks(
    rows: Sequence[Row], tokenizer: Any, end_ids: frozenset[int], tokens: TokensConfig, cut_share: float
) -> Iterator[Told]:
    """Tokenise every row as training would; whatever it would refuse, cut or render differently is told."""
    trees, kept, report = [as_tree(row, index) for index, row in enumerate(rows)], list[TokenTree](), TokenReport()
    try:
        kept = list(tokenized(trees, tokenizer, tokens, end_ids, "drop", report))
    except DataError as error:
        # that no row is left is told row by row
        if not report.dropped:
            yield Finding("error", "tokens", str(error))
            return
    dropped = zip(report.dropped, report.kinds, strict=True)
    hits = [Hit(kind, rows[index].where, reason) for (index, reason), kind in dropped]
    yield from hits
    yield from truncation(report, cut_share, [hit.where for hit in hits if hit.kind == "truncation"])
    for tree in kept:
        if said := _doubled(tree, tokenizer, end_ids):
            yield Hit("doubled_special", rows[tree.row].where, said)
    counts = {"missing_end": report.appended_end, "trimmed": report.responses_trimmed, "tools": report.tools_unread}
    counts["variables"] = report.variables_unread
    for kind, count in counts.items():
        if count:
            yield Finding("note", kind, f"{count} {KINDS[kind][1]}")


def as_tree(row: Row, index: int) -> PromptTree:
    """A row that can be used as a tree of its own; `rows` leads back to it."""
    judgment = row.said
    assert isinstance(judgment, Judgment)
    orders, ties = (tuple(map(Comparison, found)) for found in (judgment.orders, judgment.ties))
    said = judgment.prompt, judgment.responses, orders, (index,), row.where[0], judgment.tools, ties, judgment.cut
    return PromptTree(*said, template_kwargs=judgment.template_kwargs)


def _doubled(tree: TokenTree, tokenizer: Any, end_ids: frozenset[int]) -> str | None:
    first = tokenizer.bos_token_id
    if isinstance(first, int) and first not in end_ids and tree.prompt_ids[:2] == (first, first):
        return "the prompt begins with two beginning-of-sequence tokens"
    if any(len(ids) > 1 and end_ids.issuperset(ids[-2:]) for ids in tree.response_ids):
        return "a response ends with two end-of-turn tokens"
    return None


def reward_gaps(rows: Sequence[Row], scorer: Scorer) -> list[Gap]:
    """By a reward on text."""
    sides = [(row, row.responses[order[i]]) for row in rows for order in row.orders for i in (0, -1)]
    prompts: list[Text] = [row.said.prompt for row, _ in sides if isinstance(row.said, Judgment)]
    scores = scorer(prompts, [text for _, text in sides])
    return [Gap(sides[i][0], scores[i] - scores[i + 1], sides[i][1], sides[i + 1][1]) for i in range(0, len(sides), 2)]


def model_gaps(rows: Sequence[Row], policy: Policy, reference: Policy | None, tokens: TokensConfig) -> list[Gap]:
    """By log pi/ref; without a reference by the mean log-prob of a token, so that length does not count. Nats."""
    rows = [row for row in rows if row.orders]
    texts = [as_tree(row, index) for index, row in enumerate(rows)]
    trees, _ = tokenize(texts, policy.tokenizer, tokens, policy.end_ids, "drop")
    policy, _ = settle(precise(policy), "auto", trees)
    reference = None if reference is None else settle(precise(reference), policy.layout, trees)[0]

    def value(batch: Batch) -> Tensor:
        logp_R = response_logps(policy, batch)
        return logp_R / batch.length_R if reference is None else logp_R - response_logps(reference, batch)

    values = measured(policy, trees, value, _BUDGET).tolist()
    found: list[Gap] = []
    for tree in trees:
        row, first = rows[tree.row], tree.first_response
        # responses that truncation made alike are one
        for order in row.orders if len(tree.response_ids) == len(row.responses) else ():
            best, worst = order[0], order[-1]
            gap = values[first + best] - values[first + worst]
            found.append(Gap(row, gap, row.responses[best], row.responses[worst]))
    return found


def noise_checks(gaps: Sequence[Gap], by: str, noise: float) -> Iterator[Told]:
    """How many labels agree, and those that a difference is against, `noise` robust standard deviations below the middle one."""
    if len(gaps) < _ENOUGH:
        return
    values = np.array([gap.value for gap in gaps])
    agreed = float((values > 0).mean())
    # three standard errors below a coin
    turned = agreed < 0.5 - 1.5 / len(gaps) ** 0.5
    advice = ": check whether the labels are the wrong way round" if turned else ""
    text = f"{by} agrees with {agreed:.1%} of {len(gaps)} labels{advice}"
    yield Finding("warning" if turned else "note", "agreement", text)
    # medians, so that the rows looked for do not widen the spread they are measured by
    middle = float(np.median(values))
    rare = middle - noise * 1.4826 * float(np.median(np.abs(values - middle)))
    # against, and by no less than half of what is usually told apart
    limit = min(rare, -0.5 * float(np.median(np.abs(values))))
    for row, value, chosen, rejected in sorted(gaps, key=lambda gap: gap.value):
        if value < limit:
            said = f"{by}: {value:+.2f}, chosen {shown(chosen, 60)!r}, rejected {shown(rejected, 60)!r}"
            yield Hit("label_noise", row.where, said)
