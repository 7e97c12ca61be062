"""Checks that need all rows: duplicates, contradictions, leaks, length and opening bias, language, unread columns.

In: Rows of both parts. Out: Findings. Next: tokens.py.
"""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from favor.data.formats.fields import Judgment
from favor.lint.near import near_pairs, shingles
from favor.lint.settings import Finding, LintSettings, Row, shown, words_of

# fewer comparisons say nothing about a bias
_ENOUGH = 30
_LANGUAGE_WORDS = 6
_SURE = 0.95
# no fair choice falls on one side so often
_ONE_SIDED = 0.9

Where = tuple[str, int]


def set_findings(rows: Sequence[Row], settings: LintSettings, known: Mapping[str, frozenset[str]]) -> list[Finding]:
    """Every check over all rows. known: source -> the columns that favor reads of it."""
    read = [row for row in rows if row.judgment is not None]
    return [
        *_contradictions(read),
        *_duplicates(read, settings),
        *_leaks(read, settings),
        *(_near(read, settings) if settings.near else ()),
        *_length(read, settings),
        *_position(read),
        *_openings(read, settings),
        *(_languages(read) if settings.language else ()),
        *_columns(read, known),
    ]


def orders(judgment: Judgment) -> Iterator[tuple[str, str]]:
    """(better, worse) as plain text of every pair that a row's orders imply."""
    for order in judgment.orders:
        for better, worse in itertools.combinations(order, 2):
            yield words_of(judgment.responses[better]), words_of(judgment.responses[worse])


def _prompt(row: Row) -> str:
    assert row.judgment is not None
    return words_of(row.judgment.prompt).strip()


def _finding(severity: str, name: str, sentence: str, hits: Sequence[tuple[Row, str]], settings: int) -> Finding:
    rows = tuple(row.where for row, _ in hits)
    examples = tuple(f"{row.source}, row {row.number}: {said}" for row, said in hits[:settings])
    return Finding(severity, name, f"{len(hits)} {sentence}", rows, examples)  # pyright: ignore[reportArgumentType]


def contradicting(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(row, earlier row) where one says A > B and the other B > A of the same prompt."""
    seen: dict[tuple[str, str, str], Row] = {}
    found: list[tuple[Row, Row]] = []
    for row in rows:
        assert row.judgment is not None
        for better, worse in orders(row.judgment):
            if other := seen.get((_prompt(row), worse, better)):
                found.append((row, other))
            seen.setdefault((_prompt(row), better, worse), row)
    return found


def _contradictions(rows: Sequence[Row]) -> list[Finding]:
    hits = [
        (row, f"says the opposite of {other.source}, row {other.number} on {shown(_prompt(row), 60)!r}")
        for row, other in contradicting(rows)
    ]
    return [_finding("error", "contradiction", "rows contradict another row", hits, 5)] if hits else []


def repeats(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(row, earlier row) of the same part that say the same."""
    seen: dict[str, Row] = {}
    found: list[tuple[Row, Row]] = []
    for row in rows:
        key = json.dumps([row.part, row.judgment], sort_keys=True, ensure_ascii=False, default=list)
        if other := seen.get(key):
            found.append((row, other))
        seen.setdefault(key, row)
    return found


def _duplicates(rows: Sequence[Row], settings: LintSettings) -> list[Finding]:
    hits = [(row, f"is row {other.number} of {other.source} again") for row, other in repeats(rows)]
    return [_finding("warning", "duplicate", "rows repeat an earlier one", hits, settings.examples)] if hits else []


def _leaks(rows: Sequence[Row], settings: LintSettings) -> list[Finding]:
    known = {_prompt(row): row for row in rows if row.part == "train"}
    hits = [
        (row, f"its prompt is row {known[_prompt(row)].number} of the training part: {shown(_prompt(row), 60)!r}")
        for row in rows
        if row.part == "eval" and _prompt(row) in known
    ]
    sentence = "held-out rows have a prompt of the training part"
    return [_finding("error", "leak", sentence, hits, settings.examples)] if hits else []


def _near(rows: Sequence[Row], settings: LintSettings) -> list[Finding]:
    """Rows whose prompts and responses together, or whose prompts across parts, are nearly the same."""
    whole = [" ".join([_prompt(row), *(words_of(r) for r in row.judgment.responses)]) for row in rows if row.judgment]
    exact = {id(row) for row, _ in repeats(rows)}
    within = [
        (rows[i], f"is nearly row {rows[j].number} of {rows[j].source}: {shown(whole[i], 80)!r}")
        for i, j in near_pairs(whole, settings.near)
        if rows[i].part == rows[j].part
        and id(rows[i]) not in exact
        and _nearly_repeats(rows[i], rows[j], settings.near)
    ]
    prompts = [_prompt(row) for row in rows]
    across = [
        (rows[i], f"its prompt is nearly row {rows[j].number} of the training part: {shown(prompts[i], 80)!r}")
        for i, j in near_pairs(prompts, settings.near)
        if rows[i].part == "eval" and rows[j].part == "train" and prompts[i] != prompts[j]
    ]
    found: list[Finding] = []
    if within:
        found.append(
            _finding("warning", "near_duplicate", "rows nearly repeat another", _first(within), settings.examples)
        )
    if across:
        sentence = "held-out rows have nearly a prompt of the training part"
        found.append(_finding("warning", "near_leak", sentence, _first(across), settings.examples))
    return found


def _nearly_repeats(row: Row, other: Row, threshold: float) -> bool:
    """Rows of one prompt share it by design: there the responses alone must be alike, and not the same ones."""
    assert row.judgment is not None
    assert other.judgment is not None
    mine, theirs = (sorted(map(words_of, r.judgment.responses)) for r in (row, other) if r.judgment)
    if mine == theirs:
        return False
    if _prompt(row) != _prompt(other):
        return True
    a, b = shingles(" ".join(mine)), shingles(" ".join(theirs))
    return bool(a or b) and len(a & b) >= threshold * len(a | b)


def _first(hits: Sequence[tuple[Row, str]]) -> list[tuple[Row, str]]:
    """One hit a row."""
    return list({row.where: (row, said) for row, said in reversed(hits)}.values())[::-1]


def _length(rows: Sequence[Row], settings: LintSettings) -> list[Finding]:
    """How often the preferred response is the longer one, and how far length difference and label go together."""
    pairs = [(len(b), len(w)) for row in rows if row.judgment for b, w in orders(row.judgment)]
    if not pairs:
        return []
    better, worse = np.array(pairs).T
    share = float((better > worse).mean() + (better == worse).mean() / 2)
    # point-biserial correlation of the length difference with the label, each pair seen from both sides
    differences = np.concatenate([better - worse, worse - better])
    labels = np.repeat([1.0, -1.0], len(pairs))
    spread = differences.std()
    correlation = float((differences * labels).mean() / spread) if spread else 0.0
    # three standard errors of a fair coin beyond the threshold's lower side
    biased = len(pairs) >= _ENOUGH and abs(share - 0.5) > max(settings.length_share - 0.5, 1.5 / len(pairs) ** 0.5)
    text = (
        f"the preferred response is the longer one in {share:.0%} of {len(pairs)} comparisons "
        f"(correlation of length difference and label {correlation:+.2f})"
    )
    return [Finding("warning" if biased else "note", "length", text)]


def _position(rows: Sequence[Row]) -> list[Finding]:
    """How often the first of two responses is preferred, where their order has nothing to do with the judgment."""
    best = [row.judgment.orders[0][0] for row in rows if row.judgment and row.judgment.placed and row.judgment.orders]
    if not best:
        return []
    share = best.count(0) / len(best)
    text = f"the first response is preferred in {share:.0%} of {len(best)} comparisons"
    if len(best) >= _ENOUGH and not 1 - _ONE_SIDED <= share <= _ONE_SIDED:
        return [Finding("warning", "position", f"{text}: look whether the verdict's column is read as it is meant")]
    return [Finding("note", "position", text)]


def _openings(rows: Sequence[Row], settings: LintSettings) -> list[Finding]:
    """Two words that open many preferred responses and hardly any other, or the other way round."""
    pairs = [pair for row in rows if row.judgment for pair in orders(row.judgment)]
    if len(pairs) < _ENOUGH:
        return []
    sides = [Counter(" ".join(pair[side].split()[:2]).lower() for pair in pairs) for side in (0, 1)]
    found: list[Finding] = []
    for side, name in ((0, "preferred"), (1, "rejected")):
        opening, count = sides[side].most_common(1)[0]
        if count / len(pairs) >= settings.opening_share and sides[1 - side][opening] < count / 4:
            text = f"{count / len(pairs):.0%} of the {name} responses begin with {opening!r}: the model may learn just that"
            found.append(Finding("warning", "opening", text))
    return found


def _languages(rows: Sequence[Row]) -> list[Finding]:
    """Responses in another language than most of the file's; only where there is enough text to be sure."""
    import py3langid.langid as langid

    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    by_language: dict[str, list[tuple[Row, str]]] = defaultdict(list)
    for row in rows:
        assert row.judgment is not None
        for text in map(words_of, row.judgment.responses):
            if len(text.split()) >= _LANGUAGE_WORDS:
                language, sure = identifier.classify(text[:500])
                if sure >= _SURE:
                    by_language[str(language)].append((row, shown(text, 80)))
    if not by_language:
        return []
    main = max(by_language, key=lambda name: len(by_language[name]))
    total = sum(map(len, by_language.values()))
    # a second language that is common is a bilingual file, not a fault
    odd = [
        (row, f"looks like '{name}': {said!r}")
        for name, hits in by_language.items()
        if name != main and len(hits) / total < 0.1
        for row, said in hits
    ]
    odd = sorted(_first(odd), key=lambda hit: hit[0].where)
    return [_finding("warning", "language", f"rows are not in '{main}' as the others", odd, 5)] if odd else []


def _columns(rows: Sequence[Row], known: Mapping[str, frozenset[str]]) -> list[Finding]:
    """Columns that no format reads."""
    unread: Counter[str] = Counter()
    for row in rows:
        read = known[row.source] | {"weight", "tools", "ended"}
        unread.update(name for name in row.raw if name not in read)
    if not unread:
        return []
    listed = ", ".join(f"{name} ({count})" for name, count in unread.most_common(8))
    return [Finding("note", "unread_column", f"columns that favor does not read: {listed}")]
