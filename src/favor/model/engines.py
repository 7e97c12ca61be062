"""How trees are computed on a GPU: each way is checked on this model and its data, then timed; none is believed.

In: a policy whose trees equal plain transformers in float32, with layout.py's check and a clock. Out: the policy with the
attention of its products and of what is measured (float32), and a sentence. Only GPUs come here. Next: varlen.py, flex.py.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as kernels

from favor.data.batches import build, computed_tokens
from favor.data.types import Batch, TokenTree
from favor.errors import ConfigError
from favor.model import flex, varlen
from favor.model.load import Policy
from favor.ranks import current, largest

# model.layout -> torch's name for the kernels behind its flash operators (None: its own), and the module that brings them
FLASH: Mapping[str, tuple[str | None, str]] = {
    "fa3": ("FA3", "flash_attn_interface"),
    "fa4": ("FA4", "flash_attn.cute.interface"),
    "fa2": (None, "torch"),
}
# a way is worth a change when it takes so much less time than the one before it
_WORTH = 0.95
# tokens that are computed to time a way, and how often
_TIMED_TOKENS, _TIMES = 4096, 3


def inputs(name: str, batch: Batch, given: Mapping[str, Any], index: Tensor) -> tuple[dict[str, Any], Tensor]:
    """What the model is called with for one packed row, and where the tokens of an index stand in it."""
    device = batch.ids_BT.device
    if name == "flex":
        return {**given, "tree_nodes": partial(flex.attend, flex.plan(batch.nodes, device))}, index
    _switch(FLASH[name][0])
    made = varlen.plan(batch.nodes, device)
    rows = {key: given[key][:, made.order_T] for key in ("input_ids", "position_ids")}
    return {**given, **rows, "tree_nodes": partial(varlen.attend, made, varlen.FLASH)}, made.place_T[index]


def ways(dtype: torch.dtype) -> list[str]:
    """What could compute trees with such products here, preferred first; flash kernels know half precision alone."""
    found = [name for name, (_, module) in FLASH.items() if dtype == torch.bfloat16 and _installed(module)]
    return [*found, "flex"]


def chosen(
    policy: Policy,
    exact: Policy,
    asked: str,
    check: Callable[[Policy], str | None],
    clock: Callable[[Policy], float] | None,
) -> tuple[Policy, str]:
    """Settle how the trees of `exact` (float32, checked in parts) are computed with the products of `policy`.

    check: why a policy is not to be trusted, None when it is. clock: its seconds; without one the first way that passes is
    taken. Where padded rows are faster, and nothing else was asked for, the policy comes back with those. Raises ConfigError
    when the way asked for fails.
    """
    check = partial(_checked, check)
    measured = next((name for name in ways(torch.float32) if check(_by(exact, name, torch.float32)) is None), "parts")
    exact = replace(exact, attention=measured, exact_attention=measured)
    dtype = policy.compute_dtype
    names = ways(dtype) if asked in ("auto", "tree") else [asked]
    problems = {name: check(_by(exact, name, dtype)) for name in names}
    sound = [name for name in names if problems[name] is None]
    failed = "; ".join(f"{name}: {problem}" for name, problem in problems.items() if problem is not None)
    if not sound and names == [asked]:
        raise ConfigError(f"model.layout is {asked!r}, but {failed}; set model.layout=auto")
    candidates = {name: _by(exact, name, dtype) for name in sound or ["parts"]}
    rows = replace(exact, attention="parts", layout="rows")
    if clock and asked == "auto" and check(rows) is None:
        candidates["rows"] = _by(rows, "parts", dtype)
    seconds = {name: clock(candidate) for name, candidate in candidates.items()} if clock else {}
    best = fastest(seconds) if seconds else next(iter(candidates))
    why = f"attention by {_named(best)}" + (f", {_named(measured)} in float32" if measured != best else "")
    if best == "rows":
        why = "one row per response, checked against plain transformers"
    if len(seconds) > 1:
        why += ", measured ({})".format(", ".join(f"{_named(name)} {_ms(s)}" for name, s in seconds.items()))
    if failed:
        why += f"; FALL-BACK (slower) from {failed}"
    return candidates[best], why


def fastest(seconds: Mapping[str, float]) -> str:
    """The first way that no later one beats clearly; of ranks that differ the slowest counts, so that all choose alike."""
    best = next(iter(seconds))
    for name, taken in seconds.items():
        if taken < _WORTH * seconds[best]:
            best = name
    return best


def seconds_of(policy: Policy, trees: Sequence[TokenTree], work: Callable[[Batch], object]) -> float:
    """Seconds of `work` (forward and backward) on the first trees, as the slowest rank has them; infinite where memory ends."""
    taken: list[float] = []
    try:
        batch = build(_first(trees), policy.layout).to(policy.device)
        for _ in range(1 + _TIMES):
            _wait(policy.device)
            began = time.perf_counter()
            work(batch)
            _wait(policy.device)
            taken.append(time.perf_counter() - began)
        best = min(taken[1:])
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        best = math.inf
    nanoseconds = largest(int(min(best, 1e9) * 1e9), current())
    return nanoseconds / 1e9 if nanoseconds < 10**18 else math.inf


def _checked(check: Callable[[Policy], str | None], policy: Policy) -> str | None:
    """What is wrong with a policy on any rank, so that all choose alike."""
    problem = check(policy)
    failed = largest(int(problem is not None), current())
    return (problem or "another rank refused it") if failed else None


def _first(trees: Sequence[TokenTree]) -> list[TokenTree]:
    """The data's own trees, as many as are timed."""
    found: list[TokenTree] = []
    for tree in trees:
        found.append(tree)
        if sum(computed_tokens(each, "tree") for each in found) >= _TIMED_TOKENS:
            break
    return found


def _by(exact: Policy, name: str, dtype: torch.dtype) -> Policy:
    return replace(exact, compute_dtype=dtype, attention=name)


def _named(name: str) -> str:
    return {"parts": "plain operations, node by node", "rows": "one row per response"}.get(name, name)


def _ms(seconds: float) -> str:
    return "out of memory" if math.isinf(seconds) else f"{1e3 * seconds:.1f} ms"


def _installed(module: str) -> bool:
    package = module.split(".")[0]
    return find_spec(package) is not None and find_spec(module) is not None


def _switch(name: str | None) -> None:
    """Let torch's flash operators be computed by these kernels, in the whole process."""
    if kernels.current_flash_attention_impl() == name:
        return
    if name is None:
        kernels.restore_flash_attention_impl()
    else:
        kernels.activate_flash_attention_impl(name)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
