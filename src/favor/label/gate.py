"""Who is let in: the browser that came with the token, on this machine, from the page itself; everybody else is refused.

In: an ASGI app. Out: the same app behind a door, with headers that let a page load nothing from elsewhere, and a server of
it on 127.0.0.1. Next: server.py.

A page of another site can send requests to 127.0.0.1 (also by a name that it lets point there, DNS rebinding) and cannot
read a cookie of ours or forge Host and Origin; another user of this machine can connect and does not know the token.
"""

import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import uvicorn
from jinja2 import Environment, StrictUndefined, Template
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from favor.errors import ConfigError

# nothing but our own files, no frames, no forms to elsewhere; data: is the empty icon
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
# bytes of a form
_LARGEST = 1 << 20
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # `no-referrer` would make browsers send `Origin: null` with our own forms
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Door:
    """The port that is listened on, the token of this start, and the command that listens."""

    port: int
    token: str
    command: str = "label"

    @property
    def hosts(self) -> tuple[str, str]:
        """What a browser on this machine calls us."""
        return f"127.0.0.1:{self.port}", f"localhost:{self.port}"

    @property
    def cookie(self) -> str:
        """The cookie's name; cookies do not tell ports apart."""
        return f"favor_{self.command}_{self.port}"

    @property
    def address(self) -> str:
        """Where a person goes; the token leaves the address at once and lives in a cookie."""
        return f"http://{self.hosts[0]}/?token={self.token}"

    def knows(self, token: str | None) -> bool:
        """Whether it is the token, compared in constant time."""
        return token is not None and secrets.compare_digest(token.encode(), self.token.encode())


def guarded(app: ASGIApp, door: Door) -> ASGIApp:
    """The app, for those who may come in; every response has the headers."""

    async def entered(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = refused(Request(scope), door) or _let_in(Request(scope), door)
        await (answer or app)(scope, receive, sent)

    return entered


def refused(request: Request, door: Door) -> Response | None:
    """Why a request is not let in; None when it is."""
    headers = request.headers
    if headers.getlist("host") not in [[host] for host in door.hosts]:
        return _no("this page answers under 127.0.0.1 alone; open the address that the terminal shows", door)
    if request.method not in ("GET", "HEAD"):
        # a browser always says where a form comes from
        if headers.getlist("origin") != [f"http://{headers['host']}"]:
            return _no("this form does not come from this page; open the address that the terminal shows", door)
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return _no("this form comes from another site; open the address that the terminal shows", door)
    if not (door.knows(request.cookies.get(door.cookie)) or _by_address(request, door)):
        return _no("the token is missing or of an earlier start; open the address that the terminal shows", door)
    return None


def _by_address(request: Request, door: Door) -> bool:
    return request.method == "GET" and request.url.path == "/" and door.knows(request.query_params.get("token"))


def _let_in(request: Request, door: Door) -> Response | None:
    """From the address with the token to the page without it."""
    if not _by_address(request, door):
        return None
    answer = RedirectResponse("/", 303)
    answer.set_cookie(door.cookie, door.token, httponly=True, samesite="strict", path="/")
    return answer


def _no(why: str, door: Door) -> Response:
    return PlainTextResponse(f"favor {door.command}: refused: {why}\n", 403)


async def body(request: Request) -> bytes:
    """What was sent; nothing, when it is larger than anybody types."""
    found = b""
    async for part in request.stream():
        found += part
        if len(found) > _LARGEST:
            return b""
    return found


def template(package: str, name: str) -> Template:
    """A page of a package; what is filled in is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files(package).joinpath(name).read_text("utf-8"))


def packaged(package: str, name: str, kind: str) -> Callable[[Request], Any]:
    """The route of a file that comes with a package."""
    text = files(package).joinpath(name).read_text("utf-8")

    async def served(_request: Request) -> Response:
        return Response(text, media_type=kind)

    return served


def serve(port: int, command: str, make: Callable[[Door], ASGIApp], opened: Callable[[str], object]) -> None:
    """Serve on 127.0.0.1 until a signal comes. `opened` gets the address, for the person who started it.

    Raises ConfigError for a port that is taken.
    """
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
            # the address is true from when it is shown
            listening.listen()
        except OSError as error:
            raise ConfigError(
                f"port={port}: cannot be used ({error.strerror}); choose another, or leave it out"
            ) from None
        door = Door(listening.getsockname()[1], secrets.token_urlsafe(32), command)
        options = uvicorn.Config(
            make(door),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        opened(door.address)
        uvicorn.Server(options).run(sockets=[listening])
