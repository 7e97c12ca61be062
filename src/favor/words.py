"""One vocabulary over commands: run=, model=, data=, out= mean the same everywhere, whatever a command's own key is called.

In: a command's name and its words. Out: the words with its own keys. Next: config.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from favor.config import read
from favor.errors import CheckpointError
from favor.run import RunFolder

_TRAINING = MappingProxyType({"out": "run", "model": "model.path", "data": "data.train"})
_SAMPLING = MappingProxyType({"model": "engine.model.path", "data": "prompts"})
# command -> short name -> its own key; a name that is a key of the command already stands in no row
SHORT: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("train", "sft", "reward", "ppo"), _TRAINING),
    "loop": {"out": "run", "model": "model.path", "data": "prompts"},
    "lint": {"model": "model.path", "data": "data.train"},
    **dict.fromkeys(("sample", "prefer"), _SAMPLING),
    "winrate": {"out": "run", "data": "prompts"},
    "frontier": {"out": "run"},
    "demo": {"out": "run"},
}
# what says how rows are read is a section, and lies below [data] where a command has one; its keys may be given alone
_READING = MappingProxyType({"columns": "data.columns", "verdict": "data.verdict"})
_WITH_DATA = ("train", "sft", "reward", "ppo", "lint")
# commands that take a finished run where they need a model or a reward
OF_A_RUN = ("sample", "prefer", "score")


def expanded(command: str, words: Sequence[str]) -> list[str]:
    """The words with the command's own keys in place of the short ones.

    Of model, data and out only text is a short form: `model={path="x"}` is the section. Raises CheckpointError for a run=
    that is no finished run.
    """
    return [word for given in words for word in _own(command, given)]


def _own(command: str, word: str) -> Iterator[str]:
    key, equals, value = word.partition("=")
    section, dot, rest = key.partition(".")
    if equals and command in _WITH_DATA and section in _READING:
        yield f"{_READING[section]}{dot}{rest}={value}"
    elif not equals or not isinstance(read(None, [f"x={value}"])["x"], str):
        yield word
    elif key == "run" and command in OF_A_RUN:
        yield from _of_run(command, value)
    elif command == "score" and key == "model":
        yield from ("reward.kind=model", f"reward.path={value}")
    else:
        yield f"{SHORT.get(command, {}).get(key, key)}={value}"


def _of_run(command: str, run: str) -> Iterator[str]:
    folder = RunFolder(Path(run))
    if not folder.config.exists() or not folder.model.exists():
        raise CheckpointError(f"run={run}: no finished run here (config.toml and model/); train first, or name another")
    if command != "score":
        yield f"engine.model.path={folder.model}"
    elif "bradley_terry" in read(folder.config):
        yield from ("reward.kind=model", f"reward.path={folder.model}")
    else:
        yield from ("reward.kind=implicit", f"reward.path={run}")
