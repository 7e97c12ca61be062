"""One of the family as a model of its own: an adapter scaled by lambda, or weights ref + lambda (policy - ref).

Weights in between are not logits in between, so the gap is measured: KL(pi_lambda || baked) on every held-out token. In: both
models, the run's model folder. Out: a folder that transformers or PEFT loads, and its figures. Next: page.py.
"""

import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from favor.data.types import Batch
from favor.errors import ConfigError
from favor.eval.evaluate import Subject
from favor.eval.intervals import mean_interval
from favor.model.batched import measured
from favor.model.layout import settle
from favor.model.load import ModelConfig, load_policy
from favor.model.mixed import family_kl
from favor.run import atomic_folder

_ADAPTER = "adapter_model.safetensors"
# what an adapter adds to a weight is alpha / r times B A: of these one side is scaled
_SIDES = re.compile(r"\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?$")


class Baking(NamedTuple):
    """The model folder of the run, the folder to write, and lambda."""

    model: Path
    to: Path
    weight: float


def check_bakeable(model: Path, to: Path) -> None:
    """Raises ConfigError where the folder is there already, or an adapter is more than products of two matrices."""
    if to.exists():
        raise ConfigError(f"bake_to={to}: is there already; name another folder")
    if not to.resolve().parent.is_dir():
        raise ConfigError(f"bake_to={to}: {to.resolve().parent} is no folder; make it, or name another place")
    if not (model / _ADAPTER).exists():
        return
    with safe_open(model / _ADAPTER, "pt") as file:
        other = sorted(name for name in file.keys() if not _SIDES.search(name))  # noqa: SIM118 (a file, no mapping)
    if other:
        kind = "DoRA's lengths of columns" if "magnitude" in other[0] else "weights kept whole"
        raise ConfigError(
            f"bake: the adapter in {model} also has {kind} ({other[0]}), so scaled by lambda it is not base + lambda (policy - "
            "base); leave bake out, or train adapters without them (model.lora.dora=false)"
        )


def bake(subject: Subject, baking: Baking, described: ModelConfig, budget: int) -> dict[str, Any]:
    """Write the folder, whole or not at all; its gap to the exact family, nats a held-out token (mean with interval, largest)."""
    with atomic_folder(baking.to) as aside:
        adapter = (baking.model / _ADAPTER).exists()
        if adapter:
            _scale_adapter(baking, aside)
        else:
            _mix_weights(subject, baking.weight, aside)
        again = {
            "path": str(aside),
            "revision": None,
            "lora": None,
            "weights": "float32",
            "gradient_checkpointing": False,
        }
        loaded = load_policy(described.model_copy(update=again), frozen=True)
        baked, _ = settle(loaded, subject.policy.layout, subject.trees)

        def gap(batch: Batch) -> Tensor:
            kl_E = family_kl(subject.reference, subject.policy, batch, baking.weight, baked)
            return kl_E[batch.member_edge_M]

        gap_M = measured(subject.policy, subject.trees, gap, budget, tokens=True).numpy()
    place_M = np.repeat(np.arange(len(subject.trees)), [tree.num_scored for tree in subject.trees])
    mean = mean_interval(gap_M, clusters=place_M)
    kind = "adapter" if adapter else "weights"
    figures = {"lambda": baking.weight, "folder": str(baking.to), "kind": kind, "tokens": len(gap_M)}
    return figures | {**mean.named("kl_per_token"), "largest_kl": float(gap_M.max())}


def _scale_adapter(baking: Baking, aside: Path) -> None:
    """The run's folder with every B multiplied by lambda: alpha / r (lambda B) A, whatever alpha, rank and their patterns are."""
    shutil.copytree(baking.model, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_ADAPTER))
    scaled: dict[str, Tensor] = {}
    with safe_open(baking.model / _ADAPTER, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (a file, no mapping)
            side = _SIDES.search(name)
            assert side is not None
            scaled[name] = file.get_tensor(name) * (baking.weight if side["side"] == "B" else 1.0)
    save_file(scaled, aside / _ADAPTER, {"format": "pt"})


def _mix_weights(subject: Subject, strength: float, aside: Path) -> None:
    """Every weight ref + lambda (policy - ref), float32; exactly one of the two at 0 and 1."""
    model = deepcopy(subject.policy.causal_lm)
    start = dict(subject.reference.causal_lm.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.lerp(start[name], weight, strength))
    model.save_pretrained(aside)
    subject.policy.tokenizer.save_pretrained(aside)
