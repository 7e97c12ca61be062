"""What the tests of pages in a browser share: Chromium, a page that is listened to, and what is wrong with it."""

import shutil
from contextlib import contextmanager

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# widths and colour schemes in which a page is looked at
LOOKS = [(1400, "light"), (1400, "dark"), (390, "light"), (390, "dark")]


@contextmanager
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


def listened(opened, address, said, width=1400, scheme="light", **more):
    """A page in a browser of its own; what it says on the console or asks of other places goes into `said`."""
    here = address.split("?")[0]
    page = opened.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more).new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith((here, "data:")) else said.append(asked.url))
    page.goto(address)
    return page


def expect(page, said):
    """Wait until the line for screen readers says so."""
    from playwright.sync_api import expect

    expect(page.locator("#status")).to_contain_text(said)


def inaccessible(page):
    """What axe-core finds serious or critical: rule and first element."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response
    assert len(found["passes"]) > 5, "axe did not look"
    return [
        (one["id"], one["nodes"][0]["html"][:90])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def overflows(page):
    """Whether one can scroll sideways."""
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")
