"""Near-duplicates among many texts: MinHash signatures of word triples, compared through locality-sensitive hashing.

In: texts. Out: pairs of indices. Next: sets.py.
"""

import re
import zlib
from collections.abc import Sequence

from datasketch import MinHash, MinHashLSH

_NUM_PERM = 64
_CANDIDATE = 0.75
_WORD = re.compile(r"\w+")
# word triples of shorter texts are too few to compare
_MIN_WORDS = 4


def near_pairs(texts: Sequence[str], threshold: float) -> list[tuple[int, int]]:
    """(later, earlier) of texts whose word triples overlap by `threshold` (Jaccard), checked exactly on the candidates."""
    grams = [shingles(text) for text in texts]
    usable = [i for i, gram in enumerate(grams) if gram]
    # the hashing finds half of what lies just at its threshold: look lower, then check exactly
    index = MinHashLSH(threshold=_CANDIDATE * threshold, num_perm=_NUM_PERM)
    hashes = MinHash.generator(
        ([g.to_bytes(4, "little") for g in grams[i]] for i in usable), num_perm=_NUM_PERM, hashfunc=_identity
    )
    found: list[tuple[int, int]] = []
    for i, signature in zip(usable, hashes, strict=True):
        for j in sorted(int(str(key)) for key in index.query(signature)):
            both = len(grams[i] & grams[j])
            if both >= threshold * (len(grams[i]) + len(grams[j]) - both):
                found.append((i, j))
        index.insert(i, signature, check_duplication=False)
    return found


def shingles(text: str) -> frozenset[int]:
    """Hashes of the text's word triples, case and punctuation left out."""
    words = _WORD.findall(text.lower())
    if len(words) < _MIN_WORDS:
        return frozenset()
    return frozenset(zlib.crc32(" ".join(words[k : k + 3]).encode()) for k in range(len(words) - 2))


def _identity(data: bytes) -> int:
    return int.from_bytes(data, "little")
