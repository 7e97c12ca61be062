"""Several ranks take the same step as one."""

import json
import os
import subprocess
import sys

import pytest
import tiny

PPO = [
    "ppo",
    "reward.kind=callable",
    "sample.max_new_tokens=6",
    "ppo.samples_per_prompt=3",
    "train.max_steps=4",
    "train.batch_prompts=3",
]


@pytest.mark.dist
@pytest.mark.parametrize("command", ["train", "two passes", "ppo"])
def test_two_ranks_follow_one_rank(tmp_path, command):
    """torchrun with two gloo processes: the curve and the final weights of a single process, to 1e-5."""
    from safetensors.torch import load_file

    tiny.save(tmp_path / "model")
    rows = [{"prompt": f"Film {i % 4}?", "chosen": f"good {i} film", "rejected": f"bad {i}"} for i in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "length.py").write_text("def score(prompts, responses):\n    return [len(r) / 9 for r in responses]\n")
    words = [
        *([*PPO, f"reward.path={tmp_path / 'length.py'}:score"] if command == "ppo" else ["train"]),
        *(
            ["loss.kind=sum", 'loss.terms=[{kind="bco"}, {kind="aot"}, {kind="kto"}]']
            if command == "two passes"
            else []
        ),
        f"model.path={tmp_path / 'model'}",
        "model.dtype=float32",
        f"data.train={tmp_path / 'train.jsonl'}",
        *([] if command == "ppo" else ["train.batch_prompts=3"]),
        "train.epochs=3",
        "train.max_tokens_per_pack=60",
        "save.every=2",
        "optim.lr=1e-3",
    ]
    program = tmp_path / "favor_main.py"
    program.write_text("from favor.cli import main\nmain()\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    one = [sys.executable, str(program), *words, f"run={tmp_path / 'one'}"]
    two = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={29517 + len(command)}",
        str(program),
        *words,
        f"run={tmp_path / 'two'}",
    ]
    for line in (one, two):
        subprocess.run(line, env=environment, check=True, capture_output=True, text=True, timeout=200)

    def curve(run):
        records = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        return [r for r in records if r["kind"] == "step"]

    first, second = curve("one"), curve("two")
    assert len(first) == len(second) == (4 if command == "ppo" else 6)
    for a, b in zip(first, second, strict=True):
        for key in ("pairs", "reward", "ended"):
            assert a.get(key) == b.get(key)
        assert a.get("kl", 0) == pytest.approx(b.get("kl", 0), abs=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    weights = [load_file(tmp_path / run / "model/model.safetensors") for run in ("one", "two")]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 2e-5 for name in weights[0])
