"""What stands on the pages of the documentation, and a reader who types it, in page order, in a folder of their own."""

import contextlib
import json
import re
import shlex
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest
import tiny
from label_desk import pair_in, serving, write_jsonl

from favor.cli import app, main
from favor.config import load
from favor.data.formats import recognise
from favor.data.read import judge, read
from favor.data.settings import DataConfig
from favor.data.sources import read_objects
from favor.train.preference import TrainConfig

ROOT = Path(__file__).parent.parent
NAMES = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [
    "cd",
    "favor",
    "hf",
    "make",
    "mlflow",
    "ollama",
    "pip",
    "python",
    "source",
    "tensorboard",
    "torchrun",
    "trackio",
    "wandb",
]
# a block, or code within a line that begins with a program
_PIECE = re.compile(
    r"^```(?P<kind>\w*)\n(?P<block>.*?)^```$|(?<!`)`(?P<line>(?:" + "|".join(PROGRAMS) + r") [^`\n]+)`(?!`)",
    re.M | re.S,
)
# stands on pages for any command
_ANY = "COMMAND"


class Piece(NamedTuple):
    """A block of a page, or a command within a line; kind: "" for commands, else the block's language."""

    kind: str
    text: str
    heading: str = ""
    inline: bool = False


def pieces(text):
    """What can be typed, run or read of a page, in its order."""
    for found in _PIECE.finditer(text):
        heading = re.findall(r"^#+ (.*)$", text[: found.start()], re.MULTILINE)[-1:]
        yield Piece(found["kind"] or "", found["block"] or found["line"], "".join(heading), found["block"] is None)


def commands(text):
    """The commands of a block or line, each as its words, as a shell makes them."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in re.split(r"(?:^|\s)# ", line)[0].split("&&"):
            if command.strip():
                yield shlex.split(command)


def typed(page):
    """Every command of a page."""
    return [words for piece in pieces(page.read_text("utf-8")) if not piece.kind for words in commands(piece.text)]


# --- what a page's reader has before its first command ---


def rows_of(name, count):
    return [{"prompt": f"{name} {i}?", "chosen": f"good {i} film", "rejected": f"bad {i}"} for i in range(count)]


def _answers(said):
    return [{"prompt": f"Film {i}?", "responses": [f"{said} {i}", f"{said} film"]} for i in range(4)]


def _favor(*words):
    """The command line in this process; the exit code must be 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["favor", *words])
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code, shlex.join(("favor", *words))


# enough that both models of a run differ
_MUCH = ("optim.lr=0.05", "train.batch_prompts=4", "data.train=prefs.jsonl", "model.path=MODEL")
_VERDICTS = [
    {"question": f"Film {i}?", "response_a": f"good {i}", "response_b": "bad", "winner": "model_a"} for i in range(60)
]


def _like_the_hub(path):
    """A data set with a split, as the hub has it."""
    from datasets import Dataset, DatasetDict

    rows = [json.loads(line) for line in (ROOT / "tests/data/formats/shp.jsonl").read_text("utf-8").splitlines()]
    DatasetDict({"validation": Dataset.from_list(rows)}).save_to_disk(path)


def pictured_model(path):
    """A tiny model that reads pictures."""
    pytest.importorskip("PIL", reason="favor[vision] is not installed")
    import pictured

    pictured.save(path)


def pictured_file(path):
    """A picture of noise."""
    import pictured

    pictured.picture(path, 90, 120)


MAKE: dict[str, Callable[[Path], object]] = {
    "MODEL": tiny.save,
    "HuggingFaceTB/SmolLM2-135M-Instruct": tiny.save,
    "SMOLVLM": pictured_model,
    "cat.png": pictured_file,
    "pictures.jsonl": lambda path: write_jsonl(path, [row | {"images": ["cat.png"]} for row in rows_of("Film", 6)]),
    "prefs.jsonl": lambda path: write_jsonl(path, rows_of("Film", 24)),
    "train.jsonl": lambda path: write_jsonl(path, rows_of("Film", 24)),
    "test.jsonl": lambda path: write_jsonl(path, rows_of("Other film", 8)),
    "prompts.jsonl": lambda path: write_jsonl(path, [{"prompt": f"Film {i}?"} for i in range(3)]),
    "new.csv": lambda path: path.write_text("prompt\nWhat of film 7?\nWhat of film 8?\n"),
    "known.jsonl": lambda path: write_jsonl(path, rows_of("Known film", 2)),
    "hh.jsonl": lambda path: write_jsonl(path, _VERDICTS),
    "org/dataset": _like_the_hub,
    "reward.py": lambda path: path.write_text(
        "def length(prompts, responses):\n    return [len(r) / 9 for r in responses]\n"
    ),
    "FILE": lambda path: path.write_text("DPOConfig(output_dir='out', learning_rate=5e-6, beta=0.05)\n"),
    "recipe.toml": lambda path: _favor("init", "--model", "MODEL", "--data", "prefs.jsonl", "--out", path.name),
    "runs/sft": lambda path: _favor("sft", "run=runs/sft", "train.max_steps=1", *_MUCH),
    "runs/reward": lambda path: _favor("reward", "run=runs/reward", "train.max_steps=1", *_MUCH),
    "runs/dpo": lambda path: _favor("train", "run=runs/dpo", "data.hold_out.share=0.3", *_MUCH),
    "samples.jsonl": lambda path: write_jsonl(path, _answers("good")),
    "others.jsonl": lambda path: write_jsonl(path, _answers("bad")),
    "pairs.jsonl": lambda path: write_jsonl(path, rows_of("Film", 3)),
    "ranked.jsonl": lambda path: write_jsonl(path, [row | {"scores": [2, 1]} for row in _answers("good")]),
    "mine.py": lambda path: shutil.copy(ROOT / "src/favor/conform/adapters/with_favor.py", path),
    "recipes": lambda path: shutil.copytree(ROOT / "recipes", path),
}


@dataclass(frozen=True)
class Shelf:
    """Things that are made once and copied into the folders of readers."""

    folder: Path

    def take(self, name, folder, called=None):
        """Put a thing into a folder, by this name or another; made now if it was not."""
        if not (self.folder / name).exists():
            with contextlib.chdir(self.folder):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                for needed in () if name in ("MODEL", "prefs.jsonl") else ("MODEL", "prefs.jsonl"):
                    self.take(needed, self.folder)
                MAKE[name](self.folder / name)
        here = folder / (called or name)
        if not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            source = self.folder / name
            shutil.copytree(source, here) if source.is_dir() else shutil.copy(source, here)


# --- what is done with each kind of piece ---

_SAMPLES = ("sample.max_new_tokens=4",)
# sizes of a command that would take long; not for a key that the page gives itself
SMALL = {
    **dict.fromkeys(("train", "sft", "reward"), ("train.max_steps=1",)),
    "ppo": (*_SAMPLES, "train.max_steps=1", "train.batch_prompts=2", "ppo.samples_per_prompt=2"),
    "demo": ("pairs=4", "max_steps=2", "lr=0.05"),
    "frontier": (
        *("seeds=[0]", "jobs=1", "task.model=MODEL", "task.prompts=prefs.jsonl", "task.eval_prompts=test.jsonl"),
        *("task.reward.kind=callable", "task.reward.path=reward.py:length", "offline.prompts=4", "offline.answers=2"),
        *("offline.epochs=1", "budgets=[]", "fresh.rounds=1", "ppo.rollouts=1", "ppo.batch_prompts=2", "ppo.answers=2"),
        *("evaluate.prompts=4", "evaluate.samples=2", "evaluate.max_new_tokens=4"),
        *(f"methods.{name}=[0.5]" for name in ("dpo", "dpo_fresh", "ipo", "kto", "unlikelihood")),
        *(f"methods.{name}=[2]" for name in ("ppo", "ppo_true", "preferred_ft", "best_of_n")),
    ),
    "loop": (*_SAMPLES, "rounds=1", "prompts_per_round=3", "samples_per_prompt=2", "train.max_steps=1"),
    "eval": (*_SAMPLES, "sample_prompts=2"),
    "winrate": ("max_prompts=3",),
    "diff": (*_SAMPLES, "max_prompts=3"),
    "realign": (*_SAMPLES, "lambdas=[0,0.5,1]", "sample_prompts=2"),
    "conform": ("cases=first_loss",),
    "audit": ("pairs=12",),
    "export": ("check_tokens=6",),
    **dict.fromkeys(("sample", "prefer", "chat"), _SAMPLES),
}
# settings and options that name what a command writes
_WRITES = ("out", "page", "lint.page", "lint.out", "--fix", "--out")
# commands whose run= is a folder that they make
_MAKE_RUNS = ("train", "sft", "reward", "ppo", "loop", "winrate", "audit", "frontier")
_SHOWS_ONLY = ("--dry-run", "--settings", "--help", "--version")


def smaller(words):
    """The words of a favor command with its small sizes behind them."""
    if any(option in words for option in _SHOWS_ONLY):
        return words
    given = {word.partition("=")[0] for word in words}
    # a few prompts settle no gate
    gated = words[0] == "diff" and any(word.startswith(("gate.", "recipes/")) for word in words)
    words = [*words, *(["unsettled=pass"] if gated else [])]
    return [*words, *(word for word in SMALL.get(words[0], ()) if word.partition("=")[0] not in given)]


class Reader(NamedTuple):
    """Somebody with a page before them: their folder, the names of their Python, commands that they pass over."""

    folder: Path
    names: types.ModuleType
    passes: Callable[[list[str]], bool]

    def does(self, piece):
        """Type, run or read a piece; whatever fails raises."""
        if piece.kind == "":
            for words in commands(piece.text):
                # within a sentence a name alone speaks of a command
                if piece.inline and len(words) == 2 and words[0] == "favor" and words[1][0] != "-":
                    assert words[1] in NAMES, words
                elif not self.passes(words):
                    self.types(["train" if word == _ANY else word for word in words])
        else:
            {"python": self.runs, "toml": self.loads, "json": self.reads, "csv": self.reads}[piece.kind](piece)

    def types(self, words):
        """One command of favor."""
        assert words[0] == "favor", f"{shlex.join(words)}: not a command of favor, nor listed in NOT_HERE"
        words = smaller(words[1:])
        shows = any(option in words for option in _SHOWS_ONLY)
        exports = any(word.startswith("out=") for word in words)
        if words[0] in ("chat", "label", "watch") and not exports and not shows:
            self.visits(words)
            return
        _favor(*words)
        for path in () if shows else written(words):
            assert (self.folder / path).exists(), f"{shlex.join(words)} did not write {path}"

    def visits(self, words):
        """A command that serves a page: started, asked, voted at, stopped."""
        with serving(self.folder, *words) as (_, address), httpx2.Client(follow_redirects=True, timeout=60) as client:
            page = client.get(address)
            assert page.status_code == 200
            assert "<html" in page.text
            origin = {"Origin": address.partition("/?")[0]}
            {"label": _labels, "chat": _chats, "watch": lambda *_: None}[words[0]](client, origin)

    def runs(self, piece):
        """A block of Python, in the names of the blocks before it."""
        exec(compile(piece.text, "page", "exec"), vars(self.names))

    def loads(self, piece):
        """A recipe, or a part of one: its settings are settings, and its data is read."""
        recipe = self.folder / "of-the-page.toml"
        recipe.write_text(piece.text)
        words = [f"run={self.folder / 'toml'}", "model.path=MODEL"]
        load(TrainConfig, recipe, words)
        _favor("train", str(recipe), *words, "--dry-run")

    def reads(self, piece):
        """Rows: every line of JSON by itself, a table whole; their format is the one that the heading names, if it names one."""
        texts = piece.text.splitlines() if piece.kind == "json" else [piece.text]
        for text in texts:
            path = self.folder / f"row.{piece.kind.replace('json', 'jsonl')}"
            path.write_text(text + "\n")
            (row,) = (row for _, row in read_objects(str(path), "train"))
            found = recognise(row)
            assert found == piece.heading or piece.kind == "csv", f"{text[:60]} is read as {found}"
            if found == "sft":
                judge(row, "sft", 1.0)
                continue
            trees, _ = read(str(path), DataConfig(train=str(path), format=found), "train")
            assert len(trees) == 1


def written(words):
    """What a command of favor says that it writes."""
    keys = {*_WRITES, *(("run",) if words[0] in _MAKE_RUNS else ())}
    options = dict(pairwise(words))
    for key, value in [*(word.partition("=")[::2] for word in words), *options.items()]:
        if key in keys and value:
            yield value


def _labels(client, origin):
    """Vote on every pair that there is."""
    client.post(origin["Origin"] + "/name", data={"name": "Ana"}, headers=origin)
    for _ in range(100):
        page = client.get(origin["Origin"] + "/").text
        if "Nothing is left for you" in page:
            return
        fields = {"pair": pair_in(page), "answer": "left"}
        assert client.post(origin["Origin"] + "/vote", data=fields, headers=origin).status_code == 200
    raise AssertionError("favor label never comes to an end")


def _chats(client, origin):
    """Ask until two answers differ, and vote."""
    for seed in range(20):
        sample = {"temperature": 1.0, "max_new_tokens": 4}
        asked = {"prompt": "Film 3?", "sample": sample, "seed": seed, "blind": True}
        lines = client.post(origin["Origin"] + "/ask", json=asked, headers=origin).text.splitlines()
        voted = {"ask": json.loads(lines[-1])["done"], "answer": "first"}
        if "saved" in client.post(origin["Origin"] + "/vote", json=voted, headers=origin).json():
            return
    raise AssertionError("favor chat took no vote")
