"""Labels that a reward or a model is strongly against: candidates for noise.

In: Rows, and a scorer or the models themselves. Out: a Finding with the worst rows. Next: run.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from favor.data import batches
from favor.data.tokenize import TokensConfig, tokenize
from favor.data.types import Batch, Text
from favor.lint.settings import Finding, LintSettings, Row, shown, words_of
from favor.lint.tokens import as_tree
from favor.model.layout import settle
from favor.model.load import Policy, precise
from favor.model.logprobs import response_logps
from favor.rewards.source import Scorer

_ENOUGH = 10
_BUDGET = 4096


class Gap(NamedTuple):
    """By how much the best response of an order is scored above its worst."""

    row: Row
    value: float
    chosen: str
    rejected: str


def reward_gaps(rows: Sequence[Row], scorer: Scorer) -> list[Gap]:
    """By a reward on text."""
    pairs = [(row, order[0], order[-1]) for row in rows if row.judgment is not None for order in row.judgment.orders]
    prompts: list[Text] = []
    responses: list[str] = []
    for row, better, worse in pairs:
        assert row.judgment is not None
        prompts += [row.judgment.prompt] * 2
        responses += [words_of(row.judgment.responses[better]), words_of(row.judgment.responses[worse])]
    scores = scorer(prompts, responses)
    return [
        Gap(row, scores[2 * i] - scores[2 * i + 1], responses[2 * i], responses[2 * i + 1])
        for i, (row, _, _) in enumerate(pairs)
    ]


def model_gaps(rows: Sequence[Row], policy: Policy, reference: Policy | None, tokens: TokensConfig) -> list[Gap]:
    """By log pi/ref; without a reference by the mean log-prob of a token, so that length does not count. Nats."""
    read = [row for row in rows if row.judgment is not None and row.judgment.orders]
    trees, _ = tokenize(
        [as_tree(row, index) for index, row in enumerate(read)], policy.tokenizer, tokens, policy.end_ids, "drop"
    )
    policy, _ = settle(precise(policy), "auto", trees)
    reference = None if reference is None else settle(precise(reference), policy.layout, trees)[0]
    value_of: dict[int, float] = {}
    with torch.no_grad():
        for members in batches.plan([batches.computed_tokens(tree, policy.layout) for tree in trees], _BUDGET):
            batch = batches.build([trees[i] for i in members], policy.layout).to(policy.device)
            value_of.update(zip(batch.index_R.tolist(), _value(batch, policy, reference).tolist(), strict=True))
    found: list[Gap] = []
    for tree in trees:
        row = read[tree.row]
        assert row.judgment is not None
        for order in row.judgment.orders:
            better, worse = (value_of[tree.first_response + i] for i in (order[0], order[-1]))
            texts = [words_of(row.judgment.responses[i]) for i in (order[0], order[-1])]
            found.append(Gap(row, better - worse, *texts))
    return found


def noise_findings(gaps: Sequence[Gap], by: str, settings: LintSettings) -> list[Finding]:
    """Pairs whose difference is clearly against the label, and `noise` robust standard deviations below the middle one."""
    if len(gaps) < _ENOUGH:
        return []
    values = np.array([gap.value for gap in gaps])
    # medians, so that the rows looked for do not widen the spread they are measured by
    middle = float(np.median(values))
    rare = middle - settings.noise * 1.4826 * float(np.median(np.abs(values - middle)))
    # against, and by no less than half of what is usually told apart
    limit = min(rare, -0.5 * float(np.median(np.abs(values))))
    agreed = float((values > 0).mean())
    text = f"{by} agrees with {agreed:.1%} of {len(gaps)} labels"
    # three standard errors below a coin
    if agreed < 0.5 - 1.5 / len(gaps) ** 0.5:
        found = [Finding("warning", "agreement", f"{text}: look whether the labels are the wrong way round")]
    else:
        found = [Finding("note", "agreement", text)]
    against = sorted((gap for gap in gaps if gap.value < limit), key=lambda gap: gap.value)
    if against:
        examples = tuple(
            f"{gap.row.source}, row {gap.row.number}: {gap.value:+.2f}, chosen {shown(gap.chosen, 60)!r}, "
            f"rejected {shown(gap.rejected, 60)!r}"
            for gap in against[: settings.examples]
        )
        text = f"{by} is strongly against {len(against)} labels: candidates for noise"
        rows = tuple(dict.fromkeys(gap.row.where for gap in against))
        found.append(Finding("warning", "label_noise", text, rows, examples))
    return found


def _value(batch: Batch, policy: Policy, reference: Policy | None) -> Tensor:
    logp_R = response_logps(policy, batch)
    return logp_R / batch.length_R if reference is None else logp_R - response_logps(reference, batch)
