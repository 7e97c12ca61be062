"""The GPU benchmark's own arithmetic, on a CPU with a tiny model through the same code."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu

from favor.data.batches import build


@pytest.mark.parametrize("lora", [False, True])
def test_flops_are_those_of_the_products(lora):
    """By hand for the tiny model: hidden 32, MLP 48, 2 layers, 4 heads of 8 over 2 of keys, 320 words."""
    batch = build(gpu.drawn(1, 2, (3, 2), 320), "tree")
    # a prompt of 3 tokens and two answers of 2: positions 0 1 2, 3 4, 3 4; heads at 2, 3, 3
    assert batch.num_tokens == 7
    block = 32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3
    seen = 1 + 2 + 3 + 2 * (4 + 5)
    times = 2 if lora else 3
    expected = times * 2 * (2 * block * 7 + 32 * 320 * 3) + 3 * 4 * 32 * 2 * seen
    assert gpu.flops(gpu.config_of("tiny"), batch, lora=lora) == expected


def test_parameters_are_those_of_the_models_named():
    import torch
    from transformers import LlamaForCausalLM

    for name, billions in (("0.5B", 0.49), ("1B", 1.24), ("8B-lora", 8.03)):
        with torch.device("meta"):
            model = LlamaForCausalLM(gpu.config_of(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_row_says_speed_share_and_memory():
    found = gpu.Measured([2.0, 1.0, 4.0], 6e12, 8, 3 << 30, "")
    assert gpu.row_of("1B", 2, found, 10e12) == ["1B", "2", "4.0 (2.0 to 8.0)", "30.0%", "3.0"]


def test_the_whole_benchmark_runs_on_a_tiny_model(monkeypatch, capsys):
    words = [
        "--models",
        "tiny",
        "--answers",
        "2",
        "4",
        "--prompts",
        "2",
        "--lengths",
        "6",
        "5",
        "--steps",
        "2",
        "--trl",
    ]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--device", "cpu"])
    gpu.main()
    out = capsys.readouterr().out
    assert out.count("tiny") == 4
    assert "prompt trees" in out


def test_words_come_back_as_the_tokens_drawn():
    (tree,) = gpu.drawn(1, 2, (6, 5), 320)
    tokenizer = gpu.word_tokenizer(320)
    assert tuple(tokenizer(gpu.said(tree.prompt_ids)).input_ids) == tree.prompt_ids
    assert (*tokenizer(gpu.said(tree.response_ids[1])).input_ids, 2) == tree.response_ids[1]
