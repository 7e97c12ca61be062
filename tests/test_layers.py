"""Imports go one way, one backward() exists, and the path of a preference stays short."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/favor"
# what each part may import, beside itself
BASE = {"errors", "config", "run", "guard"}
ALLOWED = {
    "errors": set(),
    "stop": {"errors"},
    "settings": {"errors", "trl.names"},
    "config": {"errors", "settings"},
    "guard": {"errors"},
    "run": {"errors", "guard"},
    "output": {"errors", "run", "guard"},
    "words": {"errors", "config", "run", "settings"},
    "help": {"words"},
    # the last lines of a command read what it left behind
    "closing": {"errors", "run", "data.types", "doctor.settings", "train.notes"},
    "data": {"errors", "config", "guard", "run"},
    "losses": {"errors", "config", "data.types"},
    "model": {"errors", "config", "data.types", "data.batches", "data.sight", "ranks", "parts"},
    "ranks": {"errors", "config"},
    "parts": set(),
    "server": {"errors", "config"},
    "rewards": BASE | {"stop", "data", "losses", "model", "ranks"},
    "generate": BASE | {"output", "data", "model", "rewards", "server"},
    "winrate": BASE | {"output", "data", "model", "eval", "generate", "rewards", "server"},
    "realign": BASE
    | {"output", "data", "model", "eval", "generate.samples", "ranks", "rewards"}
    | {"report.curves", "report.frame", "report.plot", "report.samples", "report.table"},
    "diff": BASE
    | {"output", "data", "model", "eval.intervals", "eval.sequence", "generate.engines", "generate.samples", "rewards"}
    | {
        "lint.language",
        "train.health",
        "report.found",
        "report.frame",
        "report.samples",
        "report.table",
        "report.words",
    },
    "audit": BASE | {"data", "eval", "generate", "report", "winrate"},
    "eval": BASE | {"output", "data", "model", "losses", "ranks", "rewards", "generate"},
    "train": BASE
    | {"stop", "data", "losses", "model", "ranks", "parts", "rewards"}
    | {"lint.cheap", "eval.figures", "eval.intervals"},
    "lint": BASE | {"output", "settings", "data", "model", "rewards", "report.frame", "report.words"},
    "value": BASE
    | {"output", "data", "model", "eval.figures", "eval.intervals", "report.frame", "report.words"}
    | {"lint.settings", "lint.cheap", "lint.page", "rewards.model"},
    "ask": BASE
    | {"output", "data", "model", "eval.sequence", "label.intake", "label.settings", "label.store", "lint.settings"}
    | {"value.cheap", "value.pairs"},
    "label": BASE | {"output", "data", "eval.intervals"},
    "chat": BASE | {"data", "model", "generate.engines", "rewards", "label"},
    "report": {"errors", "run", "guard", "eval.intervals"},
    "export": BASE | {"data", "model", "rewards", "report.table", "report.frame"},
    "live": {"errors", "run", "guard", "label.gate", "label.run"},
    "demo": BASE | {"stop", "rewards", "eval", "train", "report"},
    "online": BASE | {"output", "stop", "data", "losses", "model", "rewards", "generate", "train"},
    "conform": BASE | {"output", "stop", "ranks", "rewards.user", "report.frame", "train"},
    "doctor": BASE | {"data.tokenize", "model", "train.packs"},
    "init": BASE | {"data", "settings", "train", "words"},
    "trl": BASE | {"losses", "train"},
    # favor in Python: what the commands call, called
    "api": BASE
    | {"settings", "data", "model", "ranks", "stop", "generate", "eval", "train", "lint", "report", "winrate", "diff"}
    | {"value", "ask", "audit", "realign", "conform"}
    | {"closing", "pages", "trl.names", "words", "favor_frontier"},
    "command": {"closing", "model", "stop"},
    "preferring": BASE
    | {"closing", "command", "pages", "report.table", "eval", "generate", "lint", "value", "ask", "label"},
    "commands": BASE
    | {"eval", "ranks", "train", "report", "winrate", "diff", "audit", "realign", "demo", "online"}
    | {"closing", "command", "preferring", "words", "pages", "data", "doctor", "export", "chat", "conform"}
    # the paper's experiment stands on the library; nothing of the library may know it, but for its command
    | {"favor_frontier"},
    # the pages of runs, for every command that writes or serves one
    "pages": {"closing", "run", "stop", "report", "favor_frontier"},
    # commands without a recipe
    "plain": {"errors", "closing", "pages", "report", "live", "init", "trl", "favor_frontier"},
    "cli": BASE | {"closing", "help", "words", "command", "commands", "plain", "train", "stop", "settings"},
}
# inside train/ a file imports earlier ones only
TRAIN_ORDER = (
    *("step", "loggers", "session", "moments", "checkpoint", "notes", "optim", "loop", "packs", "reference", "stats"),
    *("rollout", "coupled", "watch", "health", "guards"),
    *("sft", "reward", "ppo", "preference", "dryrun", "measure", "fit"),
)
# inside data/ too; the package formats is one
DATA_ORDER = (
    *("types", "schema", "readers", "tables", "sources", "formats", "pictures", "grow", "settings", "read"),
    *("encode", "shapes", "turns", "render", "sight", "tokenize", "splits", "store", "prepare", "prompts"),
    *("features", "batches"),
)
# the size of the package; a feature may raise a number to the new size in its own commit, with the reason (CONTRIBUTING.md)
MOST_LINES, MOST_FILES = 36_684, 247
# comment lines per 100 of code, on the files of the story (docs/path.md)
LEAST_COMMENTS = 5
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """Modules of ours that a file imports, in functions too; type-checking blocks count."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "favor":
            base = node.module.removeprefix("favor").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}" if base else alias.name
                is_module = (PACKAGE / inner.replace(".", "/")).with_suffix(".py").exists() or (
                    PACKAGE / inner
                ).is_dir()
                yield inner if is_module else base
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "favor_frontier":
            yield "favor_frontier"
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("favor.") for a in node.names if a.name.startswith(("favor.", "favor_")))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return
    allowed = ALLOWED[parts[0]] | {parts[0]}
    for module in imported(path):
        assert any(module == a or module.startswith(a + ".") for a in allowed), f"{path.name} may not import {module}"


def test_one_backward():
    calls = [path.name for path in FILES if ".backward()" in path.read_text("utf-8").replace("ONLY backward()", "")]
    assert calls == ["step.py"]


@pytest.mark.parametrize(("room", "order"), [("train", TRAIN_ORDER), ("data", DATA_ORDER)])
def test_a_room_is_in_layers(room, order):
    files = {
        path: path.relative_to(PACKAGE / room).parts[0].removesuffix(".py") for path in (PACKAGE / room).rglob("*.py")
    }
    files = {path: name for path, name in files.items() if name != "__init__"}
    assert set(files.values()) == set(order)
    for path, name in files.items():
        found = {module.split(".")[1] for module in imported(path) if module.startswith(f"{room}.")}
        assert found - {name} <= set(order[: order.index(name)]), name


def test_files_are_short_and_the_package_shrinks():
    lengths = [len(path.read_text("utf-8").splitlines()) for path in FILES]
    assert max(lengths) <= 400, "a file may have 400 lines: split it where its subjects part"
    for name, size, most in (("MOST_LINES", sum(lengths), MOST_LINES), ("MOST_FILES", len(FILES), MOST_FILES)):
        assert size <= most, too_big(f"{name} of tests/test_layers.py", size, most)


def too_big(pin, size, most):
    """What to do when a change goes over a pinned size."""
    return (
        f"{size} is more than the {most} of {pin}: first look for what your change makes unnecessary; what a feature "
        f"needs beyond that raises the pin to {size}, in the same commit, with the reason in its message (CONTRIBUTING.md)"
    )


def test_functions_are_short():
    lengths = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                limit = 120 if node.name == "_loop" else 60
                assert node.end_lineno - node.lineno < limit, f"{path.name}: {node.name}"
                lengths.append(node.end_lineno - node.lineno + 1)
    lengths.sort()
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[len(lengths) * 9 // 10] <= 20


def test_the_story_has_comments_where_a_reader_stops():
    from test_path import documented

    for name in documented()[0]:
        source = (PACKAGE / name).read_text("utf-8")
        comments = sum(
            token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(source).readline)
        )
        # without blank lines, comments and docstrings
        code = len(ast.unparse(_without_docstrings(ast.parse(source))).splitlines())
        assert comments >= LEAST_COMMENTS * code / 100, name


def _without_docstrings(module):
    for node in ast.walk(module):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            is_text = [isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) for item in body]
            node.body = [item for item, text in zip(body, is_text, strict=True) if not text] or [ast.Pass()]
    return module


def test_ruff_sees_every_file():
    """Its default excludes hold names such as dist, so that a package of that name would never be looked at."""
    roots = ("src", "tests", "benchmarks", "experiments", "examples")
    ruff = Path(sys.executable).with_name("ruff")
    shown = subprocess.run(
        [ruff, "check", "--show-files", *roots], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert {path for root in roots for path in (ROOT / root).rglob("*.py")} <= set(map(Path, shown))


def test_no_pickle_and_no_blanket_except():
    for path in FILES:
        text = path.read_text("utf-8")
        assert "pickle" not in text
        assert "torch.load" not in text
        assert "except Exception" not in text
        assert "except:" not in text


def caught(node):
    """Names of what a handler catches; a bare one catches BaseException."""
    kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    return {"BaseException" if kind is None else ast.unparse(kind) for kind in kinds}


def test_only_the_place_that_runs_foreign_code_catches_anything():
    found = []
    for path in FILES:
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef):
                handlers = [node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)]
                # what only cleans up passes everything on
                handlers = [node for node in handlers if ast.unparse(node.body[-1]) != "raise"]
                wide = any(caught(node) & {"Exception", "BaseException"} for node in handlers)
                found += [(str(path.relative_to(PACKAGE)), function.name)] if wide else []
    # a function of the user's may raise anything
    assert found == [("rewards/user.py", "guarded")]


def test_every_module_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path
