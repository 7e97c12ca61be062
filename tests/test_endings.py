"""Every command ends alike: how long it took, what changed, what to type next; --quiet and --json; what it prints stays clean."""

import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx2
import pytest
import tiny

from favor import cli
from favor.cli import COMMANDS, app
from favor.closing import Done
from favor.command import Command

NAMES = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
OWN = [name for name in NAMES if name not in COMMANDS]
ROWS = [{"prompt": f"Film {i}?", "chosen": f"good {i} film", "rejected": f"bad {i}"} for i in range(8)]
# commands that print what was asked for, and nothing else, on stdout
PRODUCTS = ("schema", "init", "from-trl")
# a page that is served until a signal comes
SERVED = ("watch", "label", "chat")


def ends(text):
    """What is said at the end: (what changed, what to type next)."""
    lines = text.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("done in "))
    seconds, _, changed = lines[at].partition("; ")
    assert re.fullmatch(r"done in \d.*(s|min)", seconds)
    following = [re.sub(r"^next: |^ {6}", "", line) for line in lines[at + 1 :]]
    return changed, following


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endings")
    tiny.save(folder / "model")
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "trl.json").write_text('{"beta": 0.2}')
    (folder / "length.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    return folder


def test_the_table_of_commands_is_whole():
    assert set(NAMES) == {*COMMANDS, "report", "watch", "runs", "init", "from-trl", "schema"}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_can_be_quiet_and_speak_json(name, favor):
    code, out, err = favor(name, "--help")
    assert (code, err) == (0, "")
    assert re.search(r"--quiet\b", out)
    assert re.search(r"--json\b", out)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("failed", [False, True])
def test_a_command_with_a_recipe_ends_by_the_one_mechanism(name, failed, favor, monkeypatch):
    """Whatever it does: here it prints a word and hands over what it has done."""
    config = COMMANDS[name]().config
    assert inspect.signature(COMMANDS[name]().run).return_annotation in (Done, "Done", "closing.Done")
    done = Done(("it changed",), {"x": 1}, {"out": "o"}, ("favor next",), failed=failed)
    monkeypatch.setattr(cli, "_train", lambda: Command(config, lambda *args: print("at work") or done))
    monkeypatch.setitem(cli.COMMANDS, name, cli._train)
    monkeypatch.setitem(cli.OTHERS, name, cli._train)
    monkeypatch.setattr("favor.config.load", lambda *args: None)
    assert favor(name, "--quiet") == (int(failed), "", "")
    code, out, err = favor(name)
    assert (code, err) == (int(failed), "")
    assert out.startswith("at work\n")
    assert ends(out) == ("it changed", ["favor next"])
    code, out, err = favor(name, "--json")
    assert (code, err) == (int(failed), "at work\n")
    told = json.loads(out)
    assert (told["command"], told["figures"], told["paths"]) == (name, {"x": 1}, {"out": "o"})
    assert told["next"] == ["favor next"]


def test_what_each_command_says_at_its_end(place, favor, monkeypatch, tmp_path):
    """Real runs, one after the other, as their last lines lead; what is printed next can be typed."""
    monkeypatch.setattr("favor.doctor.speed._SECONDS", 0.02)
    model, data, reward = (
        f"model.path={place / 'model'}",
        f"data.train={place / 'd.jsonl'}",
        f"{place / 'length.py'}:score",
    )
    small = ["train.batch_prompts=4", "train.max_steps=2"]
    sampled = [f"prompts={place / 'd.jsonl'}", "sample.max_new_tokens=4"]
    called = ["reward.kind=callable", f"reward.path={reward}"]
    engine = [f"engine.model.path={place / 'model'}", *sampled, "max_prompts=2"]
    typed = {
        "doctor": [],
        "lint": [data],
        "init": ["--model", place / "model", "--data", place / "d.jsonl", "--out", "recipe.toml"],
        "sft": [model, data, *small, "run=sft"],
        "train": [model, data, *small, "run=dpo", "data.hold_out.share=0.25"],
        "eval": ["run=dpo", "sample_prompts=2", "sample.max_new_tokens=4"],
        "report": ["dpo"],
        "runs": ["."],
        "sample": [*engine, "out=s.jsonl"],
        "score": ["data=s.jsonl", "out=scores.jsonl", *called],
        "prefer": [*engine, "out=p.jsonl", *called, "sample.temperature=2"],
        "winrate": ["a.file=s.jsonl", "b.file=s.jsonl", "judge.kind=reward", "run=duel"]
        + [f"judge.{word}" for word in called],
        "diff": ["sft", "dpo", *sampled, "checks=false", "max_prompts=2"],
        "realign": ["run=dpo", *sampled[1:], "lambdas=[0, 0.5]", "sample_prompts=2"],
        "reward": [model, data, *small, "run=reward"],
        "ppo": [model, data, *small, *called, "run=ppo", "sample.max_new_tokens=4"],
        "export": ["run=dpo", "out=exported", "dtype=float32"],
    }
    for name, words in typed.items():
        code, out, err = favor(name, *words)
        assert (code, err) == (0, ""), (name, out, err)
        changed, following = ends(out)
        assert changed, name
        assert following, name
        for line in following:
            asked = shlex.split(line)
            assert asked[0] == "favor", (name, line)
            assert asked[1] in NAMES, (name, line)
    assert "8 pairs" not in (tmp_path / "recipe.toml").read_text()
    code, out, _ = favor("runs", ".", "--json")
    listed = {run["name"]: run["state"] for run in json.loads(out)["figures"]["runs"]}
    assert {name: listed[name] for name in ("dpo", "sft", "ppo", "reward")} == dict.fromkeys(
        ("dpo", "sft", "ppo", "reward"), "finished"
    )
    code, out, _ = favor("report", "dpo", "sft", "--json")
    told = json.loads(out)
    assert Path(told["paths"]["report"]).name == "compare.html"
    assert told["figures"]["headline"].startswith("dpo and sft side by side")


def test_a_report_says_what_to_do_next_by_the_name_it_was_given(place, favor, tmp_path):
    """Not by the name that the run had when it was made."""
    words = [f"model.path={place / 'model'}", f"data.train={place / 'd.jsonl'}", "train.max_steps=1", "run=old"]
    assert favor("train", *words)[0] == 0
    (tmp_path / "old").rename(tmp_path / "new")
    changed, following = ends(favor("report", "new")[1])
    assert changed.startswith("Trained 1 step")
    assert following == ["favor eval run=new data=FILE", "favor chat run=new"]
    assert ends(favor("report", "run=new")[1])[1] == following
    assert favor("eval", "new")[2] == "favor: new: is a folder, not a recipe; a run is named by run=new\n"
    where = tmp_path / "new"
    assert ends(favor("report", str(where))[1])[1] == [f"favor eval run={where} data=FILE", f"favor chat run={where}"]
    page = (tmp_path / "new/report.html").read_text()
    assert str(tmp_path) not in page


def test_a_dry_run_ends_with_the_command_that_trains(place, favor):
    words = [f"model.path={place / 'model'}", f"data.train={place / 'd.jsonl'}", "run=r"]
    code, out, err = favor("train", *words, "--dry-run")
    assert (code, err) == (0, "")
    changed, following = ends(out)
    assert changed == "nothing was trained"
    assert shlex.split(following[0]) == ["favor", "train", *words]
    told = json.loads(favor("train", *words, "--dry-run", "--json")[1])
    assert told["figures"]["steps"] == "1, each of up to 16 prompts"


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_printed_on_request_stands_alone(name, place, favor, tmp_path):
    """On stdout, so that `> FILE` keeps it; the last lines go to stderr, and --quiet leaves them out."""
    words = {
        "schema": ["sft"],
        "from-trl": [place / "trl.json"],
        "init": ["--model", place / "model", "--data", place / "d.jsonl"],
    }[name]
    read = json.loads if name == "schema" else tomllib.loads
    code, out, err = favor(name, *words)
    assert code == 0
    assert read(out)
    changed, _ = ends(err)
    assert changed
    assert favor(name, *words, "--quiet") == (0, out, "")
    code, told, err = favor(name, *words, "--json")
    assert (code, err) == (0, "")
    assert json.loads(told)["product"] == out
    assert list(tmp_path.iterdir()) == []


def test_what_from_trl_and_init_print_loads(place, favor, tmp_path):
    _, out, _ = favor("init", "--model", place / "model", "--data", place / "d.jsonl")
    (tmp_path / "recipe.toml").write_text(out)
    code, out, err = favor("train", "recipe.toml", "--dry-run")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_page_says_its_address_and_ends_with_its_last_lines(place, tmp_path, quiet):
    """Of watch; the address is said however quiet it is to be, or nobody could open it."""
    pytest.importorskip("starlette", reason="favor[label] is not installed")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text('run = "run"\n[model]\npath = "m"\n')
    code = "import sys; from favor.cli import main; sys.argv[0] = 'favor'; main()"
    words = [sys.executable, "-c", code, "watch", "run", *(["--quiet"] if quiet else [])]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        assert re.match(r"http://127\.0\.0\.1:\d+/\?token=", first)
        httpx2.get(first.split("?")[0])
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "favor: stopped by SIGTERM; the run itself goes on\n"
    if quiet:
        assert "done in" not in out
    else:
        assert ends(out) == ("the page is closed", ["favor report run"])


def test_label_counts_its_answers_and_says_how_to_go_on(favor, tmp_path):
    from favor.preferring import labelled

    done = labelled(str(tmp_path / "l.sqlite"), ["label", "db=l.sqlite"])
    assert done.changed == ("no answers yet",)
    assert done.following[0] == "favor label db=l.sqlite"
