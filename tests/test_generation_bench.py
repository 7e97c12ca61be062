"""The benchmark of sampling and GRPO in the small: its samplers agree, its checks catch what differs, its arithmetic is by hand."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import generation
import samplers
from transformers import AutoModelForCausalLM

from favor.model.load import ModelConfig, load_policy

PROMPTS = ["Write about a film, please, and do not stop.", "A film", "Never?", "Good or bad?"]
PROMPTS += ["Maybe the end.", "Better or worse?", "Hello", "Yes."]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model that never says <pad>: its logit is 0 where others are as large as real ones."""
    folder = tmp_path_factory.mktemp("generation")
    model = tiny.model("qwen2")
    with torch.no_grad():
        model.lm_head.weight[0] = 0
    model.save_pretrained(folder / "source")
    tiny.tokenizer().save_pretrained(folder / "source")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return folder


@pytest.fixture(scope="module")
def both(files):
    folder = samplers.endless(files / "source", files, "<pad>")
    return load_policy(
        ModelConfig(path=str(folder), dtype="float32"), frozen=True
    ), AutoModelForCausalLM.from_pretrained(folder)


def task(both, each, new):
    return samplers.Task([both[0].tokenizer(text).input_ids for text in PROMPTS], each, new)


def test_the_end_is_the_token_named(both):
    assert both[0].end_ids == {0}
    assert both[1].generation_config.eos_token_id == 0


@pytest.mark.parametrize("way", [samplers.generates, samplers.continues])
def test_likeliest_answers_are_equal_and_samples_as_asked(both, way):
    policy, model = both
    greedy = task(both, 1, 6)
    ours = samplers.favors(policy, greedy, 1e-4)
    theirs = way(model, greedy, 2, drawn=False)
    # rounding may part near ties elsewhere
    assert samplers.alike(model, greedy, ours, theirs) >= 6
    # one token changed is no tie
    theirs[2][3] = (theirs[2][3] + 1) % tiny.VOCAB
    with pytest.raises(AssertionError, match="parts at token 3, .* nats below the likeliest"):
        samplers.alike(model, greedy, ours, theirs)
    drawn = task(both, 3, 5)
    assert samplers.clocked(lambda: way(model, drawn, 4), drawn) > 0
    # a sample too short, and one too few
    found = way(model, drawn, 4)
    for wrong in ([found[0][:4], *found[1:]], found[1:]):
        with pytest.raises(AssertionError):
            samplers.clocked(lambda wrong=wrong: wrong, drawn)


def test_a_sampler_that_does_not_run_says_why_in_the_table(files, capsys, monkeypatch):
    def broken(*_, **__):
        raise ValueError("no cache on this machine")

    monkeypatch.setattr(generation, "continues", broken)
    main(files, monkeypatch, "--parts", "sampling", "--batches", "2", "4")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 2
    assert all("did not run: no cache on this machine" in row for row in rows)
    assert " of 8 |" in rows[0]
    assert " of 2 |" in rows[1]
    assert [row.count("x**") for row in rows] == [1, 1]


def test_floors_by_hand():
    """Two prompts of 3 and 5 tokens, 4 samples of 3 tokens; 10 numbers in the blocks, 6 in the head."""
    asked = samplers.Task([[1] * 3, [1] * 5], 4, 3)
    assert asked.tokens == 24
    slow_memory = generation.Machine(1.0, 0.1, 10, 6)
    prompts, rows = 2 * (10 * 8 + 6 * 2), 2 * (10 + 6) * 8
    assert slow_memory.sampled(asked) == prompts + 2 * max(rows, 4 * 16 / 0.1)
    assert generation.Machine(1.0, 1e9, 10, 6).sampled(asked) == prompts + 2 * rows
    once = slow_memory.passed(32, 24)
    assert once == 2 * (10 * 32 + 6 * 24)
    text = generation.table(
        asked, slow_memory, {"favor": [step(1.0), step(3.0), step(2.0)], "trl": [step(2.0), step(3.0), step(8.0)]}
    )
    lines = text.splitlines()
    assert "2 prompts x 4 samples of 3 tokens" in lines[0]
    # paired by turn: 2, 1, 4 times as long
    assert "| 2.00 [1.00, 3.00] | 3.00 [2.00, 8.00] | **2.00 [1.00, 4.00] x** |" in lines[2]
    assert f"{2 * once:.2f} (favor at" in lines[3]
    assert f"{3 * once:.2f} (favor at" in lines[4]
    assert "| whole step | 6.00 [3.00, 9.00] |" in lines[5]
    assert f"{slow_memory.sampled(asked) + 5 * once:.2f} (favor at" in lines[5]


def step(seconds):
    return {"sampling_s": seconds, "after_s": seconds, "update_s": seconds, "peak_gib": 1.0, "tokens": 32}


def main(files, monkeypatch, *words):
    given = [
        "--model",
        str(files / "source"),
        "--data",
        str(files / "prompts.jsonl"),
        "--end",
        "<pad>",
        "--new",
        "5",
        "--prompts",
        "2",
        "--each",
        "3",
    ]
    monkeypatch.setattr(generation, "rate", lambda: 100.0)
    monkeypatch.setattr(generation, "bandwidth", lambda: 1e10)
    monkeypatch.setattr(sys, "argv", ["generation.py", *given, "--repeats", "2", *words])
    generation.main()


@pytest.fixture(scope="module")
def stepped(files):
    """A step of favor in its own process, and a process that gives its result to both tools, TRL's with what a test makes wrong."""
    real, results, wrong, commands = generation.process, [], {}, []

    def process(command, environment):
        commands.append(command[2:])
        if not results:
            text, peak = real(command, environment)
            results.append((json.loads(text.split("RESULT ")[1]), peak))
        found, peak = results[0]
        # TRL is not installed for the tests
        return f"RESULT {json.dumps(found | (wrong if 'trl' in command else {}))}\n", peak

    return SimpleNamespace(process=process, results=results, wrong=wrong, commands=commands)


@pytest.fixture
def grpo(files, stepped, monkeypatch):
    monkeypatch.setattr(generation, "process", stepped.process)
    stepped.wrong.clear()
    stepped.commands.clear()
    return lambda *words: main(files, monkeypatch, "--parts", "grpo", "--per-device", "2", "3", *words)


def test_a_step_of_grpo_beside_another(grpo, stepped, capsys):
    stepped.wrong["sampling_s"] = 1e3
    grpo()
    commands = stepped.commands
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("| sampling", "| between", "| update", "| whole step")) for line in lines) == 4
    assert "TRL: 2 a pass, samples by generate; gradient norms of the same samples lie 0e+00 apart" in lines[-1]
    # one of favor to be replayed, the batch sizes to try, the samplers to try, two turns
    assert [command[0] for command in commands] == ["favor", "trl", "trl", "trl", "trl", "favor", "trl", "favor", "trl"]
    assert ["--replay" in command for command in commands[1:5]] == [True, True, False, False]
    assert ["--continuous" in command for command in commands[3:]] == [True, False, False, False, False, False]


def test_another_gradient_or_length_is_refused(grpo, stepped):
    stepped.wrong["grad_norm"] = 7.0
    with pytest.raises(AssertionError, match="gradients' norms lie .* apart, so it is other work"):
        grpo()
    stepped.wrong["samples"] = [[5] * 5] * 5
    with pytest.raises(AssertionError, match="trl: samples of another length"):
        grpo()


def test_favors_step_is_what_the_table_says(grpo, stepped, both):
    """The gradient of -(1/tokens) sum A log pi over all sampled tokens, A = (r - mean)/(deviation + 1e-4), by plain transformers."""
    grpo()
    ((found, _),) = stepped.results
    model, tokenizer = both[1], both[0].tokenizer
    rewards = torch.tensor(
        [float(len(text)) for text in tokenizer.batch_decode(found["samples"], skip_special_tokens=True)]
    )
    groups = rewards.view(2, 3)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    assert rewards.mean() == pytest.approx(found["reward"])
    loss = torch.zeros(())
    for number, (sample, advantage) in enumerate(zip(found["samples"], advantages, strict=True)):
        ids = tokenizer(PROMPTS[number // 3]).input_ids + sample
        logp = model(torch.tensor([ids])).logits[0, -len(sample) - 1 : -1].log_softmax(-1)
        loss = loss - advantage * logp.gather(1, torch.tensor(sample)[:, None]).sum() / 30
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = torch.stack([grad.norm() for grad in torch.autograd.grad(loss, parameters)]).norm()
    assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert found["tokens"] == sum(len(tokenizer(text).input_ids) for text in PROMPTS[:2]) + 30
