"""Fixtures: tiny models and tokenizers, made on the spot, so that no test needs a hub."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(2)
