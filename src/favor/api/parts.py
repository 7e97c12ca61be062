"""Arguments of the Python functions -> sections of a recipe: models, rows, prompts, sides, rewards, judges.

In: what a function was called with. Out: a recipe as nested dicts, and what is to be written to files. Next: keywords.py.
"""

import contextlib
import inspect
import itertools
import os
import sys
import tempfile
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from favor.api.inputs import Given, paths_of
from favor.api.keywords import in_python, put, tree_of
from favor.api.run import Run, load_run
from favor.errors import ConfigError, FavorError

# endings by which a text is the name of a file of prompts, whether it is there or not
_FILES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Asked:
    """What the training functions are given."""

    model: Any
    rows: Any
    held_out: Any
    out: Any
    tokenizer: Any
    quiet: bool
    settings: Mapping[str, Any]


def recipe_of(schema: Any, asked: Asked, given: Given, where: str, **own: Any) -> dict[str, Any]:
    """The recipe of a command that has sections [model] and [data]."""
    tree = keywords_of(schema, with_reward(asked.settings, given, kept=True), where, **own)
    if asked.model is not None:
        put_model(tree, "model", asked.model, given, asked.tokenizer)
    files = paths_of(asked.rows) or []
    if len(files) > 1:
        put(tree, "data.sources", [{"path": file} for file in files], where)
    elif asked.rows is not None:
        put(tree, "data.train", given.rows("train", files[0] if files else asked.rows), where)
    if isinstance(asked.held_out, float):
        put(tree, "data.hold_out.share", asked.held_out, where)
    elif asked.held_out is not None:
        put(tree, "data.eval", given.rows("eval", asked.held_out), where)
    return tree


def keywords_of(schema: Any, settings: Mapping[str, Any], where: str, **own: str) -> dict[str, Any]:
    """The settings as a recipe, and what an argument of the function says."""
    tree = tree_of(schema, settings, where)
    for name, value in own.items():
        if name in tree:
            said = "the first argument" if where == "favor.evaluate" else "out="
            raise ConfigError(f"{where}: '{name}' is {said} in Python; leave {name}= out")
        tree[name] = value
    return tree


def run_of(run: Any) -> Run:
    """A run, or that of a folder."""
    return run if isinstance(run, Run) else load_run(run)


def put_model(tree: dict[str, Any], key: str, model: Any, given: Given, tokenizer: Any) -> None:
    """Section [model], from a dict of it or the model alone."""
    section = dict(model) if isinstance(model, Mapping) else {"path": model}
    if "path" in section:
        section["path"] = given.model("start", section["path"], tokenizer)
    put(tree, key, section, "model")


def prompts_of(prompts: Any, given: Given) -> str:
    """The source of prompts: a file's name, or texts, conversations and rows in memory."""
    if isinstance(prompts, os.PathLike) or (isinstance(prompts, str) and (prompts.endswith(_FILES) or _there(prompts))):
        return os.fspath(prompts)
    if isinstance(prompts, str):
        return given.rows("prompts", [{"prompt": prompts}])
    if isinstance(prompts, list | tuple):
        # one conversation is a list of its turns
        one = bool(prompts) and all(isinstance(turn, Mapping) and "role" in turn for turn in prompts)
        each = [prompts] if one else prompts
        return given.rows("prompts", [row if isinstance(row, Mapping) else {"prompt": row} for row in each])
    return given.rows("prompts", prompts)


def _there(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        # too long for a name
        return False


def side_of(name: str, side: Any, given: Given) -> dict[str, Any]:
    """Section [a] or [b] of a win rate: a model, or responses."""
    if isinstance(side, Mapping):
        return dict(side)
    if isinstance(side, str | os.PathLike):
        return {"file" if Path(side).is_file() else "model": os.fspath(side)}
    in_memory = isinstance(side, list | tuple)
    return {"file": given.rows(name, side)} if in_memory else {"model": given.model(name, side)}


def judge_of(judge: Any, given: Given, *, kept: bool) -> dict[str, Any]:
    """Section [judge]: a function (`file.py:name` is one), what scores, or a dict of it. kept: as in `reward_of`."""
    if isinstance(judge, Mapping):
        return dict(judge)
    if inspect.isroutine(judge):
        return {"kind": "callable", "path": _function(judge, kept=kept)}
    if isinstance(judge, str) and ":" in judge:
        return {"kind": "callable", "path": judge}
    return {"kind": "reward", "reward": reward_of(judge, given, None, kept=kept)}


def with_reward(settings: Mapping[str, Any], given: Given, *, kept: bool = False) -> Mapping[str, Any]:
    """Settings whose section [reward], if there is one, may be given as in `reward_of`."""
    if settings.get("reward") is None:
        return settings
    return {**settings, "reward": reward_of(settings["reward"], given, None, kept=kept)}


def reward_of(reward: Any, given: Given, tokenizer: Any, *, kept: bool) -> dict[str, Any]:
    """Section [reward]. kept: scores are remembered by what made them, and a notebook's function has no file to know it by."""
    if isinstance(reward, Mapping):
        return dict(reward)
    if inspect.isroutine(reward):
        return {"kind": "callable", "path": _function(reward, kept=kept)}
    if isinstance(reward, str) and ":" in reward:
        return {"kind": "callable", "path": reward}
    if isinstance(reward, Run) and "bradley_terry" not in reward.settings:
        return {"kind": "implicit", "path": str(reward.path)}
    return {"kind": "model", "path": given.model("reward", reward, tokenizer)}


def _function(function: Any, *, kept: bool) -> str:
    """A function's place as settings name it. Raises ConfigError for one that cannot be found again by it."""
    module, name = function.__module__, function.__qualname__
    home = sys.modules.get(module)
    if home is None or vars(home).get(name) is not function:
        raise ConfigError(
            f"{module}.{name}: not a function at the top level of a module, script or notebook (a lambda, a method?); "
            "define one there, or name one as 'file.py:function'"
        )
    if kept and module == "__main__":
        raise ConfigError(
            f"{name}: a function of a script or notebook cannot be known again, and what it made is kept; put it into a file "
            f"and name it as 'file.py:{name}'"
        )
    return f"{module}:{name}"


def fresh(base: str) -> Path:
    """The first folder base-1, base-2, ... that is not there. Raises ConfigError where several processes would look at once."""
    if os.environ.get("WORLD_SIZE", "1").strip() not in ("", "1"):
        raise ConfigError("several processes train together (WORLD_SIZE), so name their run folder with out=")
    return next(path for path in (Path(f"{base}-{n}") for n in itertools.count(1)) if not path.exists())


@contextlib.contextmanager
def speaking(schema: type[BaseModel], given: Given) -> Generator[Given]:
    """Errors in the block name arguments and keywords, not files and settings as they are typed in a shell."""
    try:
        yield given
    except FavorError as error:
        error.args = (in_python(schema, given.named(str(error))),)
        error.each = tuple(in_python(schema, given.named(each)) for each in error.each)
        raise


@contextlib.contextmanager
def staged(schema: type[BaseModel]) -> Generator[Given]:
    """A place for what is in memory, for the time of the block; messages do not name it."""
    with tempfile.TemporaryDirectory(prefix="favor-") as place, speaking(schema, Given(Path(place))) as given:
        yield given
