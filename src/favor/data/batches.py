"""Token trees -> Batches: which trees form an optimizer batch, its cut into micro-batches, how tokens are laid out.

In: TokenTrees. Out: optimizer batches in an order that resumes, micro-batches under a token budget, each as tensors.
Pure and deterministic. Next: ../model/logprobs.py.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from favor.data.features import seen, told_apart
from favor.data.types import Batch, Comparison, Layout, Node, Picture, Thumb, TokenTree, as_read, said

# bins are levelled to this part of their size
_LEVEL = 64


class LoaderState(NamedTuple):
    """Where the order stands: whole epochs done, trees of the current epoch already given out."""

    epoch: int = 0
    position: int = 0


class Order(NamedTuple):
    """How trees become optimizer batches: shuffled, resumable, the same on every rank."""

    num_trees: int
    batch_prompts: int
    seed: int
    shuffle: bool = True

    def batches(self, state: LoaderState) -> Iterator[tuple[list[int], LoaderState]]:
        """Tree indices of optimizer batches from `state` on, without end; each comes with the state that follows it."""
        epoch, position = state
        while True:
            # a function of seed and epoch alone, so a run that stops and resumes sees what an unbroken one sees
            indices = np.arange(self.num_trees)
            if self.shuffle:
                indices = np.random.default_rng([self.seed, epoch]).permutation(self.num_trees)
            while position < self.num_trees:
                batch: list[int] = indices[position : position + self.batch_prompts].tolist()
                position += len(batch)
                done = position >= self.num_trees
                yield batch, LoaderState(epoch + 1, 0) if done else LoaderState(epoch, position)
            epoch, position = epoch + 1, 0


def plan(trees: Sequence[TokenTree], layout: Layout, budget: int, world: int = 1) -> list[list[int]]:
    """Cut an optimizer batch into micro-batches of at most `budget` computed tokens, balanced over `world` ranks.

    A tree costs a bin what it adds to it: trees that share a long prefix stand together, and rows of like length. The number
    of bins is the least multiple of `world` that is found to fit, so every rank runs equally many (some may be empty, from the
    last on). A tree beyond the budget gets a bin to itself. Bin i belongs to rank i % world. Returns indices, ascending
    within a bin.
    """
    bins, fill, least = _fitted(trees, layout, budget, world)
    found, num_bins = [bins], len(bins.load)
    # the first bins are the fullest then; lower limits level them, and the one that takes least time is kept
    low, high = least // num_bins, min(max(bins.load), budget) if fill.levels else 0
    while high - low > 1 + low // _LEVEL:
        limit = (low + high) // 2
        if lower := fill(limit, num_bins):
            found.append(lower)
            high = limit
        else:
            low = limit
    return min(found, key=lambda bins: bins.time(world)).members


def planned_tokens(trees: Sequence[TokenTree], layout: Layout, budget: int, world: int = 1) -> int:
    """Tokens that an optimizer batch costs under a budget, over all its micro-batches, padding included."""
    return sum(_fitted(trees, layout, budget, world)[0].load)


def _fitted(
    trees: Sequence[TokenTree], layout: Layout, budget: int, world: int
) -> tuple["_Bins", "_Trees | _Rows", int]:
    """As few bins as are found to hold the trees, how they are filled, and the least that all trees can cost."""
    if layout == "tree":
        sizes = np.array([computed_tokens(tree, layout) for tree in trees], np.int64)
        fill = _Trees(sizes, shared := shared_tokens(trees))
        # were there one bin: each shares most with one of those before it
        least = int(sum(sizes[i] - shared[i, :i].max(initial=0) for i in range(len(trees))))
    else:
        fill = _Rows([len(tree.response_ids) for tree in trees], [_width(tree) for tree in trees])
        least = sum(map(math.prod, zip(*fill, strict=True)))
    num_bins = world * max(1, -(-least // (budget * world)))
    while (bins := fill(budget, num_bins)) is None:
        num_bins += world
    return bins, fill, least


class _Bins(NamedTuple):
    """Trees by bin, and what each bin computes."""

    members: list[list[int]]
    load: list[int]

    def time(self, world: int) -> tuple[int, int]:
        """Tokens until the slowest rank of every round is done; then the largest bin, which bounds memory."""
        return sum(max(self.load[i : i + world]) for i in range(0, len(self.load), world)), max(self.load)


class _Trees(NamedTuple):
    """Fills bins with trees of these sizes, of which two share so much."""

    size_N: np.ndarray
    shared_NN: np.ndarray

    @property
    def levels(self) -> bool:
        """Whether a limit below the budget may be quicker: without shared tokens the bins are level as they are."""
        return bool(self.shared_NN.any())

    def __call__(self, limit: int, num_bins: int) -> _Bins | None:
        """Largest tree first, into the bin that it adds least to, of these the emptiest; None when one does not fit."""
        members: list[list[int]] = [[] for _ in range(num_bins)]
        load_B = np.zeros(num_bins, np.int64)
        # what each bin already holds of the opening of each tree
        held_BN = np.zeros((num_bins, len(self.size_N)), np.int64)
        for i in sorted(range(len(self.size_N)), key=lambda i: (-self.size_N[i], i)):
            added_B = self.size_N[i] - held_BN[:, i]
            fits_B = (load_B + added_B <= limit) | (load_B == 0)
            if not fits_B.any():
                return None
            best = min(np.flatnonzero(fits_B).tolist(), key=lambda b: (added_B[b], load_B[b], b))
            members[best].append(i)
            load_B[best] += added_B[best]
            np.maximum(held_BN[best], self.shared_NN[i], out=held_BN[best])
        return _Bins([sorted(bin_) for bin_ in members], load_B.tolist())


class _Rows(NamedTuple):
    """Fills bins with padded rows: how many every tree has, and the longest of them."""

    rows: list[int]
    width: list[int]

    @property
    def levels(self) -> bool:
        """The last bin holds what is left."""
        return True

    def __call__(self, limit: int, num_bins: int) -> _Bins | None:
        """Widest first, one bin after another: a bin is as wide as its first. None when there are too few bins."""
        members: list[list[int]] = [[] for _ in range(num_bins)]
        load = [0] * num_bins
        at = held = wide = 0
        for i in sorted(range(len(self.rows)), key=lambda i: (-self.width[i], i)):
            if held and (held + self.rows[i]) * wide > limit:
                at, held = at + 1, 0
                if at == num_bins:
                    return None
            wide = wide if held else self.width[i]
            members[at].append(i)
            held += self.rows[i]
            load[at] = held * wide
        return _Bins([sorted(bin_) for bin_ in members], load)


def shared_tokens(trees: Sequence[TokenTree]) -> np.ndarray:
    """Tokens with which the prompts of two trees begin alike, for every two: [N, N] int64, 0 on the diagonal."""
    prompts, _ = _prompts(trees)
    order = sorted(range(len(trees)), key=lambda i: prompts[i])
    alike = np.array([_common(prompts[a], prompts[b]) for a, b in pairwise(order)], np.int64)
    shared = np.zeros((len(trees), len(trees)), np.int64)
    for place, i in enumerate(order):
        # between two sorted prompts nothing is shared that all between them do not share
        run = np.minimum.accumulate(alike[place:])
        shared[i, order[place + 1 :]] = shared[order[place + 1 :], i] = run
    return shared


def _prompts(trees: Sequence[TokenTree]) -> tuple[list[tuple[int, ...]], tuple[Picture, ...]]:
    """The ids of every prompt, and the pictures in them."""
    # the token of a part of a picture is the same in all, and what is equal would be computed once
    return told_apart(trees) if any(tree.pictures for tree in trees) else ([tree.prompt_ids for tree in trees], ())


def computed_tokens(tree: TokenTree, layout: Layout) -> int:
    """Tokens that a tree alone costs in this layout: common openings of its responses once, or padding included."""
    if layout == "rows":
        return len(tree.response_ids) * _width(tree)
    twice = sum(_common(a, b) for a, b in pairwise(sorted(tree.response_ids)))
    return tree.num_tokens - twice


def _width(tree: TokenTree) -> int:
    """Tokens of its longest row."""
    return len(tree.prompt_ids) + max(map(len, tree.response_ids))


def build(trees: Sequence[TokenTree], layout: Layout, pad_id: int = 0) -> Batch:
    """Lay trees out as tensors: one packed row in which every common token prefix stands once, or padded rows.

    The true longest common prefix is shared, also between trees: system prompts, multi-turn histories,
    responses that open alike.
    """
    prompts, pictures = _prompts(trees)
    paths = [
        prompt + as_read(response)
        for tree, prompt in zip(trees, prompts, strict=True)
        for response in tree.response_ids
    ]
    # where the model's own tokens stand on every path
    places = [len(tree.prompt_ids) + np.flatnonzero(said(ids)) for tree in trees for ids in tree.response_ids]
    if layout == "tree":
        # every node depends on those above it, so one row holds all trees; no padding, no mask
        nodes, ids, position, where = radix(paths)
        ids_BT, position_BT, mask_BT = ids[None], position[None], None
    else:
        nodes = ()
        ids_BT, position_BT, mask_BT, where = _padded(paths, pad_id)
    return Batch(
        ids_BT=torch.from_numpy(ids_BT),
        position_BT=torch.from_numpy(position_BT),
        mask_BT=None if mask_BT is None else torch.from_numpy(mask_BT),
        nodes=nodes,
        **_scored(paths, places, where, ids_BT.shape[1]),
        **_comparisons(trees),
        num_naive_tokens=sum(map(len, paths)),
        idle=False,
        pictures=pictures,
        **(seen(ids_BT, trees) if pictures else {}),
    )


def radix(paths: Sequence[Sequence[int]]) -> tuple[tuple[Node, ...], np.ndarray, np.ndarray, list[np.ndarray]]:
    """The forest of common prefixes of token sequences, in pre-order.

    Returns nodes, ids_T int64, position_T int64 (depth from the root) and for every path the packed index
    of each of its tokens. Two pairs whose prompts begin with the same tokens a b:

        paths       a b c x y      node           start stop end     ids_T       a b c x y z d w x
                    a b c x z      a b            0     2    9       position_T  0 1 2 3 4 4 2 3 3
                    a b d x        +- c x         2     4    6       index       0 1 2 3 4 5 6 7 8
                    a b d w        |  +- y        4     5    5
                                   |  +- z        5     6    6       where[1] = [0 1 2 3 5]   (a b c x z)
                                   +- d           6     7    9       where[2] = [0 1 6 8]     (a b d x)
                                      +- w        7     8    8
                                      +- x        8     9    9

    9 tokens are computed instead of 18. A node attends to itself causally; its descendants [stop, end) see all of it.
    """
    # sorted paths that share a prefix stand together, so one pass sees the whole forest
    order = sorted(range(len(paths)), key=lambda i: tuple(paths[i]))
    shared = [0] + [_common(paths[a], paths[b]) for a, b in pairwise(order)]
    nodes: list[list[int]] = []
    ids: list[int] = []
    position: list[int] = []
    where: list[np.ndarray] = [np.empty(0, np.int64)] * len(paths)
    open_nodes: list[tuple[int, int]] = []  # (node, depth at which it starts), from the root to the current leaf
    trail = np.empty(0, np.int64)
    for rank, index in enumerate(order):
        path, keep = paths[index], shared[rank]
        _close(nodes, open_nodes, keep, len(ids))
        if len(path) > keep:
            start = len(ids)
            ids.extend(path[keep:])
            position.extend(range(keep, len(path)))
            nodes.append([start, len(ids), len(ids)])
            open_nodes.append((len(nodes) - 1, keep))
            trail = np.concatenate([trail[:keep], np.arange(start, len(ids))])
        # a path that is a prefix of the last one adds no node: its trail is the beginning of the other's
        where[index] = trail[: len(path)]
    _close(nodes, open_nodes, 0, len(ids))
    return (
        tuple(Node(*node) for node in sorted(nodes, key=lambda node: node[0])),
        np.array(ids, np.int64),
        np.array(position, np.int64),
        where,
    )


def _close(nodes: list[list[int]], open_nodes: list[tuple[int, int]], keep: int, end: int) -> None:
    """Leave every open node below depth `keep`; a node that reaches beyond it is split there."""
    while open_nodes:
        node, depth = open_nodes[-1]
        length = nodes[node][1] - nodes[node][0]
        if depth + length <= keep:
            return
        open_nodes.pop()
        nodes[node][2] = end
        # only the part above `keep` is shared with what follows
        if depth < keep:
            start, stop, _ = nodes[node]
            cut = start + keep - depth
            nodes[node] = [cut, stop, end]
            nodes.append([start, cut, end])
            open_nodes.append((len(nodes) - 1, depth))
            return


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    limit = min(len(a), len(b))
    x, y = np.asarray(a[:limit]), np.asarray(b[:limit])
    differs = np.flatnonzero(x != y)
    return int(differs[0]) if differs.size else limit


def _padded(paths: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """One right-padded row per response: ids_BT, position_BT, mask_BT and each path's flat indices."""
    width = max(map(len, paths))
    ids_BT = np.full((len(paths), width), pad_id, np.int64)
    mask_BT = np.zeros((len(paths), width), np.bool_)
    # padding repeats the last position: some rotary frequencies are chosen by the largest one of a row
    position_BT = np.minimum(np.arange(width), np.array([[len(path) - 1] for path in paths]))
    for row, path in enumerate(paths):
        ids_BT[row, : len(path)] = path
        mask_BT[row, : len(path)] = True
    return ids_BT, position_BT, mask_BT, [row * width + np.arange(len(path)) for row, path in enumerate(paths)]


def _scored(
    paths: Sequence[Sequence[int]], places: Sequence[np.ndarray], where: Sequence[np.ndarray], width: int
) -> dict[str, Any]:
    """Which positions need logits, which tokens are scored there, and which response each belongs to."""
    token_M = np.concatenate([w[at] for w, at in zip(where, places, strict=True)])
    # the logits that score a token stand at the position before it on its own path
    parent_M = np.concatenate([w[at - 1] for w, at in zip(where, places, strict=True)])
    target_M = np.concatenate([np.asarray(p, np.int64)[at] for p, at in zip(paths, places, strict=True)])
    length_R = np.array([len(at) for at in places], np.int64)
    # a packed token has one parent, so the token's index names the scored edge
    _, first_E, edge_M = np.unique(token_M, return_index=True, return_inverse=True)
    head_N, edge_head_E = np.unique(parent_M[first_E], return_inverse=True)
    # in the order of their heads: a range of heads scores a range of edges
    order_E = np.argsort(edge_head_E, kind="stable")
    column_C, head_column_N = np.unique(head_N % width, return_inverse=True)
    arrays = {
        "head_N": head_N,
        "edge_head_E": edge_head_E[order_E],
        "edge_target_E": target_M[first_E][order_E],
        "column_C": column_C,
        "head_column_N": head_column_N,
        "member_edge_M": np.argsort(order_E)[edge_M],
        "member_response_M": np.repeat(np.arange(len(paths)), length_R),
        "length_R": length_R,
        "last_R": np.array([w[-1] for w in where], np.int64),
    }
    begins = np.searchsorted(arrays["edge_head_E"], np.arange(len(head_N) + 1))
    made = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    return made | {"edge_begins": tuple(begins.tolist())}


def _comparisons(trees: Sequence[TokenTree]) -> dict[str, Any]:
    """Comparisons as index tensors: every pair a ranking implies, the rankings themselves, ties and thumbs."""
    rankings: list[Comparison] = []
    ties: list[Comparison] = []
    thumbs: list[Thumb] = []
    index: list[int] = []
    for tree in trees:
        offset = len(index)
        index.extend(range(tree.first_response, tree.first_response + len(tree.response_ids)))
        rankings.extend(c._replace(order=tuple(offset + r for r in c.order)) for c in tree.comparisons)
        ties.extend(c._replace(order=tuple(offset + r for r in c.order)) for c in tree.ties)
        thumbs.extend(thumb._replace(response=offset + thumb.response) for thumb in tree.thumbs)
    longest = max((len(c.order) for c in rankings), default=2)
    pairs = [pair for ranking in rankings for pair in _implied(ranking)]
    chosen, rejected, weight, margin, label = zip(*pairs, strict=True) if pairs else ((),) * 5
    orders = [c.order + (-1,) * (longest - len(c.order)) for c in rankings]
    drops = [list(accumulate(c.gaps or (0.0,) * (len(c.order) - 1), initial=0.0)) for c in rankings]
    integers = {
        "index_R": index,
        "chosen_P": chosen,
        "rejected_P": rejected,
        "ranking_QK": orders,
        "tie_U2": [c.order for c in ties],
        "thumb_I": [t.response for t in thumbs],
    }
    numbers = {
        "weight_P": weight,
        "margin_P": margin,
        "label_P": label,
        "drop_QK": [d + [0.0] * (longest - len(d)) for d in drops],
        "weight_Q": [c.weight for c in rankings],
        "weight_U": [c.weight for c in ties],
        "weight_I": [t.weight for t in thumbs],
    }
    found = {name: torch.tensor(values, dtype=torch.int64) for name, values in integers.items()}
    found |= {name: torch.tensor(values, dtype=torch.float32) for name, values in numbers.items()}
    found["good_I"] = torch.tensor([t.good for t in thumbs], dtype=torch.bool)
    # without any the second dimension would be missing
    shapes = {"ranking_QK": (-1, longest), "drop_QK": (-1, longest), "tie_U2": (-1, 2)}
    return found | {name: found[name].view(shape) for name, shape in shapes.items()}


def _implied(ranking: Comparison) -> list[tuple[int, int, float, float, float]]:
    """(better, worse, weight, margin, label) of every pair that a ranking implies; the margin is 0 where nothing is known."""
    order, weight, gaps, label = ranking
    places = combinations(range(len(order)), 2)
    return [(order[i], order[j], weight, sum(gaps[i:j], 0.0), label) for i, j in places]
