"""`favor runs` and `favor --version`."""

import json
import os
from importlib.metadata import version

import pytest


def make(folder, beta, loss, *, steps=3, accuracy=None, finished=True, age=0):
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'run = "{folder}"\nseed = 0\n[loss]\nkind = "dpo"\nbeta = {beta}\n')
    os.utime(folder / "config.toml", (1e9 - age, 1e9 - age))
    records = [
        {"kind": "step", "step": i + 1, "loss": loss + steps - 1 - i, "seconds": 2.0 * (i + 1)} for i in range(steps)
    ]
    if accuracy is not None:
        records.append({"kind": "eval", "step": steps, "accuracy": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        (folder / "model").mkdir()


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "a", 0.1, 0.5, accuracy=0.6, age=10)
    make(tmp_path / "deep/b", 0.3, 0.4, accuracy=0.7)
    make(tmp_path / "c", 0.1, 0.6, steps=1, finished=False, age=20)
    make(tmp_path / "d", 0.1, 0.0, steps=0, finished=False, age=30)
    return tmp_path


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("name", ["a", "c", "d", "deep/b"]),
        ("loss", ["deep/b", "a", "c", "d"]),
        ("accuracy", ["deep/b", "a", "c", "d"]),
        ("time", ["deep/b", "a", "c", "d"]),
    ],
)
def test_runs_are_listed_in_an_order(monkeypatch, favor, folder, order, names):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, err = favor("runs", str(folder), "--sort", order)
    assert (code, err) == (0, "")
    lines = [line.strip("│ ").split("│") for line in out.splitlines() if line.startswith("│")]
    rows = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert list(rows) == names
    assert rows["a"] == ["finished", "3", "0.500", "0.600", "6 s"]
    assert rows["c"] == ["unfinished", "1", "0.600", "", "2 s"]
    assert rows["d"] == ["not begun", "0", "", "", "0 s"]


def test_the_settings_that_differ_are_shown(monkeypatch, favor, folder):
    monkeypatch.setenv("COLUMNS", "120")
    _, out, _ = favor("runs", str(folder), "--settings")
    (line,) = (line for line in out.splitlines() if "loss.beta" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == ["loss.beta", "0.1", "0.1", "0.1", "0.3"]
    assert "loss.kind" not in out


def test_what_cannot_be_listed_is_one_line(favor, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    code, _, err = favor("runs", str(tmp_path / "empty"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "no run in it" in err
    code, _, err = favor("runs", str(folder), "--sort", "beta")
    assert code == 2
    assert "--sort beta: runs are sorted by one of name, loss, accuracy, time" in err


def test_the_version_is_that_of_the_package(favor):
    assert favor("--version") == (0, f"favor {version('favor')}\n", "")


def test_a_run_itself_is_a_folder_of_one(monkeypatch, favor, folder):
    code, out, err = favor("runs", str(folder / "a"), "--sort", "time")
    assert (code, err) == (0, "")
    assert "finished" in out
