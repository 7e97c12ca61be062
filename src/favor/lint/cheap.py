"""The checks that need neither a model nor much memory: `favor train` runs them at every start, `favor lint` with the rest.

In: texts and a TokenReport. Out: Hits, which become Findings. Next: rows.py.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple, TypeAlias

import numpy as np

from favor.data.prepare import Checks
from favor.data.tokenize import TokenReport
from favor.data.types import Finding, PromptTree, Text
from favor.lint.settings import CUT_SHARE, KINDS, LENGTH_SHARE

# fewer comparisons say nothing about a bias
ENOUGH = 30
# row numbers in a message that shows no examples
_LISTED = 5
# source, row number
Where: TypeAlias = tuple[str, int]


class Hit(NamedTuple):
    """A row with a fault of some kind, and what is said of it."""

    kind: str
    where: Where
    said: str


def findings(hits: Iterable[Hit], examples: int) -> list[Finding]:
    """One finding for each kind: how many rows, with `examples` of them; with 0 the message names the first rows."""
    by_kind: dict[str, dict[Where, str]] = defaultdict(dict)
    for hit in hits:
        if KINDS[hit.kind][1]:
            by_kind[hit.kind].setdefault(hit.where, hit.said)
    found: list[Finding] = []
    for kind, said in by_kind.items():
        severity, sentence, _ = KINDS[kind]
        rows = tuple(said)
        numbers = ", ".join([*(str(number) for _, number in rows[:_LISTED]), *["..."] * (len(rows) > _LISTED)])
        message = f"{len(rows)} {sentence}" + ("" if examples else f" (rows {numbers})")
        shown = tuple(f"{source}, row {number}: {text}" for (source, number), text in list(said.items())[:examples])
        found.append(Finding(severity, kind, message, rows, shown))
    return found


def of_split(trees: Iterable[PromptTree], report: TokenReport) -> list[Finding]:
    """The findings of a split in training, in one pass over its trees."""
    hits: list[Hit] = []
    lengths: list[tuple[int, int]] = []
    for tree in trees:
        where, texts = (tree.source, tree.rows[0]), list(map(words_of, tree.responses))
        pairs = [(texts[a], texts[b]) for c in tree.comparisons for a, b in combinations(c.order, 2)]
        lengths += [(len(better), len(worse)) for better, worse in pairs]
        hits += [hit for hit, _ in contradictions([(where, "", pairs)])]
        hits += [Hit(kind, where, "") for kind, bad in RESPONSE_CHECKS.items() if any(map(bad, texts))]
    return [*findings(hits, 0), *length(lengths), *truncation(report)]


def leaks(train: Iterable[tuple[Where, Text]], held_out: Iterable[tuple[Where, Text]]) -> Iterator[Hit]:
    """Held-out prompts that are training prompts too: held-out figures would flatter."""
    known = {words_of(prompt).strip(): number for (_, number), prompt in train}
    for where, prompt in held_out:
        text = words_of(prompt).strip()
        if text in known:
            yield Hit("leak", where, f"its prompt is row {known[text]} of the training part: {shown(text, 60)!r}")


def contradictions(rows: Iterable[tuple[Where, str, Iterable[tuple[str, str]]]]) -> Iterator[tuple[Hit, Where]]:
    """Rows that say A > B where one (maybe the row itself) says B > A, and that row. rows: (where, prompt, (better, worse)s)."""
    seen: dict[tuple[str, str, str], Where] = {}
    for where, prompt, given in rows:
        pairs = [pair for pair in given if pair[0] != pair[1]]
        for better, worse in pairs:
            seen.setdefault((prompt, better, worse), where)
        other = next((seen[key] for b, w in pairs if (key := (prompt, w, b)) in seen), None)
        if other is not None:
            said = f"says the opposite of {other[0]}, row {other[1]} on {shown(prompt, 60)!r}"
            yield Hit("contradiction", where, said), other


def length(pairs: Sequence[tuple[int, int]], share: float = LENGTH_SHARE) -> list[Finding]:
    """How often the better of two responses is the longer one, and how far length difference and label go together."""
    if not pairs:
        return []
    better, worse = np.array(pairs).T
    longer = float((better > worse).mean() + (better == worse).mean() / 2)
    # point-biserial correlation of the length difference with the label, each pair seen from both sides
    differences = better - worse
    spread = float(np.sqrt((differences**2).mean()))
    correlation = float(differences.mean()) / spread if spread else 0.0
    # three standard errors of a fair coin beyond the threshold's lower side
    biased = len(pairs) >= ENOUGH and abs(longer - 0.5) > max(share - 0.5, 1.5 / len(pairs) ** 0.5)
    text = (
        f"the preferred response is the longer one in {longer:.0%} of {len(pairs)} comparisons "
        f"(correlation of length difference and label {correlation:+.2f})"
    )
    return [Finding("warning" if biased else "note", "length", text)]


def truncation(report: TokenReport, share: float = CUT_SHARE, rows: Sequence[Where] = ()) -> list[Finding]:
    """How much of the data tokens.max_tokens takes. rows: those it leaves out."""
    dropped = report.kinds.count("truncation")
    touched = dropped + report.prompts_cut + report.responses_cut
    if not touched:
        return []
    tokens, pairs = report.tokens_lost / max(1, report.tokens), report.pairs_lost / max(1, report.pairs)
    text = (
        f"longer than tokens.max_tokens: {dropped} of {report.trees} left out, {report.prompts_cut} prompts and "
        f"{report.responses_cut} responses cut; {tokens:.1%} of the tokens and {pairs:.1%} of the comparisons are lost"
    )
    return [Finding("warning" if touched / report.trees > share else "note", "truncation", text, tuple(rows))]


def words_of(text: Text) -> str:
    """A prompt or response as plain text."""
    return text if isinstance(text, str) else "\n".join(str(m.get("content") or "") for m in text)


def shown(text: str, limit: int) -> str:
    """One line of a text, for a message."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


def _leaks_of_splits(*splits: Iterable[PromptTree]) -> list[Finding]:
    return findings(leaks(*([((t.source, t.rows[0]), t.prompt) for t in trees] for trees in splits)), 0)


# kind -> whether a response is so
RESPONSE_CHECKS: dict[str, Callable[[str], bool]] = {
    "blanks": lambda text: text != text.rstrip(),
    "stub": lambda text: len(text.split()) < 2,
}
# what training runs
CHECKS = Checks(of_split, _leaks_of_splits)
