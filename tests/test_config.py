"""Recipes: what is read is what is written, and mistakes are named."""

import tomllib

import pytest
from pydantic import BaseModel

import favor.settings
from favor.cli import COMMANDS
from favor.config import checked, dump, load, split_arguments
from favor.errors import ConfigError
from favor.generate.samples import SamplesConfig
from favor.online import OnlineConfig
from favor.settings import settings
from favor.train.optim import AdamW, Rmsprop, learning_rate, warmup
from favor.train.ppo import PpoConfig
from favor.train.preference import TrainConfig
from favor.train.reward import RewardTrainConfig
from favor.train.sft import SftConfig
from favor.winrate.run import WinrateConfig

SOURCES = [
    "data.sources=[{path='a', format='pairs', max_rows=9, split='s'}, {path='b', format='pairs', max_rows=9, split='s'}]"
]
NEEDED = ["run=r", "model.path=m", "data.train=d.jsonl"]


def test_home_is_meant_by_a_tilde(monkeypatch):
    """In any setting, however it came; shells leave key=~/x as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    config = load(
        TrainConfig, None, ["run=~/r", "model.path=~/m", "data.sources=[{path='~/d.csv'}, {path='a~/e.csv'}]"]
    )
    assert (config.run, config.model.path) == ("/home/me/r", "/home/me/m")
    assert [source.path for source in config.data.sources] == ["/home/me/d.csv", "a~/e.csv"]


def test_dump_and_load_give_an_equal_record(tmp_path):
    words = [
        *NEEDED,
        "loss.kind=cdpo",
        "loss.label_smoothing=0.2",
        "model.lora.rank=4",
        "optim.betas=[0.8, 0.9]",
        "seed=7",
    ]
    config = load(TrainConfig, None, words)
    (tmp_path / "r.toml").write_text(dump(config))
    assert load(TrainConfig, tmp_path / "r.toml") == config
    assert (config.loss.label_smoothing, config.model.lora.rank, config.optim.betas, config.seed) == (
        0.2,
        4,
        (0.8, 0.9),
        7,
    )


def test_overrides_win_and_sections_merge(tmp_path):
    (tmp_path / "r.toml").write_text(
        'run = "a"\n[model]\npath = "m"\n[data]\ntrain = "x"\n[optim]\nlr = 1e-3\nclip = 2.0\n'
    )
    config = load(TrainConfig, tmp_path / "r.toml", ["optim.lr=2e-3", "run=b"])
    assert (config.run, config.optim.lr, config.optim.clip) == ("b", 2e-3, 2.0)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("trian.epochs=2", "unknown key 'trian.epochs'; did you mean 'train.epochs'"),
        ("beta=0.1", "unknown key 'beta'; TRL's beta is favor's loss.beta"),
        ("loss.kind=sigmoid", "'loss.kind' is 'sigmoid'; TRL's sigmoid is favor's dpo"),
        ("loss.name=cdpo", r"unknown key 'loss.name'; it is loss.kind now \(name = .sigmoid. is kind = .dpo.\)"),
        ("loss.gamma=1", "unknown key 'loss.gamma'; it is not read by kind 'dpo'"),
        ("loss.terms=[1]", "unknown key 'loss.terms'; it is not read by kind 'dpo'"),
        (
            "loss.divergence=forward_kl",
            "'loss.divergence' is a section, found 'forward_kl'; set loss.divergence.kind=...",
        ),
        ("loss=1", "'loss' is a section, found 1; set loss.kind=..., one of dpo, "),
        ("=3", "expected section.key=value"),
        ("run.x=3", "single value"),
        ("data.eval_split=dev", "data.eval_split is the split of data.eval, which is not set"),
        ("reward=1", "'reward' is a section, found 1; set reward.kind=..., one of model, "),
        ("reward.path=m", "'reward.kind' is not set; choose one of model, "),
        ("train.epochs=0", "'train.epochs' is 0"),
    ],
)
def test_mistakes_are_named(word, message):
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, None, [*NEEDED, word])


def test_a_mistake_is_told_where_it_stands(tmp_path):
    """What was typed is not said to be in the recipe."""
    for word, key in (("optim.sped=1", "optim.sped"), ("loss.kind=none", "loss.kind"), ("optim.lr=true", "optim.lr")):
        (tmp_path / "r.toml").write_text('run = "r"\n[model]\npath = "m"\n[data]\ntrain = "d"\n[optim]\nlr = 1e-5\n')
        with pytest.raises(ConfigError, match=rf"^settings: .*'{key}'"):
            load(TrainConfig, tmp_path / "r.toml", [word])
    (tmp_path / "r.toml").write_text('run = "r"\n[model]\npath = "m"\n[data]\ntrain = "d"\n[optim]\nsped = 1\n')
    with pytest.raises(ConfigError, match=r"r\.toml: unknown key 'optim\.sped'"):
        load(TrainConfig, tmp_path / "r.toml", ["optim.lr=1e-5"])


def test_arguments():
    assert split_arguments(["r.toml", "a=1", "b.c=x"])[1] == ["a=1", "b.c=x"]
    with pytest.raises(ConfigError, match="two recipes"):
        split_arguments(["a.toml", "b.toml"])


def test_learning_rates():
    """Warm-up reaches the full rate at its end; linear and cosine end at zero and are half way in the middle."""
    constant = AdamW(lr=1.0, schedule="constant", warmup=4)
    assert [learning_rate(constant, s, 10) for s in (0, 3, 4, 9)] == [0.2, 0.8, 1.0, 1.0]
    linear, cosine = AdamW(lr=1.0, schedule="linear"), AdamW(lr=1.0, schedule="cosine")
    assert learning_rate(linear, 5, 10) == pytest.approx(0.5)
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.5)
    assert learning_rate(linear, 10, 10) == learning_rate(cosine, 10, 10) == 0.0


def test_a_share_of_the_steps_warms_up():
    """Below 1, rounded up as transformers does; from 1 on it counts steps, and 1.5 is neither."""
    share = AdamW(lr=1.0, schedule="constant", warmup=0.35)
    assert [learning_rate(share, s, 10) for s in (0, 3, 4, 9)] == [0.2, 0.8, 1.0, 1.0]
    assert learning_rate(Rmsprop(lr=1.0, warmup=0.5), 0, 2) == 0.5
    for kind in ("adamw", "rmsprop"):
        with pytest.raises(ConfigError, match="from 1 on it counts steps, so it must be a whole number"):
            load(TrainConfig, None, [*NEEDED, f"optim.kind={kind}", "optim.warmup=1.5"])
    for old in ("warmup_steps", "warmup_share"):
        with pytest.raises(ConfigError, match=r"optim\.warmup\b"):
            load(TrainConfig, None, [*NEEDED, f"optim.{old}=1"])
    found = load(TrainConfig, None, [*NEEDED, "optim.warmup=0.1"])
    assert (found.optim.warmup, warmup(found.optim, 11)) == (0.1, 2)
    assert warmup(load(TrainConfig, None, [*NEEDED, "optim.warmup=10"]).optim, 4) == 10
    # a run's own recipe loads again
    assert checked(TrainConfig, tomllib.loads(dump(found)), "r") == found


def test_a_value_where_a_section_belongs_names_its_keys():
    with pytest.raises(ConfigError, match=r"'model' is a section, found 'x'; set model.KEY=..., one of model.path, "):
        load(TrainConfig, None, ["run=r", "data.train=t", "model=x"])


def test_a_renamed_key_says_its_new_name(monkeypatch, tmp_path):
    """In a recipe and in an override; a sentence stands for a setting that has no single successor."""
    monkeypatch.setattr(favor.settings, "RENAMED", {"optim.rate": "optim.lr", "seeds": "give seed once a run"})
    with pytest.raises(ConfigError, match=r"unknown key 'optim.rate'; it is called 'optim.lr' now"):
        load(TrainConfig, None, [*NEEDED, "optim.rate=1"])
    (tmp_path / "r.toml").write_text("seeds = 3\n")
    with pytest.raises(ConfigError, match=r"unknown key 'seeds'; give seed once a run"):
        load(TrainConfig, tmp_path / "r.toml", NEEDED)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # the kind is chosen a section above the key
        (
            ["engine.kind=vllm", "engine.model.path=m", "engine.model.device=cpu"],
            r"the kind that is chosen.*\(transformers\)",
        ),
        (["engine.model=m", "engine.model.lora.rank=2"], "'engine.model' is a single value"),
        (["engine.model.path=m", "engine.model.lora.rank=2"], "are for training, and this model only answers"),
        (["engine.model.path=m", "engine.model.gradient_checkpointing=true"], "are for training"),
        (
            ["engine.model.path=m", "engine.model.layout=rows"],
            "layout is how log-probs are computed, and this model only samples",
        ),
    ],
)
def test_a_model_that_only_answers_has_nothing_of_training(words, said):
    with pytest.raises(ConfigError, match=said):
        load(SamplesConfig, None, ["out=o", "prompts=p", *words])


def test_a_layout_is_for_models_that_judge():
    """Of winrate's models those of the sides only sample; a judge's log-probs are computed as it says."""
    given = ["run=r", "prompts=p", "a.model=m", "b.model.path=m", "judge.kind=hf", "judge.model.path=m"]
    load(WinrateConfig, None, [*given, "judge.model.layout=rows"])
    with pytest.raises(ConfigError, match="b.model: layout is how log-probs are computed"):
        load(WinrateConfig, None, [*given, "b.model.layout=rows"])


def test_what_is_wrong_inside_a_list_is_said_once():
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, None, [*NEEDED, "loss.kind=sum", "loss.terms=[{kind='ipo', tau=1}]"])
    assert "at least" not in str(caught.value)
    with pytest.raises(ConfigError, match="at least 1 item"):
        load(TrainConfig, None, [*NEEDED, "loss.kind=sum", "loss.terms=[]"])


def test_a_suggestion_is_never_the_section_itself():
    with pytest.raises(ConfigError, match=r"did you mean 'bradley_terry.tie_width'"):
        load(RewardTrainConfig, None, [*NEEDED, "bradley_terry.ties=true"])


def test_what_a_command_does_not_read_is_refused():
    """PPO cuts no prompt; a round of `favor loop` has no live reference."""
    scorer = ["reward.kind=callable", "reward.path=f.py:f"]
    with pytest.raises(ConfigError, match="PPO takes its prompts whole"):
        load(PpoConfig, None, [*NEEDED, *scorer, "tokens.max_tokens=64"])
    with pytest.raises(ConfigError, match="needs a live reference"):
        load(OnlineConfig, None, ["run=r", "model.path=m", "prompts=p", *scorer, "loss.ld_alpha=0.5"])


def test_a_new_name_is_a_setting():
    """Every key that RENAMED points to is one of a command's."""
    known = {s.key for make in COMMANDS.values() for s in favor.settings.settings(make().config, every=True)}
    for old, now in favor.settings.RENAMED.items():
        assert " " in now or now in known, old


def test_a_new_name_is_never_an_old_one():
    assert not set(favor.settings.RENAMED) & set(favor.settings.RENAMED.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["optim.kind=rmsprop", "optim.betas=[0.8, 0.9]"],
            "unknown key .optim.betas.; it is not read by kind .rmsprop.; remove it or choose a kind that reads it .adamw.",
        ),
        (["watch.kl.tokens=9"], "'watch.kl.every' is not set"),
        (["watch.eval.every=9"], "name data.eval or data.hold_out.share"),
        (["loss.kind=simpo", "reference.displacement_threshold=0.5"], "reads no reference"),
        (["watch.kl_tokens=9"], "unknown key 'watch.kl_tokens'; it is called 'watch.kl.tokens' now"),
        (["train.save_every=9"], "it is called 'save.every' now"),
        ([*SOURCES, "data.format=thumbs"], "data.format would be ignored: each of data.sources has its own"),
        ([*SOURCES, "data.max_rows=3"], "data.max_rows would be ignored"),
        ([*SOURCES, "data.eval=e", "data.split=dev"], "data.split would be ignored"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, None, ["run=r", "model.path=m", *(() if SOURCES[0] in words else ["data.train=d"]), *words])


def test_an_option_that_one_source_or_the_held_out_rows_read_is_accepted():
    need = ["run=r", "model.path=m"]
    assert load(TrainConfig, None, [*need, *SOURCES, "data.eval=e", "data.max_rows=3"]).data.max_rows == 3
    assert load(TrainConfig, None, [*need, "data.sources=[{path='a'}]", "data.split=dev"]).data.split == "dev"


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("eval", ["run=r", "sample_prompts=0", "sample.temperature=2"], "sample would be ignored: sample_prompts=0"),
        ("eval", ["run=r", "sample_prompts=0", "seed=1"], "seed would be ignored"),
        ("lint", ["data.train=d", "tokens.max_tokens=9"], "tokens.max_tokens is read only with model.path"),
        (
            "ppo",
            ["run=r", "model.path=m", "data.train=d", "reward.kind=model", "reward.path=r", "ppo.kl.coef=0"],
            "'ppo.kl.coef' is 0",
        ),
    ],
)
def test_what_another_setting_puts_out_of_use_is_refused(command, words, message):
    with pytest.raises(ConfigError, match=message):
        load(COMMANDS[command]().config, None, words)


def own(default):
    """What a section's default sets in itself, beside the kind that chooses it."""
    return default.model_fields_set - {"kind"} if isinstance(default, BaseModel) else set()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_sets_nothing_two_sections_deep(command):
    """`config._with_own` keeps what a command sets in a section that is given in part, one section deep."""
    for field in COMMANDS[command]().config.model_fields.values():
        if isinstance(field.default, BaseModel):
            assert not any(own(inner) for _, inner in field.default), field.default


def test_what_was_a_value_and_is_a_section_with_kinds_says_so():
    from favor.demo import DemoConfig
    from favor.generate.samples import SamplesConfig

    needed = ["out=o", "prompts=p"]
    with pytest.raises(
        ConfigError, match=r"'engine' is a section, found 'vllm'; set engine.kind=..., one of transformers, vllm"
    ):
        load(SamplesConfig, None, [*needed, "engine=vllm"])
    with pytest.raises(ConfigError, match=r"'engine' is a single value.* chosen by its kind as engine.kind="):
        load(SamplesConfig, None, [*needed, "engine=vllm", "engine.model=m"])
    # a key that the demo no longer has, and other commands have
    with pytest.raises(ConfigError, match=r"unknown key 'prompts'; the demo samples 20 prompts; .*sample_prompts="):
        load(DemoConfig, None, ["prompts=5"])


@pytest.mark.parametrize(
    ("schema", "words", "key", "value"),
    [
        (SftConfig, ["optim.clip=0.5"], "lr", 2e-5),
        (SftConfig, ["optim.kind=rmsprop"], "lr", 2e-5),
        (SftConfig, ["optim.lr=1.0"], "lr", 1.0),
        (PpoConfig, ["reward.kind=model", "reward.path=r", "optim.lr=1.0"], "schedule", "constant"),
    ],
)
def test_a_section_given_in_part_keeps_what_the_command_sets_in_it(schema, words, key, value):
    config = load(schema, None, ["run=r", "model.path=m", "data.train=d", *words])
    assert dict(config.optim)[key] == value
    assert {s.key: s.default for s in settings(SftConfig)}["optim.lr"] == "2e-05"
