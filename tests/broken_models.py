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
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # in tests conftest.py does it; before transformers is imported
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

import tiny
import torch
from spoil import (
    adapter,
    adapter_tensors,
    as_it_is,
    attention_buffers,
    base,
    both,
    cast,
    content,
    cut,
    fill,
    gone,
    grown,
    header_size,
    index_entry,
    is_a_file,
    is_a_folder,
    is_a_link_loop,
    link_loop,
    more_tokens,
    other_head,
    pickle_beside,
    pickled,
    plus,
    remote_code,
    remote_code_of_a_known_type,
    remote_tokenizer,
    rename,
    rotary_buffers,
    settings,
    shards,
    slow_tokenizer,
    stored_head,
    template,
    without,
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


class Case(NamedTuple):
    """What is done to the folder, by which command it is met, and what the message must name (or WORKS)."""

    spoil: Callable[[Path], object]
    expected: tuple | str = ()
    command: str = "train"
    base: str = "llama"


class Result(NamedTuple):
    """refused, unclear (refused, but not as it should be), SILENT, TRACEBACK, EXECUTED, CHANGED or LEFT (files), or works."""

    kind: str
    message: str


# what a start that fails after opening its run folder may leave there
_MAY_STAY = ("config.toml", "data.json", "metrics.jsonl")
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
    "missing embedding, tied": Case(without("model.embed_tokens.weight"), ("model.embed_tokens.weight",)),
    "LoRA on a missing weight": Case(
        without("model.layers.1.mlp.down_proj.weight"), ("model.layers.1.mlp.down_proj.weight",), "lora"
    ),
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
    "NaN": Case(fill(_Q, float("nan")), ("not finite",)),
    "infinity": Case(fill(_Q, float("inf")), ("not finite",)),
    "NaN in a bias": Case(fill("model.layers.0.self_attn.v_proj.bias", float("nan")), ("not finite",), base="qwen2"),
    "float16 overflow": Case(both(grown(_Q), cast(torch.float16)), ("not finite",)),
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
    "bidirectional BERT": Case(as_it_is, ("later",), base="bert"),
    "BERT without head": Case(as_it_is, (), base="bert body"),
    "Llama without head": Case(as_it_is, ("lm_head.weight",), base="llama body"),
    "encoder-decoder": Case(as_it_is, (), base="t5"),
    "vision model": Case(as_it_is, (), base="vit"),
    "a classifier as language model": Case(as_it_is, ("score.weight",), base="scalar"),
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
    "plain LM scores": Case(as_it_is, ("score.weight",), "score"),
    "plain LM rewards PPO": Case(as_it_is, ("score.weight",), "ppo"),
    "plain LM judges": Case(as_it_is, ("score.weight",), "judge reward"),
    "two labels score": Case(as_it_is, ("2",), "score", "two labels"),
    "three labels judge": Case(as_it_is, ("3",), "judge reward", "three labels"),
    "three labels score": Case(as_it_is, ("3",), "score", "three labels"),
    "three labels reward PPO": Case(as_it_is, ("3",), "ppo", "three labels"),
    "three labels start a reward model": Case(as_it_is, ("3",), "reward", "three labels"),
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
    "BERT as reward model": Case(as_it_is, (), "score", "bert"),
    "T5 as reward model": Case(as_it_is, (), "score", "t5"),
    "reward model with NaN": Case(fill("score.weight", float("nan")), (), "score", "scalar"),
    "reward start with a renamed tensor": Case(
        rename("layers.0.self_attn.q_proj", "layers.0.self_attn.query"), (_Q,), "reward"
    ),
    "reward start, one layer too many": Case(
        settings(num_hidden_layers=3, layer_types=None), ("model.layers.2.",), "reward"
    ),
    "reward start from BERT": Case(as_it_is, (), "reward", "bert"),
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
    "as saved": Case(as_it_is, WORKS),
    "untied": Case(as_it_is, WORKS, base="untied"),
    "GPT-2 with attention buffers": Case(attention_buffers, WORKS, base="gpt2"),
    "rotary buffers": Case(rotary_buffers, WORKS),
    "head stored though tied": Case(stored_head, WORKS),
    # transformers unties them then, and both are saved
    "head differs though tied": Case(other_head, WORKS),
    "sharded": Case(shards, WORKS),
    "names without their prefix": Case(as_it_is, WORKS, base="tied body"),
    "float16 weights": Case(cast(torch.float16), WORKS),
    "no architectures": Case(settings(architectures=None), WORKS),
    "unused keys in config": Case(settings(colour="blue"), WORKS),
    "remote code beside a known type": Case(remote_code_of_a_known_type, WORKS),
    "no template, so a transcript": Case(gone("chat_template.jinja"), WORKS, "chat"),
    "no generation_config": Case(gone("generation_config.json"), WORKS),
    "a pickle beside the weights": Case(pickle_beside, WORKS),
    "more tokens than rows, unused": Case(more_tokens(used=False), WORKS),
    "sound adapter": Case(adapter(), WORKS),
    "BERT as decoder": Case(as_it_is, WORKS, base="bert decoder"),
    "Llama 4's text model": Case(as_it_is, WORKS, base="llama4"),
    "plain LM starts a reward model": Case(as_it_is, WORKS, "reward"),
    "reward model scores": Case(as_it_is, WORKS, "score", "scalar"),
    "reward model rewards PPO": Case(as_it_is, WORKS, "ppo", "scalar"),
    "reward model goes on training": Case(as_it_is, WORKS, "reward", "scalar"),
    "sound judge": Case(as_it_is, WORKS, "judge hf"),
}


def words(command, broken, here):
    """The command line that meets the folder."""
    data = _lines(here / "data.jsonl", _CHAT if command == "chat" else _ROWS)
    train = ["run=run", f"data.train={data}", "model.dtype=float32", "train.max_steps=1", "train.batch_prompts=2"]
    good = str(base("llama"))
    reward = ["reward.kind=model", f"reward.path={broken}"]
    if command in ("train", "chat", "sft", "reward"):
        return ["train" if command == "chat" else command, *train, f"model.path={broken}"]
    if command == "lora":
        return ["train", *train, f"model.path={broken}", "model.lora.rank=2"]
    if command == "ppo":
        return ["ppo", *train, f"model.path={good}", *reward, "sample.max_new_tokens=4"]
    if command == "score":
        return ["score", "out=scores.jsonl", f"data={data}", *reward]
    if command == "sample":
        drawn = ["sample.max_new_tokens=4", "engine.model.dtype=float32"]
        return ["sample", "out=samples.jsonl", f"prompts={data}", f"model={broken}", *drawn]
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
    arguments = words(case.command, broken, here)
    before = _files(here)
    code, err = run(arguments, here)
    after = _files(here)
    if any(path.name == "EXECUTED" for path in after):
        return Result("EXECUTED", err)
    if isinstance(code, str):
        return Result("TRACEBACK", f"{code} ({err})")
    if any(after.get(path) != content for path, content in before.items() if "run" not in path.parts):
        return Result("CHANGED", err)
    if case.expected == WORKS:
        return Result("works" if code == 0 else "unclear", err)
    if code == 0:
        return Result("SILENT", err)
    if left := sorted(path.name for path in set(after) - set(before) if path.name not in _MAY_STAY):
        return Result("LEFT", f"{', '.join(left)}: {err}")
    lines = err.strip().splitlines()
    folder = str(broken.parent if case.command in ("eval", "implicit") else broken)
    good = code == 2 and len(lines) == 1 and lines[0].startswith("favor: ")
    # a template is refused row by row: the rows are named, not the folder
    named = (folder in err or case.command == "chat") and all(part in err for part in case.expected)
    return Result("refused" if good and named else "unclear", err.strip().replace(str(here), "."))


def _files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
