"""Every causal-LM family of transformers x what is special about it: trees or rows equal plain transformers, or favor says no.

Each cell is built tiny with large logits (zoo_models.py), settled as training settles it, with `model.layout` auto and
rows, and its log-probs and gradients are held against one unpadded forward of plain transformers per response. Run as a
program it prints the table: `make zoo`; exit code 1 when a cell is silently wrong or ends in a traceback.
"""

import random
import re
import sys
import time
from copy import deepcopy
from typing import NamedTuple

import tiny
import torch
import zoo_models
from oracles import tree
from transformers import logging
from zoo_models import ENCODERS, FAMILIES, WORDS, NotBuiltError

from favor.data.batches import build
from favor.errors import FavorError
from favor.model.heads import response_scores, settle_scores
from favor.model.layout import settle
from favor.model.load import ModelConfig, frozen_copy, make_policy
from favor.model.logprobs import response_logps

# largest error that rounding explains: log-probs relative to their size in nats, gradients relative to the largest one
TOLERANCE = 1e-4
# the length that position encodings were trained for, in the variants that stretch it: trees lie on both sides
ORIGINAL = 24
# the same model with a scalar head
REWARD = "reward model"
_ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
}
_STRETCHED = {
    "linear": "llama qwen2 gemma3_text",
    "dynamic": "llama qwen2 mistral phi granite falcon internlm3",
    "yarn": "llama qwen2 qwen3 deepseek_v3 deepseek_v2 gpt_oss olmo2",
    "llama3": "llama apertus cwm smollm3 granite",
    "longrope": "llama phi3 phimoe minicpm3 granitemoehybrid",
}
_MORE = {
    "falcon": {
        "alibi": {"alibi": True},
        "alibi, new decoder": {"alibi": True, "new_decoder_architecture": True},
        "new decoder": {"new_decoder_architecture": True},
        "sequential": {"parallel_attn": False, "bias": True},
        "multi-head": {"multi_query": False, "num_kv_heads": 4},
    },
    "bloom": {"post-layernorm residual": {"apply_residual_connection_post_layernorm": True}},
    "mpt": {"no alibi": {"attn_config": {"alibi": False}}},
    "gpt_neox": {"sequential": {"use_parallel_residual": False}},
    "stablelm": {"parallel, QK norm": {"use_parallel_residual": True, "qk_layernorm": True}},
    "cohere": {"QK norm": {"use_qk_norm": True}},
    "qwen2": {"half windowed": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}},
    "olmo": {"clipped": {"clip_qkv": 1.0}},
    "gpt2": {"scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}},
    "gpt_bigcode": {"multi-head": {"multi_query": False}},
    "opt": {"post-norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 32}},
    "phi": {"QK norm": {"qk_layernorm": True}},
    "gemma2": {"no caps": {"final_logit_softcapping": None, "attn_logit_softcapping": None}},
    "gemma3_text": {
        "bidirectional": {"use_bidirectional_attention": True},
        "final cap": {"final_logit_softcapping": 10.0},
    },
    "gemma3n_text": {
        "shared keys": {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        }
    },
    "granite": {"plain": {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}},
    "cohere2": {"no scale": {"logit_scale": 1.0}},
    "nanochat": {"no cap": {"final_logit_softcapping": None}},
    "xlnet": {"one-way": {"attn_type": "uni"}},
    "deepseek_v3": {"no query rank": {"q_lora_rank": None}},
    "llama4_text": {"short chunks": {"attention_chunk_size": 8, "floor_scale": 4, "no_rope_layers": [1, 0]}},
    "doge": {"experts": {"is_moe": True, "num_experts": 16}},
    "persimmon": {"no QK norm": {"qk_layernorm": False}},
    "lfm2": {"convolutions": {"layer_types": ["conv", "full_attention"]}},
    "smollm3": {"half without positions": {"no_rope_layers": [1, 0]}},
    "zamba2": {"rope": {"use_mem_rope": True}},
}


class Cell(NamedTuple):
    """One family and what is changed of its tiny default."""

    family: str
    variant: str = "default"


class Outcome(NamedTuple):
    """exact, fall-back, refused, WRONG or TRACEBACK; the layout, relative errors, what was said, the largest logit."""

    kind: str
    layout: str = ""
    logp: float = 0.0
    gradient: float = 0.0
    why: str = ""
    largest: float = 0.0


def variants(family):
    """Variant -> settings that replace the tiny default's."""
    text = zoo_models.text_config(family)
    found = {"default": {}}
    windows = [name for name in zoo_models.WINDOWS if isinstance(vars(text).get(name), int)]
    if windows:
        found["short window"] = dict.fromkeys(windows, 8)
    sparse = [name for name in ("index_topk", "indexer_budget") if isinstance(vars(text).get(name), int)]
    if sparse:
        found["few keys"] = dict.fromkeys(sparse, 8)
    if family in zoo_models.TIED:
        found["untied" if text.tie_word_embeddings else "tied"] = {"tie_word_embeddings": not text.tie_word_embeddings}
    if family in ENCODERS:
        found["decoder"] = {"is_decoder": True}
    for rope, families in _STRETCHED.items():
        if family in families.split():
            found |= {rope: _stretched(text, rope, ORIGINAL)}
            if rope in ("dynamic", "longrope"):
                found |= {f"{rope}, long rows": _stretched(text, rope, 220)}
    found |= _MORE.get(family, {})
    if family in zoo_models.REWARDS and family not in ENCODERS:
        scored = [name for name in found if name.startswith(("default", "short window", "dynamic", "longrope"))]
        found |= {f"{REWARD}: {name}": found[name] for name in scored}
    return found


def _stretched(text, rope, original):
    scaling = _ROPES[rope] | {"rope_theta": 10000.0}
    current = text.rope_parameters or {}
    if "partial_rotary_factor" in current:
        scaling["partial_rotary_factor"] = current["partial_rotary_factor"]
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = original
    if rope == "longrope":
        width = (
            vars(text).get("qk_rope_head_dim")
            or vars(text).get("head_dim")
            or text.hidden_size // text.num_attention_heads
        )
        scaling |= {"short_factor": [1.0] * (width // 2), "long_factor": [4.0 + i for i in range(width // 2)]}
        scaling |= {"short_mscale": 1.0, "long_mscale": 1.2} if "phimoe" in text.model_type else {}
    if any(kind in current for kind in ("full_attention", "sliding_attention")):
        scaling = dict.fromkeys(current, scaling)
    top = {"max_position_embeddings": original if rope == "dynamic" else 512}
    if "original_max_position_embeddings" in vars(text):
        top["original_max_position_embeddings"] = original
    return top | {"rope_parameters": scaling}


def forest(long=False):
    """Prompts and responses of 1 to 60 tokens; responses that open alike, one inside another, a later turn; short ones first."""
    rng = random.Random(7)

    def ids(count):
        return [rng.randrange(*WORDS) for _ in range(count)]

    prompt, opening = ids(9), ids(4)
    first = [ids(6), opening + ids(5), opening + ids(3), opening]
    trees = [
        tree(prompt, first, first=0),
        tree(prompt[:5] + ids(3), [ids(1), ids(7)], first=4),
        tree(prompt + first[0], [ids(3), ids(22)], first=6),
        tree(ids(3), [ids(12), ids(41)], first=8),
    ]
    return [*trees, tree(ids(150), [ids(140), ids(20)], first=10)] if long else trees


def paths(trees):
    return [(len(item.prompt_ids), item.prompt_ids + response) for item in trees for response in item.response_ids]


def plain(model, trees):
    """log pi(y|x) or the score of each response by plain transformers, float64 [R].

    The forward of two tokens resets positions that remember the longest row.
    """
    out = []
    for start, path in paths(trees):
        ids = torch.tensor([path])
        with torch.no_grad():
            zoo_models.logits_of(model, ids[:, :2])
        logits = zoo_models.logits_of(model, ids)
        if logits.shape == (1, 1):
            out.append(logits.double().squeeze())
            continue
        logp = logits[0, start - 1 : -1].double().log_softmax(-1)
        out.append(logp.gather(1, ids[0, start:, None]).sum())
    return torch.stack(out)


def gradients(value, model):
    """d(value . fixed coefficients) by parameter name; zeros where there is none."""
    model.zero_grad()
    (value * torch.linspace(-1, 1, value.shape[0], dtype=torch.float64)).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


class Truth(NamedTuple):
    """Plain transformers on this cell: log-probs, gradients (None: it has none), causality, how large its logits are."""

    logp: torch.Tensor
    gradient: dict | None
    causal: bool
    largest: float


def truth(model, trees):
    """What favor must give."""
    value = plain(model, trees)
    try:
        gradient = gradients(value, model)
    except AssertionError:  # Reformer computes none in eval mode
        gradient = None
    with torch.no_grad():
        largest = zoo_models.logits_of(model, torch.tensor([paths(trees)[0][1]])).abs().max().item()
    return Truth(value.detach(), gradient, zoo_models.scores_text(model) or _causal(model), largest)


def _causal(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(*WORDS, (1, 40), generator=generator)
    with torch.no_grad():
        before = zoo_models.logits_of(model, ids)
        other = ids.clone()
        other[0, 20:] = torch.randint(*WORDS, (20,), generator=generator)
        after = zoo_models.logits_of(model, other)
    return bool((before - after)[:, :20].abs().max() <= 1e-3 * before.std())


def logp_error(found, expected):
    return float(((found.detach() - expected).abs() / expected.abs().clamp(min=1.0)).max())


def gradient_error(found, expected):
    """Relative to the largest gradient, and a hundredth of the error relative to the parameter's own where that is not tiny."""
    scale = max(g.abs().max() for g in expected.values())
    errors = {name: (found[name] - expected[name]).abs().max() for name in expected}
    own = {name: g.abs().max() for name, g in expected.items() if g.abs().max() > 1e-3 * scale}
    return float(max(max(errors.values()) / scale, max(errors[name] / size for name, size in own.items()) / 100))


def outcome(model, asked, trees, expected):
    """Settle and compute as training does: policy and reference on everything at once, the policy on each tree alone."""
    measure = response_scores if zoo_models.scores_text(model) else response_logps
    try:
        policy = make_policy(model, tiny.tokenizer(), ModelConfig(path="zoo", dtype="float32", device="cpu"))
        settled = settle_scores if zoo_models.scores_text(model) else settle
        policy, why = settled(policy, asked, trees, train=True)
        # the reference is copied before training begins, as here
        reference = None if zoo_models.scores_text(model) else frozen_copy(policy)
        found = measure(policy, build(trees, policy.layout))
        got = gradients(found, policy.model)
        with torch.no_grad():
            again = found if reference is None else response_logps(reference, build(trees, reference.layout))
            alone = torch.cat([measure(policy, build([item], policy.layout)) for item in trees])
    except FavorError as error:
        return Outcome("refused", why=str(error))
    except Exception as error:  # noqa: BLE001 (the outcome that must not be)
        return Outcome("TRACEBACK", why=f"{type(error).__name__}: {error}")
    logp = max(logp_error(value, expected.logp) for value in (found, again, alone))
    gradient = gradient_error(got, expected.gradient) if expected.gradient is not None else float("inf")
    if not expected.causal:
        return Outcome("WRONG", policy.layout, logp, gradient, "later tokens change earlier logits; " + why)
    if not (logp <= TOLERANCE and gradient <= TOLERANCE):
        return Outcome("WRONG", policy.layout, logp, gradient, why)
    return Outcome("fall-back" if "FALL-BACK" in why else "exact", policy.layout, logp, gradient, why)


def judge(cell):
    """(outcome with layout auto, outcome with layout rows) of a cell."""
    scores = cell.variant.startswith(REWARD)
    model = zoo_models.build(cell.family, scores=scores, **variants(cell.family)[cell.variant])
    trees = forest(long="long rows" in cell.variant)
    expected = truth(deepcopy(model), trees)
    return tuple(
        outcome(deepcopy(model), asked, trees, expected)._replace(largest=expected.largest)
        for asked in ("auto", "rows")
    )


def rows(families, missing):
    """(cell, outcome with layout auto, outcome with layout rows) of every cell; `missing` gets what cannot be built, and why."""
    for family in families:
        try:
            found = variants(family)
        except NotBuiltError as error:
            missing[family] = str(error)
            continue
        for variant in found:
            try:
                yield Cell(family, variant), *judge(Cell(family, variant))
            except NotBuiltError as error:
                missing[f"{family}, {variant}"] = str(error)


def main(families):
    """Print the table, the counts, what was said and what is missing; 1 when anything is silently wrong."""
    logging.set_verbosity_error()
    began = time.monotonic()
    counts, reasons, missing, done = {}, {}, {}, []
    print(
        "| family | variant | largest logit | auto | log-probs, gradients | rows | log-probs, gradients |\n"
        + 7 * "|---"
        + "|"
    )
    for cell, *pair in rows(families or FAMILIES, missing):
        done.append(cell.family)
        words = [f"{pair[0].largest:.0f}"]
        for asked, what in zip(("auto", "rows"), pair, strict=True):
            counts[asked, what.kind] = counts.get((asked, what.kind), 0) + 1
            said = what.kind, re.sub(r"[\d.]+(e[-+]?\d+)?", "N", what.why)
            reasons.setdefault(said, []).append(f"{cell.family} ({cell.variant}, {asked})")
            layout = f" ({what.layout})" if what.layout and asked == "auto" else ""
            words += [what.kind + layout, f"{what.logp:.0e}, {what.gradient:.0e}" if what.layout else "-"]
        print(f"| {cell.family} | {cell.variant} | " + " | ".join(words) + " |", flush=True)
    print(f"\n{len(done)} cells of {len(set(done))} families in {time.monotonic() - began:.0f} s")
    for (asked, kind), count in sorted(counts.items()):
        print(f"- layout {asked}: {count} {kind}")
    print("\nWhat was said:")
    for (kind, why), where in sorted(reasons.items()):
        print(f"- {kind}: {why:.300} [{len(where)}: {', '.join(where[:4])}]")
    print("\nNot built:")
    for family, reason in missing.items():
        print(f"- {family}: {reason}")
    return int(any(kind in ("WRONG", "TRACEBACK") for _, kind in counts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
