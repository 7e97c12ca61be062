"""Model folders that are damaged, mislabelled or hostile, and the commands that meet them.

Each case makes a folder from a tiny good one, runs a command on it in this process and says what must come: one line
that names the folder (and the tensor), exit code 2, nothing executed, nothing left behind; or, for a few that look odd and
are fine, success. Run as a program it prints the table; exit code 1 when a case went otherwise.
"""

import contextlib
import io
import json
import os
import shutil
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # in tests conftest.py does it; before transformers is imported
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

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

from favor.cli import main

WORKS = "works"
_ROWS = [{"prompt": f"Film {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)]
_CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in _ROWS
]
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


class Case(NamedTuple):
    """What is done to the folder, by which command it is met, and what the message must name (or WORKS)."""

    spoil: Callable[[Path], object]
    expected: tuple | str = ()
    command: str = "train"
    base: str = "llama"


class Result(NamedTuple):
    """refused, unclear (refused, but not as it should be), SILENT, TRACEBACK, EXECUTED, LEFT (files) or works."""

    kind: str
    message: str


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


# what is done to a folder


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


_Q = "model.layers.0.self_attn.q_proj.weight"
CASES = {
    # tensors
    "renamed tensor": Case(rename("layers.0.self_attn.q_proj", "layers.0.self_attn.query"), (_Q,)),
    "renamed layer": Case(rename("layers.1.", "blocks.1."), ("model.layers.1.",)),
    "renamed everywhere": Case(rename("model.", "decoder."), ("model.",)),
    "missing weight": Case(without("model.layers.1.mlp.down_proj.weight"), ("model.layers.1.mlp.down_proj.weight",)),
    "missing head": Case(without("lm_head.weight"), ("lm_head.weight",), base="untied"),
    "missing norm": Case(without("model.norm.weight"), ("model.norm.weight",)),
    "missing bias": Case(
        without("model.layers.0.self_attn.q_proj.bias"), ("model.layers.0.self_attn.q_proj.bias",), base="qwen2"
    ),
    "missing embedding": Case(without("model.embed_tokens.weight"), ("model.embed_tokens.weight",), base="untied"),
    "unexpected bias": Case(
        plus("model.layers.0.self_attn.q_proj.bias", 32), ("model.layers.0.self_attn.q_proj.bias",)
    ),
    "unexpected tensor": Case(plus("value_head.weight", 1, 32), ("value_head.weight",)),
    "one layer too many": Case(settings(num_hidden_layers=3, layer_types=None), ("model.layers.2.",)),
    "one layer too few": Case(settings(num_hidden_layers=1, layer_types=None), ("model.layers.1.",)),
    "wider config": Case(settings(hidden_size=64), ("32", "64")),
    "deeper MLP in config": Case(settings(intermediate_size=64), ("mlp.",)),
    "larger vocabulary in config": Case(settings(vocab_size=400), ("400",)),
    "smaller vocabulary in config": Case(settings(vocab_size=300), ("300",)),
    "other key-value heads": Case(settings(num_key_value_heads=4), ("k_proj",)),
    "untied in config only": Case(settings(tie_word_embeddings=False), ("lm_head.weight",)),
    "head differs though tied": Case(other_head, ("lm_head.weight",)),
    "NaN": Case(fill(_Q, float("nan")), ("not finite",)),
    "infinity": Case(fill(_Q, float("inf")), ("not finite",)),
    "NaN in a bias": Case(fill("model.layers.0.self_attn.v_proj.bias", float("nan")), ("not finite",), base="qwen2"),
    "float16 overflow": Case(both(tensors(lambda held: held[_Q].mul_(1e7)), cast(torch.float16)), ("not finite",)),
    "int8 tensors": Case(cast(torch.int8), ("int8",)),
    "one int8 tensor": Case(cast(torch.int8, _Q), ("int8",)),
    # the weights file
    "truncated weights": Case(cut("model.safetensors")),
    "random bytes": Case(content("model.safetensors", bytes(range(256)) * 8)),
    "zero bytes": Case(content("model.safetensors", bytes(4096))),
    "empty weights": Case(content("model.safetensors", b"")),
    "header too large": Case(header_size),
    "no weights": Case(gone("model.safetensors")),
    "weights are a folder": Case(is_a_folder("model.safetensors")),
    "shard missing": Case(both(shards, gone("model-00002-of-00002.safetensors")), ("model-00002-of-00002",)),
    "index torn": Case(both(shards, cut("model.safetensors.index.json")), ("model.safetensors.index.json",)),
    "index is a list": Case(
        both(shards, content("model.safetensors.index.json", "[]")), ("model.safetensors.index.json",)
    ),
    "index without a map": Case(
        both(shards, content("model.safetensors.index.json", "{}")), ("model.safetensors.index.json",)
    ),
    "index names a file that is not there": Case(
        both(shards, index_entry("model.norm.weight", "model-00003-of-00003.safetensors")), ("model-00003-of-00003",)
    ),
    "shard cut": Case(both(shards, cut("model-00001-of-00002.safetensors"))),
    "pickle only": Case(pickled("pytorch_model.bin"), ("safetensors",)),
    "pickle named safetensors": Case(pickled("model.safetensors")),
    # config.json
    "config torn": Case(cut("config.json"), ("config.json",)),
    "config empty": Case(content("config.json", ""), ("config.json",)),
    "config is a list": Case(content("config.json", "[1, 2]"), ("config.json",)),
    "config is a number": Case(content("config.json", "7"), ("config.json",)),
    "config not UTF-8": Case(content("config.json", b'{"model_type": "\xff"}'), ("config.json",)),
    "config is a folder": Case(is_a_folder("config.json"), ("config.json",)),
    "config is a link loop": Case(link_loop, ("config.json",)),
    "width is a word": Case(settings(hidden_size="wide"), ("hidden_size",)),
    "no heads": Case(settings(num_attention_heads=0)),
    "negative layers": Case(settings(num_hidden_layers=-1, layer_types=None)),
    "no layers": Case(settings(num_hidden_layers=0, layer_types=None)),
    "width is a list": Case(settings(hidden_size=[32]), ("hidden_size",)),
    "unknown activation": Case(settings(hidden_act="magic"), ("magic",)),
    "unknown rope": Case(settings(rope_parameters={"rope_type": "magic", "rope_theta": 1.0})),
    "unknown model_type": Case(settings(model_type="mine"), ("mine",)),
    "no model_type": Case(settings(model_type=None), ("model_type",)),
    "model_type is a number": Case(settings(model_type=5)),
    "quantized for a missing library": Case(
        settings(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), ("quantiz",)
    ),
    "quantized for GPTQ": Case(settings(quantization_config={"quant_method": "gptq", "bits": 4}), ("quantiz",)),
    "quantized by magic": Case(settings(quantization_config={"quant_method": "magic"}), ("quantiz",)),
    "remote code": Case(remote_code, ("trust_remote_code",)),
    "generation_config torn": Case(cut("generation_config.json"), ("generation_config.json",)),
    "generation_config is a list": Case(content("generation_config.json", "[]"), ("generation_config.json",)),
    "generation_config with a word as end": Case(
        settings("generation_config.json", eos_token_id="end"), ("eos_token_id",)
    ),
    # other kinds of model
    "bidirectional BERT": Case(lambda folder: None, ("later",), base="bert"),
    "BERT without head": Case(lambda folder: None, (), base="bert body"),
    "Llama without head": Case(lambda folder: None, ("lm_head.weight",), base="llama body"),
    "encoder-decoder": Case(lambda folder: None, (), base="t5"),
    "vision model": Case(lambda folder: None, (), base="vit"),
    "a classifier as language model": Case(lambda folder: None, ("score.weight",), base="scalar"),
    "encoder's architecture": Case(settings(architectures=["BertForMaskedLM"], model_type="bert"), ()),
    # tokenizer
    "no tokenizer": Case(gone("tokenizer.json"), ("tokenizer",)),
    "tokenizer torn": Case(cut("tokenizer.json"), ("tokenizer",)),
    "tokenizer is a list": Case(content("tokenizer.json", "[]"), ("tokenizer",)),
    "tokenizer_config torn": Case(cut("tokenizer_config.json"), ("tokenizer_config.json",)),
    "tokenizer_config is a list": Case(content("tokenizer_config.json", "[]"), ("tokenizer_config.json",)),
    "slow tokenizer": Case(slow_tokenizer, ("tokenizer",)),
    "tokenizer with remote code": Case(remote_tokenizer, ("trust_remote_code",)),
    "token beyond the embedding": Case(more_tokens(used=True), ("<|more39|>",), "chat"),
    "template is not jinja": Case(template("{% for m in %}"), ("template",), "chat"),
    "template with an unknown filter": Case(template("{{ messages | magic }}"), ("template",), "chat"),
    "template that raises": Case(template("{{ raise_exception('no') }}"), (), "chat"),
    "template that divides by zero": Case(template("{{ 1 / 0 }}"), ("template",), "chat"),
    "template that breaks out": Case(
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}" + tiny.CHATML), ("template",), "chat"
    ),
    "template that never ends": Case(
        template("{% for i in range(10 ** 9) %}{% endfor %}" + tiny.CHATML), ("template",), "chat"
    ),
    # adapters
    "adapter without its base": Case(
        adapter(settings("adapter_config.json", base_model_name_or_path="./gone")), ("./gone",)
    ),
    "adapter without a base's name": Case(adapter(settings("adapter_config.json", base_model_name_or_path=None))),
    "adapter with renamed tensors": Case(
        adapter(adapter_tensors(lambda held: {k.replace("q_proj", "query"): v for k, v in held.items()})), ("q_proj",)
    ),
    "adapter with a missing tensor": Case(
        adapter(adapter_tensors(lambda held: dict(list(held.items())[1:]))), ("lora_",)
    ),
    "adapter of another rank": Case(adapter(settings("adapter_config.json", r=8)), ("lora_",)),
    "adapter for another base": Case(
        adapter(lambda folder: settings("adapter_config.json", base_model_name_or_path=str(base("gpt2")))(folder))
    ),
    "adapter torn": Case(adapter(cut("adapter_model.safetensors"))),
    "adapter config torn": Case(adapter(cut("adapter_config.json")), ("adapter_config.json",)),
    "adapter config is a list": Case(adapter(content("adapter_config.json", "[]")), ("adapter_config.json",)),
    "adapter without weights": Case(adapter(gone("adapter_model.safetensors"))),
    "adapter of an unknown kind": Case(adapter(settings("adapter_config.json", peft_type="MAGIC"))),
    "adapter as a pickle": Case(adapter(pickled("adapter_model.bin"))),
    "adapter with NaN": Case(
        adapter(adapter_tensors(lambda held: {k: v * float("nan") for k, v in held.items()})), ("not finite",)
    ),
    # the folder
    "a file instead of a folder": Case(is_a_file),
    "a link to itself": Case(is_a_link_loop),
    "empty folder": Case(lambda folder: [path.unlink() for path in folder.iterdir() if path.is_file()]),
    # as reward model
    "plain LM scores": Case(lambda folder: None, ("score.weight",), "score"),
    "plain LM rewards PPO": Case(lambda folder: None, ("score.weight",), "ppo"),
    "plain LM judges": Case(lambda folder: None, ("score.weight",), "judge reward"),
    "two labels score": Case(lambda folder: None, ("2",), "score", "two labels"),
    "three labels judge": Case(lambda folder: None, ("3",), "judge reward", "three labels"),
    "three labels score": Case(lambda folder: None, ("3",), "score", "three labels"),
    "three labels reward PPO": Case(lambda folder: None, ("3",), "ppo", "three labels"),
    "three labels start a reward model": Case(lambda folder: None, ("3",), "reward", "three labels"),
    "reward model without its head": Case(without("score.weight"), ("score.weight",), "score", "scalar"),
    "reward model with a renamed tensor": Case(
        rename("layers.0.mlp.up_proj", "layers.0.mlp.up"), ("up_proj",), "score", "scalar"
    ),
    "reward model with a missing norm": Case(without("model.norm.weight"), ("model.norm.weight",), "ppo", "scalar"),
    "reward model, one layer too many": Case(
        settings(num_hidden_layers=3, layer_types=None), ("model.layers.2.",), "score", "scalar"
    ),
    "reward model with an unexpected tensor": Case(
        plus("value_head.weight", 1, 32), ("value_head.weight",), "score", "scalar"
    ),
    "BERT as reward model": Case(lambda folder: None, (), "score", "bert"),
    "T5 as reward model": Case(lambda folder: None, (), "score", "t5"),
    "reward model with NaN": Case(fill("score.weight", float("nan")), (), "score", "scalar"),
    "reward start with a renamed tensor": Case(
        rename("layers.0.self_attn.q_proj", "layers.0.self_attn.query"), (_Q,), "reward"
    ),
    "reward start, one layer too many": Case(
        settings(num_hidden_layers=3, layer_types=None), ("model.layers.2.",), "reward"
    ),
    "reward start from BERT": Case(lambda folder: None, (), "reward", "bert"),
    "reward start from a pickle": Case(pickled("pytorch_model.bin"), ("safetensors",), "reward"),
    # as judge, in evaluation, in sampling
    "judge with a renamed tensor": Case(
        rename("layers.0.self_attn.q_proj", "layers.0.self_attn.query"), (_Q,), "judge hf"
    ),
    "judge with NaN": Case(fill(_Q, float("nan")), ("not finite",), "judge hf"),
    "judge without template": Case(gone("chat_template.jinja"), ("template",), "judge hf"),
    "sampling with a missing tensor": Case(without("model.norm.weight"), ("model.norm.weight",), "sample"),
    "sampling with NaN": Case(fill(_Q, float("nan")), ("not finite",), "sample"),
    "SFT with a missing tensor": Case(without("model.norm.weight"), ("model.norm.weight",), "sft"),
    "run's model spoilt before eval": Case(without("model.norm.weight"), ("model.norm.weight",), "eval"),
    "implicit reward of a spoilt run": Case(without("model.norm.weight"), ("model.norm.weight",), "implicit"),
    # odd, and fine
    "as saved": Case(lambda folder: None, WORKS),
    "untied": Case(lambda folder: None, WORKS, base="untied"),
    "GPT-2 with attention buffers": Case(attention_buffers, WORKS, base="gpt2"),
    "rotary buffers": Case(rotary_buffers, WORKS),
    "head stored though tied": Case(stored_head, WORKS),
    "sharded": Case(shards, WORKS),
    "names without their prefix": Case(lambda folder: None, WORKS, base="tied body"),
    "float16 weights": Case(cast(torch.float16), WORKS),
    "no architectures": Case(settings(architectures=None), WORKS),
    "unused keys in config": Case(settings(colour="blue"), WORKS),
    "remote code beside a known type": Case(remote_code_of_a_known_type, WORKS),
    "no template, so a transcript": Case(gone("chat_template.jinja"), WORKS, "chat"),
    "no generation_config": Case(gone("generation_config.json"), WORKS),
    "a pickle beside the weights": Case(lambda folder: torch.save({"a": _Bomb()}, folder / "pytorch_model.bin"), WORKS),
    "more tokens than rows, unused": Case(more_tokens(used=False), WORKS),
    "sound adapter": Case(adapter(), WORKS),
    "BERT as decoder": Case(lambda folder: None, WORKS, base="bert decoder"),
    "Llama 4's text model": Case(lambda folder: None, WORKS, base="llama4"),
    "plain LM starts a reward model": Case(lambda folder: None, WORKS, "reward"),
    "reward model scores": Case(lambda folder: None, WORKS, "score", "scalar"),
    "reward model rewards PPO": Case(lambda folder: None, WORKS, "ppo", "scalar"),
    "reward model goes on training": Case(lambda folder: None, WORKS, "reward", "scalar"),
    "sound judge": Case(lambda folder: None, WORKS, "judge hf"),
}


def words(command, broken, here):
    """The command line that meets the folder."""
    data = _lines(here / "data.jsonl", _CHAT if command == "chat" else _ROWS)
    train = ["run=run", f"data.train={data}", "model.dtype=float32", "train.max_steps=1", "train.batch_prompts=2"]
    good = str(base("llama"))
    reward = ["reward.kind=model", f"reward.path={broken}"]
    if command in ("train", "chat", "sft", "reward"):
        return ["train" if command == "chat" else command, *train, f"model.path={broken}"]
    if command == "ppo":
        return ["ppo", *train, f"model.path={good}", *reward, "sample.max_new_tokens=4"]
    if command == "score":
        return ["score", "out=scores.jsonl", f"data={data}", *reward]
    if command == "sample":
        drawn = ["sample.max_new_tokens=4", "model.dtype=float32"]
        return ["sample", "out=samples.jsonl", f"prompts={data}", f"model.path={broken}", *drawn]
    if command == "eval":
        return ["eval", f"run={broken.parent}", f"data={data}"]
    if command == "implicit":
        return ["score", "out=scores.jsonl", f"data={data}", "reward.kind=implicit", f"reward.path={broken.parent}"]
    sides = []
    for side, word in (("a", "good"), ("b", "bad")):
        answers = [{"prompt": row["prompt"], "responses": [word]} for row in _ROWS]
        sides.append(f"{side}.file={_lines(here / f'{side}.jsonl', answers)}")
    if command == "judge reward":
        return ["winrate", "run=run", *sides, "judge.kind=reward", *(f"judge.{word}" for word in reward)]
    return ["winrate", "run=run", *sides, "judge.kind=hf", f"judge.model.path={broken}", "judge.model.dtype=float32"]


def _lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(arguments, here):
    """The command line in this process: (exit code or the traceback, stderr)."""
    err = io.StringIO()
    kept = sys.argv
    sys.argv = ["favor", *map(str, arguments)]
    try:
        with contextlib.chdir(here), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            main()
            return 0, err.getvalue()
    except SystemExit as end:
        return end.code, err.getvalue()
    except BaseException as error:  # noqa: BLE001 (a traceback is an outcome)
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error}", f"{Path(last.filename).name}:{last.lineno}"
    finally:
        sys.argv = kept


def judge(name, here):
    """Make the folder, run the command, say what happened."""
    case = CASES[name]
    broken = here / "broken"
    if case.command in ("eval", "implicit"):
        assert run(words("train", base(case.base), here), here)[0] == 0
        broken = here / "run/model"
    else:
        shutil.copytree(base(case.base), broken)
    case.spoil(broken)
    before = _files(here)
    code, err = run(words(case.command, broken, here), here)
    if list(here.rglob("EXECUTED")):
        return Result("EXECUTED", err)
    if isinstance(code, str):
        return Result("TRACEBACK", f"{code} ({err})")
    if case.expected == WORKS:
        return Result("works" if code == 0 else "unclear", err)
    if code == 0:
        return Result("SILENT", err)
    left = {
        path
        for path in _files(here) - before
        if path.name not in ("config.toml", "data.json", "metrics.jsonl", "winrate.toml")
    }
    left -= {here / "data.jsonl", here / "a.jsonl", here / "b.jsonl"}
    if left:
        return Result("LEFT", f"{', '.join(str(path.relative_to(here)) for path in sorted(left))}: {err}")
    lines = err.strip().splitlines()
    folder = str(broken.parent if case.command in ("eval", "implicit") else broken)
    good = code == 2 and len(lines) == 1 and lines[0].startswith("favor: ")
    # a template is refused row by row: the rows are named, not the folder
    named = (folder in err or case.command == "chat") and all(part in err for part in case.expected)
    return Result("refused" if good and named else "unclear", err.strip().replace(str(here), "."))


def _files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def right(name, result):
    """Whether that is what should have happened."""
    return result.kind == ("works" if CASES[name].expected == WORKS else "refused")


def table(names):
    """Print the table and the counts; 1 when a case went otherwise than it should."""
    counts, wrong = {}, 0
    print("| folder | command | expected | outcome | message |\n|---|---|---|---|---|")
    for name in names or CASES:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as here:
            result = judge(name, Path(here).resolve())
        counts[result.kind] = counts.get(result.kind, 0) + 1
        wrong += not right(name, result)
        expected = WORKS if case.expected == WORKS else " ".join(["refused:", *case.expected])
        message = " ".join(result.message.split()).replace("|", "/")
        print(f"| {name} | {case.command} | {expected} | {result.kind} | {message:.220} |", flush=True)
    print(
        f"\n{sum(counts.values())} folders: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    )
    print(f"{wrong} not as they should be")
    return int(wrong > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(table(sys.argv[1:]))
