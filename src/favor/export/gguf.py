"""A model as GGUF, the format of llama.cpp and Ollama, and the Modelfile by which Ollama takes it.

In: a float32 policy. Out: one file with weights, tokenizer and chat template; a Modelfile whose TEMPLATE is read off the chat
template and tried against it. Names of tensors and keys are the gguf library's. Next: card.py.
"""

import json
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple, cast

import gguf
import numpy as np
from gguf import GGMLQuantizationType, TokenType
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from favor.errors import ConfigError
from favor.model.load import Policy

# model_type of transformers -> architecture, and whether its queries and keys lie in pairs of halves (llama.cpp's own order)
_ARCHITECTURES: Mapping[str, tuple[gguf.MODEL_ARCH, bool]] = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
}
_KINDS = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
_FILES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_BLOCK = 32
_QWEN3_HEAD = 128
_OTHERWISE = "use format=safetensors, and llama.cpp's convert_hf_to_gguf.py on that folder"
# how a pre-tokenizer of tokenizer.json splits words -> llama.cpp's name of it
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}


class _Chain(NamedTuple):
    """What a chat template puts between the texts of a conversation that ends with the user."""

    start: str
    before_system: str
    after_system: str
    before_answer: str
    after_answer: str
    before_next: str


def check_gguf(policy: Policy) -> None:
    """Raises ConfigError for a model or tokenizer that is not written here, before anything is."""
    model, where = policy.causal_lm.config, policy.source
    known = ", ".join(_ARCHITECTURES)
    if model.model_type not in _ARCHITECTURES:
        raise ConfigError(f"{where}: favor writes GGUF of {known}, not of {model.model_type}; {_OTHERWISE}")
    rope = (model.rope_parameters or {}).get("rope_type", "default")
    if rope != "default":
        raise ConfigError(
            f"{where}: favor writes GGUF without scaled positions, and its rope_type is {rope}; {_OTHERWISE}"
        )
    if model.hidden_act != "silu" or _is_windowed(model):
        raise ConfigError(f"{where}: an activation or a sliding window that favor does not write as GGUF; {_OTHERWISE}")
    if model.model_type == "qwen3" and model.head_dim != _QWEN3_HEAD:
        raise ConfigError(
            f"{where}: transformers reads GGUF of qwen3 with heads of {_QWEN3_HEAD} alone, not of {model.head_dim}, so what was "
            f"written could not be checked; {_OTHERWISE}"
        )
    _pre_tokenizer(_tokenizer_json(policy.tokenizer), where)


def _is_windowed(model: Any) -> bool:
    """Whether attention looks back over a window only."""
    fields = model.to_dict()
    return bool(fields.get("sliding_window")) and bool(fields.get("use_sliding_window", True))


def write_gguf(policy: Policy, folder: Path, name: str, dtype: str) -> None:
    """Write the file. Raises ConfigError as `check_gguf` does."""
    model = policy.causal_lm.config
    architecture, paired = _ARCHITECTURES[model.model_type]
    writer = gguf.GGUFWriter(folder / name, gguf.MODEL_ARCH_NAMES[architecture])
    _add_shape(writer, model)
    writer.add_file_type(_FILES[dtype])
    _add_tokenizer(writer, policy, model.vocab_size)
    names = gguf.get_tensor_name_map(architecture, model.num_hidden_layers)
    heads = {"q_proj": model.num_attention_heads, "k_proj": model.num_key_value_heads}
    for key, values in _tensors(policy):
        own = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise ConfigError(f"{policy.source}: GGUF has no name for its tensor {key}; {_OTHERWISE}")
        layer = key.split(".")[-2]
        ordered = _halves_in_pairs(values, heads[layer]) if paired and layer in heads else values
        kind = _kind(ordered, _KINDS[dtype])
        writer.add_tensor(own, gguf.quants.quantize(ordered, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(policy: Policy) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 values) of every weight; a head that is the table of embeddings is left out, as readers expect."""
    tied = policy.causal_lm.config.tie_word_embeddings
    for key, value in policy.causal_lm.state_dict().items():
        if not (tied and key == "lm_head.weight"):
            yield key, value.detach().float().cpu().numpy()


def _kind(values: np.ndarray, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    # vectors are few and sensitive; blocks of 8-bit numbers need whole rows of them
    if values.ndim == 1:
        return GGMLQuantizationType.F32
    whole = values.shape[-1] % _BLOCK == 0
    return GGMLQuantizationType.F16 if wanted == GGMLQuantizationType.Q8_0 and not whole else wanted


def _halves_in_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head from (first half, second half) to pairs of one of each: how llama.cpp turns them."""
    shape = values.shape
    return values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _add_shape(writer: gguf.GGUFWriter, model: Any) -> None:
    head = model.to_dict().get("head_dim") or model.hidden_size // model.num_attention_heads
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(model.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_vocab_size(model.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, policy: Policy, size: int) -> None:
    tokenizer, described = policy.tokenizer, _tokenizer_json(policy.tokenizer)
    special = {token["id"]: token["special"] for token in described["added_tokens"]}
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    kinds = {True: TokenType.CONTROL, False: TokenType.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(described, policy.source))
    # a table of embeddings may have more rows than there are tokens
    writer.add_token_list([known.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types(
        [
            kinds[special[i]] if i in special else TokenType.NORMAL if i in known else TokenType.UNUSED
            for i in range(size)
        ]
    )
    merges = described["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    places = (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    )
    for number, add in places:
        if isinstance(number, int):
            add(number)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return json.loads(cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer.to_str())


def _pre_tokenizer(described: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name of how words are split. Raises ConfigError for a tokenizer that it might split otherwise."""
    if described["model"]["type"] != "BPE" or described["model"].get("byte_fallback"):
        raise ConfigError(f"{where}: favor writes GGUF of byte-level BPE tokenizers, not of this one; {_OTHERWISE}")
    top = described["pre_tokenizer"] or {}
    parts = top.get("pretokenizers", [top])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1].get("use_regex", True):
        return "smollm"
    split = parts[0]["pattern"].get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if split not in _SPLITS:
        raise ConfigError(
            f"{where}: favor does not know llama.cpp's name for how this tokenizer splits words; {_OTHERWISE}"
        )
    return _SPLITS[split]


def modelfile(tokenizer: PreTrainedTokenizerBase, end_ids: Set[int], file: str) -> tuple[str, list[str]]:
    """(Ollama's Modelfile, notes for the user). The TEMPLATE is left out where the chat template is not a chain of turns."""
    lines, notes = [f"FROM ./{file}"], list[str]()
    if chain := _chain(tokenizer):
        lines.append(f'TEMPLATE """{_go_template(chain)}"""')
    elif tokenizer.chat_template:
        notes.append(
            "the chat template is no plain chain of turns, so the Modelfile has no TEMPLATE: Ollama looks for one itself"
        )
    ends = sorted(tokenizer.convert_ids_to_tokens(i) for i in end_ids)
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends]
    return "\n".join(lines) + "\n", notes


def _chain(tokenizer: PreTrainedTokenizerBase) -> _Chain | None:
    """The template as a chain; None where it does more than to put turns one behind the other."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    marks = {"system": "QSYSQ", "user": "QASKQ", "assistant": "QSAYQ"}
    talk = [*marks.items(), ("user", "QENDQ")]
    try:
        whole, bare = _rendered(tokenizer, talk), _rendered(tokenizer, talk[1:])
        parts = re.split("|".join(text for _, text in talk), whole)
        if len(parts) != len(talk) + 1:
            return None
        chain = _Chain(bare.partition(marks["user"])[0], *parts)
        return chain if _holds(tokenizer, chain) else None
    except TemplateError:
        return None


def _holds(tokenizer: PreTrainedTokenizerBase, chain: _Chain) -> bool:
    """Whether the chain is what the template gives of other conversations."""
    talk = [("user", "Hi, you."), ("assistant", "Hello!"), ("user", "More?"), ("assistant", "Yes."), ("user", "Go on")]
    system = ("system", "Be kind.")
    joined = {
        "system": f"{chain.before_system}{{}}{chain.after_system}",
        "user": "{}",
        "assistant": f"{chain.before_answer}{{}}{chain.after_answer}",
    }
    for told in (talk[:1], talk, [system, *talk[:3]], [system, *talk]):
        built = "".join(joined[role].replace("{}", text) for role, text in told)
        if ("" if told[0] == system else chain.start) + built + chain.before_next != _rendered(tokenizer, told):
            return False
    return True


def _rendered(tokenizer: PreTrainedTokenizerBase, talk: list[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": text} for role, text in talk]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _go_template(chain: _Chain) -> str:
    """The same chain in Ollama's language, which takes the system message apart from the others."""
    before, after, answer, answered, following = chain[1:]
    return (
        f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{chain.start}{{{{ end }}}}"
        '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}{answered}{{{{ end }}}}{{{{ end }}}}{following}'
    )
