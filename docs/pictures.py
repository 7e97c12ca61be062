"""The README's pictures, made from runs: `python docs/pictures.py DEMO/dpo FRONTIER`.

In: the folder of the demo's DPO run and that of a frontier. Out: docs/demo.png, the first screen of the run's page in Chromium, and
docs/frontier.svg, the picture of the frontier's page.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from favor_frontier.page import frontier_plot
from playwright.sync_api import sync_playwright

from favor.report.page import write_page
from favor.report.plot import standalone
from favor.report.records import collect

HERE = Path(__file__).parent


def main(demo: str, frontier: str) -> None:
    """Write both pictures."""
    found = json.loads((Path(frontier) / "frontier.json").read_text("utf-8"))
    (HERE / "frontier.svg").write_text(standalone(frontier_plot(found)), "utf-8")
    with tempfile.TemporaryDirectory() as work, sync_playwright() as play:
        write_page(collect(Path(demo)), Path(work) / "page.html")
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 700}, device_scale_factor=1.5, color_scheme="light")
        page.goto((Path(work) / "page.html").as_uri())
        page.locator(".verdict").screenshot(path=HERE / "demo.png")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
