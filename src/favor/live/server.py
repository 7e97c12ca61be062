"""The page of `favor watch`: the report as it is now, and whether there is more since.

In: a run folder, what makes its page. Out: HTML; a line of JSON for whoever asks how the run stands. Next: live.js.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from favor.errors import FavorError
from favor.guard import sha
from favor.label import gate
from favor.label.gate import Door
from favor.run import RunFolder

_FILES = (("live.css", "text/css"), ("live.js", "text/javascript"))
# bytes at the end of metrics.jsonl that say where the run stands
_TAIL = 1 << 16
_SCRIPT = re.compile(r"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Live:
    """A run and what makes its page."""

    run: Path
    render: Callable[[], str]

    @property
    def routes(self) -> list[Route]:
        """Everything that can be asked for."""
        files = (Route(f"/{name}", gate.packaged("favor.live", name, kind)) for name, kind in _FILES)
        return [Route("/", self.page), Route("/state", self.state), *files]

    async def page(self, _request: Request) -> Response:
        """The report, and below it the line that says how the run stands."""
        # before the page is made, so that what comes meanwhile counts as new
        now = state_of(self.run)
        try:
            # plain text: what is put into the page is no text to be escaped
            html = str(self.render())
        except FavorError as error:
            return PlainTextResponse(f"favor watch: {error}\n", 500)
        return HTMLResponse(with_state(html, now), headers={"Content-Security-Policy": policy(html)})

    async def state(self, _request: Request) -> Response:
        """How the run stands."""
        return JSONResponse(state_of(self.run))


def state_of(run: Path) -> dict[str, Any]:
    """version: of what the page shows; step: the last one; finished; seconds: since something was written."""
    folder = RunFolder(run)
    found: dict[str, tuple[int, int]] = {}
    for path in sorted(run.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path != folder.report:
            about = path.stat()
            found[path.name] = (about.st_size, about.st_mtime_ns)
    written = found.get(folder.metrics.name, (0, time.time_ns()))[1]
    step, finished = _stands(folder.metrics)
    seconds = max(0, round(time.time() - written / 1e9))
    return {"version": sha(json.dumps(found)), "step": step, "finished": finished, "seconds": seconds}


def _stands(metrics: Path) -> tuple[int, bool]:
    """The last step of metrics.jsonl, and whether the run came to its end after it."""
    if not metrics.exists():
        return 0, False
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - _TAIL))
        lines = file.read().split(b"\n")
    step, finished = 0, False
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            # the first one may be cut, and the last one may be under way
            continue
        if isinstance(record, dict) and record.get("kind") == "step" and isinstance(record.get("step"), int):
            step, finished = record["step"], False
        elif isinstance(record, dict) and record.get("name") in ("finished", "resume"):
            finished = record["name"] == "finished"
    return step, finished


def with_state(html: str, now: dict[str, Any]) -> str:
    """The page with the line, which live.js keeps true."""
    head = '<link rel="stylesheet" href="/live.css"><script type="module" src="/live.js"></script>'
    line = f'<p id="favor-live" role="status" data-version="{now["version"]}" data-step="{now["step"]}" hidden></p>'
    before, body, after = html.rpartition("</body>")
    return before.replace("</head>", f"{head}</head>", 1) + line + body + after


def policy(html: str) -> str:
    """What the page may do: run its own scripts, each by its hash, and load nothing from elsewhere."""
    hashes = [hashlib.sha256(script.encode()).digest() for script in _SCRIPT.findall(html)]
    own = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src 'self' {own}; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


def application(run: Path, render: Callable[[], str], door: Door) -> ASGIApp:
    """The app behind its door."""
    return gate.guarded(Starlette(routes=Live(run, render).routes), door)
