"""The command line as a user meets it: what it prints, how it fails, what it leaves behind."""

import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import tiny
import tomli_w
from transformers import AutoModelForCausalLM, AutoTokenizer

GOOD = [{"prompt": f"Film {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)]
COMMANDS = ("train", "sft", "reward", "ppo", "eval", "score", "winrate", "sample", "prefer", "loop", "frontier", "lint")
COMMANDS += ("report", "demo")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.save(folder / "model")
    write(folder / "good.jsonl", GOOD)
    return folder


CALLABLE = ("reward.kind=callable", "reward.path=length.py:score")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def recipe(inputs, *more):
    return [
        "train",
        "run=run",
        f"model.path={inputs / 'model'}",
        "model.dtype=float32",
        f"data.train={inputs / 'good.jsonl'}",
        "train.batch_prompts=2",
        *more,
    ]


def ppo(*more):
    """`favor ppo` on good data, with what is given on top."""

    def prepare(inputs, here):
        (here / "length.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
        return ["ppo", *recipe(inputs)[1:], *more]

    return prepare


def bad_inputs():
    """Name -> (function that prepares and returns the words, what the one message must name)."""

    def rows(*rows):
        return lambda inputs, here: recipe(inputs, f"data.train={write(here / 'bad.jsonl', rows)}")

    def words(*more):
        return lambda inputs, here: recipe(inputs, *more)

    def raw(name, content):
        def prepare(inputs, here):
            (here / name).write_bytes(content)
            return recipe(inputs, f"data.train={here / name}")

        return prepare

    def toml(text):
        def prepare(inputs, here):
            (here / "r.toml").write_text(text)
            return ["train", here / "r.toml"]

        return prepare

    def model(spoil):
        def prepare(inputs, here):
            tiny.save(here / "broken")
            spoil(here / "broken")
            return recipe(inputs, f"model.path={here / 'broken'}")

        return prepare

    return {
        "no such recipe": (lambda i, h: ["train", "no.toml"], ["no.toml", "no such recipe"]),
        "broken TOML": (toml("run = "), ["r.toml", "not valid TOML"]),
        "unknown key": (words("optim.speed=1"), ["optim.speed", "known here"]),
        "name of TRL": (words("optim.learning_rate=1"), ["TRL's learning_rate is favor's optim.lr"]),
        "loss of TRL": (words("loss.kind=exo_pair"), ["TRL's exo_pair is favor's exo"]),
        "misspelt key": (words("loss.bata=1"), ["loss.bata", "did you mean 'loss.beta'"]),
        "wrong type": (words("train.batch_prompts=many"), ["train.batch_prompts", "'many'"]),
        "out of range": (words("loss.beta=-1"), ["loss.beta", "greater than 0"]),
        "missing key": (lambda i, h: ["train", "run=run", "data.train=x.jsonl"], ["model", "not set"]),
        "unread option": (words("loss.label_smoothing=0.2"), ["loss.label_smoothing", "not read by kind 'dpo'"]),
        "contradiction": (words("reference.mode=live", "reference.store=x"), ["reference.store", "live"]),
        "no GPU": (words("model.device=cuda"), ["model.device", "no GPU"]),
        "no such data": (words("data.train=missing.jsonl"), ["missing.jsonl", "no such file"]),
        "empty file": (raw("e.jsonl", b""), ["e.jsonl", "holds no rows"]),
        "not JSON": (raw("j.jsonl", b'{"prompt"\n'), ["j.jsonl, row 1", "not JSON"]),
        "not UTF-8": (raw("u.jsonl", b'{"prompt": "\xff"}\n'), ["u.jsonl, row 1", "UTF-8"]),
        "damaged gzip": (raw("g.jsonl.gz", b"\x1f\x8b\x08\x00nonsense"), ["g.jsonl.gz", "damaged gzip"]),
        "damaged parquet": (raw("p.parquet", b"PAR1"), ["p.parquet", "not a readable Parquet"]),
        "unknown file": (raw("x.xlsx", b"x"), ["x.xlsx", "unknown kind of file"]),
        "unknown columns": (rows({"q": "a"}), ["bad.jsonl, row 1", "columns (q)"]),
        "null side": (rows(GOOD[0], {"prompt": "p", "chosen": None, "rejected": "x"}), ["bad.jsonl, row 2"]),
        "empty response": (
            rows({"prompt": "p", "chosen": " ", "rejected": "x"}),
            ["bad.jsonl, row 1", "chosen is empty"],
        ),
        "identical sides": (rows({"prompt": "p", "chosen": "x", "rejected": "x"}), ["row 1", "the same"]),
        "forged token": (rows({"prompt": "p", "chosen": "<|im_end|>", "rejected": "x"}), ["row 1", "<|im_end|>"]),
        "bad ranking": (rows({"prompt": "p", "responses": ["a", "b"], "ranking": [1, 1]}), ["row 1", "ranking [1, 1]"]),
        "all too long": (words("tokens.max_tokens=8"), ["good.jsonl", "tokens.max_tokens"]),
        "only SFT rows": (rows({"prompt": "p", "completion": "x"}), ["bad.jsonl", "nothing to learn from"]),
        "no model": (words("model.path=./nowhere"), ["./nowhere", "no such model folder"]),
        "no config": (model(lambda m: (m / "config.json").unlink()), ["broken", "no config.json"]),
        "no weights": (model(lambda m: (m / "model.safetensors").unlink()), ["broken", "cannot be loaded"]),
        "damaged weights": (
            model(lambda m: (m / "model.safetensors").write_bytes(b"x" * 99)),
            ["broken", "cannot be loaded"],
        ),
        "no tokenizer": (model(lambda m: (m / "tokenizer.json").unlink()), ["broken", "cannot be loaded"]),
        "nothing to resume": (words("resume=true"), ["run", "nothing to resume"]),
        "ppo without a reward": (ppo(), ["'reward' is not set"]),
        "ppo with an unread option": (
            ppo(*CALLABLE, "ppo.advantage.kind=rloo", "ppo.advantage.lam=0.9"),
            ["ppo.advantage.", "lam"],
        ),
        "ppo with no such reward model": (ppo("reward.kind=model", "reward.path=./gone"), ["./gone", "no such model"]),
        "ppo without prompts": (
            lambda i, h: [*ppo(*CALLABLE)(i, h), f"data.train={write(h / 'n.jsonl', [{'q': 1}])}"],
            ["n.jsonl, row 1", "no prompt"],
        ),
        "reward without comparisons": (
            lambda i, h: ["reward", *rows({"prompt": "p", "completion": "x"})(i, h)[1:]],
            ["bad.jsonl", "no comparison"],
        ),
        "bad ended": (
            rows({"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "ended": [True]}),
            ["row 1", "ended must be a list of 2"],
        ),
        "bad margin": (rows({"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}), ["row 1", "margin is -1"]),
        "frontier of nothing": (
            lambda i, h: ["frontier", "run=run", "seeds=[]"],
            ["seeds must be distinct, and at least one"],
        ),
        "score of no such file": (
            lambda i, h: ["score", "out=o.jsonl", "data=gone.jsonl", *CALLABLE],
            ["gone.jsonl", "no such file"],
        ),
    }


BAD = bad_inputs()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_clear_message(name, inputs, favor, tmp_path):
    """Non-zero exit, one line that names file, row or key, no traceback, nothing half-written."""
    prepare, expected = BAD[name]
    code, _, err = favor(*prepare(inputs, tmp_path))
    assert code == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("favor: ")
    for part in expected:
        assert part in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_failed_start_can_be_repeated(inputs, favor):
    """A recipe that failed before its first step may be mended and run again into the same folder."""
    assert favor(*recipe(inputs, "data.train=missing.jsonl"))[0] == 2
    code, _, err = favor(*recipe(inputs))
    assert code == 0, err


def greedy(folder, prompt, most):
    """What plain transformers answers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, do_sample=False, max_new_tokens=most)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_train_eval_report_sample(inputs, favor, tmp_path):
    held_out = f"data.eval={inputs / 'good.jsonl'}"
    code, out, err = favor(*recipe(inputs, held_out, "optim.lr=1e-2", "train.epochs=6"))
    assert (code, err) == (0, "")
    assert "train: 6 rows, 6 prompts, 12 responses, 6 comparisons" in out
    assert "checked against the plain path" in out
    assert "trained 18 steps; model in run/model" in out
    code, out, err = favor("eval", "run=run", "sample.max_new_tokens=6", "sample_prompts=3")
    assert (code, err) == (0, "")
    figures = json.loads((tmp_path / "run/eval.json").read_text())
    assert figures["pairs"] == 6
    assert figures["accuracy"] == 1.0
    assert figures["kl"]["num_samples"] == 6
    assert figures["margin"] > 0.1
    assert "preference accuracy" in out
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [s["prompt"] for s in samples] == ["Film 0?", "Film 1?", "Film 2?"]
    # answers to read, of which no figure is made: the last is what transformers takes without sampling
    assert [[answer["temperature"] for answer in s["read"]] for s in samples] == [[0.7, 1e-4]] * 3
    assert samples[0]["read"][1]["policy"] == greedy(tmp_path / "run/model", "Film 0?", 6)
    pairs = [json.loads(line) for line in (tmp_path / "run/eval-pairs.jsonl").read_text().splitlines()]
    assert len({pair["pair"] for pair in pairs}) == 6
    assert sum(pair["margin"] for pair in pairs) / 6 == pytest.approx(figures["margin"])
    assert [pair["policy_gap"] - pair["reference_gap"] for pair in pairs] == pytest.approx(
        [pair["margin"] / figures["beta"] for pair in pairs]
    )
    # a run that was trained on a GPU, in ways that only GPUs have, is measured here all the same
    config = tmp_path / "run/config.toml"
    there = tomllib.loads(config.read_text())
    there["model"] |= {"layout": "fa2", "device": "cuda", "dtype": "bfloat16"}
    config.write_text(tomli_w.dumps(there))
    assert favor("eval", "run=run", "sample.max_new_tokens=6", "sample_prompts=3")[0] == 0
    assert json.loads((tmp_path / "run/eval.json").read_text()) == figures
    code, out, _ = favor("report", "run")
    first, done, *_ = out.splitlines()
    assert (code, first) == (0, "report: run/report.html")
    # what the page says first
    assert done.startswith("done in ")
    assert " held-out pairs" in done
    page = (tmp_path / "run/report.html").read_text()
    assert "Film 0?" in page
    assert page.count('<svg class="plot"') >= 16
    code, _, err = favor(
        "sample",
        "out=s.jsonl",
        f"prompts={inputs / 'good.jsonl'}",
        "engine.model.path=run/model",
        "engine.model.dtype=float32",
        "sample.max_new_tokens=5",
        "samples_per_prompt=2",
        "seed=3",
    )
    assert (code, err) == (0, "")
    first = (tmp_path / "s.jsonl").read_text()
    assert [len(json.loads(line)["responses"]) for line in first.splitlines()] == [2] * 6
    favor(
        "sample",
        "out=t.jsonl",
        f"prompts={inputs / 'good.jsonl'}",
        "engine.model.path=run/model",
        "engine.model.dtype=float32",
        "sample.max_new_tokens=5",
        "samples_per_prompt=2",
        "seed=3",
        "engine.batch=5",
    )
    assert (tmp_path / "t.jsonl").read_text() == first


@pytest.mark.parametrize("words", [["--bogus"], ["bogus"], ["train", "--bogus"], ["report"]])
def test_words_that_mean_nothing(favor, words):
    code, _, err = favor(*words)
    assert code == 2
    assert "Traceback" not in err
    assert "bogus" in err or "Missing argument" in err


def test_eval_and_report_of_what_is_no_run(favor):
    assert "no finished run here" in favor("eval", "run=nowhere")[2]
    assert "no run here" in favor("report", "nowhere")[2]


def test_dry_run_counts_and_writes_nothing(inputs, favor, tmp_path):
    code, out, err = favor(*recipe(inputs), "--dry-run")
    assert (code, err) == (0, "")
    assert "steps: 3, each of up to 2 prompts" in out
    assert "6 rows, 6 prompts, 12 responses, 6 comparisons" in out
    assert "memory (estimate): 0." in out
    assert re.search(r"^disk \(estimate\): model 0\.00 GiB, each checkpoint 0\.00; [\d.]+ GiB free$", out, re.MULTILINE)
    assert "device: CPU\n" in out
    assert "learning rate: up to 5e-06, after 0 steps of warm-up, then linear\n" in out
    assert "note: no rows are held out" in out
    assert list(tmp_path.iterdir()) == []
    # what training would say of held-out rows and of the schedule
    _, out, _ = favor(*recipe(inputs), f"data.eval={inputs / 'good.jsonl'}", "optim.warmup=9", "--dry-run")
    assert "\neval: 6 rows" in out
    assert "error: 6 held-out rows have a prompt of the training part" in out
    assert "note: train rows: the preferred response is the longer one" in out
    assert "note: the warm-up (9 steps) is as long as the run (3 steps)" in out
    assert "learning rate: up to 1.5e-06, after 9 steps" in out
    assert "no rows are held out" not in out
    assert "train.max_steps=9 is not reached" in favor(*recipe(inputs), "train.max_steps=9", "--dry-run")[1]


def test_lint_lists_every_bad_row_and_fails(favor, tmp_path):
    rows = [
        *GOOD,
        {"prompt": "Film 0?", "chosen": "bad 0", "rejected": "good 0"},
        {"prompt": "x", "chosen": "", "rejected": "y"},
    ]
    write(tmp_path / "d.jsonl", rows)
    code, out, _ = favor(
        "lint", "data.train=d.jsonl", "lint.out=lint.json", "lint.page=lint.html", "--fix", "clean.jsonl"
    )
    assert code == 1
    found = {f["kind"]: f for f in json.loads((tmp_path / "lint.json").read_text())["findings"]}
    assert found["empty"]["examples"] == ["d.jsonl, row 8: chosen is empty"]
    assert found["contradiction"]["rows"] == [["d.jsonl", 7]]
    assert all(name in out for name in ("contradiction", "empty", "length"))
    assert "chosen is empty" in (tmp_path / "lint.html").read_text()
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == 5
    actions = [json.loads(line) for line in (tmp_path / "clean.actions.jsonl").read_text().splitlines()]
    assert [(a["row"], a["action"]) for a in actions] == [(1, "dropped"), (7, "dropped"), (8, "dropped")]
    assert favor("lint", "data.train=clean.jsonl", "lint.fail_on=warning")[0] == 0
    assert favor("lint", "data.train=d.jsonl", "lint.fail_on=never")[0] == 0
    assert "is the file it reads" in favor("lint", "data.train=d.jsonl", "--fix", "d.jsonl")[2]
    write(tmp_path / "d.jsonl", GOOD)
    assert favor("lint", "data.train=d.jsonl")[0] == 0
    (tmp_path / "r.toml").write_text('run = "r"\n[model]\npath = "./m"\n[data]\ntrain = "d.jsonl"\n')
    assert favor("lint", "r.toml")[0] == 0
    assert "data.trian" in favor("lint", "r.toml", "data.trian=x")[2]


def test_recipe_file_and_overrides(inputs, favor, tmp_path):
    (tmp_path / "r.toml").write_text(
        f'run = "a"\n[model]\npath = "{inputs / "model"}"\ndtype = "float32"\n[data]\ntrain = "{inputs / "good.jsonl"}"\n'
    )
    assert favor("train", "r.toml", "run=b", "train.max_steps=1")[0] == 0
    assert not (tmp_path / "a").exists()
    assert 'run = "b"' in (tmp_path / "b/config.toml").read_text()
    code, _, err = favor("train", "b/config.toml")
    assert code == 2
    assert "already holds a run" in err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_imports_no_torch(command):
    program = "import sys; sys.argv = ['favor', *sys.argv[1:]]; from favor.cli import main\ntry: main()\nfinally: print(*sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", program, *([command] if command else []), "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    imported = told.splitlines()[-1].split()
    assert "Usage" in told
    # what is imported, not seconds: a busy machine made a bound on time fail where nothing was wrong
    assert not {"torch", "numpy", "transformers", "datasets"} & set(imported)
    assert len(imported) < 600, "0.3 s on an idle machine; something heavy is imported for a page of help"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_a_checkpoint_and_says_so(inputs, tmp_path, number):
    """A real signal to a real process: one clear line, exit code 128 + signal, and the run resumes."""
    words = [f"run={tmp_path / 'run'}", *recipe(inputs)[2:], "train.epochs=4000"]
    program = [sys.executable, "-c", "from favor.cli import main; main()", "train", *words]
    metrics = tmp_path / "run/metrics.jsonl"
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not metrics.exists() or '"kind": "step"' not in metrics.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert "continue with resume=true" in err.splitlines()[-1]
    assert "Traceback" not in err
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert {p.name for p in saved.iterdir()} == {"policy.safetensors", "optimizer.safetensors", "state.json"}


def recipe_words(name, inputs, here):
    """What a recipe needs to run on the tiny model: (command, settings)."""
    model = [f"model.path={inputs / 'model'}", "model.dtype=float32"]
    if name == "prefer":
        model = [f"engine.{word}" for word in model]
    if name in ("prefer", "loop"):
        (here / "length.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
        drawn = [f"prompts={inputs / 'good.jsonl'}", "sample.max_new_tokens=5"]
        reward = ["reward.kind=callable", f"reward.path={here / 'length.py'}:score"]
        rounds = ["run=loop", "rounds=2", "prompts_per_round=3", "train.max_steps=3", "train.batch_prompts=1"]
        return name, [*model, *drawn, *reward, *(rounds if name == "loop" else ["out=preferences.jsonl"])]
    if name == "diff":
        sides = [f"{side}={inputs / 'model'}" for side in ("a", "b")]
        return name, [*sides, f"prompts={inputs / 'good.jsonl'}", "sample.max_new_tokens=4", "unsettled=pass"]
    if name in ("ppo", "winrate", "frontier"):
        return name, rlhf_words(name, inputs, here)
    data = [f"data.train={inputs / 'good.jsonl'}", f"data.eval={inputs / 'good.jsonl'}"]
    steps = [f"run={name}", "train.max_steps=3", "train.batch_prompts=2"]
    return name if name in ("sft", "reward") else "train", [*model, *data, *steps]


def rlhf_words(name, inputs, here):
    """The recipes that need a scorer: a callable, or the reward model that the recipe `reward` trained just before."""
    (here / "length.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    model, data = str(inputs / "model"), str(inputs / "good.jsonl")
    if name == "frontier":
        task = [f"task.model={model}", f"task.prompts={data}", f"task.eval_prompts={data}"]
        task += [
            f"task.reward.kind={CALLABLE[0].split('=')[1]}",
            "task.reward.path=" + str(here / "length.py") + ":score",
        ]
        sizes = ["run=frontier", "seeds=[0]", "jobs=1", "offline.prompts=4", "evaluate.prompts=3", "ppo.rollouts=3"]
        left_out = [
            f"methods.{m}=[]" for m in ("dpo_fresh", "ipo", "kto", "ppo", "unlikelihood", "preferred_ft", "best_of_n")
        ]
        sizes.append("budgets=[]")
        return [*task, *sizes, *left_out, "methods.dpo=[0.1]", "methods.ppo_true=[3]", "evaluate.max_new_tokens=4"]
    if name == "winrate":
        sides = [f"{side}.model={model}" for side in ("a", "b")]
        return ["run=winrate", *sides, f"prompts={data}", "sample.max_new_tokens=4", "judge.reward.path=reward/model"]
    steps = ["run=ppo", "train.max_steps=3", "train.batch_prompts=2", "sample.max_new_tokens=4", "model.dtype=float32"]
    return [f"model.path={model}", f"data.train={data}", *steps, *CALLABLE]


def test_every_recipe_is_valid_and_trains_three_steps(inputs, favor, tmp_path):
    root = Path(__file__).parent.parent / "recipes"
    found = sorted(root.glob("*.toml"))
    assert found
    for path in found:
        command, words = recipe_words(path.stem, inputs, tmp_path)
        code, out, err = favor(command, path, *words)
        assert (code, err) == (0, ""), path
        if command == "prefer":
            assert "6 of 6 prompts with" in out
