"""Full fine-tuning with model.weights = "bfloat16": what bfloat16 weights with float32 masters compute, to the bit, and no copy of a weight.

At DPO's rate of 5e-7 bfloat16 weights alone would not move; the masters move as float32 weights do.
"""

import shutil
from functools import partial

import pytest
import tiny
import torch
from oracles import tree
from safetensors.torch import load_file
from test_cli import CALLABLE, GOOD, recipe, recipe_words, write
from torch import nn
from transformers.pytorch_utils import Conv1D

from favor.data.batches import build
from favor.errors import ConfigError
from favor.losses.table import make_loss
from favor.model.layout import settle
from favor.model.load import ModelConfig, make_policy, precise
from favor.model.logprobs import response_logps
from favor.model.size import sizes
from favor.ranks import World
from favor.run import read_jsonl
from favor.train.optim import AdamW, make_optimizer
from favor.train.preference import make_objective
from favor.train.reference import base_of, live, sync
from favor.train.step import Learner, step

BOTH = ("model.weights=bfloat16", "model.dtype=bfloat16")
TREES = [
    tree((5, 6, 7), [(8, 9, 10, 11, 12, 2), (8, 30, 31, 32, 33, 2)], [(0, 1)]),
    tree((5, 6, 70, 71), [(8, 9, 2), (80, 31, 2)], [(0, 1)], first=2),
    tree((90, 91, 92), [(93, 94, 95, 96, 2), (60, 2)], [(1, 0)], first=4),
]


def policy_of(model, weights="bfloat16", dtype="bfloat16", asked="auto", **more):
    config = ModelConfig(path="tiny", weights=weights, dtype=dtype, device="cpu", **more)
    return settle(make_policy(model, tiny.tokenizer(), config), asked, TREES, train=True)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_number_is_that_of_bfloat16_products_on_float32_weights(family, checkpointing):
    """Log-probs and gradients, in float32 and in bfloat16 products, of both layouts."""
    for asked in ("auto", "rows"):
        found = []
        for weights in ("float32", "bfloat16"):
            policy = policy_of(tiny.model(family), weights, asked=asked, gradient_checkpointing=checkpointing)
            values = []
            for computed in (policy, precise(policy)):
                value_R = response_logps(computed, build(TREES, policy.layout))
                (value_R * torch.arange(1, 7)).sum().backward()
                values += [value_R.detach(), *(p.grad for p in policy.trainable().values())]
                policy.model.zero_grad()
            found.append(values)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def learner_of(policy, lr):
    parameters = policy.trainable()
    return Learner(parameters, make_optimizer(AdamW(lr=lr), parameters), 1.0, policy.device, World())


def taught(policy, steps=6, lr=5e-7):
    """Steps of DPO, three micro-batches each; the weights before and after, float32, and the losses."""
    base = base_of(policy)
    objective = make_objective(make_loss("dpo", beta=0.3), policy, live(base, ""))
    before = {name: p.detach().float().clone() for name, p in policy.trainable().items()}
    learner, batches = learner_of(policy, lr), [build([each], policy.layout) for each in TREES]
    losses = [step(learner, batches, objective).sums["loss"] for _ in range(steps)]
    return before, {name: p.detach().float() for name, p in policy.trainable().items()}, losses


def in_bfloat16(policy):
    """The same policy whose linear layers are tensors in bfloat16, as a trainer without masters has them."""
    for module in policy.model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not policy.causal_lm.get_output_embeddings():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().bfloat16()))
    return policy


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_it_is_bfloat16_weights_with_masters_in_the_optimizer(family):
    """Against the textbook: tensors in bfloat16, a float32 master beside each, gradients added up there, weights = masters rounded."""
    steps, lr = 6, 1e-3
    _, found, losses = taught(policy_of(tiny.model(family)), steps, lr)
    policy = in_bfloat16(policy_of(tiny.model(family), "float32"))
    objective = make_objective(make_loss("dpo", beta=0.3), policy, live(base_of(policy_of(tiny.model(family))), ""))
    masters = dict(policy_of(tiny.model(family), "float32").trainable())
    optimizer = make_optimizer(AdamW(lr=lr), masters)
    expected, rounded = [], 0
    for _ in range(steps):
        expected.append(0.0)
        for batch in (build([each], policy.layout) for each in TREES):
            loss, _ = objective.loss(batch)
            (loss.sum() / 3).backward()
            expected[-1] += float(loss.detach().sum()) / 3
            for name, p in policy.trainable().items():
                if p.grad is not None:
                    rounded += p.dtype == torch.bfloat16
                    mine = masters[name]
                    mine.grad = p.grad.float() if mine.grad is None else mine.grad + p.grad.float()
                    p.grad = None
        nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, p in policy.trainable().items():
                p.copy_(masters[name])
    assert rounded > 0
    assert losses == pytest.approx(expected, abs=1e-12)
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(found[name], masters[name]) for name in found)


def moved(before, after):
    """The share of matrices' numbers that are others now, and the update as one vector."""
    update = torch.cat([(after[n] - before[n]).flatten().double() for n in before if before[n].dim() > 1])
    return float((update != 0).double().mean()), update


def test_nothing_is_lost_at_a_small_rate():
    """lr 5e-7: as many masters move as float32 weights do, and the same way; bfloat16 weights alone stay where they are."""
    share, update = moved(*taught(policy_of(tiny.model("qwen2"), "float32", "float32"))[:2])
    mine, found = moved(*taught(policy_of(tiny.model("qwen2")))[:2])
    assert share > 0.5
    assert mine == pytest.approx(share, abs=1e-4)
    assert torch.cosine_similarity(update, found, 0) > 0.99
    assert float(found.norm() / update.norm()) == pytest.approx(1, rel=0.01)
    # the fault: no masters
    policy = in_bfloat16(policy_of(tiny.model("qwen2"), "float32"))
    before, after, _ = taught(policy)
    only = {n for n, p in policy.trainable().items() if p.dtype == torch.bfloat16}
    lost, _ = moved({n: before[n] for n in only}, {n: after[n] for n in only})
    assert lost < 0.01


def noted(saved, tensor):
    saved.append(tensor)
    return tensor


def copied(weights):
    """Bytes kept for the backward in the shape of a weight that are no weight."""
    policy = policy_of(tiny.model("qwen2"), weights)
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    shapes = {p.shape for p in policy.model.parameters() if p.dim() > 1}
    shapes |= {torch.Size(reversed(shape)) for shape in shapes}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(partial(noted, saved), lambda t: t):
        # of all three trees as many tokens as a weight has rows
        response_logps(policy, build(TREES[:2], policy.layout))
    wide = {t.untyped_storage().data_ptr(): t.nbytes for t in saved if t.shape in shapes}
    return sum(size for at, size in wide.items() if at not in own), policy


def test_no_copy_of_a_weight_outlives_its_product():
    size, policy = copied("bfloat16")
    assert size == 0
    # which autocast keeps
    assert copied("float32")[0] == policy.kept_bytes > 0
    assert all(p.dtype == torch.float32 for p in policy.trainable().values())


def test_a_frozen_reference_takes_half_and_says_the_same():
    """Of numbers that bfloat16 has; others, and a reference that moves, stay float32."""
    for exact in (True, False):
        models = [tiny.model("qwen2") for _ in range(2)]
        policy, other = [
            policy_of(m.bfloat16().float() if exact else m, w)
            for m, w in zip(models, ("bfloat16", "float32"), strict=True)
        ]
        plain = base_of(other)
        base, moving = base_of(policy), base_of(policy, moves=True)
        for policy_ in (lambda p: p, precise):
            with torch.no_grad():
                values = [
                    response_logps(policy_(each), build(TREES, policy.layout)) for each in (plain, base, moving, policy)
                ]
            assert all(torch.equal(value, values[0]) for value in values)
        narrow = {n for n, p in base.model.named_parameters() if p.dtype == torch.bfloat16}
        assert narrow == ({n for n, p in base.model.named_parameters() if p.dim() > 1} if exact else set())
        assert all(p.dtype == torch.float32 for p in (*moving.model.parameters(), *policy.model.parameters()))
        sync(live(moving, ""), {n: 2 * p for n, p in policy.trainable().items()}, 0.25)
        assert all(
            torch.allclose(p, 1.25 * q)
            for p, q in zip(moving.model.parameters(), policy.model.parameters(), strict=True)
        )


def test_the_estimate_counts_no_copies_and_half_a_frozen_reference():
    model = tiny.model("qwen2")
    numbers = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)

    def state(weights="bfloat16", **more):
        return sizes(model.config, ModelConfig(path="tiny", weights=weights, dtype="bfloat16"), 10, **more).state

    assert state() == 16 * numbers == state("float32") - 2 * matrices
    assert state(copies=1) == 20 * numbers - 2 * matrices
    assert state(copies=1, moving=True) == 20 * numbers


@pytest.mark.parametrize("command", ["train", "sft", "reward", "ppo"])
def test_what_reads_more_of_a_weight_is_refused(inputs, favor, tmp_path, command):
    (tmp_path / "length.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    words = [command, *recipe(inputs)[1:], *(CALLABLE if command == "ppo" else ())]
    for dtype in ("float32", "bfloat16x2"):
        code, _, err = favor(*words, "model.weights=bfloat16", f"model.dtype={dtype}")
        assert code == 2
        assert f"model.dtype = '{dtype}' reads more; set model.dtype=bfloat16, add [model.lora]" in err
    with pytest.raises(ConfigError, match="reads more"):
        make_policy(tiny.model(), tiny.tokenizer(), ModelConfig(path="tiny", weights="bfloat16"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masters")
    tiny.model().bfloat16().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    write(folder / "good.jsonl", GOOD)
    return folder


def steps_of(folder):
    kinds = ("loss", "grad_norm")
    return [[r[k] for k in kinds] for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "step"]


def ran(favor, inputs, command, run, *more):
    words = [command, *recipe(inputs)[1:], *(CALLABLE if command == "ppo" else ()), *more]
    code, out, err = favor(*(f"run={run}" if word == "run=run" else word for word in words))
    assert code == 0, err
    return out


def weights_in(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("command", ["train", "sft", "reward", "ppo"])
def test_a_run_is_that_of_float32_weights_and_saves_its_masters(inputs, favor, tmp_path, command):
    """Every loss and the saved weights, to the bit; and resumed it is the same run."""
    (tmp_path / "length.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    more = ("save.every=1", "save.keep=9", "train.epochs=2")
    assert "weights read in bfloat16" in ran(favor, inputs, command, "run", *BOTH, *more)
    ran(favor, inputs, command, "wide", "model.dtype=bfloat16", *more)
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "wide")
    found, other = (weights_in(tmp_path / run / "model") for run in ("run", "wide"))
    assert all(torch.equal(found[name], other[name]) for name in other)
    assert {t.dtype for t in found.values()} == {torch.float32}


def test_begins_at_ln_2_resumes_to_the_bit_and_is_what_was_measured(inputs, favor, tmp_path):
    more = (
        *BOTH,
        "save.every=1",
        "save.keep=9",
        "train.epochs=3",
        "optim.lr=1e-3",
        f"data.eval={inputs / 'good.jsonl'}",
    )
    for mode in ("stored", "live"):
        out = ran(favor, inputs, "train", mode, *more, f"reference.mode={mode}")
        assert "weights read in bfloat16" in out
        steps = steps_of(tmp_path / mode)
        assert steps[0][0] == pytest.approx(0.6931471805599453, abs=1e-6)
        assert steps[-1][0] < 0.69
    assert steps_of(tmp_path / "stored") == steps_of(tmp_path / "live")
    whole = weights_in(tmp_path / "live/model")
    for later in sorted((tmp_path / "live/checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    shutil.rmtree(tmp_path / "live/model")
    ran(favor, inputs, "train", "live", *more, "reference.mode=live", "resume=true")
    again = weights_in(tmp_path / "live/model")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    # the saved numbers are the masters: finer than bfloat16
    assert any(not torch.equal(t, t.bfloat16().float()) for t in whole.values())


def test_a_reference_that_follows_is_kept_in_float32(inputs, favor, tmp_path):
    more = (
        "train.epochs=3",
        "optim.lr=1e-3",
        "reference.mode=live",
        "reference.sync.every=2",
        "reference.sync.weight=0.3",
    )
    for run, words in (("run", BOTH), ("wide", BOTH[1:])):
        ran(favor, inputs, "train", run, *words, *more)
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "wide")


def test_a_model_of_finer_numbers_trains_and_later_commands_read_it(inputs, favor, tmp_path):
    """Its masters are those numbers: eval against it, and rounds that sample from what the last one trained."""
    tiny.save(tmp_path / "finer")
    words = ["train", *recipe(inputs)[1:], f"model.path={tmp_path / 'finer'}", *BOTH, "reference.mode=live"]
    code, _, err = favor(*words, f"data.eval={inputs / 'good.jsonl'}")
    assert code == 0, err
    assert steps_of(tmp_path / "run")[0][0] == pytest.approx(0.6931471805599453, abs=1e-6)
    code, _, err = favor("eval", "run=run")
    assert code == 0, err
    command, settings = recipe_words("loop", inputs, tmp_path)
    code, _, err = favor(command, *settings, f"model.path={tmp_path / 'finer'}", *BOTH)
    assert code == 0, err
