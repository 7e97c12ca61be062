"""What can be wrong with a model folder: small functions that spoil a good one, and the good ones they start from.

Next: broken_models.py, which says what must come of each.
"""

import json
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path

import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

_SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA = _SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 512}


def _random(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model.eval()


def _untied():
    return LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=False))


def _scalar(labels=1):
    return LlamaForSequenceClassification(LlamaConfig(**_LLAMA, tie_word_embeddings=True, num_labels=labels))


def _llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    return Llama4ForCausalLM(
        Llama4TextConfig(**_LLAMA, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=256)
    )


_T5 = {"vocab_size": tiny.VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_BASES = {
    "llama": lambda: tiny.FAMILIES["llama"](),
    "untied": _untied,
    "qwen2": lambda: tiny.FAMILIES["qwen2"](),
    "gpt2": lambda: tiny.FAMILIES["gpt2"](),
    "bert": lambda: BertLMHeadModel(BertConfig(**_SIZES)),
    "bert decoder": lambda: BertLMHeadModel(BertConfig(**_SIZES, is_decoder=True)),
    "bert body": lambda: BertModel(BertConfig(**_SIZES)),
    "llama body": lambda: LlamaModel(LlamaConfig(**_LLAMA, tie_word_embeddings=False)),
    "tied body": lambda: LlamaModel(LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "vit": lambda: ViTModel(
        ViTConfig(**{k: v for k, v in _SIZES.items() if "id" not in k[-3:]}, image_size=16, patch_size=8)
    ),
    "llama4": _llama4,
    "scalar": _scalar,
    "two labels": lambda: _scalar(2),
    "three labels": lambda: _scalar(3),
}


def base(name):
    """A good model folder, made once."""
    return Path(_made(name).name)


@cache
def _made(name):
    held = tempfile.TemporaryDirectory(prefix="favor-base-")
    torch.manual_seed(0)
    _random(_BASES[name]()).save_pretrained(held.name)
    tiny.tokenizer().save_pretrained(held.name)
    return held


def as_it_is(folder):
    """Nothing is done."""


def tensors(change):
    """Change the dict of tensors."""

    def spoil(folder):
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file({k: v.contiguous() for k, v in held.items()}, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def rename(old, new):
    def change(held):
        moved = {k.replace(old, new): v for k, v in held.items()}
        held.clear()
        held.update(moved)

    return tensors(change)


def without(*names):
    return tensors(lambda held: [held.pop(name) for name in names])


def plus(name, *shape):
    return tensors(lambda held: held.update({name: torch.randn(shape)}))


def fill(name, value):
    return tensors(lambda held: held[name].view(-1)[:3].fill_(value))


def grown(name):
    return tensors(lambda held: held[name].mul_(1e7))


def cast(dtype, name=None):
    return tensors(lambda held: held.update({k: v.to(dtype) for k, v in held.items() if name in (None, k)}))


def settings(file="config.json", /, **values):
    """Change keys of a JSON file; None removes one."""

    def spoil(folder):
        path = folder / file
        held = json.loads(path.read_text()) if path.exists() else {}
        held |= values
        path.write_text(json.dumps({k: v for k, v in held.items() if v is not None}))

    return spoil


def content(name, data):
    """Replace a file."""

    def spoil(folder):
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    return spoil


def cut(name, share=0.5):
    def spoil(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return spoil


def gone(name):
    return lambda folder: (folder / name).unlink()


def both(*steps):
    return lambda folder: [step(folder) for step in steps] and None


def shards(folder):
    """The weights in two files with an index."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(held)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, members in parts.items():
        save_file({k: held[k].contiguous() for k in members}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: file for file, members in parts.items() for k in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_entry(name, file):
    def spoil(folder):
        path = folder / "model.safetensors.index.json"
        held = json.loads(path.read_text())
        held["weight_map"][name] = file
        path.write_text(json.dumps(held))

    return spoil


PAYLOAD = "import pathlib; pathlib.Path('EXECUTED').touch()"


class _Bomb:
    def __reduce__(self):
        return exec, (PAYLOAD,)


def pickled(name):
    """Weights as a pickle that would run code, instead of safetensors."""

    def spoil(folder):
        for old in folder.glob("*.safetensors"):
            old.unlink()
        torch.save({"model.embed_tokens.weight": _Bomb()}, folder / name)

    return spoil


def pickle_beside(folder):
    torch.save({"a": _Bomb()}, folder / "pytorch_model.bin")


def remote_code(folder):
    settings(
        model_type="mine",
        architectures=["Mine"],
        auto_map={"AutoConfig": "modeling_mine.Config", "AutoModelForCausalLM": "modeling_mine.Mine"},
    )(folder)
    (folder / "modeling_mine.py").write_text(PAYLOAD)


def remote_code_of_a_known_type(folder):
    settings(auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})(folder)
    (folder / "modeling_mine.py").write_text(PAYLOAD)


def remote_tokenizer(folder):
    settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.Mine", "tok.Mine"]}, tokenizer_class="Mine")(
        folder
    )
    (folder / "tok.py").write_text(PAYLOAD)


def adapter(change=lambda folder: None, on="llama", **lora):
    """The folder becomes an adapter on a good model."""

    def spoil(folder):
        shutil.rmtree(folder)
        model = LlamaForCausalLM.from_pretrained(base(on), dtype=torch.float32)
        options = {
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "init_lora_weights": False,
            "task_type": "CAUSAL_LM",
        } | lora
        get_peft_model(model, LoraConfig(**options)).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        change(folder)

    return spoil


def adapter_tensors(change):
    def spoil(folder):
        held = load_file(folder / "adapter_model.safetensors")
        moved = change(held)
        save_file(moved, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return spoil


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def more_tokens(used):
    """The tokenizer knows a token that the embedding has no row for; the template uses it, or nothing does."""

    def spoil(folder):
        made = tiny.tokenizer()
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *(f"<|more{i}|>" for i in range(40))]})
        if used:
            made.chat_template = "<|more39|>" + tiny.CHATML
        made.save_pretrained(folder)

    return spoil


def slow_tokenizer(folder):
    for old in ("tokenizer.json", "tokenizer_config.json"):
        (folder / old).unlink()
    (folder / "vocab.json").write_text(json.dumps({"a</w>": 0, "b</w>": 1, "<unk>": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))


def header_size(folder):
    """A header that claims more bytes than there are."""
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + data[8:])


def is_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def link_loop(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "other.json")
    (folder / "other.json").symlink_to(folder / "config.json")


def is_a_link_loop(folder):
    shutil.rmtree(folder)
    folder.symlink_to(folder)


def is_a_folder(name):
    def spoil(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def attention_buffers(folder):
    """What older transformers stored beside GPT-2's weights."""
    tensors(
        lambda held: held.update(
            {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 512, 512, dtype=torch.uint8) for i in range(2)}
            | {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
        )
    )(folder)


def rotary_buffers(folder):
    tensors(
        lambda held: held.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)})
    )(folder)


def stored_head(folder):
    tensors(lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))(folder)


def other_head(folder):
    """The config says the head is the embedding; the file holds another head."""
    tensors(lambda held: held.update({"lm_head.weight": torch.randn_like(held["model.embed_tokens.weight"])}))(folder)
