"""Whatever a policy is made of, it starts as its reference, to the bit: DPO's first loss is ln 2 exactly, or the mixture is refused by name."""

import math
from itertools import product

import pytest
import tiny
import torch
from pydantic import TypeAdapter, ValidationError
from test_kept import TREES

from favor.data.batches import build
from favor.losses.table import make_loss
from favor.model.layout import settle
from favor.model.load import TrainedModel, make_policy
from favor.model.logprobs import response_logps
from favor.train.preference import make_objective
from favor.train.reference import Reference, base_of, live

ADAPTERS = {"none": None, "lora": {"rank": 4}, "rslora": {"rank": 4, "rslora": True}, "dora": {"rank": 4, "dora": True}}
WEIGHTS, DTYPES, MODES = (
    ("float32", "bfloat16", "nf4"),
    ("float32", "bfloat16", "bfloat16x2"),
    ("stored", "live"),
)
# what cannot start as its reference, or has no number to train -> the setting that the refusal names
REFUSED = {
    **{("none", "bfloat16", dtype): "model.weights" for dtype in ("float32", "bfloat16x2")},
    **{("none", "nf4", dtype): "model.weights" for dtype in DTYPES},
    **{(adapter, "nf4", "bfloat16x2"): "model.dtype" for adapter in ("lora", "rslora")},
    **{("dora", weights, dtype): "model.lora.dora" for weights, dtype in product(WEIGHTS, DTYPES[1:])},
    ("dora", "nf4", "float32"): "model.lora.dora",
}


def first_loss(settings, mode):
    """The mean loss of the first batch, before any update."""
    config = TypeAdapter(TrainedModel).validate_python({"path": "tiny", **settings})
    policy = make_policy(tiny.model().bfloat16().float(), tiny.tokenizer(), config)
    policy, _ = settle(policy, "auto", TREES, train=True)
    batch = build(TREES, policy.layout)
    with torch.no_grad():
        stored_R = response_logps(policy, batch)
    reference = live(base_of(policy), "") if mode == "live" else Reference(lambda batch: stored_R[batch.index_R], "")
    objective = make_objective(make_loss("dpo", beta=0.3), policy, reference)
    return float(objective.loss(batch)[0].detach().sum()) / len(TREES)


@pytest.mark.parametrize("checkpointing", [False, True, 2])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_first_loss_is_ln_2_in_every_mixture(adapter, checkpointing):
    for weights, dtype, mode in product(WEIGHTS, DTYPES, MODES):
        settings = {
            "weights": weights,
            "dtype": dtype,
            "lora": ADAPTERS[adapter],
            "gradient_checkpointing": checkpointing,
        }
        named = REFUSED.get((adapter, weights, dtype))
        if named is not None:
            with pytest.raises(ValidationError, match=named):
                first_loss(settings, mode)
        else:
            assert first_loss(settings, mode) == pytest.approx(math.log(2), abs=1e-12), (weights, dtype, mode)


def test_a_reference_that_is_another_model_is_seen():
    """The planted fault: an adapter that says something before the first step."""
    config = TypeAdapter(TrainedModel).validate_python({"path": "tiny", "lora": {"rank": 4}})
    policy = make_policy(tiny.model(), tiny.tokenizer(), config)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.fill_(0.05)
    policy, _ = settle(policy, "auto", TREES, train=True)
    batch = build(TREES, policy.layout)
    objective = make_objective(make_loss("dpo", beta=0.3), policy, live(base_of(policy), ""))
    assert abs(float(objective.loss(batch)[0].detach().sum()) / len(TREES) - math.log(2)) > 1e-4
