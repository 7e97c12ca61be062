"""Fixtures: tiny models and tokenizers, made on the spot, so that no test needs a hub."""

import os
import signal
import sys

# as the command line does, before transformers is imported
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch

# a suite started under nohup, or in the background of a script, would hand the ignored signals on to the processes that tests
# send them to
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def _threads():
    """Fixtures of a module train with as many threads as its tests, whatever OMP_NUM_THREADS says."""
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture
def favor(monkeypatch, capsys, tmp_path):
    """Run the command line in this process, in an empty folder: (exit code, stdout, stderr)."""

    from favor.cli import main

    def run(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["favor", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, err

    return run
