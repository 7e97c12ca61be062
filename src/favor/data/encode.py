"""Text -> token ids in batches, each piece of text only once.

In: texts and a fast tokenizer. Out: ids, the same as encoding every text whole. A special token of the chat template
ends what stands before it, so the pieces between them are encoded apart and shared between texts. Next: tokenize.py.
"""

import re
from collections.abc import Sequence
from typing import cast

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Texts of the first batch that are encoded whole too, to see that pieces give the same.
_CHECKED = 24
# Pieces remembered from batch to batch: system prompts and headers.
_PIECE_LENGTH, _MEMORY = 400, 4096


class Encoder:
    """A tokenizer with a memory of short pieces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # a call brings the backend into the state that transformers wants: no truncation, no padding
        tokenizer("x", add_special_tokens=False)
        self._backend = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
        self._cut = None if self._backend.encode_special_tokens else _boundaries(tokenizer)
        self._checked = self._cut is None
        self._known: dict[str, list[int]] = {}
        self._blank: dict[int, bool] = {}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, no special tokens added."""
        if not self._checked and texts:
            self._checked = True
            few = texts[:_CHECKED]
            if self._in_pieces(few) != self._whole(few):
                self._cut = None
        return self._whole(texts) if self._cut is None else self._in_pieces(texts)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of a text stands in it."""
        return self._backend.encode(text, add_special_tokens=False).offsets

    def is_blank(self, token: int) -> bool:
        """Whether a token alone reads as nothing but blanks."""
        if token not in self._blank:
            self._blank[token] = not self._backend.decode([token], skip_special_tokens=False).strip()
        return self._blank[token]

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

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
