"""The settings of `favor conform`, and what a trainer is asked to do.

In: a recipe. Out: ConformConfig; the place of an adapter. Next: cases.py.
"""

import ast
from collections.abc import Sequence
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, field_validator, model_validator

from favor.config import STRICT, Overwrite
from favor.errors import ConfigError

# name -> its file beside this one; with_: a module of the name of what it imports would stand in its way
BUILT_IN = {name: f"with_{name}.py" for name in ("favor", "trl", "one_file")}


class ConformConfig(BaseModel):
    """A recipe for `favor conform`."""

    model_config = STRICT
    adapter: str
    """favor, trl, one_file, or a Python file that defines train(model, rows, out, settings)."""
    cases: tuple[str, ...] = ()
    """Only these cases, by their names with commas between; without it all."""
    out: str | None = None
    """Write what was found to this JSON file."""
    page: str | None = None
    """Write what was found to this HTML page."""
    overwrite: Overwrite = False
    timeout_s: float = Field(default=300.0, gt=0)
    """Seconds that a run of a few steps may take, the import of the trainer included."""

    @field_validator("cases", mode="before")
    @classmethod
    def _by_commas(cls, names: Any) -> Any:
        return tuple(name.strip() for name in names.strip("[]").split(",")) if isinstance(names, str) else names

    @field_validator("cases")
    @classmethod
    def _are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            return names
        from favor.conform.cases import cases

        known = [case.name for case in cases()]
        for name in names:
            if name not in known:
                raise ValueError(f"{name!r} is no case; name some of {', '.join(known)}")
        return names

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "ConformConfig":
        if self.overwrite and self.out is None and self.page is None:
            raise ValueError("overwrite is not read: neither out nor page is written; set one of them or remove it")
        return self


def adapter_file(adapter: str) -> Path:
    """Where an adapter lies. Raises ConfigError when it is not there, is no Python, or defines no train."""
    built_in = adapter in BUILT_IN
    path = Path(__file__).parent / "adapters" / BUILT_IN[adapter] if built_in else Path(adapter).absolute()
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(f"{adapter}: no such Python file; name one, or {', '.join(BUILT_IN)}")
    if not any(isinstance(node, ast.FunctionDef) and node.name == "train" for node in _parsed(path).body):
        raise ConfigError(f"{path}: defines no function train(model, rows, out, settings) (docs/conform.md)")
    # the places that Python looks in, not what this process happens to hold: a function's file can have the same name
    places = (BuiltinImporter, FrozenImporter, PathFinder)
    found = next((spec for spec in (place.find_spec(path.stem) for place in places) if spec is not None), None)
    if not built_in and found is not None and found.origin not in (None, str(path)):
        raise ConfigError(f"{path}: a module named {path.stem!r} is installed, which it would hide; rename the file")
    return path


def launch_words(path: Path) -> Sequence[str]:
    """LAUNCH of an adapter, a list of texts: what stands between `python` and the program on 2 ranks; () without one."""
    for node in _parsed(path).body:
        names = (
            [target.id for target in node.targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.Assign)
            else []
        )
        if isinstance(node, ast.Assign) and names == ["LAUNCH"]:
            try:
                words = ast.literal_eval(node.value)
            except ValueError:
                words = None
            if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
                raise ConfigError(f"{path}: LAUNCH must be a list of texts, written out")
            return tuple(words)
    return ()


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{path}: is no Python ({error}); correct it") from None
