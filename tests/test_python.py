"""favor in Python: what is in memory becomes files, the run is the command line's to the digit, and nothing given is changed."""

import copy
import json
import subprocess
import sys

import pytest
import tiny
import torch

import favor
from favor import cli
from favor.api.keywords import in_python, tree_of
from favor.config import load
from favor.errors import CheckpointError, ConfigError, DataError
from favor.eval.score import ScoreConfig
from favor.generate.samples import SamplesConfig
from favor.train.preference import TrainConfig

ROWS = [{"prompt": f"Film {i}?", "chosen": f"good {i}", "rejected": f"bad {i}", "margin": i} for i in range(6)]
HELD = [{"prompt": f"Play {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(2)]
SIZES = {"batch_prompts": 2, "lr": 1e-3, "seed": 3, "quiet": True}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("python") / "start")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a model in memory on rows in memory, and the model beside what it was before."""
    model = tiny.model()
    before = copy.deepcopy(model)
    out = tmp_path_factory.mktemp("python") / "run"
    return favor.train(model, ROWS, eval=HELD, tokenizer=tiny.tokenizer(), out=out, **SIZES), model, before


def steps(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    timed = ("seconds", "tokens_per_s", "pairs_per_s")
    return [{k: v for k, v in r.items() if k not in timed} for r in records if r["kind"] == "step"]


def test_it_is_the_command_line_to_the_digit(run, start, tmp_path, monkeypatch):
    for name, rows in (("train", ROWS), ("eval", HELD)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["run=run", f"model.path={start}", "data.train=train.jsonl", "data.eval=eval.jsonl"]
    words += ["train.batch_prompts=2", "optim.lr=1e-3", "seed=3"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["favor", "train", *words])
    _main()
    assert len(steps(tmp_path / "run")) == 3
    assert steps(run[0].path) == steps(tmp_path / "run")
    name = "model/model.safetensors"
    assert (run[0].path / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    # and again from what the run kept
    monkeypatch.setattr(sys, "argv", ["favor", "train", str(run[0].folder.config), "run=again"])
    _main()
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def _main():
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code


def test_what_is_given_is_not_changed(run):
    _, model, before = run
    assert model.config.to_dict() == before.config.to_dict()
    assert model.generation_config.to_dict() == before.generation_config.to_dict()
    for (name, now), (_, then) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(now, then), name
        assert (now.requires_grad, now.dtype, now.device) == (then.requires_grad, then.dtype, then.device)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


def test_a_run_shows_what_it_made(run):
    found = run[0]
    assert list(found.metrics["step"]) == [1, 2, 3]
    assert found.metrics["loss"].iloc[0] == pytest.approx(0.6931, abs=1e-4)
    assert not torch.equal(found.model.lm_head.weight, run[1].lm_head.weight)
    assert found.model is found.model
    assert found.tokenizer.eos_token == "<|im_end|>"
    assert "not finished" not in found._repr_html_()
    assert favor.load_run(str(found.path)) == found
    figures = found.figures
    assert figures["pairs"] == 2
    assert figures == json.loads(found.folder.evaluation.read_text())
    # kept, and not computed again
    found.folder.evaluation.write_text(json.dumps(figures | {"pairs": 77}))
    assert found.figures["pairs"] == 77
    assert favor.evaluate(found.path, HELD[:1], quiet=True, sample_prompts=0)["pairs"] == 1
    assert found.report() == found.folder.report
    assert found.report().stat().st_size > 1000
    (row,) = found.sample("Film 1?", samples_per_prompt=2, max_new_tokens=4, quiet=True)
    assert row["prompt"] == "Film 1?"
    assert len(row["responses"]) == 2


def test_a_run_is_never_overwritten_and_resumes_with_the_same_inputs(run):
    found, model, _ = run
    more = {"eval": HELD, "tokenizer": tiny.tokenizer(), "out": found.path, **SIZES}
    with pytest.raises(ConfigError, match="already holds a run"):
        favor.train(model, ROWS, **more)
    weights = (found.path / "model/model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"another train\.jsonl"):
        favor.train(model, ROWS[:2], resume=True, **more)
    with pytest.raises(CheckpointError, match="another start"):
        favor.train(tiny.model(seed=1), ROWS, resume=True, **more)
    assert (found.path / "model/model.safetensors").read_bytes() == weights


def test_a_failed_start_leaves_nothing_and_may_be_repeated(tmp_path):
    out = tmp_path / "run"
    bad = [*ROWS, {"prompt": "p", "chosen": "", "rejected": "x"}]
    with pytest.raises(DataError, match=r"^rows, row 7: chosen is empty"):
        favor.train(tiny.model(), bad, tokenizer=tiny.tokenizer(), out=out, **SIZES)
    assert not out.exists()
    favor.sft(tiny.model(), ROWS, tokenizer=tiny.tokenizer(), out=out, max_steps=1, **SIZES)
    assert len(steps(out)) == 1


def test_rows_of_every_kind_are_the_same_rows(tmp_path):
    import datasets
    import numpy as np
    import pandas

    from favor.api.inputs import Given, lay

    frame = pandas.DataFrame(ROWS)
    frame.loc[2, "margin"] = np.nan
    kinds = {
        "list": ROWS,
        "generator": (row for row in ROWS),
        "numpy": [row | {"margin": np.int64(row["margin"])} for row in ROWS],
        "dataset": datasets.Dataset.from_list(ROWS),
        "frame": pandas.DataFrame(ROWS),
    }
    given = Given(tmp_path)
    for name, rows in kinds.items():
        assert given.rows(name, rows) == str(tmp_path / f"{name}.jsonl")
    given.rows("missing", frame)
    lay(given)
    texts = {name: (tmp_path / f"{name}.jsonl").read_text() for name in kinds}
    assert set(texts.values()) == {texts["list"]}
    kept = [json.loads(line) for line in (tmp_path / "missing.jsonl").read_text().splitlines()]
    assert "margin" not in kept[2]
    assert kept[1]["margin"] == 1
    assert given.rows("file", tmp_path / "x.csv") == str(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROWS[0], "x"], "^rows, row 2: is a str"),
        ([ROWS[0] | {"margin": float("nan")}], "^rows, row 1"),
        ([ROWS[0] | {"x": object()}], "row 1: holds a object"),
        (ROWS[0], "is a dict; give a list of dicts"),
        (7, "is a int"),
    ],
)
def test_rows_that_are_none_are_refused(rows, said, tmp_path):
    with pytest.raises(favor.FavorError, match=said):
        favor.train(tiny.model(), rows, tokenizer=tiny.tokenizer(), out=tmp_path / "run", **SIZES)
    assert not (tmp_path / "run").exists()


def test_a_data_set_of_splits_names_them(start):
    import datasets

    both = datasets.DatasetDict({"a": datasets.Dataset.from_list(ROWS)})
    with pytest.raises(ConfigError, match=r"several splits \(a\)"):
        favor.lint(both, quiet=True)


def test_adapters_are_folded_into_a_copy(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.model("qwen2"), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    before = copy.deepcopy(model.state_dict())
    ids = torch.arange(4, 12)[None]
    logits = model(input_ids=ids).logits
    made = favor.sft(
        model, ROWS, tokenizer=tiny.tokenizer(), out=tmp_path / "run", max_steps=1, **SIZES | {"lr": 1e-30}
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.allclose(made.model(input_ids=ids).logits, logits, atol=1e-4)
    inside = tiny.model()
    inside.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="an adapter inside"):
        favor.sft(inside, ROWS, tokenizer=tiny.tokenizer(), out=tmp_path / "x", **SIZES)


def test_the_tokenizer_is_found_or_asked_for(start, tmp_path):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(start)
    assert favor.sft(loaded, ROWS, out=tmp_path / "run", max_steps=1, **SIZES).tokenizer.chat_template == tiny.CHATML
    with pytest.raises(ConfigError, match="tokenizer="):
        favor.sft(tiny.model(), ROWS, out=tmp_path / "x", **SIZES)
    with pytest.raises(ConfigError, match="leave it out"):
        favor.sft(start, ROWS, tokenizer=tiny.tokenizer(), out=tmp_path / "x", **SIZES)
    with pytest.raises(ConfigError, match="the model is a int"):
        favor.sft(7, ROWS, out=tmp_path / "x", **SIZES)


def length(prompts, responses):
    return [len(response) for response in responses]


def longer(prompt, first, second):
    return "A" if len(first) > len(second) else "B" if len(second) > len(first) else "tie"


def test_rewards_scores_and_win_rates(run, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = favor.score(ROWS, length, quiet=True)
    assert found.rows[0]["scores"] == [6.0, 5.0]
    assert found.figures["calibration"]["accuracy"] == 1
    assert favor.score(ROWS[:1], run[0], quiet=True).rows[0]["scores"] != [0.0, 0.0]
    judge = favor.reward(start, ROWS, eval=HELD, max_steps=1, **SIZES)
    assert str(judge.path) == "runs/reward-1"
    assert judge.figures["calibration"]["pairs"] == 2
    assert judge.model.score.weight.shape[0] == 1
    assert len(favor.score(ROWS, judge, quiet=True).rows) == 6
    mine = [{"prompt": "p", "responses": ["long answer"]}]
    other = [{"prompt": "p", "responses": ["short"]}]
    assert favor.winrate(mine, other, judge=longer, quiet=True)["win_rate"] == 1
    assert favor.winrate(run[0], start, ["Film 1?"], judge=judge, quiet=True, max_new_tokens=4)["pairs"] == 1
    with pytest.raises(ConfigError, match="lambda"):
        favor.score(ROWS, lambda prompts, responses: [0.0], quiet=True)
    # code that was read as text has no module
    names = {"__name__": "nowhere"}
    exec("def same(prompts, responses):\n    return [0.0] * len(responses)\n", names)
    with pytest.raises(ConfigError, match=r"nowhere\.same: not a function at the top level"):
        favor.score(ROWS, names["same"], quiet=True)


def first(prompt, one, two):
    return "A"


def test_questions_about_labels_judges_policies_and_trainers(run, start, tmp_path, monkeypatch):
    """Each gives what its command writes; what is in memory is named by its argument."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Film {i}?", "chosen": f"good {i % 7}", "rejected": f"bad {i % 5}"} for i in range(24)]
    told = favor.value(start, rows, trusted=rows, models=2, folds=2, clean="clean.jsonl", out="worth.jsonl", quiet=True)
    assert [line["row"] for line in told.rows] == list(range(1, 25))
    written = [json.loads(line) for line in (tmp_path / "worth.jsonl").read_text().splitlines()]
    assert told.rows == [{**line, "source": "rows"} for line in written]
    assert (told.figures["pairs"], told.figures["measured_by"]) == (24, "trusted")
    assert (tmp_path / "clean.jsonl").exists()
    with pytest.raises(DataError, match=r"^trusted: 1 prompts with a pair"):
        favor.value(start, rows, trusted=rows[:1], models=2, quiet=True)
    pool = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in rows]
    told = favor.ask(start, pool, out="ask.jsonl", count=5, quiet=True)
    assert (len(told.rows), told.figures["left"]) == (5, 19)
    labels = [row for row in rows if any(row["prompt"] == one["prompt"] for one in told.rows)]
    again = favor.ask(start, pool, labels, out="ask.jsonl", count=5, overwrite=True, quiet=True)
    assert (again.figures["labelled"], again.figures["left"]) == (5, 14)
    found = favor.audit(rows, first, rows, pairs=20, repeats=0, quiet=True, fail_on={"position_bias": 0.1})
    assert (found["position_bias"], found["human_pairs"], len(found["failed"])) == (0.5, 20, 1)
    assert (tmp_path / "runs/audit-1/soft-labels.jsonl").exists()
    (tmp_path / "judges.py").write_text("def first(prompt, one, two):\n    return 'A'\n")
    kept = favor.audit(rows, f"{tmp_path / 'judges.py'}:first", rows, out="kept", pairs=20, repeats=0, quiet=True)
    assert kept["position_bias"] == 0.5
    told = favor.diff(run[0].path, run[0], ["Film 1?"], max_new_tokens=2, checks=False, quiet=True)
    assert told["figures"]["kl"]["change"] == pytest.approx(0, abs=1e-6)
    found = favor.realign(run[0], lambdas=[0.0, 1.0], sample={"max_new_tokens": 2}, sample_prompts=1, quiet=True)
    assert [one["lambda"] for one in found["family"]] == [0, 1]
    assert found["family"][0]["kl"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ConfigError, match=r"'pading' is no case"):
        favor.conform("favor", cases=["pading"], quiet=True)
    found = favor.conform("favor", cases=["first_loss"], quiet=True)
    assert {name: one["status"] for name, one in found.items()} == {"first_loss": "holds"}


def test_lint_and_errors_name_no_temporary_folder():
    found = favor.lint([*ROWS, ROWS[0]], quiet=True)
    (repeated,) = [finding for finding in found if finding.kind == "duplicate"]
    assert repeated.rows == (("rows", 7),)
    assert "favor-" not in str(found)
    with pytest.raises(DataError, match=r"^rows: it holds no rows"):
        favor.lint([], quiet=True)


@pytest.mark.parametrize(
    ("schema", "typed", "keyword"),
    [
        (TrainConfig, "data.bad_rows=drop", 'bad_rows="drop"'),
        (TrainConfig, "optim.lr=5e-6", "lr=5e-06"),
        (TrainConfig, "resume=true", "resume=True"),
        (TrainConfig, "data.hold_out.share=0.1", "share=0.1"),
        (TrainConfig, "model.lora.rank=16", "rank=16"),
        (TrainConfig, 'columns={prompt="what they say"}', 'columns={"prompt": "what they say"}'),
        (TrainConfig, "columns.prompt=COLUMN", 'columns={"prompt": "COLUMN"}'),
        (SamplesConfig, "columns.prompt=COLUMN", 'columns={"prompt": "COLUMN"}'),
        (
            TrainConfig,
            'verdict={first="a", second="b", column="c", values={first=[1], second=[...]}}',
            'verdict={"first": "a", "second": "b", "column": "c", "values": {"first": [1], "second": [...]}}',
        ),
        # these only look like settings
        (TrainConfig, "x=1", "x=1"),
        (TrainConfig, "run=runs/dpo", "run=runs/dpo"),
        (ScoreConfig, 'verdict={first="a"}', 'verdict={first="a"}'),
    ],
)
def test_messages_name_keywords(schema, typed, keyword):
    """What a shell is told to type is said as what Python takes, and it is what Python takes."""
    assert in_python(schema, f"no; give '{typed}', or not") == f"no; give '{keyword}', or not"
    if keyword != typed:
        tree_of(schema, eval(f"dict({keyword.replace('...', '2')})"), "favor")


def test_errors_about_rows_speak_python(start, tmp_path):
    rows = [{"id": 1, "what": "a film", "liked_reply": "good", "other_reply": "bad"}]
    with pytest.raises(DataError) as error:
        favor.train(start, rows, out=tmp_path / "run", **SIZES)
    said = str(error.value)
    columns = {"prompt": "what", "chosen": "liked_reply", "rejected": "other_reply"}
    assert said.startswith(
        "rows, row 1: its columns (id, liked_reply, other_reply, what) are of no known format; give '"
    )
    assert f"columns={json.dumps(columns)}" in said
    assert "data." not in said
    assert "train.jsonl" not in said
    found = favor.train(start, rows, out=tmp_path / "run", columns=columns, **SIZES)
    assert len(steps(found.path)) == 1
    with pytest.raises(DataError, match=r"""^prompts, row 1: no prompt .*: 'columns=\{"prompt": "what"\}'$"""):
        favor.sample(start, [{"what": "a film"}], quiet=True)
    (row,) = favor.sample(start, [{"what": "a film"}], columns={"prompt": "what"}, max_new_tokens=2, quiet=True)
    assert row["prompt"] == "a film"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"learning_rate": 1}, "TRL's learning_rate is favor's optim.lr"),
        ({"num_train_epochs": 1}, "train.epochs"),
        ({"max_prompt_length": 1}, "tokens.max_tokens"),
        ({"per_device_train_batch_size": 1}, "train.batch_prompts"),
        ({"alpha": 1}, "could be model.lora.alpha, loss.divergence.alpha, loss.alpha"),
        ({"every": 1}, "watch.eval.every"),
        ({"epoch": 1}, "did you mean train.epochs"),
        ({"optim.lr": 1, "lr": 2}, "optim.lr is given twice"),
        ({"run": "x"}, "'run' is out= in Python"),
        ({"label_smoothing": 0.1}, "not read by kind 'dpo'"),
        ({"loss": "ipo"}, "'loss' is a section"),
    ],
)
def test_keywords_that_cannot_be_are_refused_before_anything_is_made(words, said, tmp_path, start):
    with pytest.raises(ConfigError) as error:
        favor.train(start, ROWS, out=tmp_path / "run", **words)
    assert said in str(error.value)
    assert str(error.value).startswith("favor.train: ")
    assert not (tmp_path / "run").exists()


def test_keywords_are_the_settings():
    words = {"lr": 1.0, "beta": 0.2, "epochs": 2, "lora": {"rank": 4}, "rank": None, "max_tokens": 9, "share": 0.1}
    tree = tree_of(TrainConfig, words | {"optim": {"clip": 2.0}, "loss": {"kind": "ipo"}}, "w")
    assert tree == {
        "optim": {"clip": 2.0, "lr": 1.0},
        "loss": {"kind": "ipo", "beta": 0.2},
        "train": {"epochs": 2},
        "model": {"lora": {"rank": 4}},
        "tokens": {"max_tokens": 9},
        "data": {"hold_out": {"share": 0.1}},
    }


def test_the_front_is_quick_and_not_hidden_by_its_rooms():
    code = """
import sys, favor
assert not {"torch", "transformers", "pydantic"} & sys.modules.keys(), "slow"
import favor.train.session, favor.lint.run, favor.winrate.run
assert all(callable(getattr(favor, name)) for name in favor.__all__), "hidden"
assert set(favor.__all__) <= set(dir(favor))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_notebook_gets_lines_without_ipywidgets_and_nothing_when_quiet(capsys):
    from rich.console import Console

    from favor.train.session import moves

    assert moves(Console(force_terminal=True))
    assert not moves(Console(force_terminal=False))
    favor.score(ROWS, length, quiet=True)
    assert capsys.readouterr().out == ""
    favor.score(ROWS, length)
    assert "responses 12/12" in capsys.readouterr().out


def test_from_files_and_the_run_folder_that_is_no_run(tmp_path, start):
    with pytest.raises(CheckpointError, match="no run here"):
        favor.load_run(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    made = favor.sft({"path": start, "lora": {"rank": 2}}, files, eval=0.4, out=tmp_path / "run", max_steps=1, **SIZES)
    config = load(favor_config(), made.folder.config)
    assert [source.path for source in config.data.sources] == list(map(str, files))
    assert (config.data.hold_out.share, config.model.lora.rank) == (0.4, 2)
    assert not made.folder.given.exists()


def favor_config():
    from favor.train.sft import SftConfig

    return SftConfig
