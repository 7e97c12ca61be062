"""The pages in a browser: nothing is fetched, nothing is said on the console, nothing is cut, and what can be used works."""

import json

import pytest
from favor_frontier.page import SECTIONS
from page_desk import LOOKS, browser, inaccessible, listened, overflows
from test_realign import a_page
from test_report import a_picture, a_run

from favor.cli import COMMANDS
from favor.config import load
from favor.lint.run import lint
from favor.report.compare import write_comparison
from favor.report.page import write_page
from favor.report.records import collect
from favor.run import RunFolder, write_jsonl

# elements whose content is wider than themselves, but for the lines that are only heard
CUT = """() => [...document.querySelectorAll("main *, header *")].filter(one => one.clientWidth > 1
  && one.scrollWidth > one.clientWidth + 1 && !one.closest("svg, select")).map(one => one.outerHTML.slice(0, 90))"""
# of texts on the page's two grounds, the least ratio of luminances (WCAG 1.4.3 asks for 4.5)
CONTRAST = """() => {
  const light = (text) => { const c = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * c[0] + .7152 * c[1] + .0722 * c[2]; };
  const ground = (one) => { for (; one; one = one.parentElement) { const found = getComputedStyle(one).backgroundColor; if (!/, 0\\)$|transparent/.test(found)) return found; } return "rgb(255, 255, 255)"; };
  let least = [99, ""];
  for (const one of document.querySelectorAll("main *, header *")) {
    if (one.closest("svg") || ![...one.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !one.offsetParent) continue;
    const [a, b] = [light(getComputedStyle(one).color), light(ground(one))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < least[0]) least = [ratio, one.outerHTML.slice(0, 90)];
  }
  return least; }"""


def shown(opened, path, width=1400, scheme="light"):
    """A page, and what it says on the console or asks of the network."""
    said = []
    return listened(opened, path.as_uri(), said, width, scheme), said


def every_page(folder):
    """A page of each kind, with long words and long lines."""
    long = "an-answer-without-any-blank-" * 20
    root = a_picture(folder / "picture")
    write_jsonl(RunFolder(root).pairs, [{"pair": str(i), "prompt": i, "margin": i / 7 - 3} for i in range(40)])
    write_page(collect(root, SECTIONS), folder / "picture.html")
    root = a_run(folder / "run", evil=long)
    write_page(collect(root), folder / "run.html")
    runs = [collect(a_run(folder / f"a-run-with-a-long-name-{i}", steps=5)) for i in range(4)]
    write_comparison(runs, folder / "all.html")
    rows = [
        {"prompt": long, "chosen": "same", "rejected": "same"},
        {"prompt": "Name a fish.", "chosen": f"{long} ", "rejected": "b &amp; c"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lint(
        load(
            COMMANDS["lint"]().config,
            None,
            [f"data.train={folder / 'rows.jsonl'}", f"lint.page={folder / 'lint.html'}"],
        )
    )
    (folder / "realign.html").write_text(a_page(long))
    return [folder / f"{name}.html" for name in ("picture", "run", "all", "lint", "realign")]


@pytest.mark.slow
def test_every_page_is_whole_quiet_and_readable(tmp_path):
    with browser() as opened:
        for path in every_page(tmp_path):
            for width, scheme in LOOKS:
                page, said = shown(opened, path, width, scheme)
                page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
                assert said == [], (path.name, said)
                assert not overflows(page), (path.name, width)
                assert inaccessible(page) == [], (path.name, width, scheme)
                assert page.evaluate(CUT) == [], (path.name, width)
                least, where = page.evaluate(CONTRAST)
                assert least >= 4.5, (path.name, scheme, least, where)
                dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 25)"
                assert dark == (scheme == "dark")
                page.close()


@pytest.mark.slow
def test_answers_can_be_searched_sorted_and_all_shown(tmp_path):
    root = a_run(tmp_path / "run")
    words = ("apple", "pear", "plum", "fig", "kiwi", "lime", "date", "quince")
    records = [
        {
            "prompt": f"about {word}",
            "reference": ["x"],
            "policy": [f"y {word}"],
            "reference_scores": [0.5],
            "policy_scores": [i / 10],
        }
        for i, word in enumerate(words)
    ]
    write_jsonl(RunFolder(root).samples, records)
    write_page(collect(root), tmp_path / "page.html")
    with browser() as opened:
        page, said = shown(opened, tmp_path / "page.html")

        def prompts():
            return page.locator("#answers h3:visible").all_inner_texts()

        assert prompts() == [f"about {word}" for word in reversed(words[2:])]
        page.select_option("#order", "up")
        assert prompts()[0] == "about apple"
        page.click("#all")
        assert len(prompts()) == 8
        page.fill("#search", "PLUM y")
        assert prompts() == ["about plum"]
        assert page.inner_text("#count") == "1 of 1 shown"
        # curves over steps or over tokens
        assert page.locator(".by-tokens").is_hidden()
        page.check("#tokens")
        assert page.locator(".by-tokens").is_visible()
        assert page.locator(".by-step").is_hidden()
        assert said == []
