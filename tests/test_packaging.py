"""What is shipped and what is checked: the lock agrees with the pins, the wheel has its templates, recipes say what they cost."""

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def named(text):
    return re.sub(r"[-_.]+", "-", text).lower()


def pins(path):
    """Name -> version of every pin of a requirements file."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\\n]+)", path.read_text("utf-8"), re.MULTILINE)
    return {named(name): version for name, version in found}


def needed(name, seen):
    """Every package that one needs to run, torch's own left out: the hashes of a build of torch are its index's."""
    if name in seen or name == "torch":
        return seen
    seen.add(name)
    for line in distribution(name).requires or []:
        requirement, _, marker = line.partition(";")
        if "extra" not in marker and not re.search(r"win32|Windows|Darwin|emscripten|python_version < ", marker):
            needed(named(re.match(r"[A-Za-z0-9._-]+", requirement)[0]), seen)
    return seen


def test_the_lock_agrees_with_the_pins_and_the_project():
    locked, pinned = pins(ROOT / "requirements.lock"), pins(ROOT / "constraints.txt")
    assert {name: pinned.get(name) for name in locked} == locked
    core = {named(re.match(r"[A-Za-z0-9._-]+", line)[0]) for line in PROJECT["project"]["dependencies"]}
    assert core - locked.keys() == {"torch"}
    seen = set()
    for name in core:
        needed(name, seen)
    assert seen - locked.keys() == set(), "run `make lock`"


def test_every_locked_package_has_hashes_and_no_place():
    text = (ROOT / "requirements.lock").read_text("utf-8")
    assert not re.search(r"https?:|file:|--(?:extra-)?index|--find-links|/", text)
    blocks = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
    assert len(blocks) > 40
    assert all("--hash=sha256:" in block for block in blocks)


def test_the_wheel_has_every_file_that_is_no_module():
    package = ROOT / "src/favor"
    data = PROJECT["tool"]["setuptools"]["package-data"]["favor"]
    packed = {path for pattern in data for path in package.glob(pattern)}
    others = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert packed == others
    assert all(list(package.glob(pattern)) for pattern in data), "a pattern that matches nothing"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_says_what_it_costs(path):
    """Measured by benchmarks/recipes.py (the frontier's by itself): what was done, time, memory, machine, commit."""
    second = path.read_text("utf-8").splitlines()[1]
    assert re.fullmatch(r"# Measured: .+ in \d+ (s|min), \d+\.\d GiB \(.+ CPU cores; .+ at [0-9a-f]{7}\)", second)
