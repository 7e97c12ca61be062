"""How may this model be computed? Every way is held against plain transformers, on this very model and data.

In: a Policy and token trees. Out: the Policy with layout and head settled, and a sentence that says why. Nothing is
believed: what differs is refused, or loses its fast part and says so. Next: attention.py.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from favor.data.batches import build
from favor.data.types import Batch, Layout, TokenTree, as_read, longest_path, unseen
from favor.errors import CheckpointError, ConfigError, NumericsError, first_line
from favor.model import attention, split
from favor.model.load import Policy, check_ids, precise, use_attention
from favor.model.logprobs import plain_logits, plain_logp, response_logps, within
from favor.model.rotary import length_dependent
from favor.model.weights import fault_of

# Layer types of transformers' configs in which a token sees its whole past through softmax attention.
_TREE_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Largest difference that float32 rounding explains: of a log-prob, nats a token, relative beyond 1; of a gradient, of its norm.
_TOLERANCE, _GRADIENT = 1e-4, 1e-3
# Longest path whose gradients are checked, and tokens scored of the longest path of the data: quick beside a training step.
_CHECK_TOKENS, _SCORED = 192, 64
# What transformers and torch raise when a model cannot be computed in some way.
_FAILURES = (
    *(ConfigError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(AssertionError, NotImplementedError, ImportError),
)
# the tree with the longest path, the smallest with pictures
Looked = tuple[TokenTree, TokenTree | None]


class Method(NamedTuple):
    """What is measured of every response, and what plain transformers says of one row of ids scored from `start` on."""

    measure: Callable[[Policy, Batch], Tensor]
    plain: Callable[..., Tensor]
    causal: bool


LOGPS = Method(response_logps, plain_logp, causal=True)


class Probe(NamedTuple):
    """Trees, what is measured of their responses (float64 [R]), and its gradient by parameter (empty: not asked for)."""

    trees: Sequence[TokenTree]
    value_R: Tensor
    gradient: dict[str, Tensor]


class Limits(NamedTuple):
    """How far a way may be off: of a log-prob a token, of a gradient."""

    value: float
    gradient: float


_EXACT = Limits(_TOLERANCE, _GRADIENT)
# A GPU's attention may be off so many times what padded rows in bfloat16 are, and this beside.
_TIMES, _FLOOR = 3, Limits(2e-3, 2e-2)


def settle(
    policy: Policy,
    asked: str,
    trees: Sequence[TokenTree],
    method: Method = LOGPS,
    *,
    also: Iterable[TokenTree] = (),
    train: bool = False,
) -> tuple[Policy, str]:
    """Choose trees where they are exact, else one row per response; returns the policy and the reason.

    trees and `also` are all that will be computed, for the longest path counts. With `train` gradients must agree too, and
    a GPU's ways of computing are timed. Raises ConfigError when trees were asked of a model that cannot; CheckpointError
    when the model does not run, or a later token changes an earlier log-prob; NumericsError when no way of computing it
    equals plain transformers.
    """
    looked, exact = _looked_at(policy, itertools.chain(trees, also)), precise(policy)
    config, longest = policy.causal_lm.config.get_text_config().to_dict(), longest_path(looked[0])
    if isinstance(most := config.get("index_topk"), int) and longest > most:
        # a token reads only the keys it ranks highest, and rounding, so the batch, decides ties
        raise CheckpointError(
            f"{policy.source}: a token reads the {most} keys it ranks highest (index_topk) and the longest row has "
            f"{longest}: which ones depends on rounding, so nothing would be exact; set tokens.max_tokens={most}"
        )
    truths = _truths(exact, [_cut(tree) for tree in trees[:2]], looked, method, train=train)
    obstacle = config_obstacle(config, longest)
    if asked != "rows" and obstacle is None:
        found, obstacle = _try(exact, "tree", truths, method)
        if found is not None:
            why = "prompt trees, checked against the plain path on this model"
            if policy.device.type != "cpu":
                found, how = _on_gpu(policy, found, asked, truths, method, trees if train else ())
                why = f"{why}; {how}" if found.layout == "tree" else how
            return _finished(policy, found, why, truths[0], method)
    if asked not in ("auto", "rows"):
        raise ConfigError(f"model.layout is {asked!r}, but {obstacle}; set model.layout=auto")
    found, difference = _try(exact, "rows", truths, method)
    if found is None:
        raise NumericsError(
            f"{policy.source}: rows of several lengths in one batch do not give what plain transformers gives for each "
            f"({difference}); favor cannot compute this model exactly, choose another"
        )
    why = "one row per response, as asked, checked against plain transformers"
    if asked != "rows":
        why = f"FALL-BACK to one row per response (slower): {obstacle}"
    return _finished(policy, found, why, truths[0], method)


def config_obstacle(config: dict[str, Any], longest_path: int) -> str | None:
    """Why a model config rules trees out, or None: recurrent or convolutional layers, short windows, soft-capping."""
    layers: list[str] = config.get("layer_types") or []
    others = sorted(set(layers) - _TREE_LAYERS)
    if others:
        return f"the model has layers of type {', '.join(others)}, which read a row as one sequence"
    for key in ("sliding_window", "attention_chunk_size"):
        window = config.get(key)
        windowed = (
            any(layer != "full_attention" for layer in layers) if layers else config.get("use_sliding_window", True)
        )
        if window is not None and windowed and window < longest_path:
            return f"its {key} of {window} tokens is shorter than the longest row ({longest_path})"
    if config.get("attn_logit_softcapping") is not None:
        return "it soft-caps attention logits"
    rope = length_dependent(config)
    if rope is not None and longest_path > rope[1]:
        return f"beyond {rope[1]} tokens its positions ('{rope[0]}') depend on the length of a row; the longest has {longest_path}"
    return None


def _looked_at(policy: Policy, trees: Iterable[TokenTree]) -> Looked:
    """What of all trees is looked at. Raises CheckpointError for token ids that the model has no embedding for."""
    row, pictured, largest = None, None, 0
    for tree in trees:
        largest = max(itertools.chain((largest,), tree.prompt_ids, *map(as_read, tree.response_ids)))
        if row is None or longest_path(tree) > longest_path(row):
            row = tree
        if tree.pictures and (pictured is None or tree.num_tokens < pictured.num_tokens):
            pictured = tree
    assert row is not None, "there is something to compute"
    check_ids(policy, largest)
    return row, pictured


def _truths(policy: Policy, short: Sequence[TokenTree], looked: Looked, method: Method, *, train: bool) -> list[Probe]:
    """What plain transformers says of a few trees cut short, of one with pictures, and of the data's longest path."""
    (longest, pictured), samples = looked, [short]
    if longest_path(longest) > max(map(longest_path, short)):
        samples.append([*_long(longest), *short])
    if pictured is not None:
        # whole, as its pictures are, and with gradients, which flow into them
        responses = tuple(map(as_read, pictured.response_ids[:2]))
        samples.insert(1, [replace(pictured, response_ids=responses, comparisons=(), ties=(), thumbs=())])
    try:
        use_attention(policy, policy.plain_attention)
        if method.causal:
            _check_causal(policy, short[0])
        return [
            _plain(policy, sample, method, train=train and i <= (pictured is not None))
            for i, sample in enumerate(samples)
        ]
    except _FAILURES as error:
        raise CheckpointError(
            f"{policy.source}: {type(policy.causal_lm).__name__} does not run as a plain causal language model "
            f"({fault_of(error)}); choose another model"
        ) from None


def _plain(policy: Policy, trees: Sequence[TokenTree], method: Method, *, train: bool) -> Probe:
    """One unpadded row at a time, with the model's own attention and head."""
    paths = [(tree, response) for tree in trees for response in tree.response_ids]
    values: list[Tensor] = []
    total: dict[str, Tensor] = {}
    for share, (tree, response) in zip(_shares(len(paths)), paths, strict=True):
        ids = torch.tensor([tree.prompt_ids + response], device=policy.device)
        plain = partial(method.plain, pictures=tree.pictures) if tree.pictures else method.plain
        with torch.set_grad_enabled(train):
            value = plain(policy, ids, len(tree.prompt_ids))
            found = _gradient(policy, share * value) if train else {}
        values.append(value.detach().double())
        for name, gradient in found.items():
            total[name] = total[name] + gradient if name in total else gradient
    value_R = torch.stack(values)
    _check_finite(policy, value_R)
    return Probe(trees, value_R, total)


def _try(policy: Policy, layout: Layout, truths: Sequence[Probe], method: Method) -> tuple[Policy | None, str | None]:
    """The policy in this layout, with the fast head or without; or None, and how far off it is."""
    problem = None
    attention.register()
    for head in dict.fromkeys((policy.fast_head, None)):
        candidate = replace(policy, layout=layout, fast_head=head)
        name = attention.NAME if layout == "tree" else policy.plain_attention
        try:
            use_attention(candidate, name)
            problem = next(filter(None, (_difference(candidate, truth, method) for truth in truths)), None)
        except _FAILURES as error:
            way = "tree attention" if layout == "tree" else "padded rows"
            problem = f"{type(policy.causal_lm).__name__} does not run with {way} ({fault_of(error)})"
        if problem is None:
            return candidate, None
    return None, problem


def _difference(policy: Policy, truth: Probe, method: Method, limits: Limits = _EXACT) -> str | None:
    """How far the policy is from plain transformers, when rounding does not explain it."""
    value, name, gradient = _off(policy, truth, method)
    if value > limits.value:
        what = "log-probs {:.2g} nats per token" if method.causal else "scores {:.2g}"
        return f"the self-check found {what.format(value)} off the plain path"
    if gradient > limits.gradient:
        return f"the self-check found gradients of {name} {gradient:.2g} of their norm off the plain path"
    return None


def _off(policy: Policy, truth: Probe, method: Method) -> tuple[float, str, float]:
    """How far the policy is from plain transformers: a token, and the parameter whose gradient is furthest, relative to it."""
    batch = build(truth.trees, policy.layout).to(policy.device)
    with torch.set_grad_enabled(bool(truth.gradient)):
        value_R = method.measure(policy, batch)
        share_R = torch.tensor(_shares(len(value_R)), dtype=value_R.dtype, device=value_R.device)
        found = _gradient(policy, (share_R * value_R).sum()) if truth.gradient else {}
    size_R = batch.length_R if method.causal else torch.ones_like(batch.length_R)
    off_R = (value_R.detach().double() - truth.value_R).abs() / (size_R + truth.value_R.abs())
    worst = float(off_R.nan_to_num(float("inf")).max())
    name, gradient = _worst_gradient(found, truth.gradient) if truth.gradient else ("", 0.0)
    return worst, name, math.inf if math.isnan(gradient) else gradient


def _on_gpu(
    policy: Policy, exact: Policy, asked: str, truths: Sequence[Probe], method: Method, timed: Sequence[TokenTree]
) -> tuple[Policy, str]:
    """Which attention computes the trees there: checked against plain transformers, in bfloat16 as near as its own rows are."""
    from favor.model import engines

    limits = {torch.float32: _EXACT}
    if policy.compute_dtype != torch.float32:
        limits[policy.compute_dtype] = _rounding(replace(exact, compute_dtype=policy.compute_dtype), truths, method)

    def attend(candidate: Policy) -> None:
        use_attention(candidate, attention.NAME if candidate.layout == "tree" else policy.plain_attention)

    def check(candidate: Policy) -> str | None:
        allowed = limits[candidate.compute_dtype]
        try:
            attend(candidate)
            return next(filter(None, (_difference(candidate, truth, method, allowed) for truth in truths)), None)
        except torch.OutOfMemoryError as error:
            # other ways may take less
            return first_line(error)
        except _FAILURES as error:
            return fault_of(error)

    def clock(candidate: Policy) -> float:
        attend(candidate)
        return engines.seconds_of(
            candidate, timed, lambda batch: _gradient(candidate, method.measure(candidate, batch).sum())
        )

    found, why = engines.chosen(policy, exact, asked, check, clock if timed else None)
    attend(found)
    return found, why


def _rounding(policy: Policy, truths: Sequence[Probe], method: Method) -> Limits:
    """A few times what these products cost padded rows under the model's own attention."""
    use_attention(policy, policy.plain_attention)
    rows = replace(policy, layout="rows", attention="parts")
    values, _, gradients = zip(*(_off(rows, truth, method) for truth in truths), strict=True)
    return Limits(_TIMES * max(values) + _FLOOR.value, _TIMES * max(gradients) + _FLOOR.gradient)


def _worst_gradient(found: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[str, float]:
    """The parameter whose gradient is furthest off, relative to its norm (or a hundredth of the largest norm)."""
    norms = {name: _norm(gradient) for name, gradient in truth.items()}
    floor = 1e-2 * max(norms.values())
    off = {
        name: (_norm(found[name] - gradient) if name in found else norms[name]) / max(norms[name], floor, 1e-30)
        for name, gradient in truth.items()
    }
    off |= {name: _norm(extra) / max(floor, 1e-30) for name, extra in found.items() if name not in truth}
    # one that is missing is no matter of rounding, however small it is
    off |= {name: 1.0 for name, norm in norms.items() if name not in found and norm > 1e-4 * floor}
    return max(off.items(), key=lambda item: float("inf") if math.isnan(item[1]) else item[1])


def _norm(gradient: Tensor) -> float:
    norm = gradient.norm()
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _gradient(policy: Policy, value: Tensor) -> dict[str, Tensor]:
    parameters = policy.trainable()
    if policy.root is not None:
        return split.gradient(parameters, value)
    # what the value does not depend on has none
    gradients = cast(
        "tuple[Tensor | None, ...]", torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    )
    return {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}


def _finished(policy: Policy, found: Policy, why: str, truth: Probe, method: Method) -> tuple[Policy, str]:
    """The candidate in the policy's own precision, and everything it had to give up."""
    if found.fast_head is None and policy.fast_head is not None:
        why += "; the model changes its logits after the linear head, so its own head is used (slower)"
    found = replace(found, compute_dtype=policy.compute_dtype)
    with torch.no_grad():
        # in float32 too: some models keep their last states, and one that keeps a graph could not be copied as a reference
        value_R = method.measure(found, build(truth.trees, found.layout).to(found.device)).double()
    if found.compute_dtype == torch.float32:
        return found, why
    if not bool(torch.isfinite(value_R).all()):
        raise NumericsError(f"{policy.source}: its outputs overflow in {found.products}; set model.dtype=float32")
    off_R = (value_R - truth.value_R).abs()
    return found, (
        f"{why}; {found.products} costs {float(off_R.mean()):.2g} nats a response on average and {float(off_R.max()):.2g} at most, "
        "on the rows checked"
    )


def _check_causal(policy: Policy, tree: TokenTree) -> None:
    """Raises CheckpointError when other tokens behind a place change what the model says up to it."""
    row = [*tree.prompt_ids, *tree.response_ids[0]]
    cut = len(row) // 2
    other = next((token for token in row if token != row[cut]), None)
    if cut == 0 or other is None:
        return
    ids = torch.tensor([row, row[:cut] + [other] * (len(row) - cut)], device=policy.device)
    moved, allowed = _moved(policy, ids, cut)
    if moved <= allowed:
        return
    # seen once on a busy machine: what does not repeat itself says nothing about the model
    again, _ = _moved(policy, ids, cut)
    if again <= allowed:
        raise NumericsError(
            f"{policy.source}: the same rows computed twice gave log-probs {moved:.2g} nats apart, so this machine does not "
            "compute reliably at the moment; run the command again, and favor doctor if it stays so"
        )
    raise CheckpointError(
        f"{policy.source}: {type(policy.causal_lm).__name__} reads later tokens too (one changed an earlier log-prob by "
        f"{moved:.2g} nats), so it is not a causal language model; choose one that is"
    )


def _moved(policy: Policy, ids_2T: Tensor, cut: int) -> tuple[float, float]:
    """How far two rows are apart in the log-probs of their first `cut` places, and how far rounding may bring them."""
    with torch.no_grad():
        first, second = (
            within(policy, lambda row_T=row_T: plain_logits(policy, row_T[None], len(row_T)))[:cut].log_softmax(-1)
            for row_T in ids_2T.unbind()
        )
    _check_finite(policy, first)
    # what is not a number is never within
    moved = float((first - second).abs().nan_to_num(math.inf).max())
    return moved, 0.1 * _TOLERANCE * (1 + float(first.abs().max()))


def _check_finite(policy: Policy, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NumericsError(f"{policy.source}: its outputs are not finite; its weights are damaged, fetch them again")


def _cut(tree: TokenTree) -> TokenTree:
    """A tree cut short: what matters is how tokens see each other, not which they are, nor who said them."""
    keep, tree = _CHECK_TOKENS // 2, unseen(tree)
    responses = tuple(as_read(response[:keep]) for response in tree.response_ids[:3])
    return replace(tree, prompt_ids=tree.prompt_ids[-keep:], response_ids=responses, comparisons=(), ties=(), thumbs=())


def _long(tree: TokenTree) -> list[TokenTree]:
    """The longest path of a tree, its end scored, and another that leaves it early."""
    tree = unseen(tree)
    longest = as_read(max(tree.response_ids, key=len))
    scored = min(_SCORED, len(longest))
    before = tree.prompt_ids + longest[: len(longest) - scored]
    bare = replace(tree, comparisons=(), ties=(), thumbs=())
    other = as_read(min(tree.response_ids, key=len)[:_SCORED])
    return [
        replace(bare, prompt_ids=before, response_ids=(longest[len(longest) - scored :],)),
        replace(bare, response_ids=(other,)),
    ]


def _shares(count: int) -> list[float]:
    """Weights of the responses in the sum whose gradient is compared: different, so that none stands in for another."""
    return [1 + i / count for i in range(count)]
