"""What is stored is what was written, comes from what it says, belongs to one process at a time, and was not the user's."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from favor_frontier.page import SECTIONS
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training import StopAt, curve, open_session

from favor import guard
from favor.config import load
from favor.errors import CheckpointError, ConfigError, DataError, FavorError
from favor.eval.score import ScoreConfig, score
from favor.generate.prefer import PreferConfig, prefer
from favor.generate.samples import SamplesConfig, write_samples
from favor.lint.run import lint
from favor.lint.settings import LintConfig
from favor.ranks import World
from favor.report.page import write_page
from favor.report.records import collect
from favor.run import RunFolder, append, read_jsonl, start, write_text
from favor.stop import StoppedError
from favor.train import checkpoint, reference
from favor.train.checkpoint import checkpoints
from favor.train.ppo import PpoConfig, train_ppo
from favor.train.preference import TrainConfig, train
from favor.train.session import TrainingState
from favor.train.sft import SftConfig, sft
from favor.train.step import Learner

ROWS = [{"prompt": f"Film {i}?", "chosen": f"good {i} film", "rejected": f"bad {i}"} for i in range(6)]


@pytest.fixture
def inputs(tmp_path):
    tiny.save(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "length.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    return tmp_path


def words(inputs, *more):
    base = [f"run={inputs / 'run'}", f"model.path={inputs / 'model'}", "model.dtype=float32"]
    return [*base, f"data.train={inputs / 'data.jsonl'}", "train.batch_prompts=2", "save.every=1", *more]


def training(inputs, *more, stop=None):
    train(load(TrainConfig, None, words(inputs, "train.epochs=2", *more)), lambda root: open_session(root, stop))


def stopped(inputs, *more, at=4):
    with pytest.raises(StoppedError):
        training(inputs, *more, stop=StopAt(at))


def drawn(inputs, *more):
    base = [f"out={inputs / 'out.jsonl'}", f"prompts={inputs / 'data.jsonl'}", f"engine.model.path={inputs / 'model'}"]
    return load(SamplesConfig, None, [*base, "engine.model.dtype=float32", "sample.max_new_tokens=3", *more])


def quiet(label, done, total):
    pass


def flip(path, rng, count=200):
    """Random bytes in the last half of a file, where the numbers are."""
    raw = bytearray(path.read_bytes())
    start = rng.randrange(len(raw) // 2, len(raw))
    for place in range(start, min(len(raw), start + count)):
        raw[place] ^= rng.randrange(1, 256)
    path.write_bytes(raw)


def test_a_damaged_reference_store_is_refused(inputs):
    store = f"reference.store={inputs / 'ref.safetensors'}"
    training(inputs, store, "train.max_steps=1")
    path, rng = inputs / "ref.safetensors", random.Random(0)
    sound = path.read_bytes()
    with safe_open(path, "pt") as file:
        made_from, logps = file.metadata(), file.get_tensor("train")
    del made_from["sha256"]
    wrong = {
        "one for all": {"train": logps[:1]},
        "of another part": {"eval": logps},
        "float32": {"train": logps.float()},
        "not finite": {"train": torch.where(logps == logps[3], torch.nan, logps)},
    }
    for number, tensors in enumerate([None, None, *wrong.values()]):
        if tensors is None:
            path.write_bytes(sound)
            flip(path, rng)
        else:
            # under a hash that holds
            sealed = made_from | {"sha256": reference._content_hash(tensors, made_from)}
            save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=sealed)
        with pytest.raises(CheckpointError, match=r"ref\.safetensors: .*delete it"):
            training(inputs, store, f"run={inputs / f'run-{number}'}")
        assert not (inputs / f"run-{number}").exists()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(inputs):
    training(inputs, f"run={inputs / 'whole'}")
    stopped(inputs)
    before, newest = checkpoints(inputs / "run/checkpoints")
    rng = random.Random(1)
    for name in ("policy.safetensors", "optimizer.safetensors", "state.json"):
        sound = {path: path.read_bytes() for path in newest.iterdir()}
        flip(newest / name, rng, count=1 if name == "state.json" else 200)
        with pytest.raises(StoppedError):
            training(inputs, "resume=true", stop=StopAt(1))
        events = [r["message"] for r in read_jsonl(inputs / "run/metrics.jsonl") if r["kind"] == "event"]
        assert any(
            "step-000004: damaged checkpoint" in e and "going back to the checkpoint before" in e for e in events
        )
        assert events[-1] == f"resumed after step 3 from {before}"
        for path, raw in sound.items():
            path.write_bytes(raw)
    flip(newest / "policy.safetensors", rng)
    (before / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step-000003: damaged .*no sound checkpoint is left: delete "):
        training(inputs, "resume=true")
    (before / "optimizer.safetensors").write_bytes(b"")
    (newest / "policy.safetensors").write_bytes(sound[newest / "policy.safetensors"])
    training(inputs, "resume=true")
    assert curve(inputs / "run") == curve(inputs / "whole")


def test_a_checkpoint_that_does_not_fit_is_refused():
    weight = torch.nn.Parameter(torch.arange(4.0))
    moments = {"step.w": torch.tensor(1.0), "exp_avg.w": torch.zeros(4), "exp_avg_sq.w": torch.zeros(4)}
    good = checkpoint.Stored(Path("c"), TrainingState(step=1), {"w": torch.ones(4)}, moments, {})
    learner = Learner({"w": weight}, torch.optim.AdamW([weight]), 1.0, torch.device("cpu"), World())
    wrong = [
        ({"policy": {"w": torch.ones(1)}}, "weights: not those"),
        ({"policy": {"w": torch.ones(4, dtype=torch.float64)}}, "weights: not those"),
        ({"policy": {}}, "weights: not those"),
        ({"policy": {"w": torch.full((4,), torch.nan)}}, "w is not finite"),
        ({"moments": {}}, "state is missing"),
        ({"moments": moments | {"exp_avg.w": torch.zeros(1)}}, "'exp_avg.w' does not fit"),
        ({"moments": moments | {"exp_avg.v": torch.zeros(4)}}, "'exp_avg.v' does not fit"),
        ({"moments": moments | {"exp_avg_sq.w": torch.full((4,), torch.inf)}}, "does not fit"),
        ({"reference": {"w": torch.ones(4)}}, "reference: not those"),
        ({"state": TrainingState(step=1, inputs={"reward": "a"})}, "began with another reward"),
    ]
    for change, message in wrong:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.restore(good._replace(**change), learner, TrainingState())
        assert torch.equal(weight, torch.arange(4.0))
    checkpoint.restore(good, learner, TrainingState())
    assert torch.equal(weight, torch.ones(4))
    for impossible in (
        {"step": -1},
        {"position": -1},
        {"seconds": float("nan")},
        {"kl_coef": -1.0},
        {"kl_coef": float("nan")},
    ):
        with pytest.raises(ValidationError):
            TrainingState(**impossible)


def test_resume_only_from_what_it_began_with(inputs):
    """Another base under an adapter, another template, another reward: named, and nothing is continued."""
    stopped(inputs, "model.lora.rank=2")
    sound = (inputs / "model/model.safetensors").read_bytes()
    other = {name: tensor * 1.01 for name, tensor in load_file(inputs / "model/model.safetensors").items()}
    save_file(other, inputs / "model/model.safetensors", metadata={"format": "pt"})
    (inputs / "run/reference.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"began with another reference, another weights; resume with"):
        training(inputs, "model.lora.rank=2", "resume=true")
    (inputs / "model/model.safetensors").write_bytes(sound)
    with pytest.raises(StoppedError):
        sft(load(SftConfig, None, words(inputs, f"run={inputs / 'sft'}")), lambda root: open_session(root, StopAt(2)))
    template = inputs / "model/chat_template.jinja"
    template.write_text(template.read_text() + "{# other #}")
    with pytest.raises(CheckpointError, match="began with another template"):
        sft(load(SftConfig, None, words(inputs, f"run={inputs / 'sft'}", "resume=true")), open_session)
    asked = [f"run={inputs / 'ppo'}", "reward.kind=callable", f"reward.path={inputs / 'length.py'}:score"]
    asked = words(inputs, *asked, "sample.max_new_tokens=3", "train.max_steps=3")
    with pytest.raises(StoppedError):
        train_ppo(load(PpoConfig, None, asked), lambda root: open_session(root, StopAt(3)))
    (inputs / "length.py").write_text("def score(prompts, responses):\n    return [-len(r) for r in responses]\n")
    with pytest.raises(CheckpointError, match="began with another reward; resume"):
        train_ppo(load(PpoConfig, None, [*asked, "resume=true"]), open_session)


def test_probe_and_warnings_come_back_after_resume(inputs):
    """The last KL stands in every record until the next probe; a displacement that was told is not told again."""
    more = ("watch.kl.every=3", "watch.kl.prompts=2", "watch.kl.tokens=3", "reference.displacement_threshold=0.01")
    more = (*more, "optim.lr=1e-2", "train.batch_prompts=32", "train.epochs=6")

    def events(run):
        return [
            (r["step"], r["name"])
            for r in read_jsonl(inputs / run / "metrics.jsonl")
            if r.get("name") == "displacement"
        ]

    training(inputs, *more, f"run={inputs / 'whole'}")
    stopped(inputs, *more)
    # a kill in the middle of a line
    with (inputs / "run/metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 5, "lo')
    training(inputs, *more, "resume=true")
    assert curve(inputs / "run") == curve(inputs / "whole")
    assert all("kl" in record for step, record in curve(inputs / "run").items() if step >= 3)
    assert events("run") == events("whole")
    shown = collect(inputs / "run")
    assert [record["step"] for record in shown.steps] == [1, 2, 3, 4, 5, 6]
    assert not any("damaged" in event["message"] for event in shown.events)


def test_damaged_metrics_are_said(inputs):
    stopped(inputs)
    path = inputs / "run/metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 0.69', '"loss": 0.96'))
    training(inputs, "resume=true")
    assert any("metrics.jsonl is not what was written" in event["message"] for event in collect(inputs / "run").events)


def test_one_process_at_a_time(inputs):
    """The second is told who; a killed one's lock does not count, and no lock lies about."""
    run, recipe = inputs / "held", 'run = "held"\n'
    with (
        start(run, recipe, resume=False),
        pytest.raises(ConfigError, match=rf"held: in use by process {os.getpid()} on "),
        start(run, recipe, resume=False),
    ):
        pass
    program = "import sys, time; from pathlib import Path; from favor import guard\n"
    program += "with guard.held(Path(sys.argv[1]), 'x'): print('held', flush=True); time.sleep(60)"
    lock = inputs / ".out.jsonl.lock"
    with subprocess.Popen([sys.executable, "-c", program, lock], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"out\.jsonl: in use by process {other.pid} on .* \(-c .*, since 20"):
            write_samples(drawn(inputs), quiet)
        other.kill()
    write_samples(drawn(inputs), quiet)
    assert not list(inputs.rglob("*.lock"))


def test_a_folder_that_is_not_ours(inputs):
    for name, text in (
        ("notes.txt", "mine"),
        ("config.toml", '# mine\nrun = "x"\n'),
        ("config.toml", "[site]\nrun=1\n"),
    ):
        folder = inputs / f"of-{len(text)}"
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(ConfigError, match="holds files, but no run of favor"):
            training(inputs, f"run={folder}")
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, text)]


@pytest.mark.parametrize("name", ["checkpoints", "model"])
def test_a_file_in_the_place_of_a_folder_is_refused_before_the_work(inputs, name):
    with start(inputs / "run", 'run = "run"\n', resume=False):
        (inputs / "run" / name).write_text("mine")
    refused = pytest.raises(ConfigError, match=f"run/{name}: is a file where a folder belongs")
    with refused, start(inputs / "run", 'run = "run"\n', resume=True):
        pass
    assert (inputs / "run" / name).read_text() == "mine"


def test_a_failed_start_takes_back_what_it_made_and_nothing_else(inputs):
    missing = f"data.train={inputs / 'gone.jsonl'}"
    with pytest.raises(DataError):
        training(inputs, missing, f"run={inputs / 'a/b/run'}")
    assert not (inputs / "a").exists()
    (inputs / "empty").mkdir()
    with pytest.raises(DataError):
        training(inputs, missing, f"run={inputs / 'empty'}")
    assert list((inputs / "empty").iterdir()) == []
    training(inputs, "train.max_steps=1")
    made = {path: path.read_bytes() for path in (inputs / "run").rglob("*") if path.is_file()}
    for more in ((), ("resume=true",)):
        with pytest.raises(FavorError):
            training(inputs, missing, *more)
    assert {path: path.read_bytes() for path in (inputs / "run").rglob("*") if path.is_file()} == made


def test_out_is_no_input_and_nobody_elses(inputs):
    out, data = inputs / "out.jsonl", inputs / "data.jsonl"
    out.symlink_to(data)
    (inputs / "hard.jsonl").hardlink_to(data)
    before = data.read_bytes()
    for name in ("data.jsonl", "out.jsonl", "hard.jsonl"):
        with pytest.raises(ConfigError, match="is the file it reads"):
            write_samples(drawn(inputs, f"out={inputs / name}", "overwrite=true"), quiet)
    out.unlink()
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"this command is not known to have made it.*overwrite=true"):
        write_samples(drawn(inputs), quiet)
    assert (out.read_text(), data.read_bytes()) == ("mine", before)
    assert write_samples(drawn(inputs, "overwrite=true"), quiet) == 6
    first, said = out.read_bytes(), []
    assert write_samples(drawn(inputs), lambda *words: said.append(words[0])) == 6
    assert "made before with the same settings" in said[0]
    with pytest.raises(ConfigError, match="was made with another seed; choose another"):
        write_samples(drawn(inputs, "seed=1"), quiet)
    tiny.model(seed=1).save_pretrained(inputs / "model")
    with pytest.raises(ConfigError, match="was made with another content of model"):
        write_samples(drawn(inputs), quiet)
    out.write_bytes(first + b"\n")
    with pytest.raises(ConfigError, match="was changed since favor wrote it"):
        write_samples(drawn(inputs, "seed=1"), quiet)


def test_outputs_are_tried_before_the_work(inputs):
    (inputs / "raises.py").write_text("def score(prompts, responses):\n    raise SystemExit('worked')\n")
    reward = ["reward.kind=callable", f"reward.path={inputs / 'raises.py'}:score", f"data={inputs / 'data.jsonl'}"]
    for out, message in (
        (inputs / "no/x", "no such folder"),
        (inputs, "is a folder"),
        (inputs / "raises.py", "it reads"),
    ):
        with pytest.raises(ConfigError, match=message):
            score(load(ScoreConfig, None, [f"out={out}", *reward]), quiet)
    reward[1] = f"reward.path={inputs / 'length.py'}:score"
    (inputs / "o.figures.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"o\.figures\.json: is there already"):
        score(load(ScoreConfig, None, [f"out={inputs / 'o'}", *reward]), quiet)
    (inputs / "o.figures.json").unlink()
    first = score(load(ScoreConfig, None, [f"out={inputs / 'o'}", *reward]), quiet)
    again = score(load(ScoreConfig, None, [f"out={inputs / 'o'}", *reward]), quiet)
    assert again == json.loads(json.dumps(first))
    asked = [
        f"out={inputs / 'p'}",
        f"prompts={inputs / 'data.jsonl'}",
        f"engine.model.path={inputs / 'model'}",
        *reward[:2],
    ]
    asked += ["engine.model.dtype=float32", "sample.max_new_tokens=4"]
    report = prefer(load(PreferConfig, None, asked), quiet)
    assert prefer(load(PreferConfig, None, asked), quiet) == report
    checked = [f"data.train={inputs / 'data.jsonl'}", f"lint.fix={inputs / 'clean.jsonl'}"]
    lint(load(LintConfig, None, checked))
    lint(load(LintConfig, None, checked))
    (inputs / "clean.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"clean\.jsonl: was changed since .*lint\.overwrite=true"):
        lint(load(LintConfig, None, checked))


def test_a_full_disk_leaves_whole_files(tmp_path):
    """With a limit on the size of files, which stops a write in its middle as a full disk does."""
    path, before = tmp_path / "m.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    append(path, {"step": 1})
    write_text(tmp_path / "t", "old")
    whole, handler = path.read_bytes(), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, before[1]))
    try:
        with pytest.raises((FavorError, OSError)):
            append(path, {"step": 2, "text": "x" * 100})
        with pytest.raises((FavorError, OSError)):
            write_text(tmp_path / "t", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == whole
    assert (tmp_path / "t").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_killed_processes_left_is_swept(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f".eval.json.{dead.pid}.tmp", f".eval.json.{os.getppid()}.tmp", "mine.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoints" / f".step-000002.{dead.pid}.tmp").mkdir(parents=True)
    guard.sweep(tmp_path)
    left = {path.name for path in tmp_path.rglob("*")}
    assert left == {f".eval.json.{os.getppid()}.tmp", "mine.tmp", "checkpoints"}


def test_report_shows_what_is_there(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.config.write_text('run = "run"\n')
    rows = [{"kind": "step", "step": s, "loss": 0.7 - s / 10, "unique_tokens": 3} for s in (1, 2)]
    folder.metrics.write_bytes(
        json.dumps(rows[0]).encode() + b"\n\xff\xfe{]\n[1]\n" + json.dumps(rows[1]).encode() + b'\n{"k'
    )
    folder.evaluation.write_text('{"accuracy": "x"}')
    folder.samples.write_text('{"prompt": "p"}\n')
    folder.winrate.write_text("[]")
    folder.frontier.write_text('{"points": 1}')
    record = collect(folder.root, SECTIONS)
    assert [step["loss"] for step in record.steps] == [0.7 - 0.1, 0.7 - 0.2]
    notes = " ".join(event["message"] for event in record.events)
    assert all(name in notes for name in ("metrics.jsonl: 3 of 5 lines", "eval.json", "winrate.json", "frontier.json"))
    write_page(record, folder.report)
    assert "metrics.jsonl: 3 of 5 lines are damaged" in folder.report.read_text()


def test_faults_quickly():
    """The suite's share of `make fault`: one of each kind against the two commands that keep most."""
    here = Path(__file__).parent
    program = [
        sys.executable,
        "-W",
        "ignore",
        "fault.py",
        "--trials",
        "1",
        "--only",
        "train",
        "sample",
        "--minutes",
        "1",
    ]
    kinds = ["--kinds", "aimed kill", "damage"]
    done = subprocess.run([*program, *kinds], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
