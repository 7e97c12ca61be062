"""The embedded model itself: trees equal plain transformers, and step 0 is ln 2, on real text."""

import pytest
import torch
from oracles import plain_logps

from favor.data import batches
from favor.data.read import DataConfig, read
from favor.data.tokenize import TokensConfig, tokenize
from favor.losses.table import make_loss
from favor.model.layout import settle
from favor.model.load import ModelConfig, frozen_copy, load_policy
from favor.model.logprobs import response_logps
from favor.run import cache_folder
from favor.train.preference import make_objective
from favor.train.reference import Reference


@pytest.mark.slow
def test_smollm2_trees_equal_plain_transformers():
    model, reviews = cache_folder() / "smollm2-135m-instruct", cache_folder() / "reviews"
    if not model.exists() or not reviews.exists():
        pytest.skip("the embedded model is not in the cache; `make demo` fetches it")
    policy = load_policy(ModelConfig(path=str(model), dtype="float32"))
    source = str(reviews / "train.jsonl")
    texts, _ = read(source, DataConfig(train=source, max_rows=170), "train")
    trees, _ = tokenize(texts[:4], policy.tokenizer, TokensConfig(), policy.end_ids, "error")
    plain = plain_logps(policy.causal_lm, trees)
    coefficient = torch.linspace(-1, 1, len(plain), dtype=torch.float64)
    (plain * coefficient).sum().backward()
    expected = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy, why = settle(policy, "auto", trees)
    assert "prompt trees" in why
    batch = batches.build(trees, "tree")
    assert batch.num_tokens < 0.8 * batch.num_naive_tokens
    policy.model.zero_grad()
    found = response_logps(policy, batch)
    assert torch.allclose(found, plain, rtol=1e-5)
    (found * coefficient).sum().backward()
    scale = max(g.abs().max() for g in expected.values())
    for name, parameter in policy.model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * scale, name
    reference = frozen_copy(policy)
    with torch.no_grad():
        ref = response_logps(reference, batch)
        loss, stats = make_objective(make_loss(), policy, Reference(lambda _: ref, "")).loss(batch)
    assert loss.item() / stats["pairs"].item() == pytest.approx(0.6931471805599453, abs=1e-6)
