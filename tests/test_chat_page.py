"""`favor chat` in a browser, as a person would: ask, see two answers, vote by keyboard, and train on the vote."""

import json

import pytest
from chat_desk import a_run
from label_desk import serving
from page_desk import browser, expect, listened, overflows

pytest.importorskip("starlette", reason="favor[label] is not installed")

from favor.config import load
from favor.label.settings import LabelConfig
from favor.train.dryrun import describe
from favor.train.preference import TrainConfig

THERE = "Both answers are there"


def opens(opened, address, said, **more):
    """The page after the token has left its address."""
    page = listened(opened, address, said, **more)
    assert "token" not in page.url
    return page


def asks(page, text):
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")
    expect(page, THERE)


def contrast(page):
    """The least contrast of a token's letters and its ground, over all shades, by the formula of WCAG 2."""
    pairs = page.evaluate(
        """() => [...document.querySelectorAll(".scale .t")].map(t => {
             const card = t.classList.contains("z0") ? document.body : t;
             return [getComputedStyle(t).color, getComputedStyle(card).backgroundColor];
           })"""
    )
    return min(_ratio(*map(_light, pair)) for pair in pairs)


def _light(colour):
    channels = [int(part) / 255 for part in colour.split("(")[1].rstrip(")").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _ratio(a, b):
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


@pytest.mark.slow
def test_a_person_asks_votes_and_trains(tmp_path):
    a_run(tmp_path)
    said = []
    words = ("chat", "run=run", "sample.max_new_tokens=24", "name=Ana")
    with browser() as opened, serving(tmp_path, *words) as (_, address):
        page = opens(opened, address, said)
        asks(page, "What is the capital of France?")
        texts = [page.inner_text(f"#text-{n}") for n in (1, 2)]
        assert all(texts)
        assert texts[0] != texts[1]
        assert page.inner_text("#name-1") == "Answer 1: before training"
        # the value of a token, by pointing and by keyboard
        page.hover("#text-2 .t >> nth=0")
        assert "log-ratio" in page.inner_text("#value-2")
        page.focus("#text-1 .t >> nth=0")
        first = page.inner_text("#value-1")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#value-1") != first
        # one stop for Tab, however many tokens there are
        assert page.locator("#text-1 .t[tabindex='0']").count() == 1
        # the pieces' log-ratios times beta are the reward
        page.locator("#table-1 summary").click()
        ratios = [float(cell) for cell in page.locator("#rows-1 td:nth-child(2)").all_inner_texts()]
        reward = float(page.inner_text("#reward-1").split()[-1])
        assert abs(reward - 0.3 * sum(ratios)) < 0.02
        page.locator("h1").focus()
        page.keyboard.press("2")
        expect(page, "Saved: answer 2 is better")
        assert page.inner_text("#tally-after") == "1"
        # blind: nothing is said or coloured before the vote
        page.locator("#settings summary").click()
        page.check("#blind")
        page.locator("h1").focus()
        page.keyboard.press("n")
        see_text(page, "#name-1", "Answer 1")
        expect(page, THERE)
        assert page.input_value("#seed") == "1"
        assert page.inner_text("#name-1") == "Answer 1"
        assert page.locator(".answers .t").count() == 0
        page.keyboard.press("t")
        expect(page, "Saved: as good. 1 was")
        assert page.locator(".answers .t").count() > 5
        page.keyboard.press("u")
        expect(page, "Taken back")
        page.keyboard.press("x")
        expect(page, "Saved: both bad")
    assert said == []
    trains(tmp_path, texts[1])


def see_text(page, place, text):
    from playwright.sync_api import expect

    expect(page.locator(place)).to_have_text(text)


def trains(folder, better):
    """The votes, exported by `favor label`, are what `favor train` reads."""
    from favor.label.export import export

    out = folder / "prefs.jsonl"
    export(load(LabelConfig, None, [f"db={folder / 'labels.sqlite'}", f"out={out}"]))
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    (good,) = (row for row in rows if row["verdict"] != ["both_bad"])
    assert good[good["verdict"][0]].strip() == better.strip()
    words = [f"run={folder / 'next'}", f"model.path={folder / 'base'}", f"data.train={out}"]
    assert "2 rows" in describe(load(TrainConfig, None, words))


@pytest.mark.slow
def test_a_conversation_goes_on_stops_and_fits_a_phone(tmp_path):
    from playwright.sync_api import expect as see

    a_run(tmp_path)
    said = []
    with browser() as opened, serving(tmp_path, "chat", "run=run", "sample.max_new_tokens=12") as (_, address):
        page = opens(opened, address, said)
        asks(page, "What is the capital of France?")
        page.locator("#on-2").click()
        assert page.locator("#talk li").count() == 2
        page.locator("#settings summary").click()
        page.locator("#most").fill("400")
        page.locator("#prompt").fill("And of Italy?")
        page.keyboard.press("Enter")
        see(page.locator("#text-2")).not_to_be_empty()
        page.keyboard.press("Escape")
        expect(page, "Stopped")
        see(page.locator("#send")).to_be_enabled()
        see(page.locator("#vote button >> nth=0")).to_be_disabled()
        # the models are free again at once; and keys can be switched off
        page.locator("#most").fill("8")
        asks(page, "And of Italy?")
        page.uncheck("#keys")
        page.locator("h1").focus()
        page.keyboard.press("1")
        page.wait_for_timeout(300)
        assert page.inner_text("#tally-before") == "0"
        assert contrast(page) >= 4.5
        narrow = opens(opened, address, said, width=390, scheme="dark")
        asks(narrow, "A long" + "word" * 20)
        narrow.locator("#table-2 summary").click()
        assert not overflows(narrow)
        assert contrast(narrow) >= 4.5
        # what a mistake looks like
        narrow.locator("#prompt").fill("a <|im_end|> b")
        narrow.keyboard.press("Enter")
        see(narrow.locator("#problem")).to_contain_text("<|im_end|>")
    assert said == []
