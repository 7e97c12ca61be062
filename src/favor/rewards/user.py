"""Functions of yours: found, called, and the one place where foreign code may raise anything.

In: `file.py:function` or `package.module:function`. Out: the function, whose failures are one line that names file,
function, exception and line. Next: source.py.
"""

import ast
import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from favor.errors import ConfigError, FavorError, first_line
from favor.stop import StoppedAtOnceError


def find_function(path: str) -> Callable[..., Any]:
    """The function, guarded. Raises ConfigError naming what is missing, or what the file does when it is imported."""
    place, name = _split(path)
    with guarded(path, "could not be imported"):
        module = _imported(place)
    found = vars(module).get(name)
    if not callable(found):
        raise ConfigError(f"{path}: {place} has no function '{name}'; define it there, or name another")

    def call(*given: Any) -> Any:
        with guarded(path, "failed"):
            return found(*given)

    return call


def check_function(path: str) -> None:
    """Look for a file and its syntax without running it, which may be dear. Raises ConfigError as `find_function`."""
    place, _ = _split(path)
    if place.endswith(".py"):
        with guarded(path, "could not be read"):
            ast.parse(_existing(Path(place)).read_bytes(), place)


def _split(path: str) -> tuple[str, str]:
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise ConfigError(f"{path}: expected file.py:function or package.module:function")
    return place, name


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path}: no such Python file; check the path before the colon")
    return path


@contextlib.contextmanager
def guarded(path: str, what: str) -> Generator[None]:
    """Turn whatever the user's code raises into a ConfigError; a signal that ends the command passes.

    The working folder is what it was, so that relative paths of ours keep their meaning.
    """
    here = Path.cwd()
    try:
        yield
    # in a notebook Ctrl-C is an exception, and it is the person's, not the function's
    except (FavorError, StoppedAtOnceError, KeyboardInterrupt):
        raise
    # the user's code may raise anything, and may exit; nothing of ours runs in the block
    except BaseException as error:  # noqa: BLE001
        kind = said = type(error).__name__
        with contextlib.suppress(Exception):
            said = first_line(error)
        shown = kind if said == kind else f"{kind}: {said}"
        raise ConfigError(f"{path}: {what}{_place(error, path)} ({shown}); fix it there") from None
    finally:
        with contextlib.suppress(OSError):
            os.chdir(here)


def _place(error: BaseException, path: str) -> str:
    """The line of the user's file where it happened, if it was there."""
    file = path.rpartition(":")[0]
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f" at line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" at line {lines[-1]}" if lines else ""


def _imported(place: str) -> Any:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{place}: no such Python module ({error}); install it or name a file.py") from None
    path = _existing(Path(place))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses and the like look their module up by name
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
