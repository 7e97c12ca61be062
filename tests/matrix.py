"""Every loss x layout x reference x full or LoRA x passes: one step each, held against slow_losses or refused with a reason.

Run as a program it prints the table: `make matrix`.
"""

import itertools
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import slow_losses
import tiny
import torch
from oracles import tree

from favor.data.types import Comparison, Thumb
from favor.errors import ConfigError
from favor.losses.table import LOSSES, needs
from favor.model import four_bits
from favor.model.batched import measured
from favor.model.layout import settle
from favor.model.load import ModelConfig, make_policy
from favor.model.logprobs import response_logps
from favor.ranks import World
from favor.train import preference, reference
from favor.train.optim import make_optimizer
from favor.train.preference import TrainConfig
from favor.train.reference import frozen
from favor.train.step import Learner, step
from favor.train.watch import References

# every loss as it comes, and the options that change what it sees
VARIANTS = {kind: {"kind": kind} for kind in LOSSES} | {
    "dpo, length-normalised": {"kind": "dpo", "length_normalized": True},
    "dpo, forward KL": {"kind": "dpo", "divergence": {"kind": "forward_kl"}},
    "dpo, Jensen-Shannon": {"kind": "dpo", "divergence": {"kind": "jensen_shannon"}},
    "dpo, alpha divergence": {"kind": "dpo", "divergence": {"kind": "alpha", "alpha": 0.3}},
    "dpo, LD": {"kind": "dpo", "ld_alpha": 0.3},
    "dpo, WPO": {"kind": "dpo", "wpo": "probability"},
    "dpo, WPO aligned": {"kind": "dpo", "wpo": "aligned"},
    "dpo, soft labels": {"kind": "dpo"},
    "odpo, linear": {"kind": "odpo", "offset": "linear", "offset_scale": 0.3},
    "plackett_luce, top 1": {"kind": "plackett_luce", "top_k": 1},
    "dpo + sft (RPO)": {"kind": "sum", "terms": [{"kind": "dpo"}, {"kind": "sft", "weight": 0.5}]},
    "ipo + bco + plackett_luce": {
        "kind": "sum",
        "terms": [
            {"kind": "ipo", "weight": 0.1},
            {"kind": "bco", "weight": 2.0, "beta": 0.2},
            {"kind": "plackett_luce", "weight": 0.3},
        ],
    },
}
# the same pairs by DPO, with another way of keeping or adapting the weights: what [model] then says
MODELS = {
    "dpo, weights in bfloat16": {"weights": "bfloat16"},
    "dpo, weights in 4 bits": {"weights": "nf4"},
    "dpo, rsLoRA": {"lora": {"rslora": True}},
    "dpo, DoRA": {"lora": {"dora": True}},
    "dpo, DoRA on weights in bfloat16": {"weights": "bfloat16", "lora": {"dora": True}},
    "dpo, products in bfloat16x2": {"dtype": "bfloat16x2"},
    "dpo, products and weights in bfloat16": {"dtype": "bfloat16", "weights": "bfloat16"},
    "dpo, layers recomputed": {"gradient_checkpointing": True},
    "dpo, every second layer recomputed": {"gradient_checkpointing": 2},
}
# and with another optimizer than SGD
OPTIMIZERS = {"dpo, AdamW in 8 bits": {"kind": "adamw8bit", "lr": 1e-2, "weight_decay": 0.1}}
# how far from plain float32 a cell may be: DiscoPOP's slope is 1/tau = 20 times DPO's, and so is what float32 log-probs leave
# in it; activations in bfloat16 are rounded to 8 bits
WITHIN = {"discopop": 5e-5, "dpo, products in bfloat16x2": 2e-2, "dpo, products and weights in bfloat16": 2e-2}
VARIANTS |= {name: {"kind": "dpo"} for name in (*MODELS, *OPTIMIZERS)}
BETA = 0.3


class Cell(NamedTuple):
    """One cell of the matrix."""

    variant: str
    layout: str
    reference: str
    weights: str
    passes: str


AXES = (("tree", "rows"), ("stored", "live"), ("full", "lora"), ("one", "two"))
CELLS = [Cell(v, *rest) for v in VARIANTS for rest in itertools.product(*AXES)]


def forest(soft=False):
    """Pairs with margins and weights, a scored ranking of three, ties and thumbs; nothing two responses share is equal."""
    first = replace(
        tree([9, 5, 6, 7, 8], [[40, 41, 42, 2], [40, 41, 50, 51, 52, 2], [60, 2]], first=0, row=1),
        comparisons=(Comparison((1, 0, 2), 1.0, (0.5, 1.5)), Comparison((2, 1), 2.0, (1.25,))),
        ties=(Comparison((0, 2), 2.0),),
    )
    second = replace(
        tree([9, 5, 6, 70], [[80, 81, 2], [82, 83, 84, 85, 2]], first=3, row=2),
        comparisons=(Comparison((0, 1), 1.0, (2.0,), 0.75 if soft else 1.0),),
        thumbs=(Thumb(0, True, 1.0), Thumb(1, False, 2.0)),
    )
    third = replace(
        tree([90, 91], [[92, 93, 94, 2], [95, 2]], first=5, row=3),
        comparisons=(Comparison((1, 0), 1.0, (0.75,)),),
        thumbs=(Thumb(0, True, 3.0),),
    )
    return [first, second, third]


def config_of(cell):
    """The cell as a recipe; raises pydantic's error where the recipe itself is refused."""
    loss = with_beta(VARIANTS[cell.variant]) | {"passes": cell.passes}
    free = all(term["kind"] in slow_losses.FREE for term in loss.get("terms", [loss]))
    values = {"run": "unused", "model": {"path": "unused"}, "data": {"train": "unused"}, "loss": loss}
    if not free:
        values["reference"] = {"mode": cell.reference}
    values["model"] |= model_settings(cell)
    values["optim"] = OPTIMIZERS.get(cell.variant, {})
    return TrainConfig.model_validate(values)


def model_settings(cell):
    """What the cell's recipe says in section [model]."""
    found = MODELS.get(cell.variant, {})
    if cell.weights == "lora":
        return found | {"lora": {"rank": 4} | found.get("lora", {})}
    return {key: value for key, value in found.items() if key != "lora"}


def with_beta(term):
    """A beta at which every term matters; a term that has one keeps its own."""
    if "terms" in term:
        return term | {"terms": [with_beta(t) for t in term["terms"]]}
    return ({"beta": BETA} if "beta" in LOSSES[term["kind"]].settings() else {}) | term


def policies(cell, trees):
    """A policy that has moved away from its reference, and that reference."""
    settings = ModelConfig.model_validate({"path": "tiny", "dtype": "float32", "device": "cpu"} | model_settings(cell))
    model = tiny.model("llama")
    if cell.variant in MODELS:
        # numbers that bfloat16 has too
        model.bfloat16().float()
    policy = make_policy(model, tiny.tokenizer(), settings)
    policy, _ = settle(policy, cell.layout, trees)
    ref = reference.base_of(policy)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy, ref


def references(cell, ref, trees):
    """The reference as training holds it."""
    alive = reference.live(ref, "live")
    if cell.weights == "full":
        alive = reference.Reference(
            lambda batch: no_grad(lambda: response_logps(ref, batch)),
            "live",
            lambda batch: no_grad(lambda: preference_tokens(ref, batch)),
        )
    if cell.reference == "live":
        return alive, alive.logps
    if cell.weights == "lora":
        with frozen(ref) as base:
            table = measured(base, trees, lambda batch: response_logps(base, batch), 10_000)
    else:
        table = measured(ref, trees, lambda batch: response_logps(ref, batch), 10_000)
    return reference.Reference(lambda batch: table[batch.index_R], "stored"), alive.logps


def preference_tokens(ref, batch):
    from favor.model.logprobs import scored_logps

    return scored_logps(ref, batch)


def no_grad(compute):
    with torch.no_grad():
        return compute()


def token_logps(model, trees, strangers=False):
    """Log-probs of every response's tokens, and the mean of log sum p^2, by plain transformers, one response at a time."""
    model.set_attn_implementation("eager")
    tokens, overlaps = [], []
    for number, item in enumerate(trees):
        responses = trees[number - 1].response_ids[:1] if strangers else item.response_ids
        for response in responses:
            ids = torch.tensor([item.prompt_ids + response])
            logp = (
                model(input_ids=ids, use_cache=False).logits[0, len(item.prompt_ids) - 1 : -1].float().log_softmax(-1)
            )
            tokens.append(logp.gather(1, torch.tensor(response)[:, None])[:, 0].double())
            overlaps.append((2 * logp).logsumexp(-1).mean().item())
    return tokens, overlaps


def judged(trees, tokens, overlaps, tokens_ref, zero):
    found = slow_losses.Judged(tokens, tokens_ref, zero=zero, overlap=overlaps)
    for item in trees:
        at = item.first_response
        for c in item.comparisons:
            gaps = c.gaps
            found.rankings.append(([at + i for i in c.order], [-sum(gaps[:k]) for k in range(len(c.order))], c.weight))
            for i in range(len(c.order)):
                for j in range(i + 1, len(c.order)):
                    margin = sum(gaps[i:j])
                    found.pairs.append((at + c.order[i], at + c.order[j], c.weight, margin, c.label))
        found.ties += [(at + c.order[0], at + c.order[1], c.weight) for c in item.ties]
        found.thumbs += [(at + t.response, t.good, t.weight) for t in item.thumbs]
    return found


@lru_cache(maxsize=2 * len(VARIANTS))
def oracle(variant, weights):
    """Loss and gradients by plain transformers and slow_losses: the same for every layout, reference and number of passes."""
    cell, trees = Cell(variant, "rows", "live", weights, "one"), forest(soft="soft" in variant)
    loss = with_beta(VARIANTS[variant])
    policy, ref = policies(cell, trees)
    model = deepcopy(policy.model)
    # plain float32 weights and layers, however the policy keeps them
    for name, module in model.named_modules():
        vars(module).pop("forward", None)
        if "absmax" in dict(module.named_buffers(recurse=False)):
            unpacked = four_bits.numbers(model, f"{name}.weight", module.weight)
            module.weight = torch.nn.Parameter(unpacked, requires_grad=False)
    model.float()

    def reference_tokens(strangers=False):
        with torch.no_grad():
            if cell.weights == "full":
                return token_logps(deepcopy(ref.model), trees, strangers)[0]
            with model.disable_adapter():
                return token_logps(model, trees, strangers)[0]

    tokens_ref = reference_tokens()
    with torch.no_grad():
        away = zip(token_logps(model, trees, strangers=True)[0], reference_tokens(strangers=True), strict=True)
        zero = max(0.0, float(sum((a - b).sum() for a, b in away)) / len(trees))
    tokens, overlaps = token_logps(model, trees)
    value = slow_losses.loss(loss, judged(trees, tokens, overlaps, tokens_ref, zero))
    model.zero_grad()
    value.backward()
    return value.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def outcome(cell, budget=16):
    """("equal", largest relative error of loss and gradients) or ("refused", why)."""
    trees = forest(soft="soft" in cell.variant)
    try:
        config = config_of(cell)
        policy, ref = policies(cell, trees)
    except (ConfigError, ValueError) as error:
        return "refused", str(error)
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_tokens_per_pack": budget})})
    found, alive = references(cell, ref, trees)
    compared = References({"train": found if needs(config.loss).reference else reference.none()}, alive, alive, None)
    expected, slow = oracle(cell.variant, cell.weights)
    parameters = policy.trainable()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    if cell.variant in OPTIMIZERS:
        optimizer = make_optimizer(config.optim, parameters)
    # of SGD the update itself is the gradient
    gradients: dict[str, torch.Tensor] = {}
    optimizer.register_step_pre_hook(
        lambda *unused: gradients.update({n: p.grad.double() for n, p in parameters.items() if p.grad is not None})
    )
    learner = Learner(parameters, optimizer, 1e30, policy.device, World())
    cut, objective = preference.plan_step(config, policy, compared, trees, World())
    assert len(cut) > 1
    done = step(learner, cut, objective)
    scale = max(g.abs().max().item() for g in slow.values())
    # the parameters hold before - gradient in float32: what rounding at their own size costs
    rounding = max(p.abs().max().item() for p in before.values()) * 6e-8
    error = 0.0
    for name, p in parameters.items():
        mine, other = before[name].double() - p.detach().double(), torch.zeros_like(p, dtype=torch.float64)
        if cell.variant in OPTIMIZERS:
            moved, mine = mine, gradients[name]
            assert (moved - first_adamw(config.optim, before[name].double(), mine)).abs().max() < 1e-6, name
        if name in slow:
            other = slow[name].double()
        error = max(error, ((mine - other).abs().max().item() - rounding) / scale)
    return "equal", max(error, abs(done.sums["loss"] - expected) / max(1.0, abs(expected)))


def first_adamw(optim, p, gradient):
    """What AdamW takes off at its first step, by the textbook: both means are the gradient's own."""
    decay = optim.weight_decay if p.dim() >= 2 else 0.0
    return optim.lr * (gradient / (gradient.abs() + optim.eps) + decay * p)


def main():
    """Print the matrix."""
    from rich.console import Console
    from rich.table import Table

    columns = list(itertools.product(*AXES))
    table = Table("loss", *("\n".join(column) for column in columns))
    worst, refusals = 0.0, set()
    for variant in VARIANTS:
        row = []
        for column in columns:
            kind, what = outcome(Cell(variant, *column))
            if kind == "equal":
                worst = max(worst, what if variant not in WITHIN else 0.0)
                row.append("ok" if what < WITHIN.get(variant, 1e-5) else f"{what:.0e}")
            else:
                refusals.add(what)
                row.append("refused")
        table.add_row(variant, *row)
    console = Console(width=220)
    console.print(table)
    console.print(f"{len(CELLS)} cells; largest relative error of a loss or gradient {worst:.1e}; refusals:")
    for reason in sorted(refusals):
        console.print(f"- {reason}", highlight=False)


if __name__ == "__main__":
    main()
