"""The pairs of a recipe as text and as numbers, a row at a time, so that what is found can name it.

In: rows, a model. Out: a Part for each of their parts. Next: features.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from favor.data.grow import grow
from favor.data.read import Half, ReadReport, judged, tree_key
from favor.data.settings import DataConfig, SourceConfig
from favor.data.tokenize import TokensConfig, tokenize
from favor.data.types import Comparison, PromptTree, TokenTree
from favor.eval.figures import pairs
from favor.model.layout import settle
from favor.model.load import ModelConfig, Policy, load_policy, precise
from favor.value.cheap import Cases, gaps
from favor.value.features import NUMBERS, features

# a row as a tree of its own, and the key of its prompt
Row: TypeAlias = tuple[PromptTree, str]


class Pair(NamedTuple):
    """A pair in its row: the row as a tree of text and of ids, and what is said of two of its responses.

    Both list the same responses. gap: by how much chosen is better, where the row says so. prompt: a number that pairs of one
    prompt share.
    """

    text: PromptTree
    ids: TokenTree
    chosen: int
    rejected: int
    said: Comparison
    gap: float | None
    prompt: int

    @property
    def weight(self) -> float:
        """How much it counts; a soft label by how far it is from a coin."""
        return self.said.weight * abs(2 * self.said.label - 1)


class Part(NamedTuple):
    """Pairs, as numbers too. logp_gap_P: log ref(chosen) - log ref(rejected), nats. left_out: rows without a pair to compare."""

    pairs: list[Pair]
    cases: Cases
    logp_gap_P: NDArray[np.float64]
    left_out: int


class How(NamedTuple):
    """How rows become numbers: sections [model] and [tokens], data.bad_rows, tokens computed at once."""

    model: ModelConfig
    tokens: TokensConfig
    bad_rows: Literal["error", "drop"]
    budget: int


def parts(rows: Mapping[str, Sequence[Row]], how: How, progress: Callable[[str, int, int], None]) -> dict[str, Part]:
    """The pairs of every part, all read by one model. Raises DataError for rows that cannot be used, as training does."""
    # adapters would be drawn by chance, and the model without them is the reference
    policy = load_policy(how.model.model_copy(update={"lora": None}), frozen=True)
    known = {key: place for place, key in enumerate(dict.fromkeys(key for part in rows.values() for _, key in part))}
    trees = {name: _tokenized(policy, how, [text for text, _ in part]) for name, part in rows.items()}
    ready, _ = settle(precise(policy), how.model.layout, [ids for part in trees.values() for _, ids in part])
    total = sum(map(len, trees.values()))
    found: dict[str, Part] = {}
    for name, part in trees.items():
        prompts = {(text.source, text.rows): known[key] for text, key in rows[name]}
        pairs_of = [
            Pair(text, ids, one.order[i], one.order[j], one, _gap(one, i, j), prompts[text.source, text.rows])
            for text, ids in part
            for one in ids.comparisons
            for i, j in combinations(range(len(one.order)), 2)
        ]
        ids_of = [ids for _, ids in part]
        known_RF = features(ready, ids_of, how.budget, lambda done: progress("responses read", done, total))
        found[name] = _as_numbers(pairs_of, ids_of, known_RF, len(rows[name]) - len(part))
    return found


def read_rows(sources: Iterable[SourceConfig], half: Half, data: DataConfig) -> Iterator[Row]:
    """Every row of the sources as a tree of its own, and the key of its prompt."""
    for source in sources:
        report = ReadReport(source.path, data.format_of(source))
        for number, _, judgment in judged(source, data, half, report):
            yield grow([(number, judgment)], data.rules, source.path, report), tree_key(judgment)


def _tokenized(policy: Policy, how: How, texts: Sequence[PromptTree]) -> list[tuple[PromptTree, TokenTree]]:
    """Rows with a comparison whose responses stay apart in tokens."""
    ids, _ = tokenize(texts, policy.tokenizer, how.tokens, policy.end_ids, how.bad_rows)
    of_row = {(text.source, text.rows[0]): text for text in texts}
    both = [(of_row[tree.source, tree.row], tree) for tree in ids if tree.comparisons]
    return [(text, tree) for text, tree in both if len(text.responses) == len(tree.response_ids)]


def _as_numbers(found: list[Pair], trees: Sequence[TokenTree], known_RF: NDArray[np.float32], left_out: int) -> Part:
    chosen_P, rejected_P, _ = pairs(trees)
    weight_P, prompt_P = np.array([pair.weight for pair in found]), np.array([pair.prompt for pair in found])
    logp_R = known_RF[:, -NUMBERS].astype(np.float64)
    cases = Cases(gaps(known_RF, chosen_P, rejected_P), weight_P, prompt_P)
    return Part(found, cases, logp_R[chosen_P] - logp_R[rejected_P], left_out)


def _gap(one: Comparison, better: int, worse: int) -> float | None:
    """By how much one member of an order is better than another."""
    return sum(one.gaps[better:worse]) if one.gaps else None
