"""The checks that need neither a model nor much memory: `favor train` runs them at every start, `favor lint` with the rest.

In: texts and a TokenReport. Out: Hits (a fault of a row) and Findings (rows with a fault, or a fault of the whole). Next: rows.py.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple, TypeAlias

import numpy as np

from favor.data.splits import Checks
from favor.data.tokenize import TokenReport
from favor.data.types import Finding, PromptTree, Text, words_of
from favor.lint.settings import CUT_SHARE, KINDS, LENGTH_SHARE

# fewer comparisons say nothing about a bias
ENOUGH = 30
# row numbers in a message that shows no examples
_LISTED = 5
# a reason of more characters than _SHORT is told once, if its first _ALIKE are the same
_SHORT, _ALIKE = 80, 160
# source, row number
Where: TypeAlias = tuple[str, int]


class Hit(NamedTuple):
    """A row with a fault of some kind, and what is said of it."""

    kind: str
    where: Where
    said: str


# what a check yields: rows, or something about all of them
Told: TypeAlias = Hit | Finding


def findings(told: Iterable[Told], examples: int) -> list[Finding]:
    """The rows of each kind as one finding, with `examples` of them (with 0 the message names the first); others as they are."""
    by_kind: dict[str, dict[Where, str]] = defaultdict(dict)
    found: list[Finding] = []
    for one in told:
        if isinstance(one, Finding):
            found.append(one)
        elif KINDS[one.kind][1]:
            by_kind[one.kind].setdefault(one.where, one.said)
    for kind, said in by_kind.items():
        severity, sentence, _ = KINDS[kind]
        numbers = ", ".join([str(number) for _, number in said][:_LISTED]) + ", ..." * (len(said) > _LISTED)
        message = f"{len(said)} {sentence}" + ("" if examples else f" (rows {numbers})")
        # a long reason that many rows share is told once
        texts = {
            text[:_ALIKE] if kind == "malformed" and len(text) > _SHORT else where: (where, text)
            for where, text in reversed(said.items())
        }
        shown = [f"{place(where)}: {text}" for where, text in reversed(texts.values())][:examples]
        found.append(Finding(severity, kind, message, tuple(said), tuple(shown)))
    return found


def of_split(trees: Iterable[PromptTree], report: TokenReport) -> list[Finding]:
    """The findings of a split in training, in one pass over its trees."""
    told: list[Told] = []
    lengths: list[tuple[int, int]] = []
    for tree in trees:
        where, texts = (tree.source, tree.rows[0]), list(map(words_of, tree.responses))
        pairs = [(texts[a], texts[b]) for c in tree.comparisons for a, b in combinations(c.order, 2)]
        lengths += [(len(better), len(worse)) for better, worse in pairs]
        told += contradictions([(where, "", pairs)])
        told += [Hit(kind, where, "") for kind, is_odd in RESPONSE_CHECKS.items() if any(map(is_odd, texts))]
    return findings([*told, *length(lengths), *truncation(report)], 0)


def leaks(train: Iterable[tuple[Where, Text]], held_out: Iterable[tuple[Where, Text]]) -> Iterator[Hit]:
    """Held-out prompts that are training prompts too: held-out figures would flatter."""
    known = {words_of(prompt).strip(): where for where, prompt in train}
    for where, prompt in held_out:
        text = words_of(prompt).strip()
        if text in known:
            yield Hit("leak", where, f"its prompt is that of {place(known[text])}: {shown(text, 60)!r}")


def contradictions(rows: Iterable[tuple[Where, str, Iterable[tuple[str, str]]]]) -> Iterator[Hit]:
    """Rows that say A > B where another (or the row itself) says B > A. rows: (where, prompt, (better, worse) pairs)."""
    seen: dict[tuple[str, str, str], Where] = {}
    for where, prompt, given in rows:
        pairs = [pair for pair in given if pair[0] != pair[1]]
        for better, worse in pairs:
            seen.setdefault((prompt, better, worse), where)
        other = next((seen[key] for b, w in pairs if (key := (prompt, w, b)) in seen), None)
        if other is not None:
            yield Hit("contradiction", where, f"says the opposite of {place(other)} on {shown(prompt, 60)!r}")
            # neither side can be known to be right; a row that is held out says nothing about the training rows
            if other[0] == where[0]:
                yield Hit("contradicted", other, f"{place(where)} says the opposite")


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


def place(where: Where) -> str:
    """A row, for a message."""
    return f"{where[0]}, row {where[1]}"


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
