"""How many tokens are computed at once: what the recipe says, or what larger packs would save and memory holds.

In: section [train], token trees, the policy. Out: the section with a number, which the run keeps. Next: loop.py.
"""

from collections.abc import Sequence
from itertools import islice

import torch

from favor.data.batches import LoaderState, Order, computed_tokens, planned_tokens
from favor.data.types import Layout, TokenTree
from favor.model.load import ModelConfig, Policy
from favor.model.room import memory
from favor.model.size import sizes
from favor.parts import num_here
from favor.ranks import from_main, largest
from favor.run import read_json, write_json
from favor.train.loop import LoopConfig
from favor.train.session import Session

# where auto begins: enough for a CPU's products; a GPU wants more
LEAST, LEAST_ON_A_GPU = 1024, 16_384
# larger packs must save this share of the tokens; beyond so many tokens nothing is tried
_WORTH, _MOST = 0.03, 65_536
# optimizer batches that are looked at
_LOOKED_AT = 4
# share of the free memory that the activations of a pack may take
_SHARE = 0.5


def settled(
    config: LoopConfig,
    model: ModelConfig,
    policy: Policy,
    batches: Sequence[Sequence[TokenTree]],
    session: Session,
    *,
    resume: bool,
) -> LoopConfig:
    """The section with max_tokens_per_pack as a number: the recipe's own, that of the run that is continued, or chosen now.

    batches: trees of the batches that `looked_at` names.

    A run that is continued computes in the packs that it began with, so it stays equal to the bit.
    """
    if config.max_tokens_per_pack != "auto":
        return config
    kept, world = session.folder.packs, session.world
    tokens = int(read_json(kept)["max_tokens_per_pack"]) if resume and world.is_main and kept.exists() else 0
    tokens = from_main(tokens, world)
    if not tokens:
        tokens = chosen(policy.layout, batches, world.size, gpu=model.on_gpu)
        # the memory is looked at where it could decide
        most = _room(model, policy, world.size) if tokens > LEAST else tokens
        while tokens > max(most, LEAST):
            tokens //= 2
        # all ranks take the smallest
        tokens = -largest(-tokens, world)
        if world.is_main:
            write_json(kept, {"max_tokens_per_pack": tokens})
    if tokens != LEAST:
        session.say(f"packs of up to {tokens:,} tokens (train.max_tokens_per_pack sets another number)")
    return config.model_copy(update={"max_tokens_per_pack": tokens})


def looked_at(config: LoopConfig, used: Sequence[int]) -> list[list[int]]:
    """The trees of a few optimizer batches, which stand for all; used: the indices of what trains."""
    order = Order(len(used), config.batch_prompts, 0, config.shuffle)
    return [[used[i] for i in indices] for indices, _ in islice(order.batches(LoaderState()), _LOOKED_AT)]


def chosen(layout: Layout, batches: Sequence[Sequence[TokenTree]], world: int = 1, *, gpu: bool = False) -> int:
    """The smallest power of two from where "auto" begins whose packs compute hardly more tokens than the best larger ones."""
    whole = max(sum(computed_tokens(tree, layout) for tree in batch) for batch in batches)
    budgets = [LEAST_ON_A_GPU if gpu else LEAST]
    while budgets[-1] < min(whole, _MOST):
        budgets.append(2 * budgets[-1])
    costs = [sum(planned_tokens(batch, layout, budget, world) for batch in batches) for budget in budgets]
    return next(budget for budget, cost in zip(budgets, costs, strict=True) if cost * (1 - _WORTH) <= min(costs))


def _room(model: ModelConfig, policy: Policy, world: int) -> int:
    """Tokens whose activations, the same with adapters, fit into a share of the memory free beside gradients and optimizer."""
    free = torch.cuda.mem_get_info(policy.device)[0] if policy.device.type == "cuda" else memory().free // world
    to_come = 12 * sum(num_here(parameter) for parameter in policy.trainable().values())
    one = sizes(policy.causal_lm.config, model.model_copy(update={"lora": None}), 1)
    return int(_SHARE * (free - to_come)) // (one.activations + one.logits)
