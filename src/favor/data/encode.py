"""Text -> token ids in batches, each piece of text only once.

In: texts and a fast tokenizer. Out: ids, the same as encoding every text whole. A special token of the chat template
ends what stands before it, so the pieces between them are encoded apart and shared between texts. Next: tokenize.py.
"""

import re
from collections.abc import Sequence
from typing import cast

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Texts of the first batch that are encoded whole too, to see that pieces give the same.
_CHECKED = 24
# Pieces remembered from batch to batch: system prompts and headers.
_PIECE_LENGTH, _MEMORY = 400, 4096
# a token that is one byte, where the tokenizer has such ones for what it does not know
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class Encoder:
    """A tokenizer with a memory of short pieces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # a call brings the backend into the state that transformers wants: no truncation, no padding
        tokenizer("x", add_special_tokens=False)
        self._backend = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
        self._cut = None if self._backend.encode_special_tokens else _boundaries(tokenizer)
        self._checked = self._cut is None
        self._known: dict[str, list[int]] = {}
        # pieces whose ids do not give their text back
        self._lost: set[str] = set()
        self._bytes: dict[int, bytes] = {}
        self._added = frozenset(cast(PreTrainedTokenizerFast, tokenizer).added_tokens_decoder)
        byte_level = "ByteLevel" in str(self._backend.decoder)
        self._byte_level = {letter: byte for byte, letter in bytes_to_unicode().items()} if byte_level else {}
        self._blank: dict[int, bool] = {}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, no special tokens added."""
        if not self._checked and texts:
            self._checked = True
            few = texts[:_CHECKED]
            if self._in_pieces(few) != self._whole(few):
                self._cut = None
        return self._whole(texts) if self._cut is None else self._in_pieces(texts)

    def comes_back(self, text: str) -> bool:
        """Whether the ids that a text got from `ids` decode to it, but for what the tokenizer does to every text.

        That is its normalizer (case, Unicode forms) and blanks. Characters that it does not know are lost.
        """
        return not self._lost or self._lost.isdisjoint([text] if self._cut is None else self._cut.split(text))

    def decoded(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens too."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of a text stands in it."""
        return self._backend.encode(text, add_special_tokens=False).offsets

    def is_blank(self, token: int) -> bool:
        """Whether a token alone reads as nothing but blanks."""
        if token not in self._blank:
            self._blank[token] = not self.decoded([token]).strip()
        return self._blank[token]

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        found = [item.ids for item in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        self._lost.update(text for text, ids in zip(texts, found, strict=True) if not self._same(text, ids))
        return found

    def _same(self, text: str, ids: list[int]) -> bool:
        """Whether ids say the same as their text: by the bytes of the tokens, else (which is slow) by decoding them."""
        known = self._bytes
        try:
            back = b"".join([known[i] for i in ids])
        except KeyError:
            known.update((i, self._bytes_of(i)) for i in ids if i not in known)
            back = b"".join([known[i] for i in ids])
        return back == text.encode() or self._folded(self.decoded(ids)) == self._folded(text)

    def _bytes_of(self, token: int) -> bytes:
        """What a token stands for, by the usual ways to write it; where they do not apply the bytes are just not the text's."""
        text = self._backend.id_to_token(token) or ""
        if token in self._added:
            return text.encode()
        if self._byte_level:
            return bytes(self._byte_level.get(letter, 0) for letter in text)
        if _BYTE.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        return text.replace("\u2581", " ").encode()

    def _folded(self, text: str) -> str:
        """A text as the tokenizer's normalizer makes it, without blanks."""
        normalizer = self._backend.normalizer
        seen = text if normalizer is None else normalizer.normalize_str(text)
        return "".join(seen.replace("\u2581", " ").split())

    def _in_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        assert self._cut is not None
        cut = [self._cut.split(text) for text in texts]
        known = self._known
        new = list(dict.fromkeys(piece for pieces in cut for piece in pieces if piece not in known))
        here = known | dict(zip(new, self._whole(new), strict=True))
        short = [piece for piece in new if len(piece) <= _PIECE_LENGTH]
        if len(known) + len(short) <= _MEMORY:
            known.update((piece, here[piece]) for piece in short)
        return [[i for piece in pieces for i in here[piece]] for pieces in cut]


def _boundaries(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches where a special token of the chat template begins; None when there is none that surely cuts."""
    added = list(cast(PreTrainedTokenizerFast, tokenizer).added_tokens_decoder.values())
    template = str(tokenizer.chat_template or "")
    every = [token.content for token in added]
    safe = [t.content for t in added if t.content in template and _stands_alone(t) and not _entangled(t.content, every)]
    return re.compile("(?=" + "|".join(map(re.escape, safe)) + ")") if safe else None


def _stands_alone(token: AddedToken) -> bool:
    return token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)


def _entangled(token: str, every: Sequence[str]) -> bool:
    """Whether another token may reach into this one from the left."""
    openings = tuple(token[:k] for k in range(1, len(token)))
    return any(other.endswith(openings) or other.find(token, 1) >= 0 for other in every)
