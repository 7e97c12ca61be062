"""Who is let in: the browser that came with the token, on this machine, from the page itself; everybody else is refused.

In: an ASGI app. Out: the same app behind a door, with headers that let a page load nothing from elsewhere. Next: server.py.

A page of another site can send requests to 127.0.0.1 (also by a name that it lets point there, DNS rebinding) and cannot
read a cookie of ours or forge Host and Origin; another user of this machine can connect and does not know the token.
"""

import secrets
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# nothing but our own files, no frames, no forms to elsewhere; data: is the empty icon
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
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
    """The port that is listened on, and the token of this start."""

    port: int
    token: str

    @property
    def hosts(self) -> tuple[str, str]:
        """What a browser on this machine calls us."""
        return f"127.0.0.1:{self.port}", f"localhost:{self.port}"

    @property
    def cookie(self) -> str:
        """The cookie's name; cookies do not tell ports apart."""
        return f"favor_label_{self.port}"

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
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        answer = refused(Request(scope), door) or _let_in(Request(scope), door)
        await (answer or app)(scope, receive, sent)

    return entered


def refused(request: Request, door: Door) -> Response | None:
    """Why a request is not let in; None when it is."""
    headers = request.headers
    if headers.getlist("host") not in [[host] for host in door.hosts]:
        return _no("this page answers under 127.0.0.1 alone; open the address that the terminal shows")
    if request.method not in ("GET", "HEAD"):
        # a browser always says where a form comes from
        if headers.getlist("origin") != [f"http://{headers['host']}"]:
            return _no("this form does not come from this page; open the address that the terminal shows")
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return _no("this form comes from another site; open the address that the terminal shows")
    if not (door.knows(request.cookies.get(door.cookie)) or _by_address(request, door)):
        return _no("the token is missing or of an earlier start; open the address that the terminal shows")
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


def _no(why: str) -> Response:
    return PlainTextResponse(f"favor label: refused: {why}\n", 403)
