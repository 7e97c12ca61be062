"""The pages are true: links lead somewhere; commands, Python, recipes and rows are run, in page order, in a folder that has what a reader has."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types

import pytest
from pages import MAKE, PAGES, ROOT, Reader, Shelf, commands, pieces, rows_of, typed, written
from test_winrate import server  # noqa: F401

import favor
from favor import demo
from favor.data.formats import RowError
from favor.errors import FavorError
from favor.help import EXAMPLES
from favor.trl.names import KEYS, LOSSES, SAID

# commands of pages that no test here can run, by their first words, and why
NOT_HERE = {
    "make": "sets up an environment of its own, or takes minutes; its target exists",
    "source": "belongs to a shell",
    "pip": "would change the environment of the tests; `make smoke` installs in an empty one",
    "torchrun": "starts processes of its own: test_several_processes does it",
    "ollama": "another program, which is not here",
    "tensorboard": "another program's page; tests/test_loggers.py reads the files that it shows",
    "wandb": "sends a run away",
    "mlflow": "another program's page; tests/test_loggers.py reads the files that it shows",
    "trackio": "another program's page; tests/test_loggers.py reads the files that it shows",
    "hf": "signs in at a hub",
    "favor doctor --hub": "asks a hub; tests/test_doctor.py has one that is none",
    "favor --install-completion": "changes the start files of a shell; tests/test_discovery.py asks what they would ask",
    "favor export run=runs/dpo out=film-model push=OWNER/NAME": "uploads to a hub; tests/test_export.py has one that is none",
    "cd tests": "belongs to the next one",
    "python benchmarks/failures.py": "trains for minutes; tests/test_starting_values.py reads it",
    "python benchmarks/memory.py": "loads the real model six times; tests/test_kept.py counts the same on a tiny one",
    "python benchmarks/scale.py": "tests/test_scale.py holds its tables against the page",
    "python benchmarks/starting_values.py": "trains for an hour; tests/test_starting_values.py has its table and picture",
    "python -W ignore interval_coverage.py": "simulates for minutes; tests/test_interval_coverage.py has a part of it",
}
# pages that tell of other commits
PAST = ("log",)
# beside MODEL, prefs.jsonl and test.jsonl: what a reader of a page has before its first command
HAS = {
    "chat": ["runs/dpo", "recipe.toml"],
    "choose": ["runs/dpo", "prompts.jsonl"],
    "conform": ["mine.py"],
    "doctor": ["runs/dpo"],
    "export": ["runs/dpo"],
    "failures": ["recipe.toml"],
    "formats": ["hh.jsonl", "org/dataset"],
    "guards": ["recipe.toml"],
    "label": ["prompts.jsonl", "known.jsonl"],
    "python": ["FILE", "HuggingFaceTB/SmolLM2-135M-Instruct"],
    "coming_from": ["FILE"],
    "realign": ["runs/dpo", "runs/dpo:runs/dpo-strong", "reward.py"],
    "rlhf": ["recipes", "reward.py"],
    "vision": ["SMOLVLM", "cat.png", "pictures.jsonl"],
    "winrate": ["runs/dpo", "runs/sft"],
    "diff": ["runs/dpo", "runs/sft", "recipes"],
    "README": ["new.csv"],
    # the same run under the names of the page
    "metrics": ["runs/dpo:A", "runs/dpo:B", "runs/dpo:C", "runs/dpo:RUN"],
}
# what stands in recipes/ for the dots of a first line
DOTS = {
    "model.path": "MODEL",
    "engine.model": "MODEL",
    "data.train": "prefs.jsonl",
    "data.eval": "test.jsonl",
    "prompts": "prompts.jsonl",
}
TRAINED = ("dpo", "dpo-lora", "paper", "plackett-luce")
# of which the commands take more than a few seconds
SLOW = ("chat", "rlhf")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def passed_over(words):
    return shlex.join(words).startswith(tuple(NOT_HERE))


def stand_in_for_the_demo(monkeypatch, folder):
    """The tiny model and a few reviews, for what `favor demo` downloads."""
    reviews = folder / ".reviews"
    reviews.mkdir()
    texts = [
        {"film": f"f{i % 9}", "text": f"a {('dull', 'warm')[i % 2]} film {i % 7}", "fresh": i % 2 == 1}
        for i in range(60)
    ]
    for name, rows in (("train", rows_of("Film", 8)), ("test", rows_of("Other", 8)), ("classifier", texts)):
        (reviews / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(demo, "model_folder", lambda cache, say: folder / "MODEL")
    monkeypatch.setattr(demo, "review_files", lambda cache, say: reviews)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def reader(shelf, tmp_path, monkeypatch):
    """A reader who has MODEL, prefs.jsonl and test.jsonl, and a Python that imported favor."""
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "prefs.jsonl", "test.jsonl"):
        shelf.take(name, tmp_path)
    # a module, as a script or a notebook is one: its functions are found again by its name
    names = types.ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, names.__name__, names)
    rows = rows_of("Film", 12)
    vars(names).update(rows=rows, model="MODEL", held_out=rows[:3], favor=favor)
    stand_in_for_the_demo(monkeypatch, tmp_path)
    return Reader(tmp_path, names, passed_over)


READ = [page for page in PAGES if page.stem not in PAST and any(pieces(page.read_text("utf-8")))]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page.stem in SLOW else [], id=page.stem) for page in READ]
)
def test_what_a_page_says_can_be_done(page, reader, shelf, server):  # noqa: F811
    """From the first piece to the last: a later one reads what an earlier one wrote."""
    for name in HAS.get(page.stem, ()):
        thing, _, called = name.partition(":")
        shelf.take(thing, reader.folder, called or thing)
    follow(reader, page.read_text("utf-8").replace("http://localhost:8000/v1", server["url"]))


def follow(reader, text):
    for piece in pieces(text):
        reader.does(piece)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "```\nfavor train model=MODEL data=nowhere.jsonl run=r\n```",
            "favor train model=MODEL data=nowhere.jsonl run=r",
        ),
        ("so `favor report runs/none` and", "favor report runs/none"),
        ("```\nfavor lint data=prefs.jsonl && favor eval run=runs/none  # words\n```", "favor eval run=runs/none"),
        ("ask `favor nothing`", "nothing"),
        ("```\nfavor label db=empty.sqlite\n```", "no such file"),
        ("```\nrm -r runs\n```", "not a command of favor, nor listed in NOT_HERE"),
        ("```python\nfavor.train(model, rows, speed=2)\n```", "speed"),
        ('```toml\n[data]\ntrain = "prefs.jsonl"\nspeed = 2\n```', r"unknown key 'data\.speed'"),
        ('```toml\n[data]\ntrain = "nowhere.jsonl"\n```', "favor train"),
        ('# ranked\n```json\n{"chosen": "a", "rejected": "b"}\n```', "is read as pairs"),
        ('# pairs\n```json\n{"chosen": "a", "rejected": "a"}\n```', "row 1"),
        ("```csv\nprompt;chosen\na;b\n```", "prompt"),
        ("```yaml\na: b\n```", "yaml"),
    ],
)
def test_what_cannot_be_done_would_be_seen(text, said, reader):
    """The planted faults: each parses, or names what there is, and fails when it is done."""
    with pytest.raises((AssertionError, FavorError, RowError, KeyError), match=said):
        follow(reader, text)


def test_a_command_that_writes_nothing_would_be_seen(reader, monkeypatch):
    monkeypatch.setattr("pages._favor", lambda *words: None)
    with pytest.raises(AssertionError, match=r"did not write clean\.jsonl"):
        follow(reader, "```\nfavor lint data=prefs.jsonl --fix clean.jsonl\n```")


@pytest.mark.parametrize("prefix", NOT_HERE)
def test_what_is_passed_over_stands_on_a_page(prefix):
    """Nothing is passed over that no page says any more."""
    assert any(shlex.join(words).startswith(prefix) for page in PAGES for words in typed(page))


def test_what_is_made_has_a_target():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    made = [words[1] for page in PAGES if page.stem not in PAST for words in typed(page) if words[0] == "make"]
    assert len(made) > 15
    assert set(made) <= set(targets)


@pytest.mark.slow
@pytest.mark.dist
def test_several_processes(reader, shelf):
    (words,) = (words for words in typed(ROOT / "README.md") if words[0] == "torchrun")
    shelf.take("recipe.toml", reader.folder)
    subprocess.run([*words, "train.max_steps=1"], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200)
    assert (reader.folder / "runs/recipe/model/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_runs_by_its_first_line(path, reader, shelf):
    """With something in the place of its dots."""
    command = path.read_text("utf-8").splitlines()[0].partition(": ")[2]
    assert command.startswith(f"favor {'train' if path.stem in TRAINED else path.stem} recipes/{path.name}")
    for name in ("recipes", "runs/sft", "runs/reward", "runs/dpo", "prompts.jsonl", "reward.py", "ranked.jsonl"):
        shelf.take(name, reader.folder)
    for key, value in DOTS.items():
        command = command.replace(f"{key}=...", f"{key}={value}")
    if path.stem == "plackett-luce":
        command = command.replace("data.train=prefs.jsonl", "data.train=ranked.jsonl")
    if path.stem in ("dpo", "sft", "reward"):
        shutil.rmtree(reader.folder / "runs" / path.stem)
    follow(reader, f"```\n{command}\n```")


@pytest.mark.slow
@pytest.mark.parametrize("command", EXAMPLES)
def test_the_examples_of_help_can_be_done(command, reader, shelf):
    """Where everything lies that they name and do not write themselves, and what the recipes name."""
    text = "\n".join(EXAMPLES[command])
    own = {path for words in commands(text) for path in written(words[1:])}
    for name in MAKE:
        if name in text and name not in own:
            shelf.take(name, reader.folder)
    for name in {"reward.py", "recipes", "runs/reward", "runs/sft", "runs/dpo"} - own:
        shelf.take(name, reader.folder)
    follow(reader, f"```\n{text}\n```")


def test_the_examples_of_the_method_print_what_they_say(capsys):
    (text,) = (piece.text for piece in pieces((ROOT / "docs/how.md").read_text("utf-8")) if piece.kind == "python")
    exec(compile(text, "page", "exec"), {})
    said = re.findall(r"^print\(.*\)\s+# ([\d.]+)", text, re.MULTILINE)
    assert len(said) == 3
    assert capsys.readouterr().out.split() == said


def test_every_name_of_trl_is_on_its_page():
    page = (ROOT / "docs/coming_from.md").read_text("utf-8")
    rows = {name: f"`{key}`" for name, key in KEYS.items()} | SAID
    for name, (kind, more) in LOSSES.items():
        rows[name] = ", ".join(
            f"`{word}`" for word in (kind, *(f"loss.{key}={str(v).lower()}" for key, v in more.items()))
        )
    assert [name for name, said in rows.items() if f"| `{name}` | {said} |" not in page] == []
