"""`favor watch`: what the page is told of a run, who gets in, and a reader who stays where they were."""

import asyncio
import json
import re
import time

import chat_desk
import httpx2
import pytest
from label_desk import serving, write_jsonl
from markupsafe import Markup
from page_desk import browser

pytest.importorskip("starlette", reason="favor[label] is not installed")

from favor.errors import CheckpointError, ConfigError
from favor.label.gate import Door
from favor.live.run import follow
from favor.live.server import application, policy, state_of
from favor.run import append

DOOR = Door(8123, "the-token", "watch")
HERE = "http://127.0.0.1:8123"
PAGE = "<!doctype html><html><head><title>x</title></head><body><script>let a = 1;</script><p>body</p></body></html>"


def a_run(folder, steps):
    run = folder / "run"
    run.mkdir()
    (run / "config.toml").write_text('run = "run"\n[model]\npath = "m"\n')
    for step in range(1, steps + 1):
        writes(run, step)
    return run


def writes(run, step):
    append(run / "metrics.jsonl", {"kind": "step", "step": step, "loss": 0.7 - step / 100, "accuracy": 0.5})


def event(run, name, step):
    append(run / "metrics.jsonl", {"kind": "event", "step": step, "name": name, "message": f"{name} at {step}"})


def asked(run, *paths, render=lambda: PAGE, cookies=None):
    async def all_of_them():
        transport = httpx2.ASGITransport(app=application(run, render, DOOR))
        cookie = {DOOR.cookie: DOOR.token} if cookies is None else cookies
        async with httpx2.AsyncClient(transport=transport, base_url=HERE, cookies=cookie) as client:
            return [await client.get(path) for path in paths]

    return asyncio.run(all_of_them())


def test_the_state_follows_what_the_run_writes(tmp_path):
    run = a_run(tmp_path, 3)
    before = state_of(run)
    assert (before["step"], before["finished"]) == (3, False)
    assert state_of(run)["version"] == before["version"]
    # the report itself and the lock are not news
    (run / "report.html").write_text("x")
    (run / ".lock").write_text("x")
    assert state_of(run)["version"] == before["version"]
    writes(run, 4)
    after = state_of(run)
    assert after["step"] == 4
    assert after["version"] != before["version"]
    event(run, "finished", 4)
    assert state_of(run)["finished"]
    # evaluation comes after the end
    (run / "eval.json").write_text("{}")
    assert state_of(run)["version"] != after["version"]
    assert state_of(run)["finished"]
    event(run, "resume", 4)
    assert not state_of(run)["finished"]


def test_the_state_of_a_long_file_a_torn_line_and_none(tmp_path):
    run = a_run(tmp_path, 0)
    assert state_of(run)["step"] == 0
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(2000):
            file.write(json.dumps({"kind": "step", "step": step, "text": "x" * 90}) + "\n")
        file.write('{"kind": "step", "step": 20')
    assert state_of(run)["step"] == 1999


def test_the_page_has_its_state_and_runs_its_own_scripts_alone(tmp_path):
    run = a_run(tmp_path, 3)
    page, state, script = asked(run, "/", "/state", "/live.js", render=lambda: Markup(PAGE))
    assert '<p id="favor-live"' in page.text
    assert f'data-version="{state.json()["version"]}"' in page.text
    assert page.text.index("/live.js") < page.text.index("</head>")
    rules = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    # sha256 of "let a = 1;"
    assert rules["script-src"] == "'self' 'sha256-xY6QKfH9PRsQnLz56nj6MBwiK5oHg+im1Jkpdp1x/Ck='"
    assert rules["default-src"] == rules["frame-ancestors"] == "'none'"
    assert script.status_code == 200
    assert "default-src 'none'; script-src 'self'; " in script.headers["content-security-policy"]


def test_a_script_of_another_place_has_no_hash():
    found = policy('<script type="module" src="/x.js"></script><SCRIPT type="a">1</SCRIPT><script>2</script>')
    assert len(re.findall("sha256-", found)) == 2


def test_without_the_token_nothing_is_shown(tmp_path):
    run = a_run(tmp_path, 1)
    for reply in asked(run, "/", "/state", "/live.js", cookies={}):
        assert reply.status_code == 403
        assert reply.text.startswith("favor watch: refused: the token")


def test_a_page_that_cannot_be_made_is_one_line(tmp_path):
    def broken():
        raise CheckpointError("config.toml: gone")

    (page,) = asked(a_run(tmp_path, 1), "/", render=broken)
    assert (page.status_code, page.text) == (500, "favor watch: config.toml: gone\n")


def test_no_run_and_no_package_are_one_line(tmp_path, monkeypatch):
    from favor.plain import watch

    with pytest.raises(CheckpointError, match="no run here"):
        watch(tmp_path)
    monkeypatch.setattr("favor.label.run.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"favor watch needs starlette, uvicorn"):
        follow(tmp_path, lambda: PAGE, 0, print)


@pytest.mark.parametrize("command", ["label", "chat", "watch"])
def test_the_address_is_told_whatever_else_is_kept_back(command, favor, tmp_path, monkeypatch):
    """--quiet leaves the address, --json makes it an object; a person could not open the page without it."""
    chat_desk.a_run(tmp_path)
    write_jsonl(tmp_path / "s.jsonl", [{"prompt": "p", "responses": ["a", "b"]}])
    words = {"label": ["data=s.jsonl"], "chat": ["run=run"], "watch": ["run=run"]}[command]
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    place = re.compile(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}")
    code, out, err = favor(command, *words, "--quiet")
    assert (code, err) == (0, "")
    assert place.fullmatch(out.strip())
    code, out, err = favor(command, *words, "--json")
    first = out.splitlines()[0]
    told = json.loads(first)
    assert (code, told["command"]) == (0, command)
    assert place.fullmatch(told["url"])
    assert "give it to nobody" in err
    code, out, _ = favor(command, *words)
    assert [line for line in out.splitlines() if place.fullmatch(line)]
    assert "give it to nobody" in out


@pytest.mark.slow
def test_a_reader_stays_where_they_were_while_the_run_goes_on(tmp_path):
    from playwright.sync_api import expect

    run, said = a_run(tmp_path, 30), []
    for number in range(40):
        event(run, "note", number)
    writes(run, 31)
    with browser() as opened, serving(tmp_path, "watch", "run") as (_, address):
        page = opened.new_context(viewport={"width": 1000, "height": 500}).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        assert "token" not in page.url
        line = page.locator("#favor-live")
        expect(line).to_have_text("Live: step 31")
        page.locator("details >> nth=-1").evaluate("one => { one.open = !one.open; }")
        opened_before = page.locator("details >> nth=-1").evaluate("one => one.open")
        page.evaluate("scrollTo(0, 600)")
        began = time.monotonic()
        version = line.get_attribute("data-version")
        for step in range(32, 36):
            writes(run, step)
        expect(line).to_have_text("Live: step 35", timeout=20000)
        page.wait_for_selector(f"#favor-live:not([data-version='{version}'])", state="attached", timeout=20000)
        assert time.monotonic() - began < 20
        expect(line).to_have_attribute("data-step", "35")
        page.wait_for_timeout(500)
        assert abs(page.evaluate("scrollY") - 600) < 5
        assert page.locator("details >> nth=-1").evaluate("one => one.open") == opened_before
        event(run, "finished", 35)
        expect(line).to_have_text("This run has finished, at step 35", timeout=20000)
        expect(page.locator("body")).to_contain_text("finished at 35", timeout=20000)
        narrow = opened.new_context(viewport={"width": 390, "height": 800}).new_page()
        narrow.goto(address)
        expect(narrow.locator("#favor-live")).to_be_visible()
    assert said == []
