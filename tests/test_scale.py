"""The page of many processes has the tables that its script computes, and the script counts as favor does."""

import sys
from pathlib import Path

import pytest

from favor.train.optim import STATE_BYTES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "scale", raising=False)
    import scale

    return scale


def test_the_page_has_what_the_script_computes(scale):
    page = (ROOT / "docs/scale.md").read_text("utf-8")
    assert "\n".join(scale.tables()[:8]) in page
    assert "\n".join(scale.tables()[9:]) in page


def test_bytes_and_numbers_are_favors(scale):
    # weight, gradient, moments
    assert {"all weights": 4 + 4 + STATE_BYTES["adamw"], "LoRA": 4} == scale.KEPT
    it = scale.model("1B")
    # published: 1.24 billion
    assert it.weights == it.rest + 16 * it.layer == 1_235_814_400


def test_more_gpus_hold_less_and_are_never_slower_at_the_same_split(scale):
    it = scale.model("1B")
    two, four = (scale.run(it, "all weights", gpus) for gpus in (2, 4))
    assert (two.how, four.how) == ("full", "full")
    # packs are the same, so the share of the weights is what falls
    assert two.size - four.size == 16 * it.weights / 4
    assert scale.run(it, "all weights", 1024).hours <= scale.run(it, "all weights", 64).hours * 1.01
