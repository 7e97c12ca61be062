"""The pages are true: links lead somewhere, commands are commands, snippets run and print what the page says they print."""

import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import tiny

import favor
from favor.cli import COMMANDS, main
from favor.config import load
from favor.errors import ConfigError
from favor.trl.names import KEYS, LOSSES, SAID

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROWS = [{"prompt": f"Film {i}?", "chosen": f"good {i} film", "rejected": "bad"} for i in range(12)]
# what stands for a file of the reader's
NEEDED = {"train": ["run=r", "model.path=m", "data.train=d"], "lint": ["data.train=d"]}


def blocks(page, language):
    return [text for kind, text in BLOCK.findall(page.read_text("utf-8")) if kind == language]


def commands(page):
    """Every `favor ...` of a block, its words as a shell makes them."""
    for text in blocks(page, ""):
        for line in text.replace("\\\n", " ").splitlines():
            for command in line.split(" # ")[0].split("&&"):
                if command.strip().startswith("favor "):
                    yield shlex.split(command)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


ALL = [(page.stem, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}-{words[0]}-{i}" for i, (page, words) in enumerate(ALL)])
def test_a_command_of_a_page_is_one(page, words):
    """Its settings are settings, their values are allowed; what it leaves out is in the recipe that it names."""
    command, *rest = words
    if command not in COMMANDS:
        assert command in ("init", "report", "watch", "schema", "from-trl")
        return
    options = {"--dry-run": 1, "--settings": 1, "--fix": 2}
    while found := next((i for i, word in enumerate(rest) if word in options), None):
        del rest[found : found + options[rest[found]]]
    recipe = next((Path(word) for word in rest if "=" not in word), None)
    settings = [word for word in rest if "=" in word]
    if recipe is not None and not (ROOT / recipe).exists():
        recipe, settings = None, [*NEEDED[command], *settings]
    load(COMMANDS[command]().config, recipe and ROOT / recipe, settings)


def test_a_wrong_command_would_be_seen(tmp_path):
    """The planted fault: a key that no command has."""
    (tmp_path / "page.md").write_text("```\nfavor train recipe.toml optim.rate=1 && favor eval run=r  # words\n```\n")
    first, second = commands(tmp_path / "page.md")
    assert second == ["eval", "run=r"]
    with pytest.raises(ConfigError, match=r"unknown key 'optim\.rate'"):
        test_a_command_of_a_page_is_one("page", first)


def run_command(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["favor", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, words


def run_python(text, names, folder):
    """One block in the page's namespace. MODEL and hub ids are the tiny model."""
    text = re.sub(r'"(MODEL|HuggingFaceTB/[\w.-]+)"', repr(str(folder / "model")), text)
    exec(compile(text, "page", "exec"), names)


def test_the_quick_start_runs_as_it_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "model")
    page, names = ROOT / "docs/quickstart.md", {}
    first, second = blocks(page, "python")
    run_python(first, names, tmp_path)
    typed = list(commands(page))
    assert [words[0] for words in typed] == ["lint", "init", "train", "train", "eval", "report"]
    for words in typed:
        run_command([str(tmp_path / "model") if word == "MODEL" else word for word in words], monkeypatch)
    assert (tmp_path / "runs/first/report.html").exists()
    run_python(second, names, tmp_path)
    assert (tmp_path / "runs/second/model/model.safetensors").exists()


def test_the_examples_of_the_method_print_what_they_say(capsys):
    (text,) = blocks(ROOT / "docs/how.md", "python")
    run_python(text, {}, Path())
    said = re.findall(r"^print\(.*\)\s+# ([\d.]+)", text, re.MULTILINE)
    assert len(said) == 3
    assert capsys.readouterr().out.split() == said


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_of_a_page_runs(monkeypatch, tmp_path, page):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "model")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    # a module, as a script or a notebook is one: its functions are found again by its name
    here = types.ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, here.__name__, here)
    vars(here).update(rows=ROWS, model=str(tmp_path / "model"), held_out=ROWS[:3], favor=favor)
    for text in blocks(ROOT / page, "python"):
        run_python(text, vars(here), tmp_path)


def test_every_name_of_trl_is_on_its_page():
    page = (ROOT / "docs/coming_from.md").read_text("utf-8")
    assert [name for name in (*KEYS, *SAID, *LOSSES) if f"| `{name}` | " not in page] == []
    for name, key in KEYS.items():
        assert f"| `{name}` | `{key}` |" in page
