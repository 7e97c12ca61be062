"""Bytes for each number of a model while it trains, by what [model] and [optim] say: counted on the tensors, activations left out.

`python benchmarks/memory.py [MODEL]` prints the table of docs/choose.md. One step of AdamW on one pair; MODEL (the demo's, by
default) is first rounded to bfloat16 in memory, as most models are on their hub.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from favor.data.batches import build
from favor.data.types import Comparison, TokenTree
from favor.losses.table import make_loss
from favor.model.layout import settle
from favor.model.load import ModelConfig, Policy, load_tokenizer, make_policy
from favor.ranks import World
from favor.train.moments import kept
from favor.train.optim import AdamW, AdamW8bit, make_optimizer
from favor.train.preference import make_objective
from favor.train.reference import none
from favor.train.step import Learner, step

DEMO = Path.home() / ".cache/favor/smollm2-135m-instruct"
LORA: dict[str, object] = {"lora": {"rank": 16}}
# what [model] says; "optim" is the kind of [optim]
ROWS: dict[str, dict[str, object]] = {
    "all weights": {},
    'all weights, `optim.kind = "adamw8bit"`': {"optim": "adamw8bit"},
    'all weights, `model.dtype = "bfloat16"`': {"dtype": "bfloat16"},
    'all weights, `model.weights` and `model.dtype = "bfloat16"`': {"weights": "bfloat16", "dtype": "bfloat16"},
    'all weights, these two and `optim.kind = "adamw8bit"`': {
        "weights": "bfloat16",
        "dtype": "bfloat16",
        "optim": "adamw8bit",
    },
    "LoRA": LORA,
    'LoRA, `model.dtype = "bfloat16"`': LORA | {"dtype": "bfloat16"},
    'LoRA, `model.weights = "bfloat16"`': LORA | {"weights": "bfloat16"},
    'LoRA, `model.weights = "nf4"`': LORA | {"weights": "nf4"},
    'LoRA, `model.weights` and `model.dtype = "bfloat16"`': LORA | {"weights": "bfloat16", "dtype": "bfloat16"},
}
PAIR = TokenTree((5, 6, 7, 8), ((9, 10, 11, 2), (12, 13, 2)), (True, True), (Comparison((0, 1)),), 0, 1)


def counted(path: str, said: dict[str, object]) -> dict[str, float]:
    """Bytes a number: weights; copies of them that the forward leaves for the backward; gradients; optimizer."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).float()
    numbers = sum(p.numel() for p in model.parameters())
    optim = AdamW8bit() if said.get("optim") == "adamw8bit" else AdamW()
    config = ModelConfig.model_validate(
        {"path": path, "device": "cpu", **{k: v for k, v in said.items() if k != "optim"}}
    )
    policy = make_policy(model, load_tokenizer(config), config)
    policy, _ = settle(policy, "auto", [PAIR])
    found = {"weights": _bytes([*policy.model.parameters(), *policy.model.buffers()]), "copies": _copies(policy)}
    parameters = policy.trainable()
    optimizer = make_optimizer(optim, parameters)
    learner = Learner(parameters, optimizer, 1.0, policy.device, World())
    gradients: list[int] = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append(_bytes(p.grad for p in parameters.values() if p.grad is not None))
    )
    step(learner, [build([PAIR], policy.layout)], make_objective(make_loss(kind="simpo"), policy, none()))
    found |= {"gradients": gradients[0]}
    found |= {"optimizer": _bytes(t for p in parameters.values() for t in kept(optimizer.state[p]).values())}
    return {name: size / numbers for name, size in found.items()}


def _copies(policy: Policy) -> int:
    """Bytes of what is kept for the backward in the shape of a weight, and is none of the weights."""
    own = {t.untyped_storage().data_ptr() for t in policy.model.parameters()}
    shapes = {t.shape for t in policy.model.parameters() if t.dim() > 1 and min(t.shape) > 64}
    shapes |= {torch.Size(reversed(shape)) for shape in shapes}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape in shapes and tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    objective = make_objective(make_loss(kind="simpo"), policy, none())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective.loss(build([PAIR], policy.layout))
    return _bytes(found.values())


def _bytes(tensors: Iterator[Tensor] | object) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())  # pyright: ignore


if __name__ == "__main__":
    print("| | weights | copies for the backward | gradients | optimizer | together |\n|---|---|---|---|---|---|")
    for name, said in ROWS.items():
        row = list(counted(sys.argv[1] if len(sys.argv) > 1 else str(DEMO), said).values())
        print(f"| {name} | {' | '.join(f'{x:.2f}' for x in row)} | {sum(row):.2f} |", flush=True)
