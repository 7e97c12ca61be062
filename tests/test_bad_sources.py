"""No bad source ends in a traceback, changes a file, or is read as anything but what it holds."""

import pytest
from bad_sources import COMMANDS, corpus
from source_cases import cases

NAMES = sorted(cases())
# every kind of source, in a few seconds
FEW = NAMES[::20]


def faults(found):
    return {key: verdict for key, verdict in found.items() if verdict.wrong or verdict.kind == "changed file"}


def test_the_corpus_is_large():
    assert len(NAMES) >= 120


@pytest.mark.parametrize("command", ["train, drop", "lint", "score", "sample"])
def test_a_few_sources(command):
    assert faults(corpus((command,), FEW)) == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_source(command):
    found = corpus((command,), NAMES)
    assert len(found) >= 250
    assert faults(found) == {}
