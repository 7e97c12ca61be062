"""`favor chat`: a run in, the page, votes out.

In: ChatConfig. Out: a store with votes. Next: settings.py.
"""

from collections.abc import Callable
from pathlib import Path

from favor.chat.settings import ChatConfig
from favor.chat.talk import load_models
from favor.label import store
from favor.label.run import check_packages


def chat(config: ChatConfig, opened: Callable[[str], object]) -> None:
    """Open the page until a signal comes; `opened` gets its address.

    Raises ConfigError for a missing package, a store or a port that cannot be used, CheckpointError where there is no run.
    """
    check_packages("favor chat")
    from favor.chat.server import application
    from favor.label import gate

    models = load_models(config)
    with store.opened(Path(config.db)) as db:
        gate.serve(config.port, "chat", lambda door: application(db, config, models, door), opened)
