"""`favor from-trl`: what TRL says becomes a recipe that loads, with a comment for what has no equal; nothing is run."""

import json
import sys
import tomllib

import pytest

from favor.cli import main
from favor.config import checked
from favor.errors import ConfigError
from favor.losses import table
from favor.settings import _keys
from favor.train.preference import TrainConfig
from favor.trl import names
from favor.trl.recipe import recipe_of

SCRIPT = """
import os
from trl import DPOConfig
os.system("touch ran")
lr = 5e-6
args = DPOConfig(
    output_dir="out", learning_rate=lr, per_device_train_batch_size=2, gradient_accumulation_steps=8, beta=0.05,
    loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], warmup_ratio=0.1, lr_scheduler_type="cosine", bf16=True,
    report_to="wandb", max_steps=N, adam_beta2=0.95, save_steps=100, max_length=512, neftune_noise_alpha=5,
)
peft = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], lora_dropout=0.05)
"""


def loaded(path, text):
    path.write_text(text)
    found = recipe_of(path)
    return checked(TrainConfig, tomllib.loads(found), "recipe"), found


def test_a_script_is_read_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, text = loaded(tmp_path / "dpo.py", SCRIPT)
    assert not (tmp_path / "ran").exists()
    assert (config.run, config.optim.lr, config.train.batch_prompts, config.train.epochs) == ("out", 5e-6, 16, 3)
    assert (config.optim.schedule, config.optim.betas, config.save.every) == ("cosine", (0.9, 0.95), 100)
    assert config.optim.warmup == 0.1
    assert (config.model.dtype, config.model.lora.rank, config.model.lora.targets) == ("bfloat16", 8, ("q_proj",))
    assert (config.tokens.max_tokens, config.tokens.truncation, config.seed) == (512, "response_end", 42)
    terms = [(term.kind, term.weight, term.settings.get("beta")) for term in table.terms(config.loss)]
    assert terms == [("dpo", 1.0, 0.05), ("sft", 0.2, None)]
    for said in ("report_to", "max_steps = N: computed", "lora_dropout", "neftune_noise_alpha"):
        assert any(said in line for line in text.splitlines() if line.startswith("#")), said


@pytest.mark.parametrize("loss", names.LOSSES)
def test_every_loss_of_trl_is_one_of_ours(loss, tmp_path):
    given = {
        "loss_type": loss,
        "beta": 0.2,
        "label_smoothing": 0.05,
        "f_divergence_type": "js_divergence",
        "bf16": False,
    }
    config, _ = loaded(tmp_path / "x.json", json.dumps(given))
    assert config.loss.kind == names.LOSSES[loss][0]
    settings = dict(config.loss)
    assert settings.get("beta", 0.2) == 0.2
    assert settings.get("label_smoothing", 0.05) == 0.05


def test_yaml_and_dicts(tmp_path):
    yaml = "model_name_or_path: a/b\nlearning_rate: 5e-6\nmax_steps: 7\nf_divergence_type: alpha_divergence\n"
    config, text = loaded(tmp_path / "x.yaml", yaml + "f_alpha_divergence_coef: 0.3\nsync_ref_model: true\n")
    assert (config.model.path, config.optim.lr, config.train.max_steps, config.train.epochs) == ("a/b", 5e-6, 7, 7)
    assert config.loss.divergence.alpha == 0.7
    assert (config.reference.mode, config.reference.sync.every, config.reference.sync.weight) == ("live", 512, 0.6)
    assert "not in x.yaml" in text
    config, _ = loaded(tmp_path / "x.txt", "{'learning_rate': 1e-5, 'lr_scheduler_type': 'constant', 'seed': 1}")
    assert (config.optim.lr, config.optim.schedule, config.seed) == (1e-5, "constant", 1)


def test_a_saved_dict_of_all_arguments_is_short(tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path / "out"), learning_rate=2e-6, report_to="none", use_cpu=True)
    config, text = loaded(tmp_path / "x.json", json.dumps(args.to_dict()))
    assert config.optim.lr == 2e-6
    # of some 120 arguments
    assert len(text.splitlines()) < 50


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.bin", "", "run code"),
        ("x.py", "x = 1\n", "holds no setting"),
        ("x.py", "def (", "not Python"),
        ("x.py", "DPOConfig(seed=1)\nDPOConfig(seed=2)\n", "calls DPOConfig in lines 1 and 2"),
        ("x.json", "{", "not JSON"),
        ("x.json", "[1]", "holds a list"),
        ("x.yaml", "a: [", "not YAML"),
        ("x.json", '{"loss_type": "mine"}', "'mine'"),
        ("x.json", '{"learning_rate": "fast"}', "learning_rate is 'fast'"),
        ("x.json", '{"loss_type": ["sft", "ipo"], "loss_weights": [1]}', "loss_weights has 1"),
        ("x.json", '{"learning_rate": -1}', "optim.lr"),
    ],
)
def test_what_cannot_be_read_is_said(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        recipe_of(tmp_path / name)
    assert said in str(error.value)


def test_every_key_that_is_named_is_one(tmp_path):
    valid = {key for name in ("train", "sample") for key in _keys(__import__("favor.cli").cli.COMMANDS[name]().config)}
    assert set(names.KEYS.values()) <= valid
    assert not names.KEYS.keys() & names.SAID.keys()
    assert {kind for kind, _ in names.LOSSES.values()} <= set(table.LOSSES)


def test_the_command_prints_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.json").write_text('{"beta": 0.3}')
    monkeypatch.setattr(sys, "argv", ["favor", "from-trl", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert tomllib.loads(capsys.readouterr().out)["loss"]["beta"] == 0.3
