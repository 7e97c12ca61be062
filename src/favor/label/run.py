"""`favor label`: files in, the page, a store with votes.

In: LabelConfig. Out: a store with votes; what is made of them: export.py. Next: settings.py.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from favor.errors import ConfigError
from favor.label import store
from favor.label.settings import LabelConfig

_NEEDED = ("starlette", "uvicorn", "krippendorff")


def label(config: LabelConfig, say: Callable[[str], object], opened: Callable[[str], object]) -> None:
    """Open the page until a signal comes; `opened` gets its address.

    Raises what reading the files raises, ConfigError for a store or a port that cannot be used or a missing package,
    DataError where there is nothing to compare.
    """
    check_packages("favor label")
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
        serve(db, config, opened)


def check_packages(command: str) -> None:
    """Raises ConfigError where what the pages need is not installed."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError(f"{command} needs {', '.join(missing)}, not installed here; run: pip install 'favor[label]'")
