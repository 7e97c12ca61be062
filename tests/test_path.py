"""The path is a tested fact: one plain `favor train` step is traced and held against docs/path.md.

What counts: functions of our files that are executed; module-level code and what an import runs do not. Run as a program
it prints the table of files, their lines and their functions.
"""

import ast
import inspect
import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
from test_layers import too_big

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/favor"
# a feature may raise a number to the new size in its own commit, with the reason (CONTRIBUTING.md)
COMMAND_FILES, COMMAND_LINES = 45, 10_042
STORY_FILES, STORY_LINES = 10, 2696
FORM_CHANGES = 7
# what belongs to another command or another option: two passes, cached token ids, rewards, held-out figures ...
ELSEWHERE = (
    "winrate/",
    "generate/",
    "eval/",
    "report/",
    "demo/",
    "rewards/",
    "model/adapters.py",
    "train/checkpoint.py",
    "train/coupled.py",
    "train/watch.py",
    "train/health.py",
    "train/guards.py",
    "data/store.py",
    "data/formats/published.py",
    "data/formats/plain.py",
    "data/formats/columns.py",
    "data/tables.py",
)
# the one part of lint that training runs
CHEAP_CHECK = "lint/cheap.py"
# rare letters, so that no word of another row holds them
MARK = "qzxqzxq"


class Trace:
    """Functions of ours that were called, and classes of ours whose objects held the marked pair."""

    def __init__(self, mark_ids):
        self.called, self.forms, self.hashed, self._mark_ids = {}, {}, 0, mark_ids

    def __call__(self, frame, event, arg):
        code = frame.f_code
        # a named tuple's constructor is a lambda of no file
        if event == "return" and (code.co_name == "__init__" or code.co_filename.startswith("<string")):
            self._made(frame.f_locals.get("self", arg))
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)) or not code.co_flags & inspect.CO_OPTIMIZED:
            return
        if code.co_name == "weights_hash":
            self.hashed += 1
        # the package's own lazy names run only in a fresh process
        if code.co_filename == str(PACKAGE / "__init__.py"):
            return
        if code not in self.called and not _importing(frame):
            self.called[code] = Path(code.co_filename).relative_to(PACKAGE).as_posix()

    def _made(self, value):
        kind = type(value)
        # the self-check's copies of a few rows go nowhere
        ours = kind.__module__.startswith("favor.") and kind.__module__ != "favor.model.layout"
        if ours and kind not in self.forms and self._holds(value):
            self.forms[kind] = kind.__name__

    def _holds(self, record):
        """Whether a record holds the pair itself: its text, its ids, or log-probs per response; not another record that does."""
        fields = record._asdict() if isinstance(record, tuple) else getattr(record, "__dict__", {})
        per_response = any(isinstance(v, torch.Tensor) and re.search(r"_[RP]$", name) for name, v in fields.items())
        return per_response or any(self._within(value) for value in fields.values())

    def _within(self, value, depth=0):
        if isinstance(value, str):
            return MARK in value
        if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy":
            return self._ids(value.reshape(-1).tolist())
        if type(value) in (list, tuple) and depth < 4:
            return self._ids(value) or any(self._within(item, depth + 1) for item in value)
        return isinstance(value, dict) and depth < 4 and any(self._within(item, depth + 1) for item in value.values())

    def _ids(self, values):
        width = len(self._mark_ids)
        return any(list(values[i : i + width]) == self._mark_ids for i in range(len(values) - width + 1))

    @property
    def files(self):
        """Executed files -> number of their functions that ran."""
        names = list(self.called.values())
        return {name: names.count(name) for name in sorted(set(names))}


def _importing(frame):
    """Whether a frame stands below the import of a module."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            return True
        frame = frame.f_back
    return False


def traced(folder):
    """One plain step: pairs in a JSONL file, no held-out data, everything else as it comes."""
    from favor.cli import main

    tiny.save(folder / "model")
    marked = {"prompt": f"Film {MARK}?", "chosen": f"good {MARK} film", "rejected": "bad"}
    rows = [marked, *({"prompt": f"Film {i}?", "chosen": f"good {i} film", "rejected": f"bad {i}"} for i in (1, 2, 3))]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"run={folder / 'run'}", f"model.path={folder / 'model'}", f"data.train={folder / 'train.jsonl'}"]
    trace = Trace(tiny.tokenizer()(MARK).input_ids)
    before, argv = sys.getprofile(), sys.argv
    sys.argv = ["favor", "train", *words, "train.max_steps=1"]
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
        sys.argv = argv
    return trace


def lines(name):
    """Lines of one of our files, blank ones and docstrings too."""
    return len((PACKAGE / name).read_text("utf-8").splitlines())


def documented():
    """(story, others, forms) as docs/path.md lists them."""
    page = (ROOT / "docs/path.md").read_text("utf-8")
    story, others = (re.findall(r"^\| `([\w/]+\.py)` \|", s, re.M) for s in re.split(r"^## ", page, flags=re.M)[1:3])
    forms = re.search(r"^Forms of a pair: (.*)$", page, re.M)[1]
    return story, others, [re.sub(r"`", "", form).strip() for form in forms.split("->")]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return traced(tmp_path_factory.mktemp("path"))


def test_the_files_of_a_step_are_those_of_the_page(trace):
    story, others, _ = documented()
    assert set(story) <= set(trace.files), "the story tells of a file that a plain step does not run"
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.findall(r"`([\w/]+\.py)`", readme) == story
    assert sorted(story + others) == sorted(trace.files)
    for pin, size, most in (
        ("COMMAND_FILES", len(trace.files), COMMAND_FILES),
        ("COMMAND_LINES", sum(map(lines, trace.files)), COMMAND_LINES),
        ("STORY_FILES", len(story), STORY_FILES),
        ("STORY_LINES", sum(map(lines, story)), STORY_LINES),
    ):
        assert size <= most, too_big(f"{pin} of tests/test_path.py", size, most)


def test_next_leads_through_the_story():
    """The last words of each file's docstring name the file that the page tells next, relative to its own folder."""
    story, _, _ = documented()
    for name, following in zip(story, [*story[1:], None], strict=True):
        told = re.findall(r"Next: (\S+)\.(?=\s|$)", ast.get_docstring(ast.parse((PACKAGE / name).read_text("utf-8"))))
        expected = [] if following is None else [os.path.relpath(following, Path(name).parent)]
        assert told == expected, f"{name} should say 'Next:' as docs/path.md does"


def test_a_plain_step_does_not_touch_other_commands_or_options(trace):
    assert [name for name in trace.files if name.startswith(ELSEWHERE)] == []
    assert [name for name in trace.files if name.startswith("lint/")] == [CHEAP_CHECK]


def test_the_weights_are_hashed_once(trace):
    assert trace.hashed == 1


def test_a_pair_changes_form_a_few_times(trace):
    """From a row of the file to the loss: every record that holds the marked pair's text, ids or log-probs is on the page."""
    _, _, forms = documented()
    assert forms[0] == "row"
    assert forms[-1] == "loss"
    assert list(trace.forms.values()) == forms[1:-1]
    assert len(forms) - 1 <= FORM_CHANGES


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = traced(Path(folder))
    story, _, forms = documented()
    print("forms on the page:", " -> ".join(forms))
    table = sorted(((lines(name), name, count) for name, count in found.files.items()), reverse=True)
    print(f"{len(table)} files, {sum(row[0] for row in table)} lines, {sum(row[2] for row in table)} functions")
    print(f"story: {len(story)} files, {sum(map(lines, story))} lines; forms: {' -> '.join(found.forms.values())}")
    for number, name, count in table:
        print(f"| {number:4} | {name} | {count} functions |{' story' if name in story else ''}")
