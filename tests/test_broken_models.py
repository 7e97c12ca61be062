"""Damaged, mislabelled and hostile model folders: one clear line and nothing executed, or, where nothing is wrong, success."""

import shutil
from pathlib import Path

import broken_models
import pytest
import spoil
import torch
from broken_models import CASES

# the rest is slow only because it is many
QUICK = """
renamed tensor; missing head; missing bias; unexpected tensor; one layer too many; one layer too few; wider config; NaN;
untied in config only; int8 tensors; truncated weights; pickle only; index is a list; config is a list; width is a word;
quantized for a missing library; remote code; generation_config is a list; bidirectional BERT; tokenizer is a list;
token beyond the embedding; template that divides by zero; adapter with renamed tensors; adapter config is a list;
plain LM scores; sampling with NaN; three labels score; reward model with a renamed tensor; plain LM starts a reward model;
GPT-2 with attention buffers; head stored though tied; names without their prefix; sound adapter; Llama 4's text model
"""


def _marked():
    quick = {name.strip() for name in QUICK.replace("\n", " ").split(";")}
    assert quick <= set(CASES), quick - set(CASES)
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in CASES]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _marked())
def test_folder(name, tmp_path):
    torch.set_num_threads(1)
    result = broken_models.judge(name, tmp_path)
    assert broken_models.right(name, result), result


def test_the_planted_code_would_run(tmp_path, monkeypatch):
    """The payloads are live: unpickled, or trusted, they do what must never happen."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(spoil.base("llama"), tmp_path / "broken")
    spoil.pickled("pytorch_model.bin")(tmp_path / "broken")
    torch.load(tmp_path / "broken/pytorch_model.bin", weights_only=False)
    mark = Path("EXECUTED")
    assert mark.exists()
    mark.unlink()
    spoil.remote_code(tmp_path / "broken")
    words = broken_models.words("train", tmp_path / "broken", tmp_path)
    broken_models.run([*words, "model.trust_remote_code=true"], tmp_path)
    assert mark.exists()
