"""What is measured is float32 whatever training used, and every command gives the same figure."""

import json

import numpy as np
import pytest
import tiny
import torch
from oracles import plain_logps
from test_cli import write
from transformers import AutoModelForCausalLM

from favor.cli import main
from favor.data.read import DataConfig, read
from favor.data.tokenize import TokensConfig, tokenize
from favor.model.load import ModelConfig, load_tokenizer

WORDS = [
    "good",
    "bad",
    "warm",
    "cold",
    "dull",
    "bright",
    "slow",
    "quick",
    "sad",
    "glad",
    "long",
    "short",
    "wise",
    "odd",
    "plain",
    "rich",
]


def rows(count, seed):
    random = np.random.default_rng(seed)

    def say():
        return " ".join(random.choice(WORDS, size=int(random.integers(6, 14))))

    return [{"prompt": f"Film {seed} {i}?", "chosen": say(), "rejected": say()} for i in range(count)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run trained in bfloat16, evaluated and scored: folder and what the commands printed."""
    here = tmp_path_factory.mktemp("precision")
    tiny.save(here / "model")
    write(here / "train.jsonl", rows(24, 0))
    write(here / "test.jsonl", rows(12, 1))
    return here


def favor(monkeypatch, capsys, here, *words):
    monkeypatch.chdir(here)
    monkeypatch.setattr("sys.argv", ["favor", *words])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code in (0, None), err
    return out


def truth(here):
    """log-probs of every held-out response by plain transformers in float32: policy and reference [pairs, 2]."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(here / name).eval() for name in ("run/model", "model"))
    tokenizer = load_tokenizer(ModelConfig(path=str(here / "model")))
    texts, _ = read(str(here / "test.jsonl"), DataConfig(train=str(here / "test.jsonl")), "test")
    trees, _ = tokenize(texts, tokenizer, TokensConfig(), frozenset({2}), "error")
    with torch.no_grad():
        return tuple(plain_logps(model, trees).view(-1, 2).numpy() for model in (policy, reference))


def test_eval_score_and_transformers_agree_after_training_in_bfloat16(run, monkeypatch, capsys):
    settings = [
        "run=run",
        "model.path=model",
        "data.train=train.jsonl",
        "data.eval=test.jsonl",
        "train.batch_prompts=8",
    ]
    watch = ["watch.eval.every=3", "watch.kl.every=3", "watch.kl.prompts=4", "watch.kl.tokens=8", "optim.lr=1e-3"]
    out = favor(monkeypatch, capsys, run, "train", *settings, *watch, "model.dtype=bfloat16")
    assert "precision: bfloat16 products on float32 weights" in out
    assert "bfloat16 costs" in out
    evaluated = favor(monkeypatch, capsys, run, "eval", "run=run", "sample_prompts=0")
    assert "precision: float32" in evaluated
    reward = ["reward.kind=implicit", "reward.path=run"]
    scored = favor(monkeypatch, capsys, run, "score", "out=scores.jsonl", "data=test.jsonl", *reward)
    assert "precision: float32" in scored
    pi, ref = truth(run)
    margins = 0.1 * ((pi - ref)[:, 0] - (pi - ref)[:, 1])
    figures = json.loads((run / "run/eval.json").read_text())
    assert figures["precision"] == "float32"
    assert figures["margin"] == pytest.approx(margins.mean(), abs=2e-5)
    assert figures["accuracy"] == np.mean(margins > 0)
    assert figures["reference_accuracy"] == np.mean(ref[:, 0] > ref[:, 1])
    lines = [json.loads(line)["scores"] for line in (run / "scores.jsonl").read_text().splitlines()]
    assert np.mean([a - b for a, b in lines]) == pytest.approx(figures["margin"], abs=2e-6)
    # the held-out figures while it trained: the last step's are those of the finished model
    *_, held_out = [
        r for r in map(json.loads, (run / "run/metrics.jsonl").read_text().splitlines()) if r["kind"] == "eval"
    ]
    assert held_out["margin"] == pytest.approx(figures["margin"], abs=2e-5)
    page = favor(monkeypatch, capsys, run, "report", "run")
    assert page
    assert "bfloat16 products on float32 weights" in (run / "run/report.html").read_text()


def test_the_same_figures_in_bfloat16_would_differ(run):
    """What the test above would miss if rounding were too small to see on this model."""
    from oracles import tree

    from favor.data.batches import build
    from favor.model.load import ModelConfig, load_policy
    from favor.model.logprobs import response_logps

    data = [tree((5, 6, 7), [(8, 9, 10, 11, 12, 2), (30, 31, 32, 33, 2)])]
    values = [
        response_logps(load_policy(ModelConfig(path=str(run / "model"), dtype=d)), build(data, "rows")).detach()
        for d in ("float32", "bfloat16")
    ]
    assert float((values[0] - values[1]).abs().max()) > 1e-3


def test_dry_run_says_the_precision(run, monkeypatch, capsys):
    words = ["run=x", "model.path=model", "data.train=train.jsonl"]
    assert "precision: float32\n" in favor(monkeypatch, capsys, run, "train", *words, "--dry-run")
    out = favor(monkeypatch, capsys, run, "train", *words, "model.dtype=bfloat16", "--dry-run")
    assert "precision: bfloat16 products" in out


@pytest.mark.parametrize(
    ("extra", "answer", "named"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "good", "tools"),
        ({}, [{"role": "assistant", "content": "good", "reasoning_content": "because"}], "reasoning_content"),
        ({}, [{"role": "assistant", "content": "good", "tool_calls": [{"function": {"name": "f"}}]}], "tool_calls"),
        (
            {},
            [
                {"role": "assistant", "content": "a"},
                {"role": "tool", "content": "b"},
                {"role": "assistant", "content": "c"},
            ],
            "responses of several turns",
        ),
    ],
)
def test_score_refuses_what_a_reward_on_text_does_not_see(run, monkeypatch, capsys, tmp_path, extra, answer, named):
    """Or it would score something else than training and eval see, with exit code 0."""
    write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": answer, "rejected": "bad", **extra}])
    (tmp_path / "f.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["favor", "score", "out=o", "data=rows.jsonl", "reward.kind=callable", "reward.path=f.py:score"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert f"row 1: it has {named}, which a reward on text does not see" in err


def test_samples_longer_than_the_data_choose_the_layout_too(run, monkeypatch, capsys):
    """A window that the data fit and the samples do not: trees would be nats off for the KL of eval, probe and KTO's z0."""
    torch.manual_seed(0)
    made = tiny.MistralForCausalLM(tiny.MistralConfig(**tiny._GQA, head_dim=8, sliding_window=64)).eval()
    made.save_pretrained(run / "mistral")
    tiny.tokenizer().save_pretrained(run / "mistral")
    rows = [{"prompt": f"Film {i}?", "chosen": "good", "rejected": "bad"} for i in range(4)]
    write(run / "short.jsonl", rows)
    words = ["model.path=mistral", "data.train=short.jsonl", "data.eval=short.jsonl", "train.batch_prompts=2"]
    assert "prompt trees" in favor(monkeypatch, capsys, run, "train", "run=w1", *words)
    probed = favor(monkeypatch, capsys, run, "train", "run=w2", *words, "watch.kl.every=1", "watch.kl.tokens=60")
    assert "FALL-BACK" in probed
    assert "sliding_window of 64" in probed
    evaluated = favor(monkeypatch, capsys, run, "eval", "run=w1", "sample.max_new_tokens=60", "sample_prompts=2")
    assert "FALL-BACK" in evaluated
    assert "FALL-BACK" not in favor(monkeypatch, capsys, run, "eval", "run=w1", "sample_prompts=0")


def test_figures_against_another_start_are_refused(run, monkeypatch, capsys):
    """The model that a run started from, edited since: eval and score would compare with something else."""
    from safetensors.torch import load_file, save_file

    tiny.save(run / "start")
    words = ["model.path=start", "data.train=train.jsonl", "data.eval=test.jsonl", "train.max_steps=1"]
    favor(monkeypatch, capsys, run, "train", "run=from", *words)
    favor(monkeypatch, capsys, run, "eval", "run=from", "sample_prompts=0")
    weights = load_file(run / "start/model.safetensors")
    weights["model.norm.weight"][3] *= 1.5
    save_file(weights, run / "start/model.safetensors", metadata={"format": "pt"})
    for words in (
        ["eval", "run=from"],
        ["score", "out=o.jsonl", "data=test.jsonl", "reward.kind=implicit", "reward.path=from"],
    ):
        with pytest.raises(AssertionError, match="its weights are not those that from started from"):
            favor(monkeypatch, capsys, run, *words)
    favor(monkeypatch, capsys, run, "eval", "run=from", "sample_prompts=0", "reference=start")
