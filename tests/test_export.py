"""`favor export`: what is written loads elsewhere and says the same, the card tells what is known, nothing leaves unasked."""

import json
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from favor import cli
from favor.config import load
from favor.errors import CheckpointError, ConfigError
from favor.export import gguf
from favor.export import run as export_run
from favor.export.run import ExportConfig, export

ROWS = [{"prompt": f"Film {i}?", "chosen": f"good {i} film", "rejected": "bad"} for i in range(4)]


def favor(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["favor", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def trained(monkeypatch, folder, *words, family="llama", template=tiny.CHATML):
    """A run of two steps, by the command, from inside its folder: every path is a relative one."""
    monkeypatch.chdir(folder)
    tiny.save(folder / "base", family, template)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ("run=run", "model.path=base", "data.train=train.jsonl", "optim.lr=1e-2", "train.batch_prompts=2", *words)
    assert not favor(monkeypatch, "train", *words)
    return folder / "run"


def exported(*words):
    return export(load(ExportConfig, None, ["run=run", "out=out", "check_tokens=12", *words]))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_gives_the_same_log_probs(monkeypatch, tmp_path, family):
    # as Qwen3's own are
    monkeypatch.setitem(tiny.FAMILIES, "qwen3", lambda: Qwen3ForCausalLM(Qwen3Config(**tiny._GQA, head_dim=128)))
    trained(monkeypatch, tmp_path, family=family)
    made = exported("format=gguf", "dtype=float32")
    assert made.tokens >= 4
    assert made.difference < 1e-5
    assert made.notes == ()
    assert (tmp_path / "out/Modelfile").read_text().startswith("FROM ./model.gguf\nTEMPLATE")
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "out/Modelfile").read_text()


def test_a_gguf_that_says_something_else_is_not_kept(monkeypatch, tmp_path):
    """The planted fault: queries and keys in transformers' order, which llama.cpp would turn wrongly."""
    trained(monkeypatch, tmp_path)
    monkeypatch.setattr(gguf, "_halves_in_pairs", lambda values, heads: values)
    with pytest.raises(CheckpointError, match=r"gives other log-probs than the run's .* nats a token"):
        exported("format=gguf", "dtype=float32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "q8_0"])
def test_smaller_numbers_cost_little_and_the_file_is_smaller(monkeypatch, tmp_path, dtype):
    trained(monkeypatch, tmp_path)
    assert 0 < exported("format=gguf", f"dtype={dtype}").difference < 0.1
    small = (tmp_path / "out/model.gguf").stat().st_size
    exported("format=gguf", "dtype=float32", "overwrite=true")
    assert small < 0.85 * (tmp_path / "out/model.gguf").stat().st_size


def test_adapters_are_merged(monkeypatch, tmp_path):
    run = trained(monkeypatch, tmp_path, "model.lora.rank=4", "model.lora.alpha=64")
    made = exported("dtype=float32")
    assert made.difference < 1e-4
    assert not list((tmp_path / "out").glob("adapter*"))
    # from another folder: the adapter names its base by an absolute path
    monkeypatch.chdir("/")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        adapted = AutoPeftModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(input_ids=ids).logits
    assert (merged - adapted).abs().max() < 1e-4
    assert (merged - base).abs().max() > 1e-2


def test_the_files_hold_bfloat16_unless_asked(monkeypatch, tmp_path):
    trained(monkeypatch, tmp_path)
    assert 0 < exported().difference < 0.1
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 (not a dict)


def test_the_card_tells_what_is_known_and_no_place(monkeypatch, tmp_path):
    run = trained(monkeypatch, tmp_path, f"data.eval={tmp_path / 'train.jsonl'}", "loss.beta=0.25")
    exported()
    bare = (tmp_path / "out/README.md").read_text()
    assert "Nothing was measured" in bare
    assert not favor(monkeypatch, "eval", "run=run", "sample_prompts=0")
    exported("overwrite=true")
    card = (tmp_path / "out/README.md").read_text()
    accuracy = json.loads((run / "eval.json").read_text())["accuracy"]
    assert f"| implicit reward accuracy | {accuracy:.3f} [" in card
    assert "(`favor train`, method: dpo, beta 0.25)" in card
    assert "beta = 0.25" in card
    assert "2305.18290" in card
    assert "&#" not in card
    assert str(tmp_path) not in card
    header = card.split("---")[1]
    assert "library_name: transformers" in header
    assert "- dpo" in header
    # a folder of this machine is no model of the hub
    assert "base_model" not in header


def test_what_is_there_stays(monkeypatch, tmp_path):
    trained(monkeypatch, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(ConfigError, match="is there already, and favor export did not make it"):
        exported("overwrite=true")
    with pytest.raises(ConfigError, match="did not make it"):
        export(load(ExportConfig, None, ["run=run", "out=run/model", "overwrite=true"]))
    assert (tmp_path / "out/mine").read_text() == "x"
    (tmp_path / "out/mine").unlink()
    (tmp_path / "out").rmdir()
    exported()
    with pytest.raises(ConfigError, match="overwrite=true"):
        exported()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dtype=q8_0"], "a number format of gguf"),
        (["public=true"], "public is read only with push"),
    ],
)
def test_settings_that_do_not_go_together(words, message):
    with pytest.raises(ConfigError, match=message):
        load(ExportConfig, None, ["run=r", "out=o", *words])


def test_a_model_that_gguf_is_not_written_of_is_refused_before_anything_is_made(monkeypatch, tmp_path):
    trained(monkeypatch, tmp_path, family="gpt2")
    with pytest.raises(ConfigError, match=r"writes GGUF of llama, qwen2, qwen3, not of gpt2; use format=safetensors"):
        exported("format=gguf")
    assert not (tmp_path / "out").exists()
    assert exported("dtype=float32").difference < 1e-4


def test_a_head_that_transformers_would_not_read_back_is_refused(monkeypatch, tmp_path):
    trained(monkeypatch, tmp_path, family="qwen3")
    with pytest.raises(
        ConfigError, match="with heads of 128 alone, not of 8, so what was written could not be checked"
    ):
        exported("format=gguf")


def test_nothing_is_uploaded_unless_asked(monkeypatch, tmp_path, capsys):
    calls = []

    class Hub:
        def create_repo(self, name, **settings):
            calls.append((name, settings["private"]))
            return f"https://hub/{name}"

        def upload_folder(self, **settings):
            calls.append(sorted(path.name for path in Path(settings["folder_path"]).iterdir()))

    monkeypatch.setattr(export_run, "HfApi", Hub)
    trained(monkeypatch, tmp_path)
    exported()
    assert calls == []
    assert not favor(monkeypatch, "export", "run=run", "out=other", "push=me/film", "check_tokens=8")
    assert calls[0] == ("me/film", True)
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(calls[1])
    assert "uploaded to https://hub/me/film" in capsys.readouterr().out


def test_a_hub_that_refuses_leaves_the_folder(monkeypatch, tmp_path):
    trained(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match=r"push=no/such/name: the hub refused .*; the folder out is whole and stays"):
        exported("push=no/such/name")
    assert (tmp_path / "out/model.safetensors").exists()


SMOLLM = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# the system message goes into the first user turn
INSTRUCT = (
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.s = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.s + m.content }} [/INST]{% set ns.s = '' %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# numbers its turns
COUNTING = "{% for m in messages %}{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.CHATML


def in_ollama(template, system, talk):
    """What Ollama makes of the four forms that our TEMPLATE uses."""
    start = re.match(r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}", template, re.DOTALL)
    before, _, after = start[1].partition("{{ .System }}")
    body = re.search(
        r'eq \.Role "user" \}\}(.*?)\{\{ else if eq \.Role "assistant" \}\}(.*?)\{\{ end \}\}\{\{ end \}\}(.*)$',
        template,
        re.DOTALL,
    )
    turns = "".join(body[1 if role == "user" else 2].replace("{{ .Content }}", text) for role, text in talk)
    return (f"{before}{system}{after}" if system else start[2]) + turns + body[3]


@pytest.mark.parametrize("template", [tiny.CHATML, SMOLLM, INSTRUCT])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_modelfile_renders_as_the_chat_template(template, system):
    tokenizer = tiny.tokenizer(template)
    text, notes = gguf.modelfile(tokenizer, {tokenizer.eos_token_id}, "m.gguf")
    assert notes == []
    talk = [("user", "Which one?"), ("assistant", "This {{ one }}."), ("user", "Why?")]
    whole = ([("system", system)] if system else []) + talk
    expected = tokenizer.apply_chat_template(
        [{"role": role, "content": said} for role, said in whole], tokenize=False, add_generation_prompt=True
    )
    assert in_ollama(re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1], system, talk) == expected


@pytest.mark.parametrize("template", [COUNTING, NO_SYSTEM])
def test_a_template_that_is_no_chain_is_left_to_ollama(template):
    tokenizer = tiny.tokenizer(template)
    text, notes = gguf.modelfile(tokenizer, {tokenizer.eos_token_id}, "m.gguf")
    assert "TEMPLATE" not in text
    assert "no plain chain of turns" in notes[0]
