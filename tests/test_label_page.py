"""The page of `favor label`: who is let in, what forms do, kills while votes arrive, and two people in a browser."""

import asyncio
import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest
from label_desk import pair_in, running, said, some_pairs, write_jsonl
from page_desk import browser, expect, listened, overflows

pytest.importorskip("starlette", reason="favor[label] is not installed")

from favor.cli import COMMANDS
from favor.config import load
from favor.data.read import DataConfig, read
from favor.label import store
from favor.label.gate import Door
from favor.label.server import application, read_vote, turns
from favor.label.settings import LabelConfig
from favor.label.store import Pair
from favor.train.dryrun import describe

DOOR = Door(8123, "the-token")
HERE = "http://127.0.0.1:8123"


@pytest.fixture
def db(tmp_path):
    with store.opened(tmp_path / "labels.sqlite") as opened:
        store.add_pairs(opened, some_pairs(6))
        yield opened


def asked(db, *requests, config=None, cookies=None):
    """The answers to requests (method, path, fields or headers) of one browser, in turn."""

    async def all_of_them():
        transport = httpx2.ASGITransport(app=application(db, config or LabelConfig(), DOOR))
        async with httpx2.AsyncClient(transport=transport, base_url=HERE, cookies=cookies) as client:
            return [
                await client.request(
                    method, path, data=more.get("data"), headers={"Origin": HERE, **more.get("headers", {})}
                )
                for method, path, more in requests
            ]

    return asyncio.run(all_of_them())


COOKIE = {DOOR.cookie: DOOR.token}


# who is let in


def test_the_address_with_the_token_lets_in_and_leaves_the_token_in_a_cookie(db):
    come, page = asked(db, ("GET", "/?token=the-token", {}), ("GET", "/", {}))
    assert (come.status_code, come.headers["location"]) == (303, "/")
    cookie = come.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert page.status_code == 200
    assert "Who are you?" in page.text
    assert "the-token" not in page.text


PATHS = ["/", "/results", "/labels.jsonl", "/label.js", "/label.css", "/none"]


@pytest.mark.parametrize("path", [*PATHS, "/?token=wrong", "/results?token=the-token"])
@pytest.mark.parametrize("cookies", [{}, {DOOR.cookie: "wrong"}, {DOOR.cookie: ""}, {"favor_label_1": "the-token"}])
def test_without_the_token_nothing_is_shown(path, cookies, db):
    (answer,) = asked(db, ("GET", path, {}), cookies=cookies)
    assert answer.status_code == 403
    assert answer.text.startswith("favor label: refused: the token is missing")


@pytest.mark.parametrize("path", ["/name", "/vote", "/undo", "/leave"])
def test_without_the_token_nothing_is_changed(path, db):
    (answer,) = asked(db, ("POST", f"{path}?token=the-token", {"data": {"name": "Ana"}}))
    assert answer.status_code == 403
    assert store.names(db) == {}


HOSTS = [
    "evil.example:8123",
    "127.0.0.1",
    "127.0.0.1:80",
    "localhost.evil.example:8123",
    "[::1]:8123",
    "0.0.0.0:8123",
    "127.0.0.1:8123.",
    "",
]


@pytest.mark.parametrize("host", HOSTS)
def test_another_host_is_refused_even_with_the_token(host, db):
    """A page whose name is made to point at 127.0.0.1 would send its own name."""
    get, post = asked(
        db,
        ("GET", "/?token=the-token", {"headers": {"Host": host}}),
        ("POST", "/name", {"headers": {"Host": host, "Origin": f"http://{host}"}, "data": {"name": "Ana"}}),
        cookies=COOKIE,
    )
    assert (get.status_code, post.status_code) == (403, 403)
    assert "set-cookie" not in get.headers
    assert store.names(db) == {}


@pytest.mark.parametrize(
    "origin",
    ["null", "http://evil.example", "https://127.0.0.1:8123", "http://127.0.0.1:8124", "http://localhost:8123", ""],
)
def test_a_form_of_another_page_is_refused(origin, db):
    (answer,) = asked(db, ("POST", "/name", {"headers": {"Origin": origin}, "data": {"name": "Ana"}}), cookies=COOKIE)
    assert answer.status_code == 403
    assert store.names(db) == {}


def test_a_form_without_origin_or_of_another_site_is_refused(db):
    async def bare():
        transport = httpx2.ASGITransport(app=application(db, LabelConfig(), DOOR))
        async with httpx2.AsyncClient(transport=transport, base_url=HERE, cookies=COOKIE) as client:
            none = await client.post("/name", data={"name": "Ana"})
            cross = await client.post(
                "/name", data={"name": "Ana"}, headers={"Origin": HERE, "Sec-Fetch-Site": "cross-site"}
            )
            return none, cross

    assert [answer.status_code for answer in asyncio.run(bare())] == [403, 403]
    assert store.names(db) == {}


def test_localhost_is_this_machine_too(db):
    page, name = asked(
        db,
        ("GET", "/", {"headers": {"Host": "localhost:8123"}}),
        (
            "POST",
            "/name",
            {"headers": {"Host": "localhost:8123", "Origin": "http://localhost:8123"}, "data": {"name": "Ana"}},
        ),
        cookies=COOKIE,
    )
    assert (page.status_code, name.status_code) == (200, 303)


@pytest.mark.parametrize(("path", "cookies"), [("/", COOKIE), ("/", {}), ("/label.js", COOKIE), ("/none", COOKIE)])
def test_every_answer_allows_nothing_from_elsewhere(path, cookies, db):
    (answer,) = asked(db, ("GET", path, {}), cookies=cookies)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["form-action"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers


# what forms do


def test_a_name_is_asked_once_and_checked(db):
    empty, long, odd, good, page = asked(
        db,
        ("POST", "/name", {"data": {"name": "   "}}),
        ("POST", "/name", {"data": {"name": "x" * 61}}),
        ("POST", "/name", {"data": {"name": "a\u202eb"}}),
        ("POST", "/name", {"data": {"name": " Ana  <b>\n"}}),
        ("GET", "/", {}),
        cookies=COOKIE,
    )
    assert all('role="alert"' in answer.text for answer in (empty, long, odd))
    assert good.status_code == 303
    assert store.names(db) == {1: "Ana <b>"}
    assert "Ana &lt;b&gt;" in page.text


def as_ana(db, *requests, config=None):
    person = store.annotator(db, "Ana")
    return asked(db, *requests, config=config, cookies=COOKIE | {f"{DOOR.cookie}_person": str(person)})


def test_a_vote_is_of_what_stood_left(db):
    """The form says left or right; the stored order says what that was."""
    for _ in range(6):
        (page,) = as_ana(db, ("GET", "/", {}))
        left = re.findall(r'<div class="text" dir="auto">(.*?)</div>', page.text)[1]
        (answer,) = as_ana(db, ("POST", "/vote", {"data": {"pair": pair_in(page.text), "answer": "left"}}))
        assert answer.status_code == 303
        vote = store.votes(db)[-1]
        pair = store.pair_at(db, vote.pair)
        assert (pair.first if vote.verdict == "first" else pair.second) == left
    assert {row[0] for row in db.execute("SELECT swapped FROM shown")} == {0, 1}
    (done,) = as_ana(db, ("GET", "/", {}))
    assert "Nothing is left for you" in done.text


def test_a_request_sent_twice_counts_once(db):
    (page,) = as_ana(db, ("GET", "/", {}))
    pair = pair_in(page.text)
    first, again = as_ana(
        db, *[("POST", "/vote", {"data": {"pair": pair, "answer": said}}) for said in ("tie", "skip")]
    )
    assert (first.status_code, again.status_code) == (303, 303)
    assert [vote.verdict for vote in store.votes(db)] == ["tie"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pair": "x", "answer": "left"},
        {"pair": "99", "answer": "left"},
        {"pair": "9" * 400, "answer": "left"},
        {"answer": "left"},
        "unknown",
        "unshown",
    ],
)
def test_a_form_that_the_page_does_not_have_is_refused(fields, db):
    (page,) = as_ana(db, ("GET", "/", {}))
    here = pair_in(page.text)
    if fields == "unknown":
        fields = {"pair": here, "answer": "first"}
    elif fields == "unshown":
        fields = {"pair": next(i for i in range(1, 7) if i != here), "answer": "left"}
    (answer,) = as_ana(db, ("POST", "/vote", {"data": fields}))
    assert answer.status_code == 400
    assert store.votes(db) == []


def test_a_form_larger_than_anybody_types_is_refused(db):
    (page,) = as_ana(db, ("GET", "/", {}))
    fields = {"pair": pair_in(page.text), "answer": "left", "comment": "x" * 2_000_000}
    (answer,) = as_ana(db, ("POST", "/vote", {"data": fields}))
    assert answer.status_code == 400
    assert store.votes(db) == []


def test_somebody_is_told_how_much_is_left(db):
    (page,) = as_ana(db, ("GET", "/", {}))
    assert "You have answered 0; 6 to go." in page.text
    # nothing can be taken back yet
    assert 'action="/undo"' not in page.text
    _, page = as_ana(db, ("POST", "/vote", {"data": {"pair": pair_in(page.text), "answer": "left"}}), ("GET", "/", {}))
    assert "You have answered 1; 5 to go." in page.text
    assert 'action="/undo"' in page.text
    # a pair that has all the votes it wants is not counted
    done = LabelConfig(votes_per_pair=1)
    here = pair_in(page.text)
    for pair in {*range(1, 7)} - {here, store.votes(db)[0].pair}:
        said(db, pair, "Ben", "tie")
    (page,) = as_ana(db, ("GET", "/", {}), config=done)
    assert "You have answered 1; 1 to go." in page.text


def test_gold_alone_is_counted(tmp_path):
    with store.opened(tmp_path / "x.sqlite") as db:
        store.add_pairs(db, some_pairs(3, gold="first"))
        (page,) = as_ana(db, ("GET", "/", {}))
        assert "You have answered 0; 3 to go." in page.text


def test_taking_back_shows_the_pair_again(db):
    (page,) = as_ana(db, ("GET", "/", {}))
    pair = pair_in(page.text)
    _, _, back = as_ana(
        db, ("POST", "/vote", {"data": {"pair": pair, "answer": "left"}}), ("POST", "/undo", {}), ("GET", "/", {})
    )
    assert pair_in(back.text) == pair
    assert store.votes(db) == []


def test_leaving_asks_for_a_name_again(db):
    (answer,) = as_ana(db, ("POST", "/leave", {}))
    assert f'{DOOR.cookie}_person=""' in answer.headers["set-cookie"]
    assert "Max-Age=0" in answer.headers["set-cookie"]
    (page,) = asked(db, ("GET", "/", {}), cookies=COOKIE | {f"{DOOR.cookie}_person": "99"})
    assert "Who are you?" in page.text


def test_texts_are_shown_as_text(tmp_path):
    with store.opened(tmp_path / "x.sqlite") as db:
        store.add_pairs(db, [Pair("<script>alert(1)</script>", "\n</textarea><img src=x onerror=1>", "{{ 1 }}")])
        (page,) = as_ana(db, ("GET", "/", {}))
    assert "<script>alert" not in page.text
    assert "<img" not in page.text
    assert "&lt;/textarea&gt;" in page.text
    assert "{{ 1 }}" in page.text


def test_the_page_does_not_say_where_answers_come_from(tmp_path):
    with store.opened(tmp_path / "x.sqlite") as db:
        store.add_pairs(db, [Pair("p", "a", "b", source="runs/dpo/samples.jsonl, row 1", gold="first")])
        (page,) = as_ana(db, ("GET", "/", {}))
    assert "runs/dpo" not in page.text
    assert "gold" not in page.text.lower()
    assert "first" not in page.text


PAIR = Pair("p", "one\r\ntwo", "three")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"answer": "left"}, ("first", None)),
        ({"answer": "right"}, ("second", None)),
        ({"answer": "left", "edit_left": "one\ntwo", "edit_right": "three"}, ("first", None)),
        ({"answer": "left", "edit_left": "one\n2"}, ("first", "one\n2")),
        ({"answer": "right", "edit_right": "3"}, ("second", "3")),
        ({"answer": "skip", "edit_right": "3"}, ("skip", None)),
        ({"answer": "left", "edit_right": "3"}, "You edited answer B, but did not choose it"),
        ({"answer": "tie", "edit_left": "3"}, "You edited answer A"),
        ({"answer": "left", "edit_left": " "}, "The edited answer is empty"),
        ({"answer": "left", "edit_left": "three "}, "the same as the other one"),
    ],
)
def test_what_a_form_means(form, expected):
    found = read_vote(form, PAIR, 1, 1, swapped=False)
    if isinstance(expected, str):
        assert expected in found
    else:
        assert (found.verdict, found.edit) == expected
    turned = PAIR._replace(first=PAIR.second, second=PAIR.first)
    other = read_vote(form, turned, 1, 1, swapped=True)
    swap = {"first": "second", "second": "first"}
    assert other == (
        found if isinstance(found, str) else found._replace(verdict=swap.get(found.verdict, found.verdict))
    )


def test_a_mistaken_edit_keeps_what_was_typed(db):
    (page,) = as_ana(db, ("GET", "/", {}))
    fields = {"pair": pair_in(page.text), "answer": "right", "edit_left": "my text", "comment": "why"}
    (answer,) = as_ana(db, ("POST", "/vote", {"data": fields}))
    assert "did not choose it" in answer.text
    assert "\nmy text</textarea>" in answer.text
    assert "\nwhy</textarea>" in answer.text
    assert "<details open>" in answer.text
    assert store.votes(db) == []


def test_turns_show_who_and_what():
    call = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"name": "f"}]}
    assert turns("a") == [("", "a")]
    ((who, what),) = turns((call,))
    assert (who, what.splitlines()[0]) == ("assistant", "Let me see.")
    assert '"name": "f"' in what


def test_results_and_download(db):
    (page,) = as_ana(db, ("GET", "/", {}))
    _, results, labels = as_ana(
        db,
        ("POST", "/vote", {"data": {"pair": pair_in(page.text), "answer": "left", "comment": "good\r\none"}}),
        ("GET", "/results", {}),
        ("GET", "/labels.jsonl", {}),
    )
    assert "1 of 6" in results.text
    assert "Ana" in results.text
    (row,) = map(json.loads, labels.text.splitlines())
    assert row["comments"] == ["good\none"]
    assert labels.headers["content-disposition"].startswith("attachment")


# the process


def test_it_listens_on_this_machine_alone(tmp_path):
    write_jsonl(tmp_path / "s.jsonl", [{"prompt": "p", "responses": ["a", "b"]}])
    with running(tmp_path, "data=s.jsonl") as (process, address):
        port = int(re.search(r":(\d+)/", address)[1])
        found = [line.split() for line in Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]]
        listening = {place for _, place, _, state, *_ in found if state == "0A" and place.endswith(f":{port:04X}")}
        assert listening == {f"0100007F:{port:04X}"}
        assert httpx2.get(address.split("?")[0]).status_code == 403
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        assert (
            process.stderr.read()
            == "favor: stopped by SIGTERM; every vote that was answered is kept; run the same command again to go on\n"
        )
    assert not (tmp_path / "labels.sqlite-wal").exists()


def voting(address, name, acknowledged, stop):
    """One person who votes as fast as answers come; what was answered goes into `acknowledged`."""
    chance = random.Random(name)
    here = address.split("/?")[0]
    with httpx2.Client(headers={"Origin": here}, follow_redirects=False, timeout=10) as client:
        try:
            client.get(address)
            client.post(f"{here}/name", data={"name": name})
            while not stop.is_set():
                html = client.get(f"{here}/").text
                if 'name="pair"' not in html:
                    return
                said = chance.choice(["left", "right", "tie", "both_bad"])
                fields = {"pair": pair_in(html), "answer": said, "comment": f"{name} {time.monotonic_ns()}"}
                if client.post(f"{here}/vote", data=fields).status_code == 303:
                    acknowledged.append((name, fields["pair"], fields["comment"]))
        except httpx2.HTTPError:
            return  # the server was killed


def killed_while_voting(folder, rounds):
    """Kill the server again and again while three people vote; every acknowledged vote, and those in the file."""
    write_jsonl(folder / "s.jsonl", [{"prompt": f"p{i}", "responses": ["a", "b"]} for i in range(400)])
    acknowledged, chance = [], random.Random(0)
    for turn in range(rounds):
        with running(folder, *(["data=s.jsonl"] if turn == 0 else []), "votes_per_pair=9") as (process, address):
            stop = threading.Event()
            people = [
                threading.Thread(target=voting, args=(address, f"{name} {turn}", acknowledged, stop)) for name in "ABC"
            ]
            for person in people:
                person.start()
            time.sleep(chance.uniform(0.5, 1.5))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            stop.set()
            for person in people:
                person.join(20)
        with store.opened(folder / "labels.sqlite", new=False) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            names = store.names(db)
            kept = {(names[vote.annotator], vote.pair, vote.comment) for vote in store.votes(db)}
        assert set(acknowledged) <= kept, f"kill {turn + 1}"
    return acknowledged, kept


def test_two_kills_lose_no_acknowledged_vote(tmp_path):
    acknowledged, kept = killed_while_voting(tmp_path, 2)
    # a vote that was kept and whose answer the kill took away is no loss: at most one a person and kill
    assert len(acknowledged) > 5
    assert len(kept) <= len(acknowledged) + 6


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fifty_kills_lose_no_acknowledged_vote(tmp_path):
    acknowledged, kept = killed_while_voting(tmp_path, 50)
    print(f"{len(acknowledged)} acknowledged, {len(kept)} kept")
    assert len(acknowledged) > 250
    assert len(kept) <= len(acknowledged) + 150


# in a browser


ROWS = [
    {
        "prompt": f"Write one line about film {i}, the one with the dog.",
        "responses": [
            f"A warm, funny film about dog number {i}.",
            f"It is film {i}. It has a dog. I sat there until it was over.",
        ],
    }
    for i in range(10)
]
GOLD = [{"prompt": f"What is {i} + 1?", "chosen": f"{i + 1}", "rejected": f"{i + 2}, I believe"} for i in range(2)]


def sits_down(opened, address, name, said, **more):
    """A browser of one's own: the page after the name was given."""
    page = listened(opened, address, said, **more)
    assert "token" not in page.url
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#vote")
    return page


def answers_all(page, key_of):
    """Answer by keys alone until nothing is left; how many. The page forbids `eval`, so waiting is done from here."""
    for count in range(100):
        if page.locator("#vote").count() == 0:
            return count
        before = page.input_value("[name=pair]")
        page.keyboard.press(key_of(page))
        page.wait_for_selector(f"[name=pair][value='{before}']", state="detached")
        page.wait_for_selector("h1")
    raise AssertionError("it does not end")


def warm(page):
    return "a" if "warm" in page.inner_text("section[aria-labelledby=left-name] .text") else "ArrowRight"


@pytest.mark.slow
def test_two_people_label_by_keyboard_and_the_labels_train(tmp_path):
    from tiny import save

    data, gold = write_jsonl(tmp_path / "s.jsonl", ROWS), write_jsonl(tmp_path / "g.jsonl", GOLD)
    said = []
    with browser() as opened, running(tmp_path, f"data={data}", f"gold={gold}", "gold_share=0.2") as (_, address):
        ana = sits_down(opened, address, "Ana", said)
        ben = sits_down(opened, address, "Ben", said, width=390)
        assert ana.input_value("[name=pair]") != ben.input_value("[name=pair]")
        # an edit, a comment and a vote taken back, by keys
        ana.keyboard.press("Shift+A")
        ana.keyboard.press("Control+A")
        ana.keyboard.type("A better line.")
        ana.keyboard.press("Control+Enter")
        expect(ana, "Saved: A is better.")
        assert ana.evaluate("document.activeElement.tagName") == "H1"
        ana.keyboard.press("c")
        ana.keyboard.type("Both are tax a b t s.")
        ana.keyboard.press("Escape")
        ana.keyboard.press("t")
        expect(ana, "Saved: as good.")
        ana.keyboard.press("u")
        expect(ana, "Taken back")
        # keys can be switched off, for those who speak to their computer
        ana.locator("details.keys summary").click()
        ana.uncheck("#keys")
        pair = ana.input_value("[name=pair]")
        ana.locator("h1").focus()
        ana.keyboard.press("a")
        ana.wait_for_timeout(300)
        assert ana.input_value("[name=pair]") == pair
        ana.check("#keys")
        ana.locator("h1").focus()
        assert answers_all(ana, warm) + answers_all(ben, warm) >= 19
        ana.click("text=Results")
        assert "Ben" in ana.inner_text("table")
        assert not overflows(ben)
    assert said == []
    with store.opened(tmp_path / "labels.sqlite") as db:
        votes, golds = store.votes(db), store.golds(db)
        done = Counter(vote.annotator for vote in votes if golds[vote.pair] is None)
        assert done == {1: 10, 2: 10}
        assert [vote.edit for vote in votes if vote.edit] == ["A better line."]
        assert db.execute("SELECT comment FROM vote WHERE withdrawn IS NOT NULL").fetchall() == [
            ("Both are tax a b t s.",)
        ]
    out = tmp_path / "prefs.jsonl"
    command = COMMANDS["label"]()
    config = load(command.config, None, [f"db={tmp_path / 'labels.sqlite'}", f"out={out}"])
    from favor.label.export import export

    export(config)
    trees, _ = read(str(out), DataConfig(train=str(out)), "train")
    assert len(trees) == 10
    assert sum("warm" in str(tree.responses[c.order[0]]) for tree in trees for c in tree.comparisons) >= 9
    save(tmp_path / "model")
    from favor.train.preference import TrainConfig

    plan = describe(
        load(TrainConfig, None, [f"run={tmp_path / 'run'}", f"model.path={tmp_path / 'model'}", f"data.train={out}"])
    )
    assert "12 rows" in plan
