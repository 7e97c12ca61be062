"""Two models answer one prompt side by side, token by token; then both say how likely they find each answer's tokens.

In: a run, a prompt. Out: tokens as they are sampled, two Answers with log-probs. Next: server.py.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from favor.chat.settings import ChatConfig
from favor.data.tokenize import TokensConfig, prompt_encoder
from favor.data.types import Batch, Text, TokenTree
from favor.model.batched import measured
from favor.model.load import Policy
from favor.model.logprobs import scored_logps
from favor.model.sample import SampleConfig, decode, sample
from favor.rewards.model import load_pair, read_run

Side: TypeAlias = Literal["before", "after"]
SIDES: tuple[Side, Side] = ("before", "after")


@dataclass(frozen=True)
class Models:
    """A run's model and the one it started from, in float32; beta of its implicit reward; a prompt as ids (RowError)."""

    before: Policy
    after: Policy
    beta: float
    encode: Callable[[Text], tuple[int, ...]]

    @property
    def of(self) -> dict[Side, Policy]:
        """The models by side."""
        return {"before": self.before, "after": self.after}


class Piece(NamedTuple):
    """A token of an answer, or several that make one letter: text, and log-probs in nats by both models.

    The end of the turn is a piece without text.
    """

    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Answer:
    """What one model said. ended: it came to its end, not to a limit. reward: beta times the sum of log after/before."""

    text: str
    ended: bool
    pieces: tuple[Piece, ...]
    reward: float


class Spelling:
    """Tokens as text while they come: a token that ends within a letter waits for the next one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # what was shown last stands before what is new: some tokenizers drop a space at the start of a text
        self._before, self._shown = 0, 0

    def add(self, token: int) -> str:
        """The text that the token completes; empty while there is none."""
        self._ids.append(token)
        found = self._new()
        if not found or found.endswith("\ufffd"):
            return ""
        self._before, self._shown = self._shown, len(self._ids)
        return found

    def rest(self) -> str:
        """What an answer that is cut within a letter ends with."""
        return self._new()

    def _new(self) -> str:
        known, all_of_it = decode(self._tokenizer, [self._ids[self._before : self._shown], self._ids[self._before :]])
        return all_of_it[len(known) :]


class Turns:
    """Threads take turns, one step each, so that two models do not compute against each other."""

    def __init__(self, members: Sequence[str]) -> None:
        self._changed = threading.Condition()
        self._waiting = deque(members)

    def wait(self, member: str) -> None:
        """Until it is this one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == member)

    def pass_on(self, member: str) -> None:
        """The next one's turn; back when it is this one's again."""
        with self._changed:
            self._waiting.rotate(-1)
            self._changed.notify_all()
        self.wait(member)

    def leave(self, member: str) -> None:
        """This one is done."""
        with self._changed:
            self._waiting.remove(member)
            self._changed.notify_all()


class _EnoughError(Exception):
    """Nobody listens any more."""


def load_models(config: ChatConfig) -> Models:
    """Raises CheckpointError where there is no finished run, or its start is another model now."""
    _, recipe = read_run(config.run)
    after, before = load_pair(config.run, config.reference)
    encoder = prompt_encoder(after.tokenizer, TokensConfig(template=recipe.tokens.template))
    return Models(before, after, recipe.scale, encoder)


def answers(
    models: Models,
    prompt_ids: tuple[int, ...],
    how: SampleConfig,
    seed: int,
    told: Callable[[Side, str], None],
    stop: threading.Event,
) -> dict[Side, Answer]:
    """Both models' answers by the same seed; `told` gets text as it comes, in the models' own threads.

    Each is what model/sample.py gives for this seed, or the beginning of it once `stop` is set. Raises what sampling raises.
    """
    ids: dict[Side, list[int]] = {side: [] for side in SIDES}
    turns = Turns(SIDES)

    def one(side: Side) -> None:
        spelling = Spelling(models.after.tokenizer)

        def sampled(token: int) -> None:
            ids[side].append(token)
            if text := spelling.add(token):
                told(side, text)
            if stop.is_set():
                raise _EnoughError
            turns.pass_on(side)

        try:
            turns.wait(side)
            sample(models.of[side], [prompt_ids], [seed], how, told=sampled)
        except _EnoughError:
            pass
        except BaseException:
            stop.set()
            raise
        finally:
            turns.leave(side)
        if text := spelling.rest():
            told(side, text)

    with ThreadPoolExecutor(len(SIDES)) as pool:
        for done in [pool.submit(one, side) for side in SIDES]:
            done.result()
    return scored(models, prompt_ids, ids)


def scored(models: Models, prompt_ids: tuple[int, ...], ids: Mapping[Side, Sequence[int]]) -> dict[Side, Answer]:
    """What was sampled, with the log-probs of its tokens by both models: those that training computes."""
    values = dict.fromkeys(ids, torch.zeros(2, 0, dtype=torch.float64))
    for side in ids:
        if ids[side]:
            values[side] = token_logps(models, prompt_ids, tuple(ids[side]))
    return {side: _answer(models, ids[side], values[side]) for side in ids}


def token_logps(models: Models, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> Tensor:
    """Log-prob of every token of a response, before and after: float64 [2, tokens], nats."""

    def both(batch: Batch) -> Tensor:
        found = [scored_logps(models.of[side], batch)[batch.member_edge_M] for side in SIDES]
        return torch.stack(found)

    # one row alone has neither padding nor a tree: it is what plain transformers computes, so nothing needs a check
    tree = TokenTree(prompt_ids, (response_ids,), (True,), (), 0, row=1)
    return measured(models.after, [tree], both, 1, tokens=True)


def _answer(models: Models, ids: Sequence[int], logps_2T: Tensor) -> Answer:
    tokenizer, ended = models.after.tokenizer, bool(ids) and ids[-1] in models.after.end_ids
    (text,) = decode(tokenizer, [ids])
    ratio = logps_2T[1] - logps_2T[0]
    return Answer(text, ended, tuple(pieces(tokenizer, ids, logps_2T)), models.beta * float(ratio.sum()))


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], logps_2T: Tensor) -> list[Piece]:
    """An answer in pieces that can be read; their texts are the answer's text, and their log-probs sum to its."""
    spelling, found, start = Spelling(tokenizer), list[Piece](), 0
    for stop, token in enumerate(ids, 1):
        text = spelling.add(token)
        if text or stop == len(ids):
            before, after = logps_2T[:, start:stop].sum(1).tolist()
            found.append(Piece(text or spelling.rest(), before, after))
            start = stop
    return found
