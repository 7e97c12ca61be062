"""A process of a run over several is killed: the others end soon and say so, and the run goes on from its checkpoint."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from split_cases import recipe
from test_split import free_port
from torch.distributed.distributed_c10d import Backend, BackendConfig

from favor.errors import LostError
from favor.ranks import World, _join, barrier, from_main, largest, started_again, sum_, world
from favor.run import RunFolder
from favor.train.session import resumes

PROGRAM = Path(__file__).with_name("elastic_program.py")
INIT = torch.distributed.init_process_group
# torchrun asks the others to end and waits 30 s for that; starting takes its time on a busy machine
SOON = 90


def launched(folder, name, *words, restarts=0, note=""):
    """A run on two processes with a checkpoint after every second of five steps."""
    recipe(folder)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    settings = [
        *("train", f"run={folder / name}", f"model.path={folder / 'model'}", f"data.train={folder / 'rows.jsonl'}"),
        *("train.batch_prompts=3", "train.max_steps=5", "train.epochs=9", "train.max_tokens_per_pack=60"),
        *("optim.lr=1e-3", "save.every=2", "ranks.shard=full"),
    ]
    return subprocess.run(
        [sys.executable, *launch, f"--max-restarts={restarts}", str(PROGRAM), str(note), *settings, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def events(run):
    """Messages by name."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["name"]: record["message"] for record in records if record["kind"] == "event"}


def equal(found, expected):
    """Bit for bit."""
    mine, theirs = (load_file(run / "model/model.safetensors") for run in (found, expected))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_process_ends_the_run_and_the_run_goes_on(tmp_path):
    done = launched(tmp_path, "whole")
    assert done.returncode == 0, done.stderr

    died = launched(tmp_path, "killed", note=tmp_path / "when")
    took = time.time() - float((tmp_path / "when").read_text())
    assert died.returncode != 0
    said = [line for line in died.stderr.splitlines() if line.startswith("favor: ")]
    assert said[-1].startswith("favor: another process of this run ended, or cannot be reached")
    assert said[-1].endswith("Continue from the newest checkpoint with resume=true")
    assert [line for line in said[:-1] if "stopping after this step" not in line] == []
    assert took < SOON
    again = launched(tmp_path, "killed", "resume=true")
    assert again.returncode == 0, again.stderr
    assert events(tmp_path / "killed")["resume"].startswith("resumed after step 2 ")
    assert equal(tmp_path / "killed", tmp_path / "whole")

    itself = launched(tmp_path, "itself", restarts=1, note=tmp_path / "when")
    assert itself.returncode == 0, itself.stderr
    assert events(tmp_path / "itself")["resume"].startswith("resumed after step 2 ")
    assert equal(tmp_path / "itself", tmp_path / "whole")


# killed on the first try; the other one, which waits for nothing, is started anew without a count of it
_JOINS = """
import os, signal, sys, time
from favor.ranks import world
from favor.train.session import resumes
died, run = sys.argv[1:]
with world() as members:
    first = not os.path.exists(died)
    again = resumes(run, False)
    if first:
        if members.rank == 1:
            open(died, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    print(members.rank, os.environ["TORCHELASTIC_RESTART_COUNT"], again)
"""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_over_machines_a_restart_is_counted_where_a_process_died(tmp_path):
    """Two of torchrun's agents stand for two machines: the processes find each other again, and agree that they go on."""
    (tmp_path / "joins.py").write_text(_JOINS)
    RunFolder(tmp_path).config.write_text("")
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1"]
    meet = ["--rdzv-backend=c10d", "--rdzv-id=here", f"--rdzv-endpoint=localhost:{free_port()}"]
    known = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    machines = [
        subprocess.Popen(
            [sys.executable, *launch, *meet, tmp_path / "joins.py", tmp_path / "died", tmp_path],
            env=os.environ | known | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        said = sorted(machine.communicate(timeout=280)[0].strip() for machine in machines)
    finally:
        for machine in machines:
            machine.kill()
    assert said in (["0 0 True", "1 1 True"], ["0 1 True", "1 0 True"])


def test_only_what_torchrun_starts_anew_continues_unasked(tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert not started_again()
    assert (resumes(str(run), True), resumes(str(run), False)) == (True, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    # it died before it began
    assert not resumes(str(run), False)
    run.mkdir()
    RunFolder(run).config.write_text("")
    assert resumes(str(run), False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not resumes(str(run), False)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"
            ),
            True,
        ),
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc] op.preamble.length <= op.nbytes. 8 vs 4"
            ),
            False,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_counts_as_the_loss_of_a_process(monkeypatch, error, lost):
    """Another error stays what it is: it is a mistake of ours, to be reported."""
    monkeypatch.setattr("favor.ranks._join", lambda: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LostError if lost else RuntimeError) as raised, world():
        raise error
    assert lost or raised.value is error


@pytest.fixture
def joining(monkeypatch):
    """What `_join` asks of torch, and the store that torchrun would give it."""
    asked, store = {}, torch.distributed.HashStore()
    monkeypatch.setattr("favor.ranks.rendezvous", lambda _: iter([(store, 0, 1)]))
    monkeypatch.setattr("favor.ranks.dist.init_process_group", lambda backend, **given: asked.update(given, to=backend))

    def joined():
        _join()
        return asked, store

    return joined


def test_ranks_with_gpus_also_sum_what_lies_on_the_cpu(monkeypatch, joining):
    """Such as a rollout's scores. nccl, which knows tensors of a GPU alone, is stood in for by gloo told the same."""
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        asked, _ = joining()
    devices = BackendConfig(Backend(asked.pop("to"))).device_backend_map
    assert devices["cuda"] == "nccl"
    INIT(",".join(f"{device}:gloo" for device in devices), **asked)
    try:
        members = World(0, 2)
        barrier(members)
        assert sum_(torch.tensor([3.0]), members).tolist() == [3.0]
        assert (largest(3, members), from_main(3, members)) == (3, 3)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("keeps", "name"), [("True", "try-2/told"), ("False", "told")])
def test_names_of_a_try_where_torchrun_keeps_what_was_told(monkeypatch, joining, keeps, name):
    """Where it does not, its counts may differ by machine, and ranks with other names would wait for each other."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", keeps)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    asked, store = joining()
    asked["store"].set("told", "this")
    assert store.check([name])
    assert store.num_keys() == 1
