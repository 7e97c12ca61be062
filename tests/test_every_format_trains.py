"""Every format's fixture goes through the whole of `favor train` (or `favor sft`): a step, a model."""

import math
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from favor.config import load
from favor.ranks import World
from favor.run import RunFolder, read_jsonl
from favor.stop import StopRequest
from favor.train.preference import TrainConfig, train
from favor.train.session import Session
from favor.train.sft import SftConfig, sft

FIXTURES = sorted((Path(__file__).parent / "data/formats").glob("*.jsonl"))
THUMBS = {"trl_unpaired", "kto_alpaca", "kto_sharegpt"}
# judged equal as often as not: losses that read ties
TIED = {"ties", "helpsteer2", "helpsteer3", "ultrafeedback_binarized"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {t: tiny.save(folder / name, template=t) for name, t in (("plain", tiny.CHATML), ("agents", tiny.AGENTS))}


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.stem)
def test_a_step(models, tmp_path, fixture):
    def session(root):
        return Session(RunFolder(root), World(), Console(quiet=True), StopRequest())

    words = [
        f"run={tmp_path / 'run'}",
        f"model.path={models[tiny.template_of(fixture.stem)]}",
        "model.dtype=float32",
        f"data.train={fixture}",
        "tokens.max_tokens=4096",
        "train.batch_prompts=8",
    ]
    if fixture.stem == "alpaca_ranking":
        words.append("data.format=alpaca")
    if fixture.stem.startswith("sft"):
        sft(load(SftConfig, None, words), session)
    else:
        loss = "kto" if fixture.stem in THUMBS else "davidson" if fixture.stem in TIED else "dpo"
        train(load(TrainConfig, None, [*words, f"loss.kind={loss}"]), session)
    (step,) = (r for r in read_jsonl(tmp_path / "run/metrics.jsonl") if r["kind"] == "step")
    assert math.isfinite(step["loss"])
    # that fixture is one tie, and a tie is at its best where policy and reference are equal
    # (exactly 0 on some processors, a rounding of it on others)
    assert (step["grad_norm"] > 1e-6) is (fixture.stem != "helpsteer2")
    assert (tmp_path / "run/model/config.json").exists()
