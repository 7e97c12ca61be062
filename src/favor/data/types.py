"""The records that travel from a preference file to the loss, and THE shape legend.

In: nothing. Out: PromptTree (text), TokenTree (ids), Batch (tensors). Next: read.py.

Shape legend, used as name suffixes everywhere:
  B rows of a padded batch (1 when packed)     T tokens of a row        N positions whose logits are needed
  E scored tokens (each once)                  M (response, scored token) memberships
  R responses     P pairs     Q rankings       K longest ranking        U ties      I thumbs     V vocabulary
  J tokens that are parts of pictures
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = str | tuple[Message, ...]
Layout: TypeAlias = Literal["tree", "rows"]


class Comparison(NamedTuple):
    """Responses in order of preference, best first; a pair is the ranking with two members.

    order: indices into the tree's responses. weight: how much this comparison counts (1 = one judgment).
    gaps: by how much each member is better than the next, where the data says so (a margin, a score difference).
    label: of a pair, the probability that this order is right (a soft label, such as a share of votes).
    """

    # three responses, 2 best and 0 worst: order (2, 1, 0), gaps of 2 over 1 and of 1 over 0
    order: tuple[int, ...]
    weight: float = 1.0
    gaps: tuple[float, ...] = ()
    label: float = 1.0


class Thumb(NamedTuple):
    """One response judged alone: good or bad."""

    response: int
    good: bool
    weight: float = 1.0


@dataclass(frozen=True)
class PromptTree:
    """One prompt, its unique responses and the comparisons among them, as text or chat messages.

    `prompt` is plain text or messages; every response is plain text or the messages that follow the prompt, of which those
    that others than the assistant say are read and not scored. `ties` are judgments that two responses are equally good,
    `thumbs` judge one response alone, `cut` are the responses that stop before their end. `tools` and `template_kwargs`
    (variables such as enable_thinking) go to the chat template.
    `rows` are the 1-based row numbers of `source` merged here, `first_rows` the row that gave each response first.
    """

    prompt: Text
    responses: tuple[Text, ...]
    comparisons: tuple[Comparison, ...]
    rows: tuple[int, ...]
    source: str
    tools: tuple[dict[str, Any], ...] | None = None
    ties: tuple[Comparison, ...] = ()
    cut: tuple[int, ...] = ()
    thumbs: tuple[Thumb, ...] = ()
    first_rows: tuple[int, ...] = ()
    template_kwargs: Mapping[str, Any] | None = None


class Picture(NamedTuple):
    """A picture of a prompt: SHA-256 of its file and where that is, its size as it is seen, its tokens in the prompt."""

    digest: str
    path: str
    height: int
    width: int
    tokens: int = 0


@dataclass(frozen=True)
class TokenTree:
    """A PromptTree after tokenisation and truncation.

    A token of a response that the model did not say (a tool's answer, a user's turn, what the template writes before a later
    turn of the model's) stands in `response_ids` as ~id, below zero: it is read, and never scored.
    `complete[r]` says that response r still ends with its end-of-turn token (a cut one does not).
    `first_response` is the index of response 0 in the whole data set: the key of the reference store.
    `source` and `row` name the first row it came from.
    Where the prompt holds `picture_id`, parts of its pictures stand, one picture after the other.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[tuple[int, ...], ...]
    complete: tuple[bool, ...]
    comparisons: tuple[Comparison, ...]
    # with responses [0, 1] of the first tree and three of the second: 0, then 2
    first_response: int
    row: int
    ties: tuple[Comparison, ...] = ()
    thumbs: tuple[Thumb, ...] = ()
    source: str = ""
    pictures: tuple[Picture, ...] = ()
    picture_id: int = -1

    @property
    def num_scored(self) -> int:
        """Tokens of its responses that the model said."""
        return sum(int(said(ids).sum()) for ids in self.response_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens when the prompt is computed once (an upper bound: shared openings save more)."""
        return len(self.prompt_ids) + sum(map(len, self.response_ids))


def sampled_tree(prompt_ids: Sequence[int], length: int) -> TokenTree:
    """A tree as large as a sample of `length` tokens can make it: for `settle`, before there are samples."""
    response = tuple(islice(cycle(prompt_ids), length))
    return TokenTree(tuple(prompt_ids), (response,), (True,), (), 0, 0)


def longest_path(tree: TokenTree) -> int:
    """Tokens from the start of the prompt to the end of the longest response."""
    return len(tree.prompt_ids) + max(map(len, tree.response_ids))


def unseen(tree: TokenTree) -> TokenTree:
    """The tree with another token where pictures stand: as long, and text alone."""
    if not tree.pictures:
        return tree
    other = next(token for token in tree.prompt_ids if token != tree.picture_id)
    ids = tuple(other if token == tree.picture_id else token for token in tree.prompt_ids)
    return replace(tree, prompt_ids=ids, pictures=(), picture_id=-1)


def said(ids: Sequence[int]) -> np.ndarray:
    """Which tokens of a response the model said: bool."""
    return np.asarray(ids) >= 0


def as_read(ids: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens of a response as the model reads them, whoever said them."""
    return ids if min(ids, default=0) >= 0 else tuple(i if i >= 0 else ~i for i in ids)


def until_said(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Ids up to the last that the model says."""
    last = max((i for i, token in enumerate(ids, 1) if token >= 0), default=0)
    return ids[:last]


def words_of(text: Text) -> str:
    """A prompt or response as plain text; what a turn calls is said as JSON."""
    return text if isinstance(text, str) else "\n".join(map(_words_of_turn, text))


def _words_of_turn(turn: Message) -> str:
    content, calls = str(turn.get("content") or ""), turn.get("tool_calls")
    said = json.dumps(calls, ensure_ascii=False, default=str) if calls else ""
    return "\n".join(filter(None, (content, said)))


class Finding(NamedTuple):
    """One kind of fault in the data and where it is: rows are (source, row number); examples show the first of them."""

    severity: Literal["error", "warning", "note"]
    kind: str
    message: str
    rows: tuple[tuple[str, int], ...] = ()
    examples: tuple[str, ...] = ()


class Node(NamedTuple):
    """A run of tokens shared by everything below it, in pre-order: [start, stop), descendants [stop, end)."""

    # a node without descendants has stop == end
    start: int
    stop: int
    end: int


@dataclass(frozen=True)
class Batch:
    """Token trees as tensors: one packed row of trees, or one padded row per response.

    ids_BT, position_BT int64; `nodes` describe the tree attention of the packed row and are empty for
    padded rows, whose `mask_BT` (bool) marks real tokens. head_N int64 are flat indices into B*T of the
    positions whose next-token logits are needed; edge_head_E int64 indexes head_N and edge_target_E
    int64 is the token scored there; edges are in the order of their heads, those of head n are edge_begins[n] to [n + 1].
    column_C int64 are the columns of the rows that hold heads, head_column_N int64 which of them each head is in.
    member_edge_M / member_response_M int64 say which scored tokens make up which response; last_R int64 is the flat
    index of each response's last token. chosen_P / rejected_P int64 index R; weight_P, margin_P and label_P float32.
    ranking_QK int64, best first, padded with -1; weight_Q float32; drop_QK float32 is how far each member's score lies
    below the best one's (0 where unknown). tie_U2 int64 indexes R, weight_U float32. thumb_I int64 indexes R, good_I
    bool, weight_I float32. index_R int64 is the data-set-wide response index. `idle`: computed beside other
    ranks by one that has no trees; it counts for nothing. pictures: those of its prompts, each once; seen_J int64 are the flat
    places of B*T where parts of them stand, feature_J int64 which of all their features belongs there.
    """

    ids_BT: Tensor
    position_BT: Tensor
    mask_BT: Tensor | None
    nodes: tuple[Node, ...]
    # logits are computed at N positions, tokens are scored at E (position, token) edges,
    head_N: Tensor
    edge_head_E: Tensor
    edge_target_E: Tensor
    # known to the host, so that nothing waits for the device
    edge_begins: tuple[int, ...]
    column_C: Tensor
    head_column_N: Tensor
    # and a response is the sum of its members: an edge that two responses share counts in both
    member_edge_M: Tensor
    member_response_M: Tensor
    length_R: Tensor
    last_R: Tensor
    index_R: Tensor
    # every pair that a ranking implies; the rankings themselves follow
    chosen_P: Tensor
    rejected_P: Tensor
    weight_P: Tensor
    margin_P: Tensor
    label_P: Tensor
    ranking_QK: Tensor
    drop_QK: Tensor
    weight_Q: Tensor
    tie_U2: Tensor
    weight_U: Tensor
    thumb_I: Tensor
    good_I: Tensor
    weight_I: Tensor
    num_naive_tokens: int
    idle: bool = False
    pictures: tuple[Picture, ...] = ()
    seen_J: Tensor | None = None
    feature_J: Tensor | None = None

    @property
    def num_responses(self) -> int:
        """R."""
        return int(self.index_R.shape[0])

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding included."""
        return self.ids_BT.numel()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        mine = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if device.type == "cuda" and self.ids_BT.device.type == "cpu":
            # what is not pinned is copied while everything waits
            mine = {name: value.pin_memory() for name, value in mine.items()}
        moved = {name: value.to(device, non_blocking=True) for name, value in mine.items()}
        return replace(self, **moved)  # pyright: ignore[reportArgumentType] (tensor fields only)
