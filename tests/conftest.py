"""Fixtures: tiny models and tokenizers, made on the spot, so that no test needs a hub."""

import os
import signal

# as the command line does, before transformers is imported
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch

# a suite started under nohup, or in the background of a script, would hand the ignored signals on to the processes that tests
# send them to
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(2)
