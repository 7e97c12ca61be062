"""The page of `favor chat`: a question, two answers as they come, a vote.

In: ChatConfig, both models, an open store. Out: HTML, lines of JSON while the models answer; a vote is on the disk before it
is answered. Next: page.html.jinja.
"""

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from favor.chat.settings import ChatConfig
from favor.chat.talk import SIDES, Answer, Models, Side, answers
from favor.config import checked
from favor.data.formats import RowError
from favor.data.prompts import prompt_of
from favor.data.types import Text
from favor.errors import ConfigError, FavorError
from favor.label import gate, store
from favor.label.export import exported
from favor.label.gate import Door
from favor.label.store import Db, Pair, Vote
from favor.model.sample import SampleConfig
from favor.run import jsonl

_FILES = (
    ("favor.label", "label.css", "text/css"),
    ("favor.chat", "chat.css", "text/css"),
    ("favor.chat", "chat.js", "text/javascript"),
)
_SAID = ("first", "second", "tie", "both_bad")
# questions whose answers can still be voted on
_KEPT = 50
# tenths of a second that a question waits for the one before
_PATIENCE = 100


@dataclass(frozen=True)
class Asked:
    """A question, how it was asked, which side stands first, and what was answered."""

    prompt: Text
    prompt_ids: tuple[int, ...]
    how: ChatConfig
    shown: tuple[Side, Side]
    answers: dict[Side, Answer] = field(default_factory=dict[Side, Answer])

    @property
    def pair(self) -> Pair:
        """Its answers as a pair to keep; where they come from is said in `source`, which no page shows."""
        first, second = (self.answers[side] for side in self.shown)
        ended, settings = (first.ended, second.ended), self.how.sample
        pair = store.ordered(Pair(self.prompt, first.text, second.text, ended=ended))
        after = "first" if pair.first == self.answers["after"].text else "second"
        source = (
            f"favor chat {self.how.run}: {after} is after training; temperature {settings.temperature:g}, max_new_tokens "
            f"{settings.max_new_tokens}, seed {self.how.seed}, {'blind' if self.how.blind else 'not blind'}"
        )
        return pair._replace(source=source)

    @property
    def revealed(self) -> list[dict[str, Any]]:
        """Of each answer in the order shown: its side, its reward, and what both models think of its tokens."""
        found = [(side, self.answers[side]) for side in self.shown]
        return [{"side": side, "reward": a.reward, "pieces": [list(piece) for piece in a.pieces]} for side, a in found]


@dataclass(frozen=True)
class Desk:
    """What the routes share. All of them run on one thread; models answer on others, one question at a time."""

    db: Db
    config: ChatConfig
    models: Models
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    asked: dict[int, Asked] = field(default_factory=dict[int, Asked])
    # of this start: what each vote was, for taking it back
    votes: list[str] = field(default_factory=list[str])

    @property
    def routes(self) -> list[Route]:
        """Everything that can be asked for."""
        return [
            Route("/", self.page),
            Route("/ask", self.ask, methods=["POST"]),
            Route("/vote", self.vote, methods=["POST"]),
            Route("/undo", self.undo, methods=["POST"]),
            Route("/labels.jsonl", self.labels),
            *(Route(f"/{name}", gate.packaged(package, name, kind)) for package, name, kind in _FILES),
        ]

    async def page(self, _request: Request) -> Response:
        """The page, empty."""
        values = {"config": self.config, "beta": self.models.beta, "tally": self._tally()}
        return HTMLResponse(gate.template("favor.chat", "page.html.jinja").render(**values))

    async def ask(self, request: Request) -> Response:
        """Both models answer: lines of JSON, `add` while text comes, `done` at the end, `problem` where there is one."""
        try:
            asked = self._question(await _sent(request))
        except (RowError, ConfigError) as error:
            return _problem(str(error))
        # models that were stopped end at their next token
        for _ in range(_PATIENCE):
            if not self.busy.locked():
                break
            await asyncio.sleep(0.1)
        else:
            return _problem("the models are answering another question; stop that one first")
        return StreamingResponse(self._answered(asked), media_type="application/x-ndjson")

    async def vote(self, request: Request) -> Response:
        """Keep a vote as a labelled pair, and say which answer was which."""
        said = await _sent(request)
        asked = self.asked.get(said["ask"]) if isinstance(said.get("ask"), int) else None
        if asked is None or said.get("answer") not in _SAID:
            return _problem("these answers are not known any more; ask again")
        texts = [asked.answers[side].text.strip() for side in asked.shown]
        if not all(texts) or texts[0] == texts[1]:
            why = "both answers are the same" if all(texts) else "an answer is empty"
            return _problem(f"{why}, so there is nothing to compare; ask with another seed")
        saved = self._keep(asked, said["answer"])
        return JSONResponse({"saved": saved, "revealed": asked.revealed, "tally": self._tally()})

    async def undo(self, _request: Request) -> Response:
        """The last vote of this start is taken back."""
        if not self.votes:
            return _problem("there is no vote to take back")
        self.votes.pop()
        store.withdraw(self.db, store.annotator(self.db, self.config.name))
        return JSONResponse({"tally": self._tally()})

    async def labels(self, _request: Request) -> Response:
        """The rows that `favor label out=FILE` writes, as a download."""
        headers = {"Content-Disposition": 'attachment; filename="labels.jsonl"'}
        return Response(jsonl(exported(self.db)[0]), media_type="application/jsonl", headers=headers)

    def _question(self, said: Mapping[str, Any]) -> Asked:
        """What is asked. Raises RowError for a prompt and ConfigError for a setting that cannot be used."""
        prompt = prompt_of({"prompt": said.get("prompt")})
        own = self.config.model_dump(exclude={"sample", "seed", "blind"})
        given = {name: said.get(name) for name in ("sample", "seed", "blind")}
        how = checked(ChatConfig, {**own, **given}, "the page")
        return Asked(prompt, self.models.encode(prompt), how, _order(how, prompt))

    async def _answered(self, asked: Asked) -> AsyncGenerator[str]:
        """Lines of JSON. When nobody reads them any more, the models stop at their next token."""
        loop, lines, stop = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None](), threading.Event()

        def told(side: Side, text: str) -> None:
            line = {"place": asked.shown.index(side), "add": text}
            loop.call_soon_threadsafe(lines.put_nowait, line)

        def work() -> dict[Side, Answer]:
            settings = SampleConfig(**asked.how.sample.model_dump())
            try:
                return answers(self.models, asked.prompt_ids, settings, asked.how.seed, told, stop)
            finally:
                loop.call_soon_threadsafe(lines.put_nowait, None)

        await self.busy.acquire()
        working = asyncio.ensure_future(asyncio.to_thread(work))
        # not when this ends, which may be before the models notice
        working.add_done_callback(lambda _: self.busy.release())
        try:
            while (line := await lines.get()) is not None:
                yield _line(line)
            yield _line(self._done(asked, await working))
        except FavorError as error:
            yield _line({"problem": str(error)})
        finally:
            stop.set()

    def _done(self, asked: Asked, found: dict[Side, Answer]) -> dict[str, Any]:
        """The last line: whole texts, and what the models think of them unless that is to come with the vote."""
        asked.answers.update(found)
        number = max(self.asked, default=0) + 1
        self.asked[number] = asked
        self.asked.pop(number - _KEPT, None)
        texts = [{"text": found[side].text, "ended": found[side].ended} for side in asked.shown]
        return {"done": number, "texts": texts, "revealed": None if asked.how.blind else asked.revealed}

    def _keep(self, asked: Asked, said: Any) -> bool:
        """Add pair and vote; False when this person has voted on these two answers before, and that vote stands."""
        pair, turned = asked.pair, {"first": "second", "second": "first"}
        swapped = pair.first != asked.answers[asked.shown[0]].text
        store.add_pairs(self.db, [pair])
        number, who = store.number_of(self.db, pair), store.annotator(self.db, self.config.name)
        assert number is not None, "it was added just now"
        store.show(self.db, number, who, swapped=swapped)
        verdict: Any = turned.get(said, said) if swapped else said
        saved = store.add_vote(self.db, Vote(number, who, verdict))
        if saved:
            place = {"first": 0, "second": 1}.get(said)
            self.votes.append(said if place is None else asked.shown[place])
        return saved

    def _tally(self) -> dict[str, int]:
        count = Counter(self.votes)
        return {name: count[name] for name in (*SIDES, "tie", "both_bad")}


def _order(how: ChatConfig, prompt: Text) -> tuple[Side, Side]:
    """Which side stands first: before, or decided by chance, which is the same for the same question."""
    asked = how.model_dump(mode="json", include={"run", "sample", "seed"})
    swapped = how.blind and random.Random(json.dumps([prompt, asked])).random() < 0.5
    return (SIDES[1], SIDES[0]) if swapped else SIDES


async def _sent(request: Request) -> dict[str, Any]:
    """The JSON object that was sent; an empty one, where it is none."""
    try:
        found = json.loads(await gate.body(request))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _problem(why: str) -> Response:
    # not by a status, which browsers tell the console
    return PlainTextResponse(_line({"problem": why}))


def application(db: Db, config: ChatConfig, models: Models, door: Door) -> ASGIApp:
    """The app behind its door."""
    return gate.guarded(Starlette(routes=Desk(db, config, models).routes), door)
