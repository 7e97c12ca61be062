"""Labels that a reward is strongly against: candidates for noise.

In: Rows and a scorer. Out: a Finding with the worst rows. Next: run.py.
"""

from collections.abc import Sequence

import numpy as np

from favor.data.types import Text
from favor.lint.settings import Finding, LintSettings, Row, shown, words_of
from favor.scoring.source import Scorer

_ENOUGH = 10


def noise_findings(rows: Sequence[Row], scorer: Scorer, settings: LintSettings) -> list[Finding]:
    """Pairs whose reward difference is clearly against the label, and `noise` robust standard deviations below the middle one."""
    pairs = [(row, order[0], order[-1]) for row in rows if row.judgment is not None for order in row.judgment.orders]
    if len(pairs) < _ENOUGH:
        return []
    prompts: list[Text] = []
    responses: list[str] = []
    for row, better, worse in pairs:
        assert row.judgment is not None
        prompts += [row.judgment.prompt] * 2
        responses += [words_of(row.judgment.responses[better]), words_of(row.judgment.responses[worse])]
    scores = np.array(scorer(prompts, responses))
    gaps = scores[::2] - scores[1::2]
    # medians, so that the rows looked for do not widen the spread they are measured by
    middle = float(np.median(gaps))
    rare = middle - settings.noise * 1.4826 * float(np.median(np.abs(gaps - middle)))
    # against, and by no less than half of what the reward usually tells apart
    limit = min(rare, -0.5 * float(np.median(np.abs(gaps))))
    found = [Finding("note", "reward", f"the reward agrees with {float((gaps > 0).mean()):.1%} of {len(pairs)} labels")]
    against = [i for i in np.argsort(gaps, kind="stable").tolist() if gaps[i] < limit]
    if against:
        examples = tuple(
            f"{pairs[i][0].source}, row {pairs[i][0].number}: {gaps[i]:+.2f}, chosen "
            f"{shown(responses[2 * i], 60)!r}, rejected {shown(responses[2 * i + 1], 60)!r}"
            for i in against[: settings.examples]
        )
        text = f"{len(against)} labels are strongly against the reward: candidates for noise"
        found.append(Finding("warning", "label_noise", text, tuple(pairs[i][0].where for i in against), examples))
    return found
