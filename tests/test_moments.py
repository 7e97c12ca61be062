"""AdamW in 8 bits: it goes where AdamW goes in a quarter of its memory, and its checkpoints resume to the bit."""

import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_cli import GOOD, recipe, write
from torch import nn

from favor.config import load
from favor.errors import CheckpointError
from favor.train import moments, optim
from favor.train.checkpoint import Stored, _moments
from favor.train.dryrun import describe
from favor.train.optim import AdamW, AdamW8bit, Rmsprop, make_optimizer
from favor.train.preference import TrainConfig
from favor.train.session import TrainingState


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moments")
    tiny.save(folder / "model")
    write(folder / "good.jsonl", GOOD)
    return folder


def regression(config, steps=150):
    """Least squares over a 64 x 96 matrix (8 bits) and a vector (float32): the losses, what each is moved by, the optimizer."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(64, 96, generator=generator)
    matrix, vector = nn.Parameter(torch.zeros(64, 96)), nn.Parameter(torch.zeros(64))
    optimizer = make_optimizer(config, {"matrix": matrix, "vector": vector})
    losses = []
    for _ in range(steps):
        x = torch.randn(256, 96, generator=generator)
        loss = (x @ (matrix - truth).T + vector - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, matrix.detach(), vector.detach(), optimizer


def test_it_goes_where_adamw_goes():
    settings = {"lr": 0.03, "weight_decay": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
    plain, matrix, vector, _ = regression(AdamW(**settings))
    lean, other, other_vector, _ = regression(AdamW8bit(**settings))
    assert plain[-1] < 0.02 * plain[0]
    # at a constant rate both wander about the minimum
    assert lean[-1] < 0.002 * plain[0]
    assert nn.functional.cosine_similarity(matrix.flatten(), other.flatten(), dim=0) > 0.9999
    # which a wrong decay, or betas that nobody reads, would miss
    assert torch.allclose(vector, other_vector, atol=0.02)
    _, first, first_vector, _ = regression(AdamW(**settings), steps=2)
    _, second, second_vector, _ = regression(AdamW8bit(**settings), steps=2)
    assert torch.allclose(first_vector, second_vector, atol=1e-6)
    assert (first - second).abs().mean() < 0.02 * first.abs().mean()


def test_its_state_takes_two_bytes_a_number():
    sizes = {}
    for config in (AdamW(), AdamW8bit()):
        parameter = nn.Parameter(torch.zeros(512, 512))
        optimizer = make_optimizer(config, {"weight": parameter})
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = moments.kept(optimizer.state[parameter])
        sizes[config.kind] = sum(t.nbytes for t in state.values()) / parameter.numel()
    assert sizes["adamw"] == pytest.approx(optim.STATE_BYTES["adamw"], abs=1e-3)
    # two sizes of 4 bytes for every 256 numbers beside them
    assert sizes["adamw8bit"] == pytest.approx(optim.STATE_BYTES["adamw8bit"] + 8 / 256, abs=1e-3)


def test_resume_bit_for_bit(inputs, favor, tmp_path):
    """The tiny model's embedding is remembered in 8 bits, its other matrices are small enough for float32."""
    words = recipe(inputs, "optim.kind=adamw8bit", "optim.lr=1e-3", "save.every=1", "save.keep=9", "train.epochs=3")
    assert favor(*words)[0] == 0
    whole = load_file(tmp_path / "run/model/model.safetensors")
    first, *later = sorted((tmp_path / "run/checkpoints").iterdir())
    assert later
    kinds = {name.split(".")[0]: t.dtype for name, t in load_file(first / "optimizer.safetensors").items()}
    assert kinds["absmax1"] == torch.float32
    assert {t.dtype for name, t in load_file(first / "optimizer.safetensors").items() if "state1" in name} == {
        torch.uint8,
        torch.float32,
    }
    for path in (*later, tmp_path / "run/model"):
        shutil.rmtree(path)
    code, out, err = favor(*words, "resume=true")
    assert code == 0, err
    assert "resumed after step 1" in out
    again = load_file(tmp_path / "run/model/model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    # plain AdamW ends elsewhere: the 8 bits were at work
    words = [word.replace("run=run", "run=plain").replace("adamw8bit", "adamw") for word in words]
    assert favor(*words)[0] == 0
    plain = load_file(tmp_path / "plain/model/model.safetensors")
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)


@pytest.mark.parametrize("spoilt", ["absmax1.matrix", "state2.vector", "shape"])
def test_a_state_that_does_not_fit_is_refused(tmp_path, spoilt):
    parameters = {"matrix": nn.Parameter(torch.zeros(64, 96)), "vector": nn.Parameter(torch.zeros(64))}
    optimizer = make_optimizer(AdamW8bit(), parameters)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = {
        f"{key}.{name}": value
        for name, p in parameters.items()
        for key, value in moments.kept(optimizer.state[p]).items()
    }
    stored = Stored(tmp_path, TrainingState(step=1, inputs={}), {}, dict(found), {})
    sound = _moments(stored, parameters)
    back = moments.restored(optimizer, parameters["matrix"], sound["matrix"])
    assert back.keys() == optimizer.state[parameters["matrix"]].keys()
    assert isinstance(back["step"], int)
    if spoilt == "shape":
        found["absmax1.matrix"] = found["absmax1.matrix"][:-1]
    else:
        del found[spoilt]
    with pytest.raises(CheckpointError, match="optimizer state"):
        _moments(stored._replace(moments=found), parameters)


def test_a_fused_step_lies_where_its_weight_lies():
    """On a GPU the kernel reads the number of steps there; RMSprop counts on the host."""
    weight = nn.Parameter(torch.zeros(3))
    elsewhere = nn.Parameter(torch.empty(3, device="meta"))
    for config, place in ((AdamW(), "meta"), (Rmsprop(), "cpu")):
        optimizer = make_optimizer(config, {"w": weight})
        found = moments.restored(optimizer, elsewhere, {"step": torch.tensor(3.0)})
        assert found["step"].device.type == place
        assert moments.restored(optimizer, weight, {"step": torch.tensor(3.0)})["step"] == 3
        assert moments.restored(optimizer, weight, {}) == {}, "a weight that no batch has used yet"


def test_where_it_is_not_installed(inputs, favor, monkeypatch):
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    code, _, err = favor(*recipe(inputs, "optim.kind=adamw8bit"))
    assert code == 2
    assert "needs bitsandbytes, not installed here; run: pip install 'favor[bitsandbytes]'" in err


def test_the_dry_run_counts_it(inputs):
    """12 bytes beside a float32 weight with AdamW, 6 in 8 bits; a checkpoint has the weights and what is remembered."""
    numbers = sum(p.numel() for p in tiny.model().parameters())
    found = {}
    for kind in ("adamw", "adamw8bit", "rmsprop"):
        words = ["run=x", f"model.path={inputs / 'model'}", f"data.train={inputs / 'good.jsonl'}", f"optim.kind={kind}"]
        config = load(TrainConfig, None, words)
        assert f"memory (estimate): {0:.1f}" in describe(config)
        from favor.model.size import architecture_of, sizes

        trained = 4 + optim.STATE_BYTES[kind]
        found[kind] = sizes(architecture_of(config.model), config.model, 1, trained_bytes=trained).state / numbers
    assert found == pytest.approx({"adamw": 16, "adamw8bit": 10, "rmsprop": 12})
