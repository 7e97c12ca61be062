"""The edge of the program: what the machine refuses, as one line; what is our own mistake, as such.

In: an exception that no part of favor expected. Out: a line for the user, or None. Next: cli.py.
"""

import sys
from types import TracebackType

from safetensors import SafetensorError

from favor.errors import clipped, refused
from favor.hide import without_secrets

# what `explained` may know a line for; what it knows none for is raised on
EXPECTED = (OSError, ValueError, RuntimeError, MemoryError, SafetensorError)
_MEMORY = (
    "lower train.batch_prompts, train.max_tokens_per_pack or sample.batch, shorten tokens.max_tokens or "
    "sample.max_new_tokens, or train adapters with model.lora.rank=16"
)


def explained(error: Exception) -> str | None:
    """One line for what the machine or a library's types say about the input; None for what must be our own mistake."""
    if isinstance(error, UnicodeEncodeError | UnicodeDecodeError):
        return f"text that cannot be written or read as {error.encoding} ({error.reason}); use UTF-8"
    if isinstance(error, OSError):
        return refused(error)
    if isinstance(error, MemoryError):
        return f"out of memory ({first_line(error)}); {_MEMORY}"
    if isinstance(error, RecursionError):
        return f"nested too deeply ({first_line(error)}); flatten what is nested in the recipe or the data"
    return _by_library(error)


def _by_library(error: Exception) -> str | None:
    """Errors of libraries that only a running command has imported."""
    if isinstance(error, SafetensorError):
        return (
            f"a safetensors file cannot be written or read ({first_line(error)}); free space, or choose another place"
        )
    # imported here only where they are imported already: `favor --help` needs neither
    if "torch" in sys.modules:
        from torch import OutOfMemoryError

        if isinstance(error, OutOfMemoryError):
            return f"out of memory on the GPU ({first_line(error)}); {_MEMORY}"
    if "pydantic" in sys.modules:
        from pydantic import ValidationError

        if isinstance(error, ValidationError):
            said = [f"'{'.'.join(map(str, item['loc']))}': {item['msg']}" for item in error.errors(include_input=False)]
            return f"settings of {error.title}: {'; '.join(said)}; fix the recipe they come from"
    return None


def first_line(error: BaseException) -> str:
    """What an exception says, in one short line; its kind where it says nothing."""
    said = " ".join(str(error).split())
    return clipped(said) if said else type(error).__name__


def our_mistake(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The last hook: a line before the traceback, for whoever meets a fault of favor itself."""
    print(
        f"favor: internal error, not caused by your input ({kind.__name__}: {without_secrets(first_line(error))}); "
        "please report it with the lines below",
        file=sys.stderr,
    )
    sys.__excepthook__(kind, error, trace)
