"""The page where people compare answers: routes, what a form says, and the server on 127.0.0.1.

In: LabelConfig, an open store. Out: HTML; every vote is on the disk before it is answered. Next: page.html.jinja.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qs

from jinja2 import Template
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from favor.data.types import Text
from favor.label import gate, store
from favor.label.agreement import measured
from favor.label.export import exported
from favor.label.gate import Door, guarded
from favor.label.routing import next_pair, num_left
from favor.label.settings import LabelConfig
from favor.label.store import Db, Pair, Vote
from favor.run import jsonl

# letters of a name
_LONGEST_NAME = 60
_TYPES = {"label.css": "text/css", "label.js": "text/javascript"}
_SAID = {"left": "A is better", "right": "B is better", "tie": "as good", "both_bad": "both bad", "skip": "skipped"}


@dataclass(frozen=True)
class Desk:
    """What the routes share. All of them run on one thread, one after the other, on one connection."""

    db: Db
    config: LabelConfig
    door: Door
    template: Template

    @property
    def routes(self) -> list[Route]:
        """Everything that can be asked for."""
        return [
            Route("/", self.pair),
            Route("/name", self.name, methods=["POST"]),
            Route("/leave", self.leave, methods=["POST"]),
            Route("/vote", self.vote, methods=["POST"]),
            Route("/undo", self.undo, methods=["POST"]),
            Route("/results", self.results),
            Route("/labels.jsonl", self.labels),
            *(Route(f"/{name}", gate.packaged("favor.label", name, kind)) for name, kind in _TYPES.items()),
        ]

    async def pair(self, request: Request) -> Response:
        """The pair that is before this person."""
        who = self._who(request)
        return self._named("") if who is None else self._shown(who)

    async def name(self, request: Request) -> Response:
        """Somebody says who they are."""
        said = " ".join((await _form(request)).get("name", "").split())
        if not said or len(said) > _LONGEST_NAME or not said.isprintable():
            return self._named(f"Please give a name of 1 to {_LONGEST_NAME} letters.")
        answer = RedirectResponse("/", 303)
        number = store.annotator(self.db, said)
        answer.set_cookie(self._cookie, str(number), httponly=True, samesite="strict", path="/")
        return answer

    async def leave(self, _request: Request) -> Response:
        """Somebody else takes the seat."""
        answer = RedirectResponse("/", 303)
        answer.delete_cookie(self._cookie, path="/")
        return answer

    async def vote(self, request: Request) -> Response:
        """Keep a vote; a second one on the same pair (a double click, a repeated request) changes nothing."""
        who, form = self._who(request), await _form(request)
        if who is None:
            return self._named("")
        number = int(form["pair"]) if form.get("pair", "").isdecimal() and len(form["pair"]) < 16 else -1
        pair, swapped = store.pair_at(self.db, number), store.is_swapped(self.db, number, who)
        if pair is None or swapped is None or form.get("answer") not in _SAID:
            return PlainTextResponse("favor label: this pair was not shown to you; reload the page\n", 400)
        vote = read_vote(form, pair, number, who, swapped=swapped)
        if isinstance(vote, str):
            return self._shown(who, problem=vote, form=form)
        store.add_vote(self.db, vote)
        return RedirectResponse("/", 303)

    async def undo(self, request: Request) -> Response:
        """The last answer is taken back."""
        who = self._who(request)
        if who is not None:
            store.withdraw(self.db, who)
        return RedirectResponse("/", 303)

    async def results(self, request: Request) -> Response:
        """How far the work is, and what is known of the votes."""
        return self._page("results", self._who(request), figures=measured(self.db))

    async def labels(self, _request: Request) -> Response:
        """The rows of `out`, as a download."""
        rows, _ = exported(self.db, self.config.labels)
        headers = {"Content-Disposition": 'attachment; filename="labels.jsonl"'}
        return Response(jsonl(rows), media_type="application/jsonl", headers=headers)

    @property
    def _cookie(self) -> str:
        return f"{self.door.cookie}_person"

    def _who(self, request: Request) -> int | None:
        said = request.cookies.get(self._cookie, "")
        number = int(said) if said.isdecimal() and len(said) < 16 else -1
        return number if number in store.names(self.db) else None

    def _named(self, problem: str) -> Response:
        return self._page("name", None, problem=problem)

    def _shown(self, who: int, problem: str = "", form: Mapping[str, str] | None = None) -> Response:
        found, votes = next_pair(self.db, who, self.config), store.votes(self.db)
        count = {"mine": sum(vote.annotator == who for vote in votes), "left": num_left(self.db, who, self.config)}
        if found is None:
            return self._page("done", who, count=count)
        number, swapped = found
        pair = store.pair_at(self.db, number)
        assert pair is not None, "pairs are never removed"
        sides = (pair.second, pair.first) if swapped else (pair.first, pair.second)
        ended = pair.ended[::-1] if swapped else pair.ended
        answers = [
            {"letter": letter, "side": side, "turns": turns(text), "ended": whole, "editable": editable(text)}
            for letter, side, text, whole in zip("AB", ("left", "right"), sides, ended, strict=True)
        ]
        shown = {"number": number, "prompt": turns(pair.prompt), "answers": answers, "form": form or {}}
        return self._page("pair", who, count=count, problem=problem, **shown)

    def _page(self, kind: Literal["name", "pair", "done", "results"], who: int | None, **values: Any) -> Response:
        person = None if who is None else store.names(self.db)[who]
        filled = {"problem": "", "db": self.config.db, **values}
        return HTMLResponse(self.template.render(kind=kind, person=person, **filled))


def read_vote(form: Mapping[str, str], pair: Pair, number: int, who: int, *, swapped: bool) -> Vote | str:
    """What a form says, in terms of the pair; or what is wrong with it, for the person."""
    said, left, right = form["answer"], *((pair.second, pair.first) if swapped else (pair.first, pair.second))
    edits = {side: _edit(form, side, text) for side, text in (("left", left), ("right", right))}
    changed = [side for side, edit in edits.items() if edit is not None]
    if said != "skip" and (other := [side for side in changed if side != said]):
        letter = "A" if other[0] == "left" else "B"
        return (
            f"You edited answer {letter}, but did not choose it. Choose {letter}, or set its text back to what it was."
        )
    edit = edits.get(said)
    if edit is not None and not edit.strip():
        return "The edited answer is empty. Write the better answer, or set its text back to what it was."
    if edit is not None and edit.strip() == editable(right if said == "left" else left).strip():
        return "The edited answer is the same as the other one. Choose that one instead."
    comment = form.get("comment", "").strip()
    verdict: Any = {"left": ("first", "second")[swapped], "right": ("second", "first")[swapped]}.get(said, said)
    return Vote(number, who, verdict, edit, comment)


def _edit(form: Mapping[str, str], side: str, text: Text) -> str | None:
    """The new text of an answer; None when it is what it was."""
    given, before = form.get(f"edit_{side}"), editable(text)
    return None if given is None or not before or given == before else given


def _lines(text: str) -> str:
    """The text with our line ends; browsers send their own."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def editable(text: Text) -> str:
    """The text of an answer that can be edited: plain, or one turn that only says something; else empty."""
    if isinstance(text, str):
        return _lines(text)
    only_said = len(text) == 1 and text[0].keys() <= {"role", "content"}
    return _lines(str(text[0].get("content") or "")) if only_said else ""


def turns(text: Text) -> list[tuple[str, str]]:
    """(who, what) of a prompt or an answer; plain text has no who. What a turn holds beside its content follows as JSON."""
    if isinstance(text, str):
        return [("", text)]
    found: list[tuple[str, str]] = []
    for turn in text:
        rest = {name: value for name, value in turn.items() if name not in ("role", "content")}
        words = [str(turn.get("content") or ""), json.dumps(rest, ensure_ascii=False, indent=1) if rest else ""]
        found.append((str(turn["role"]), "\n".join(filter(None, words))))
    return found


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form. Nothing, when it is larger than anybody types."""
    fields = parse_qs((await gate.body(request)).decode("utf-8", "replace"), keep_blank_values=True)
    return {name: _lines(values[0]) for name, values in fields.items()}


def application(db: Db, config: LabelConfig, door: Door) -> ASGIApp:
    """The app behind its door."""
    template = gate.template("favor.label", "page.html.jinja")
    return guarded(Starlette(routes=Desk(db, config, door, template).routes), door)


def serve(db: Db, config: LabelConfig, opened: Callable[[str], object]) -> None:
    """Serve until a signal comes. `opened` gets the address. Raises ConfigError for a port that is taken."""
    gate.serve(config.port, "label", lambda door: application(db, config, door), opened)
