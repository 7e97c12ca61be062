"""`favor watch`: a run folder in, its report in the browser until a signal comes.

In: a run folder, what makes its page. Out: a served page. Next: server.py.
"""

from collections.abc import Callable
from pathlib import Path

from favor.label.run import check_packages


def follow(run: Path, render: Callable[[], str], port: int, opened: Callable[[str], object]) -> None:
    """Serve the page; `opened` gets its address.

    Raises CheckpointError where there is no run, ConfigError for a missing package or a port in use.
    """
    check_packages("favor watch")
    # a folder without a run is refused here, not in the browser
    render()
    from favor.label import gate
    from favor.live.server import application

    gate.serve(port, "watch", lambda door: application(run, render, door), opened)
