"""Slow, obvious reference implementations that the fast code is held against."""

import torch

from favor.data.types import TokenTree


def plain_logps(model, trees):
    """log pi(y|x) of every response by plain transformers: one unpadded forward each, full logits, float64 [R]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = []
    for tree in trees:
        for response in tree.response_ids:
            ids = torch.tensor([tree.prompt_ids + response])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            logp = logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            out.append(logp[len(tree.prompt_ids) - 1 :].double().sum())
    model.set_attn_implementation(before)
    return torch.stack(out)


def tree(prompt, responses, comparisons=(), first=0, row=1):
    """A TokenTree from plain lists."""
    from favor.data.types import Comparison

    return TokenTree(
        prompt_ids=tuple(prompt),
        response_ids=tuple(map(tuple, responses)),
        complete=(True,) * len(responses),
        comparisons=tuple(Comparison(tuple(order)) for order in comparisons),
        first_response=first,
        row=row,
    )
