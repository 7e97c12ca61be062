"""The pass without gradients: within its budget, in the trees' order, every rank its share and all the same figures."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from oracles import tree

from favor.data import batches
from favor.eval.figures import pairs
from favor.model.batched import measured
from favor.model.layout import settle
from favor.model.load import ModelConfig, make_policy
from favor.model.logprobs import response_logps, scored_logps


def forest(count=40):
    """Trees of several sizes, not the first of their data set; long prompts, so that rows cost much more than trees."""
    made, first = [], 7
    for i in range(count):
        responses = [list(range(10 + k, 14 + k + (i + k) % 5)) for k in range(3)]
        made.append(tree([5] * (20 + i % 7), responses, first=first, row=i))
        first += 3
    return made


def policy_in(layout):
    settings = ModelConfig(path="tiny", dtype="float32", device="cpu")
    policy, _ = settle(make_policy(tiny.model(), tiny.tokenizer(), settings), layout, forest(3))
    return policy


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_batches_keep_the_budget_and_every_value_is_in_its_place(layout):
    policy, trees, computed, done = policy_in(layout), forest(), [], []

    def measure(batch):
        computed.append(batch.num_tokens)
        return response_logps(policy, batch)

    found = measured(policy, trees, measure, 300, progress=done.append)
    # in rows a tree costs its prompt three times; planned by the tree's own tokens this came to 900
    assert len(computed) >= (3 if layout == "tree" else 6)
    # the rows of unequal trees are padded to the longest
    assert max(computed) <= 320
    assert sum(done) == len(trees)
    alone = [response_logps(policy, batches.build([each], layout)).detach() for each in trees]
    assert torch.allclose(found, torch.cat(alone), atol=1e-4)
    tokens = measured(policy, trees, lambda b: scored_logps(policy, b)[b.member_edge_M].expand(2, -1), 300, tokens=True)
    lengths = [len(response) for each in trees for response in each.response_ids]
    assert tokens.shape == (2, sum(lengths))
    assert torch.allclose(torch.stack([part.sum() for part in tokens[1].split(lengths)]), found, atol=1e-4)


def test_pairs_are_those_of_a_batch():
    trees = forest(5)
    batch = batches.build(trees, "tree")
    chosen_P, rejected_P, tree_P = pairs(trees)
    assert chosen_P.tolist() == batch.chosen_P.tolist()
    assert rejected_P.tolist() == batch.rejected_P.tolist()
    assert (tree_P == chosen_P // 3).all()


PROGRAM = """
from types import SimpleNamespace
from favor.model import batched, sample as sampling
plain, sample, log = batched.batches.build, sampling.sample, open({log!r} + __import__("os").environ.get("RANK", "0"), "w")
def build(trees, layout, *rest):
    print("computed", len(trees), file=log, flush=True)
    return plain(trees, layout, *rest)
def counted(policy, prompts, *rest):
    print("sampled", len(prompts), file=log, flush=True)
    return sample(policy, prompts, *rest)
batched.batches = SimpleNamespace(plan=batched.batches.plan, build=build)
sampling.sample = counted
from favor.cli import main
main()
"""


@pytest.mark.dist
def test_ranks_share_held_out_figures_and_the_probe(tmp_path):
    """Two gloo processes: each computes its share of the held-out trees and samples its share; the figures of one process."""
    tiny.save(tmp_path / "model")
    for name, count in (("train", 4), ("eval", 12)):
        rows = [{"prompt": f"{name} {i}?", "chosen": f"good {i} film", "rejected": f"bad {i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "train",
        f"model.path={tmp_path / 'model'}",
        f"data.train={tmp_path / 'train.jsonl'}",
        f"data.eval={tmp_path / 'eval.jsonl'}",
        "train.max_steps=1",
        "train.max_tokens_per_pack=60",
        "watch.eval.every=1",
        "watch.kl.every=1",
        "watch.kl.tokens=6",
        "watch.kl.prompts=6",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611"]
    found, shares = {}, {}
    for name, line in (("one", []), ("two", launch)):
        program = tmp_path / f"{name}.py"
        program.write_text(PROGRAM.format(log=str(tmp_path / f"log-{name}-")))
        subprocess.run(
            [sys.executable, *line, str(program), *words, f"run={tmp_path / name}"],
            env=environment,
            check=True,
            capture_output=True,
            timeout=200,
        )
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        records = {line["kind"]: line for line in lines}
        figures = records["eval"] | {key: records["step"][key] for key in ("kl", "kl_se")}
        found[name] = {key: value for key, value in figures.items() if isinstance(value, float)}
        logs = [log.read_text().split() for log in sorted(tmp_path.glob(f"log-{name}-*"))]
        shares[name] = [
            {kind: sum(int(n) for k, n in zip(log[::2], log[1::2], strict=True) if k == kind) for kind in log[::2]}
            for log in logs
        ]
    assert found["two"] == pytest.approx(found["one"], abs=1e-6)
    assert {"loss", "accuracy", "margin", "kl", "kl_se"} <= found["one"].keys()
    (one,) = shares["one"]
    assert [share["sampled"] for share in shares["two"]] == [3, 3]
    assert all(0.4 * one["computed"] <= share["computed"] <= 0.6 * one["computed"] for share in shares["two"])
