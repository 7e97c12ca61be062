"""A small model cut out of a larger one: some of its layers, and only the tokens that given texts use.

In: a model folder with a byte-level BPE tokenizer, and texts. Out: a smaller model folder that splits these texts into
the same pieces; it wants fine-tuning before it says anything. Next: prepare.py.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from favor.errors import ConfigError
from favor.model.weights import readable
from favor.run import atomic_folder


def shrink(source: Path, texts: Iterable[str], layers: Sequence[int], out: Path) -> int:
    """Write the smaller model; returns the size of its vocabulary.

    layers: which of the source's layers to keep, in order. Raises ConfigError when the model or tokenizer is of
    another kind, or has no such layer.
    """
    with readable(str(source)):
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    config = model.config
    if not isinstance(model.base_model.layers, nn.ModuleList) or max(layers) >= config.num_hidden_layers:
        raise ConfigError(f"{source}: layers {list(layers)} cannot be cut from its {config.num_hidden_layers}")
    described, kept = _smaller_vocabulary(json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer, texts, source)
    model.base_model.layers = nn.ModuleList(model.base_model.layers[i] for i in layers)
    kept_layers: list[Any] = list(model.base_model.layers)
    for index, layer in enumerate(kept_layers):
        layer.self_attn.layer_idx = index
    config.num_hidden_layers = len(layers)
    _keep_rows(model, kept)
    smaller = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        eos_token=tokenizer.eos_token,
        bos_token=tokenizer.bos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
    )
    # plain text is all it is for: the source's chat template holds words that the vocabulary may not have
    ids = {name: smaller.convert_tokens_to_ids(str(vars(tokenizer)["_special_tokens_map"][name])) for name in _SPECIAL}
    for part in (config, model.generation_config):
        part.update({f"{name}_id": i for name, i in ids.items()})
    with atomic_folder(out) as aside:
        model.save_pretrained(aside)
        smaller.save_pretrained(aside)
    return len(kept)


_SPECIAL = ("eos_token", "bos_token", "pad_token")


def _smaller_vocabulary(
    described: dict[str, Any], tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], source: Path
) -> tuple[dict[str, Any], list[int]]:
    """The tokenizer's description cut to the tokens in use, what they are merged from, and the 256 bytes; and the ids kept."""
    if described["model"]["type"] != "BPE" or (described["pre_tokenizer"] or {}).get("type") != "ByteLevel":
        raise ConfigError(f"{source}: its tokenizer is not a byte-level BPE, so its vocabulary cannot be cut")
    vocabulary: dict[str, int] = described["model"]["vocab"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in described["model"]["merges"]]
    parents = {a + b: (a, b) for a, b in pairs}
    special = {str(vars(tokenizer)["_special_tokens_map"][name]) for name in (*_SPECIAL, "unk_token")}
    added = [token for token in described["added_tokens"] if token["content"] in special]
    needed = {token for text in texts for token in tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)}
    needed |= {token for token in vocabulary if len(token) == 1} | {token["content"] for token in added}
    todo = list(needed)
    while todo:
        for parent in parents.get(todo.pop(), ()):
            if parent not in needed:
                needed.add(parent)
                todo.append(parent)
    kept = sorted(needed, key=vocabulary.__getitem__)
    new = {token: index for index, token in enumerate(kept)}
    described["model"]["vocab"] = new
    described["model"]["merges"] = [[a, b] for a, b in pairs if a in new and b in new and a + b in new]
    described["added_tokens"] = [token | {"id": new[token["content"]]} for token in added]
    return described, [vocabulary[token] for token in kept]


def _keep_rows(model: Any, kept: list[int]) -> None:
    """Embedding and head for the kept tokens only; tied weights stay tied."""
    rows = model.get_input_embeddings().weight[kept].detach().clone()
    head = model.get_output_embeddings().weight[kept].detach().clone()
    model.resize_token_embeddings(len(kept))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows)
        model.get_output_embeddings().weight.copy_(head)
