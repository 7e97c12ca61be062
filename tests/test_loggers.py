"""watch.logger: every tool gets the figures of metrics.jsonl, once each, also over a resume; without its package a line says so."""

import json
import os
import sqlite3
import struct
from pathlib import Path

import pytest
import tiny

from favor.config import load
from favor.errors import ConfigError
from favor.run import RunFolder, read_jsonl
from favor.stop import StoppedError
from favor.train import loggers, session
from favor.train.loggers import following
from favor.train.preference import TrainConfig, train
from favor.train.session import Session, in_session
from favor.train.sft import SftConfig, sft

ROWS = [{"prompt": f"Film {i}?", "chosen": f"good {i} film", "rejected": f"bad {i}"} for i in range(6)]


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Settings of a run of six steps, held-out figures twice; the tools' own variables are as of somebody new."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    tiny.save(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [
        f"run={tmp_path / 'run'}",
        f"model.path={tmp_path / 'model'}",
        f"data.train={tmp_path / 'rows.jsonl'}",
        "train.batch_prompts=2",
        "train.epochs=2",
        "save.every=2",
    ]


EVAL = ["watch.eval.every=3"]


def trained(words, *more, stop_at=None):
    """The run's folder, trained to the end, or stopped after a step as by Ctrl-C."""
    config = load(TrainConfig, None, [*words, f"data.eval={_rows(words)}", *EVAL, *more])
    if stop_at is None:
        in_session(lambda open_session: train(config, open_session))
        return RunFolder(Path(config.run))
    opened, append = [], session.append

    def stopping(path, record):
        append(path, record)
        if record.get("step") == stop_at and record["kind"] == "step":
            opened[0].stop.signal_number = 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "append", stopping)
        with pytest.raises(StoppedError):
            in_session(lambda open_session: train(config, lambda root: opened.append(open_session(root)) or opened[0]))
    return RunFolder(Path(config.run))


def _rows(words):
    return next(word.split("=", 1)[1] for word in words if word.startswith("data.train="))


def expected(folder):
    """(curve, step) -> figure, as metrics.jsonl has them."""
    found = {}
    for record in read_jsonl(folder.metrics):
        group = {"step": "train", "eval": "eval"}.get(record["kind"])
        if group:
            figures = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
            # what is written first counts: a resumed run repeats it
            for key, value in figures.items():
                found.setdefault((f"{group}/{key}", record["step"]), value)
    return found


def of_tensorboard(folder):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    from tensorboard.util import tensor_util

    found = []
    for path in sorted((folder.root / "tensorboard").iterdir()):
        for event in loader.EventFileLoader(str(path)).Load():
            told = [value for value in event.summary.value if value.tag.startswith(("train/", "eval/"))]
            found += [((value.tag, event.step), float(tensor_util.make_ndarray(value.tensor))) for value in told]
    return found


def wandb_records(raw):
    """The records of a .wandb file: a head of 7 bytes, then LevelDB's log, blocks of 32 KiB of (crc, length, kind, data)."""
    at, parts = 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", raw, at + 4)
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        # whole, or the last part
        if kind in (1, 4):
            yield parts
            parts = b""


def of_wandb(folder):
    from wandb.proto import wandb_internal_pb2

    found, ids = [], set()
    for path in sorted((folder.root / "wandb").glob("offline-run-*/run-*.wandb")):
        ids.add(path.name)
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            found += [((key, items["step"]), items[key]) for key in items if key.startswith(("train/", "eval/"))]
    # one run, in as many parts as there were starts
    assert len(ids) == 1
    return found


def of_mlflow(folder):
    with sqlite3.connect(folder.root / "mlflow/mlflow.db") as db:
        assert db.execute("SELECT count(*) FROM runs").fetchone() == (1,)
        assert db.execute("SELECT status FROM runs").fetchone() == ("FINISHED",)
        found = db.execute("SELECT key, step, value FROM metrics ORDER BY timestamp").fetchall()
        assert db.execute("SELECT value FROM params WHERE key = 'loss.beta'").fetchone() == ("0.1",)
    db.close()
    return [((key, step), value) for key, step, value in found]


def of_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("favor")
    found = []
    for line in SQLiteStorage.get_logs("favor", run):
        found += [((k, line["step"]), v) for k, v in line.items() if k.startswith(("train/", "eval/"))]
    return found


TOOLS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio}
MODULES = {"mlflow": ("mlflow", "sqlalchemy", "alembic")}


def needs(tool):
    for name in MODULES.get(tool, (tool,)):
        pytest.importorskip(name, reason=f"favor[{tool}] is not installed")


# the tools' own warnings are not ours
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_has_the_figures_of_the_run_once_each_over_a_resume(tool, words, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    needs(tool)
    if tool == "trackio":
        monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
        monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    trained(words, f"watch.logger={tool}", stop_at=3)
    folder = trained(words, f"watch.logger={tool}", "resume=true")
    found, wanted = TOOLS[tool](folder), expected(folder)
    assert len(wanted) > 60
    # held-out figures begin before the first step
    assert {step for _, step in wanted} == set(range(7))
    assert sorted(key for key, _ in found) == sorted(wanted)
    for key, value in found:
        assert value == pytest.approx(wanted[key], rel=1e-5), key
    # the files are in the run, which is still favor's own
    if tool != "trackio":
        assert (folder.root / tool).is_dir()


def test_a_resumed_run_repeats_what_it_had_told_only_in_its_own_file(tmp_path, monkeypatch):
    """A kill after step 3 with a checkpoint of step 2: step 3 is written again and not told again."""
    told = []

    def tool(root, settings):
        from contextlib import nullcontext

        return nullcontext(lambda figures, step: told.append((step, figures)))

    monkeypatch.setattr(loggers, "_TOOLS", {"tensorboard": tool})
    monkeypatch.setattr(loggers, "_NEEDED", {"tensorboard": ()})
    folder = RunFolder(tmp_path)
    folder.config.write_text('run = "x"\n[loss]\nbeta = 0.1\n')
    before = [{"kind": "step", "step": n, "loss": 1.0} for n in (1, 2, 3)] + [{"kind": "eval", "step": 2, "loss": 1.0}]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in before) + '{"kind": "st')
    with following("tensorboard", folder) as tell:
        tell({"kind": "event", "step": 2, "name": "resume", "message": "resumed"})
        for n in (3, 4):
            tell({"kind": "step", "step": n, "loss": 0.5, "note": "text", "ok": True})
            tell({"kind": "eval", "step": n, "loss": 0.25})
    assert told == [(3, {"eval/loss": 0.25}), (4, {"train/loss": 0.5, "train/ok": 1.0}), (4, {"eval/loss": 0.25})]


@pytest.mark.parametrize("tool", TOOLS)
def test_without_the_package_one_line_says_so_before_anything_is_made(tool, words, monkeypatch, tmp_path):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    config = load(TrainConfig, None, [*words, f"watch.logger={tool}"])
    with pytest.raises(
        ConfigError, match=rf"watch.logger = '{tool}' needs .*not installed here; run: pip install 'favor\[{tool}\]'"
    ):
        in_session(lambda open_session: train(config, open_session))
    assert not (tmp_path / "run").exists()


def test_by_default_nothing_is_told_and_nothing_imported(words, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: pytest.fail("looked for a package"))
    folder = RunFolder(Path(words[0].split("=", 1)[1]))
    in_session(lambda open_session: train(load(TrainConfig, None, [*words, "train.max_steps=1"]), open_session))
    assert not any((folder.root / tool).exists() for tool in TOOLS)
    assert Session.__dataclass_fields__["tell"].default is None


def test_other_training_commands_have_the_key(words):
    needs("tensorboard")
    config = load(SftConfig, None, [*words, "watch.logger=tensorboard"])
    in_session(lambda open_session: sft(config, open_session))
    folder = RunFolder(Path(config.run))
    found = dict(of_tensorboard(folder))
    assert {step for name, step in found if name == "train/loss"} == set(range(1, 7))


def test_a_tool_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="watch.logger"):
        load(TrainConfig, None, ["run=x", "model.path=m", "data.train=t", "watch.logger=excel"])
