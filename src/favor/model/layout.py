"""May this model be computed on trees? First its config is read, then the model itself is tried.

In: a Policy and a few token trees. Out: the Policy with its layout settled, and a sentence that says why.
Next: attention.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from favor.data.pack import build
from favor.data.types import Batch, TokenTree
from favor.errors import ConfigError, NumericsError
from favor.model import attention
from favor.model.load import Policy, plain_attention
from favor.model.logprobs import response_logps

Measure: TypeAlias = Callable[[Policy, Batch], Tensor]
# Layer types of transformers' configs in which a token sees its whole past through softmax attention.
_TREE_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Largest difference between the two paths that rounding explains, in nats per token.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Longest path the self-check computes: it must be quick beside one training step.
_CHECK_TOKENS = 192


def settle(
    policy: Policy, asked: str, trees: Sequence[TokenTree], measure: Measure = response_logps
) -> tuple[Policy, str]:
    """Choose trees where they are exact, else one row per response; returns the policy and the reason.

    `measure` is what both ways must agree on: log-probs, or a reward model's scores.

    Raises ConfigError when `layout = "tree"` was asked of a model that cannot, NumericsError when even
    the row path differs from plain transformers.
    """
    if asked == "rows":
        return replace(policy, layout="rows"), "one row per response, as asked"
    longest = max(len(tree.prompt_ids) + max(map(len, tree.response_ids)) for tree in trees)
    obstacle = config_obstacle(policy.causal_lm.config.get_text_config().to_dict(), longest)
    if obstacle is None:
        policy, obstacle = _try(policy, _sample(trees), measure)
    if obstacle is None:
        return policy, "prompt trees, checked against the plain path on this model"
    if asked == "tree":
        raise ConfigError(f"model.layout is 'tree', but {obstacle}; set model.layout=auto")
    policy.causal_lm.set_attn_implementation(policy.plain_attention)
    return replace(policy, layout="rows"), f"FALL-BACK to one row per response (slower): {obstacle}"


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
    return None


def _try(policy: Policy, trees: Sequence[TokenTree], measure: Measure) -> tuple[Policy, str | None]:
    """Compute a tiny forest both ways; the fast head is given up first, then trees."""
    attention.register()
    with plain_attention(policy), torch.no_grad():
        plain_R = _plain(policy, trees, measure)
    length_R = build(trees, "rows").length_R.to(policy.device)
    worst = 0.0
    for candidate in (policy, replace(policy, fast_head=None)):
        candidate = replace(candidate, layout="tree")
        try:
            candidate.causal_lm.set_attn_implementation(attention.NAME)
            with torch.no_grad():
                tree_R = measure(candidate, build(trees, "tree").to(policy.device))
        except (ConfigError, KeyError, ValueError, RuntimeError, TypeError) as error:
            return policy, f"{type(policy.causal_lm).__name__} does not run with tree attention ({error})"
        worst = float(((tree_R - plain_R).abs() / length_R).max())
        if worst <= _TOLERANCE[policy.compute_dtype]:
            return candidate, None
    return policy, f"the self-check found log-probs {worst:.2g} nats per token off the plain path"


def _plain(policy: Policy, trees: Sequence[TokenTree], measure: Measure) -> Tensor:
    """Padded rows with the model's own attention and head."""
    rows = build(trees, "rows").to(policy.device)
    full = measure(replace(policy, layout="rows", fast_head=None), rows)
    if not bool(torch.isfinite(full).all()):
        raise NumericsError(
            f"{policy.source}: its log-probs are not finite; the weights are damaged or overflow this dtype"
        )
    return full


def _sample(trees: Sequence[TokenTree]) -> list[TokenTree]:
    """The first few trees, cut short: what matters is how tokens see each other, not which they are."""
    keep = _CHECK_TOKENS // 2
    return [
        replace(
            tree,
            prompt_ids=tree.prompt_ids[-keep:],
            response_ids=tuple(response[:keep] for response in tree.response_ids[:3]),
            comparisons=(),
        )
        for tree in trees[:2]
    ]
