"""Families of transformers equal plain transformers in trees or in rows, or are refused: nothing is silently wrong."""

import pytest
import tiny
import torch
from zoo import Cell, judge, variants
from zoo_models import ENCODERS, FAMILIES, REWARDS, NotBuiltError, build

from favor.model.heads import load_scalar_model
from favor.model.load import ModelConfig, load_policy

# What changes logits after the head, looks ahead, or takes its positions from the batch: (cell, whether it must train).
NASTY = {
    Cell("llama", "tied"): True,
    Cell("gemma2"): True,
    Cell("gemma3n_text", "short window"): True,
    Cell("granite"): True,
    Cell("cohere2", "short window"): True,
    Cell("minicpm3"): True,
    Cell("recurrent_gemma"): True,
    Cell("modernbert-decoder"): True,
    Cell("gpt_oss", "short window"): True,
    Cell("deepseek_v3", "yarn"): True,
    Cell("bloom"): True,
    Cell("llama4_text", "short chunks"): True,
    Cell("roberta", "decoder"): False,
    Cell("bert"): False,
    Cell("gemma3_text", "bidirectional"): False,
    Cell("llama", "dynamic"): False,
    Cell("phi3", "longrope, long rows"): False,
    Cell("llama", "reward model: longrope"): False,
    Cell("gpt2", "reward model: default"): True,
}
# what looks ahead, or has no gradient in eval mode, or is a part of something else
MAY_BE_REFUSED = (*ENCODERS, "cpmant", "mllama", "prophetnet", "reformer", "xlm", "xlnet")
# families that run in trees, and must go on doing so
IN_TREES = """
afmoe apertus arcee aria_text beam biogpt bitnet cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm dbrx
diffllama dots1 emu3 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo fuyu gemma gemma3 gemma3_text gemma3n_text
gemma4_text gemma4_unified_text glm glm4 glm4_moe got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neox granite granitemoe
granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2
jetmoe kolibri1 laguna lfm2 llama mellum minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral
modernbert-decoder moshi moss_transcribe_diarize nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3
phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2
"""


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of tiny products: threads that wait for each other cost more than they bring."""
    torch.set_num_threads(1)


def check(cell):
    """Both outcomes of a cell, none of which may be silently wrong or a traceback."""
    found = judge(cell)
    for what in found:
        assert what.kind in ("exact", "fall-back", "refused"), (cell, what)
        if what.kind == "refused":
            assert "\n" not in what.why
    return found


@pytest.mark.parametrize("cell", NASTY, ids=", ".join)
def test_nasty_cell(cell):
    auto, rows = check(cell)
    assert auto.largest > 20 or "reward" in cell.variant, "logits too small to show what is done to them"
    if NASTY[cell]:
        assert auto.kind != "refused", auto.why
        assert rows.kind != "refused", rows.why


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    try:
        names = variants(family)
    except NotBuiltError as error:
        pytest.skip(str(error))
    for variant in names:
        try:
            auto, rows = check(Cell(family, variant))
        except NotBuiltError as error:
            pytest.skip(str(error))
        if variant == "default" and family in IN_TREES.split():
            assert (auto.kind, auto.layout) == ("exact", "tree"), auto
        if variant == "default" and family not in MAY_BE_REFUSED:
            assert "refused" not in (auto.kind, rows.kind), (auto, rows)


# transformers has no loader for the language model's own config of these
_PARTS = ("emu3", "mllama")
_SOON = ("llama", "gpt2", "gemma3n_text", "granitemoehybrid", "deepseek_v3", "mpt")
_SAVED = [
    pytest.param(family, scores, marks=() if family in _SOON else pytest.mark.slow)
    for family in FAMILIES
    for scores in (False, True)
    if family not in _PARTS and (not scores or (family in REWARDS and family not in ENCODERS))
]


@pytest.mark.parametrize(("family", "scores"), _SAVED)
def test_a_family_is_loaded_as_it_was_saved(family, scores, tmp_path):
    """What refuses folders with missing or unexpected tensors finds none in what transformers itself wrote."""
    try:
        saved = build(family, scores=scores)
    except NotBuiltError as error:
        pytest.skip(str(error))
    saved.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    settings = ModelConfig(path=str(tmp_path), dtype="float32", device="cpu")
    loaded = dict((load_scalar_model if scores else load_policy)(settings).model.named_parameters())
    assert loaded.keys() == dict(saved.named_parameters()).keys()
    for name, p in saved.named_parameters():
        # Youtu's loader empties the padding's row
        first = 1 if family == "youtu" and "embed" in name else 0
        assert torch.equal(loaded[name][first:], p[first:]), name
