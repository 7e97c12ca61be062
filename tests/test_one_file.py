"""The method in one file does what `favor train` does: the same losses and the same weights on the same data."""

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from favor.cli import app

EXAMPLE = Path(__file__).parent.parent / "examples/one_file_dpo.py"
PROMPTS = ["hello there", "the film", "What is good?", "Write a review", "yes or no", "bad or worse", "the capital"]


@pytest.fixture
def folder(tmp_path):
    rows = [
        {
            "prompt": f"{prompt} {i}",
            "chosen": f"a warm film {i} that never stops" * (1 + i % 3),
            "rejected": f"worse {i}",
        }
        for i, prompt in enumerate(PROMPTS * 2)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("template", [tiny.CHATML, None], ids=["chat", "plain"])
def test_losses_and_weights_are_those_of_favor(folder, template, monkeypatch, capsys):
    """14 pairs, batches of 4, 2 epochs: 8 steps.

    Only float32 rounding may tell them apart: one pads rows, the other computes prompt trees, so sums run in another
    order. Losses to 1e-5 nats (1e-6 is what is printed); weights to 1e-4 of the way that training moved them, in norm (4e-7
    was measured), not one by one: AdamW divides a gradient by its own size, even one that is nothing but rounding.
    """
    model, data = str(tiny.save(folder / "model", template=template)), str(folder / "pairs.jsonl")
    words = [
        "--model",
        model,
        "--data",
        data,
        "--out",
        str(folder / "one"),
        "--lr",
        "1e-3",
        "--batch",
        "4",
        "--epochs",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words, "--weight-decay", "0.1"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    here = [float(x) for x in re.findall(r"loss (\S+)", capsys.readouterr().out)]

    settings = [
        f"run={folder / 'run'}",
        f"model.path={model}",
        f"data.train={data}",
        "optim.lr=1e-3",
        "optim.weight_decay=0.1",
    ]
    settings += ["train.batch_prompts=4", "train.epochs=2", "train.shuffle=false", "model.device=auto"]
    done = CliRunner().invoke(app, ["train", *settings])
    assert done.exit_code == 0, done.output
    records = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    there = [record["loss"] for record in records if record["kind"] == "step"]

    assert len(here) == len(there) == 8
    assert here[:5] == pytest.approx(there[:5], abs=1e-5)
    assert abs(there[4] - there[0]) > 1e-2
    start = load_file(folder / "model/model.safetensors")
    one, run = load_file(folder / "one/model.safetensors"), load_file(folder / "run/model/model.safetensors")
    assert one.keys() == run.keys() == start.keys()
    changed, off = (
        torch.stack([(a[name].double() - b[name].double()).norm() for name in start]).norm()
        for a, b in ((run, start), (one, run))
    )
    assert changed > 0.1
    assert off < 1e-4 * changed


def test_it_is_short_and_stands_alone():
    text = EXAMPLE.read_text("utf-8")
    assert len(text.splitlines()) <= 150
    tree = ast.walk(ast.parse(text))
    imported = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("favor") for name in imported)
