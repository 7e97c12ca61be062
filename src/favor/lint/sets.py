"""Checks that need all rows: duplicates, contradictions, leaks, length and opening bias, language, unread columns.

In: Rows of both parts that can be used. Out: Hits and Findings. Next: models.py.
"""

import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from datasketch import MinHash, MinHashLSH

from favor.data.formats import Judgment
from favor.data.types import Finding
from favor.lint.cheap import ENOUGH, Hit, Told, contradictions, leaks, length, place, shown
from favor.lint.language import identifier
from favor.lint.rows import Row
from favor.lint.settings import LintSettings

# a second language above this share makes a bilingual file, not a fault
_RARE = 0.1
# no fair choice falls on one side so often
_ONE_SIDED = 0.9
# the hashing finds half of what lies just at its threshold: look lower, then check exactly
_NUM_PERM, _CANDIDATE = 64, 0.75
_WORD = re.compile(r"\w+")
# columns that `favor label` writes beside what is read
_FOR_PEOPLE = frozenset(("annotators", "comments", "source", "edited"))
# word triples of shorter texts are too few to compare
_MIN_WORDS = 4


def set_checks(rows: Sequence[Row], settings: LintSettings, known: Mapping[str, frozenset[str]]) -> Iterator[Told]:
    """Every check over all rows that can be used. known: source -> the columns that favor reads of it."""
    yield from contradictions((row.where, row.prompt, row.pairs) for row in rows)
    seen: dict[str, Row] = {}
    for row in rows:
        said = json.dumps([row.part, row.said], sort_keys=True, ensure_ascii=False, default=list)
        if (first := seen.setdefault(said, row)) is not row:
            yield Hit("duplicate", row.where, f"is the same as {place(first.where)}")
    train, held_out = ([(row.where, row.prompt) for row in rows if row.part == part] for part in ("train", "eval"))
    yield from leaks(train, held_out)
    if settings.near:
        yield from _near(rows, settings.near)
    if settings.language:
        yield from _languages(rows)
    yield from length([(len(better), len(worse)) for row in rows for better, worse in row.pairs], settings.length_share)
    yield from _position(rows)
    yield from _openings(rows, settings.opening_share)
    unread = Counter(name for row in rows for name in row.raw if name not in known[row.where[0]] | _FOR_PEOPLE)
    if unread:
        listed = ", ".join(f"{name} ({count})" for name, count in unread.most_common(8))
        yield Finding("note", "unread_column", f"columns that favor does not read: {listed}")


def near_pairs(texts: Sequence[str], threshold: float) -> list[tuple[int, int]]:
    """(later, earlier) of texts whose word triples overlap by `threshold` (Jaccard), checked exactly on the candidates."""
    grams = [shingles(text) for text in texts]
    usable = [i for i, gram in enumerate(grams) if gram]
    index = MinHashLSH(threshold=_CANDIDATE * threshold, num_perm=_NUM_PERM)
    hashes = MinHash.generator((grams[i] for i in usable), num_perm=_NUM_PERM, hashfunc=int)
    found: list[tuple[int, int]] = []
    for i, signature in zip(usable, hashes, strict=True):
        earlier = sorted(int(str(key)) for key in index.query(signature))
        found += [(i, j) for j in earlier if _alike(grams[i], grams[j], threshold)]
        index.insert(i, signature, check_duplication=False)
    return found


def shingles(text: str) -> frozenset[int]:
    """Hashes of the text's word triples, case and punctuation left out."""
    words = _WORD.findall(text.lower())
    if len(words) < _MIN_WORDS:
        return frozenset()
    return frozenset(zlib.crc32(" ".join(words[k : k + 3]).encode()) for k in range(len(words) - 2))


def _alike(a: frozenset[int], b: frozenset[int], threshold: float) -> bool:
    return bool(a or b) and len(a & b) >= threshold * len(a | b)


def _near(rows: Sequence[Row], threshold: float) -> Iterator[Hit]:
    """Rows whose prompts and responses together, or whose prompts across parts, are nearly the same."""
    whole = [" ".join([row.prompt, *row.responses]) for row in rows]
    for i, j in near_pairs(whole, threshold):
        if rows[i].part == rows[j].part and _nearly_repeats(rows[i], rows[j], threshold):
            said = f"is nearly {place(rows[j].where)}: {shown(whole[i], 80)!r}"
            yield Hit("near_duplicate", rows[i].where, said)
    for i, j in near_pairs([row.prompt for row in rows], threshold):
        row, other = rows[i], rows[j]
        if row.part == "eval" and other.part == "train" and row.prompt != other.prompt:
            said = f"its prompt is nearly that of {place(other.where)}: {shown(row.prompt, 80)!r}"
            yield Hit("near_leak", row.where, said)


def _nearly_repeats(row: Row, other: Row, threshold: float) -> bool:
    """Rows of one prompt share it by design: there the responses alone must be alike, and not the same ones."""
    mine, theirs = sorted(row.responses), sorted(other.responses)
    if mine == theirs or row.prompt != other.prompt:
        return mine != theirs
    return _alike(shingles(" ".join(mine)), shingles(" ".join(theirs)), threshold)


def _position(rows: Sequence[Row]) -> Iterator[Finding]:
    """How often the first of two responses is preferred, where their order has nothing to do with the judgment."""
    best = [row.orders[0][0] for row in rows if row.orders and isinstance(row.said, Judgment) and row.said.placed]
    if best:
        share = best.count(0) / len(best)
        biased = len(best) >= ENOUGH and not 1 - _ONE_SIDED <= share <= _ONE_SIDED
        text = f"the first response is preferred in {share:.0%} of {len(best)} comparisons"
        text += ": check whether the verdict's column means what the recipe says" if biased else ""
        yield Finding("warning" if biased else "note", "position", text)


def _openings(rows: Sequence[Row], most: float) -> Iterator[Finding]:
    """Two words that open many preferred responses and hardly any other, or the other way round."""
    pairs = [pair for row in rows for pair in row.pairs]
    sides = [Counter(" ".join(pair[side].split()[:2]).lower() for pair in pairs) for side in (0, 1)]
    for side, name in ((0, "preferred"), (1, "rejected")) if len(pairs) >= ENOUGH else ():
        opening, count = sides[side].most_common(1)[0]
        if count / len(pairs) >= most and sides[1 - side][opening] < count / 4:
            text = f"{count / len(pairs):.0%} of the {name} responses begin with {opening!r}: the model may learn just that"
            yield Finding("warning", "opening", text)


def _languages(rows: Sequence[Row]) -> Iterator[Hit]:
    """Responses in another language than most of the file's; only where there is enough text to be sure."""
    identify = identifier()
    by_language: dict[str, list[Hit]] = defaultdict(list)
    for row in rows:
        for text in row.responses:
            if language := identify(text):
                by_language[language].append(
                    Hit("language", row.where, f"looks like '{language}': {shown(text, 80)!r}")
                )
    total = sum(map(len, by_language.values()))
    main = max(by_language, key=lambda name: len(by_language[name]), default="")
    odd = [hits for name, hits in by_language.items() if name != main and len(hits) < _RARE * total]
    yield from sorted((hit for hits in odd for hit in hits), key=lambda hit: hit.where)
