"""`favor label`: files in, the page, labels out.

In: LabelConfig. Out: a store with votes, or a file of preferences. Next: settings.py.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from favor.errors import ConfigError
from favor.label import store
from favor.label.settings import LabelConfig

_NEEDED = ("starlette", "uvicorn", "krippendorff")


def label(config: LabelConfig, say: Callable[[str], object], recipe: Path | None = None) -> None:
    """Export where `out` is given, else open the page until a signal comes.

    Raises what reading the files raises, ConfigError for a store, a port or an `out` that cannot be used or a missing
    package, DataError where there is nothing to compare or to write.
    """
    if config.out is not None:
        from favor.label.export import export

        say(f"{config.out}: {export(config, recipe)}")
        return
    check_packages("favor label")
    _open(config, say)


def check_packages(command: str) -> None:
    """Raises ConfigError where what the pages need is not installed."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError(f"{command} needs {', '.join(missing)}, not installed here; run: pip install 'favor[label]'")


def _open(config: LabelConfig, say: Callable[[str], object]) -> None:
    from favor.label.intake import take_in
    from favor.label.server import serve

    path, found = Path(config.db), take_in(config)
    # a file that cannot be read leaves no store behind
    with store.opened(path, new=bool(found)) as db:
        for tally, pairs in found:
            say(f"{tally}; {store.add_pairs(db, pairs)} of them new")
        if not (known := store.golds(db)):
            raise ConfigError(f"db={path}: holds no pairs; add some with data=FILE")
        say(f"{path}: {len(known)} pairs, {len(store.votes(db))} answers so far")

        def started(lines: Sequence[str]) -> None:
            for line in (*lines, f"when done: favor label db={path} out=labels.jsonl"):
                say(line)

        serve(db, config, started)
