"""Sampling, best of N, preferences from samples and the online loop, on a tiny model."""

import json
import sys
import types

import pytest
import tiny
import zoo_models
from rich.console import Console

from favor.config import dump, load
from favor.data.prompts import sample_seeds
from favor.data.read import DataConfig, read
from favor.errors import ConfigError, DataError
from favor.eval.evaluate import EvalConfig, evaluate
from favor.eval.score import ScoreConfig, score
from favor.generate import engines
from favor.generate.prefer import PreferConfig, prefer
from favor.generate.samples import SamplesConfig, write_samples
from favor.model.load import ModelConfig, make_policy
from favor.model.sample import SampleConfig, sample
from favor.online import OnlineConfig, loop
from favor.ranks import World
from favor.run import RunFolder, read_jsonl
from favor.server import Reply
from favor.stop import StoppedError, StopRequest
from favor.train.preference import TrainConfig, train
from favor.train.session import Session
from favor.winrate.run import WinrateConfig, winrate

PROMPTS = ["Write about a film.", "A film", "Never?", [{"role": "user", "content": "Good or bad?"}], "Maybe the end."]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    tiny.save(folder / "model")
    rows = [{"prompt": prompt} for prompt in [*PROMPTS, PROMPTS[0]]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def length(prompts, responses):\n    return [len(r) for r in responses]\n"
        "def same(prompts, responses):\n    return [1.0 for r in responses]\n"
    )
    return folder


def quiet(label, done, total):
    pass


def words(inputs, out, *more):
    return [
        f"out={out}",
        f"prompts={inputs / 'prompts.jsonl'}",
        f"engine.model.path={inputs / 'model'}",
        "engine.model.dtype=float32",
        "sample.max_new_tokens=6",
        "engine.batch=3",
        *more,
    ]


def by_length(inputs, name="length"):
    return ["reward.kind=callable", f"reward.path={inputs / 'reward.py'}:{name}"]


def run_sample(words, progress=quiet):
    return write_samples(load(SamplesConfig, None, words), progress)


def rows_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_prompts_under_another_name(inputs, tmp_path):
    """Mapped or refused with the setting that maps them; the samples are those of the file with our name."""
    (tmp_path / "asked.csv").write_text("no,what they say\n" + "".join(f"{i},{p}\n" for i, p in enumerate(PROMPTS[:3])))
    given = [*words(inputs, tmp_path / "s.jsonl")[2:], f"prompts={tmp_path / 'asked.csv'}"]
    with pytest.raises(
        DataError,
        match=r"row 2: no prompt .*: its columns are no, what they say; .*: 'columns=\{prompt=\"what they say\"\}'$",
    ):
        run_sample([f"out={tmp_path / 'a.jsonl'}", *given])
    column = 'columns.prompt="what they say"'
    run_sample([f"out={tmp_path / 'a.jsonl'}", *given, column])
    run_sample(words(inputs, tmp_path / "b.jsonl", "max_prompts=3"))
    assert rows_of(tmp_path / "a.jsonl") == rows_of(tmp_path / "b.jsonl")
    made = prefer(load(PreferConfig, None, [f"out={tmp_path / 'p.jsonl'}", *given, column, *by_length(inputs)]), quiet)
    assert made.prompts == 3
    with pytest.raises(ConfigError, match=r"columns maps 'promt'.*did you mean 'prompt'"):
        run_sample([f"out={tmp_path / 'c.jsonl'}", *given, "columns.promt=no"])
    with pytest.raises(ConfigError, match="columns is not read: it is of prompts=FILE"):
        load(
            WinrateConfig,
            None,
            ["run=r", "a.file=a", "b.file=b", "judge.kind=callable", "judge.path=x:y", "columns.prompt=no"],
        )


def test_scores_of_columns_with_other_names(inputs, tmp_path):
    (tmp_path / "p.csv").write_text("ask,good,bad\nA film,good one,bad\n")
    given = [f"data={tmp_path / 'p.csv'}", *by_length(inputs), 'columns={prompt="ask", chosen="good", rejected="bad"}']
    figures = score(load(ScoreConfig, None, [f"out={tmp_path / 's.jsonl'}", *given]), quiet)
    assert figures["calibration"]["accuracy"] == 1.0
    assert rows_of(tmp_path / "s.jsonl") == [
        {"prompt": "A film", "responses": ["good one", "bad"], "scores": [8.0, 3.0]}
    ]


class Killed(BaseException):
    """As abrupt as a signal."""


def kill_after(chunks):
    calls = []

    def progress(label, done, total):
        calls.append(done)
        if len(calls) == chunks:
            raise Killed

    return progress


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_killed_run_continues_to_the_same_file(inputs, tmp_path, chunks, monkeypatch):
    run_sample(words(inputs, tmp_path / "whole.jsonl", "samples_per_prompt=2"))
    again = words(inputs, tmp_path / "cut.jsonl", "samples_per_prompt=2")
    with pytest.raises(Killed):
        run_sample(again, kill_after(chunks))
    assert not (tmp_path / "cut.jsonl").exists()
    assert len((tmp_path / "cut.jsonl.partial").read_text().splitlines()) == 1 + 3 * chunks
    drawn = []
    monkeypatch.setattr(engines, "sample", lambda *a, real=engines.sample: drawn.extend(a[1]) or real(*a))
    assert run_sample(again) == 10
    assert len(drawn) == 10 - 3 * chunks
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    # beside each what favor knows it by
    records = [".cut.jsonl.favor.json", ".whole.jsonl.favor.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*records, "cut.jsonl", "whole.jsonl"]
    assert [row["prompt"] for row in rows_of(tmp_path / "cut.jsonl")] == PROMPTS


def test_samples_are_of_seed_and_place_alone(inputs, tmp_path):
    run_sample(words(inputs, tmp_path / "a.jsonl"))
    run_sample(words(inputs, tmp_path / "b.jsonl", "max_prompts=2", "engine.batch=1"))
    a, b = rows_of(tmp_path / "a.jsonl"), rows_of(tmp_path / "b.jsonl")
    assert a[:2] == b
    run_sample(words(inputs, tmp_path / "a.jsonl", "seed=1", "overwrite=true"))
    assert rows_of(tmp_path / "a.jsonl") != a


@pytest.mark.parametrize(
    ("family", "over", "computed"),
    [
        ("llama", {}, 3),
        ("gpt2", {}, 3),
        ("bloom", {}, 3),
        ("gemma2", {"sliding_window": 8}, 3),
        # states of recurrent layers, a model that keeps nothing
        ("mamba2", {}, 12),
        ("openai-gpt", {}, 12),
    ],
)
def test_a_prompt_of_several_samples_is_computed_once(family, over, computed):
    """Its samples are those of every row by itself, and those that are drawn where nothing is shared."""
    policy = make_policy(
        zoo_models.build(family, **over), tiny.tokenizer(), ModelConfig(path=family, dtype="float32"), frozen=True
    )
    prompts = [[20 + i for i in range(length)] for length in (9, 4, 7)]
    repeated, seeds = [prompt for prompt in prompts for _ in range(4)], sample_seeds(0, range(3), 4)
    shapes = []
    policy.causal_lm.get_input_embeddings().register_forward_hook(lambda _, given, __: shapes.append(given[0].shape))
    config = SampleConfig(max_new_tokens=8)
    found = sample(policy, repeated, seeds, config)
    assert [tuple(shape) for shape in shapes if shape[1] == 9][-1] == (computed, 9)
    assert found == sample(policy, repeated, seeds, config.model_copy(update={"batch": 1}))
    assert len(set(found)) > 6
    # prompts in another order, and one that has a single sample
    mixed = [7, 0, 4, 1, 9, 2, 3, 6]
    assert [found[i] for i in mixed] == sample(policy, [repeated[i] for i in mixed], [seeds[i] for i in mixed], config)


def test_other_weights_do_not_continue(inputs, tmp_path):
    tiny.save(tmp_path / "model")
    again = [*words(inputs, tmp_path / "s.jsonl"), f"engine.model.path={tmp_path / 'model'}"]
    with pytest.raises(Killed):
        run_sample(again, kill_after(1))
    tiny.model(seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="other settings, prompts or weights"):
        run_sample(again)


def test_bad_places_are_refused_before_the_work(inputs, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        run_sample(words(inputs, tmp_path / "nowhere/s.jsonl"))
    with pytest.raises(ConfigError, match="is a folder"):
        run_sample(words(inputs, tmp_path))
    with pytest.raises(ConfigError, match=r"unknown key 'tokens'"):
        run_sample(words(inputs, tmp_path / "s.jsonl", "tokens.max_tokens=99"))


def test_best_of_keeps_the_highest_score(inputs, tmp_path):
    best, every = tmp_path / "best.jsonl", tmp_path / "all.jsonl"
    count = run_sample(words(inputs, best, "samples_per_prompt=2", "best_of=3", "engine.batch=99", *by_length(inputs)))
    assert count == 10
    run_sample(words(inputs, every, "samples_per_prompt=6", "engine.batch=99"))
    for kept, drawn in zip(rows_of(best), rows_of(every), strict=True):
        groups = drawn["responses"][:3], drawn["responses"][3:]
        assert kept["responses"] == [max(group, key=len) for group in groups]
        assert kept["scores"] == [max(map(len, group)) for group in groups]
    run_sample(words(inputs, tmp_path / "tied.jsonl", "best_of=3", "engine.batch=99", *by_length(inputs, "same")))
    run_sample(words(inputs, tmp_path / "three.jsonl", "samples_per_prompt=3", "engine.batch=99"))
    tied, three = rows_of(tmp_path / "tied.jsonl"), rows_of(tmp_path / "three.jsonl")
    assert [row["responses"][0] for row in tied] == [row["responses"][0] for row in three]


def test_preferences_are_rankings_by_score(inputs, tmp_path):
    out = tmp_path / "preferences.jsonl"
    config = load(PreferConfig, None, words(inputs, out, "samples_per_prompt=5", *by_length(inputs)))
    report = prefer(config, quiet)
    rows = rows_of(out)
    assert report.rows == len(rows)
    assert (report.prompts, report.samples) == (5, 25)
    trees, told = read(str(out), DataConfig(train=str(out)), "train")
    assert told.format == "ranked"
    pairs = 0
    for row, tree in zip(rows, trees, strict=True):
        assert row["scores"] == [len(response) for response in row["responses"]]
        assert len({r.strip() for r in row["responses"]}) == len(row["responses"]) > 1
        for comparison in tree.comparisons:
            scores = [row["scores"][i] for i in comparison.order]
            assert scores == sorted(scores, reverse=True)
            pairs += len(scores) * (len(scores) - 1) // 2
    assert pairs == report.comparisons > 0
    first = out.read_bytes()
    prefer(config, quiet)
    assert out.read_bytes() == first


def test_what_holds_no_preference_is_left_out_and_counted(inputs, tmp_path, monkeypatch):
    texts = [
        *("a", "bb", "a ", "ccc"),  # one duplicate
        *("x", "x", "x", "x"),  # all equal
        *("x", "y", "z", " "),  # all tied, one blank
        *("", "  ", "", ""),  # all blank
        *("long", "s", "t", "u"),
    ]
    monkeypatch.setattr(
        "favor.generate.samples.draw",
        lambda engine, source, jobs, how, keep: keep({job.index: Reply(texts[job.index], True) for job in jobs}),
    )
    config = load(PreferConfig, None, words(inputs, tmp_path / "p.jsonl", *by_length(inputs)))
    report = prefer(config, quiet)
    assert (report.rows, report.all_equal, report.all_tied, report.blank) == (2, 2, 1, 5)
    assert report.duplicates == 1 + 3
    assert report.comparisons == 3 + 3
    assert rows_of(tmp_path / "p.jsonl")[0] == {
        "prompt": PROMPTS[0],
        "responses": ["a", "bb", "ccc"],
        "scores": [1, 2, 3],
        "ended": [True, True, True],
    }
    assert "2 of 5 prompts with 6 comparisons" in str(report)
    config = load(PreferConfig, None, words(inputs, tmp_path / "q.jsonl", *by_length(inputs, "same")))
    with pytest.raises(DataError, match=r"q.jsonl: not written, no prompt has a preference.*samples are kept"):
        prefer(config, quiet)
    assert [p.name for p in tmp_path.glob("q.*")] == ["q.jsonl.partial"]
    # another reward, the same samples
    monkeypatch.setattr("favor.generate.samples.draw", None)
    config = load(PreferConfig, None, words(inputs, tmp_path / "q.jsonl", *by_length(inputs)))
    assert prefer(config, quiet) == report


def fake_vllm(seen):
    """What vLLM's offline interface takes and gives, as far as it is used."""

    class SamplingParams:
        def __init__(self, *, seed, temperature, max_tokens):
            self.settings = (seed, temperature, max_tokens)

    class LLM:
        def __init__(self, *, model, revision, dtype, trust_remote_code):
            seen["model"] = (model, revision, dtype, trust_remote_code)

        def generate(self, prompts, sampling_params, use_tqdm):
            seen["prompts"] = [prompt["prompt_token_ids"] for prompt in prompts]
            seen["params"] = [params.settings for params in sampling_params]
            letters = tiny.tokenizer().convert_tokens_to_ids(list("abcdefghij"))
            ids = [[letter, 2] if i else [letter] for i, letter in enumerate(letters[: len(prompts)])]
            one = [types.SimpleNamespace(token_ids=x, finish_reason="stop" if x[-1] == 2 else "length") for x in ids]
            return [types.SimpleNamespace(outputs=[x]) for x in one]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    return module


def vllm_words(inputs, out, *more):
    return [*[w for w in words(inputs, out) if "batch" not in w], "engine.kind=vllm", *more]


def test_vllm_is_given_ids_seeds_and_limits(inputs, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(seen))
    assert run_sample(vllm_words(inputs, tmp_path / "v.jsonl", "samples_per_prompt=2", "sample.temperature=0.7")) == 10
    assert seen["model"] == (str(inputs / "model"), None, "float32", False)
    tokenizer = tiny.tokenizer()
    expected = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
            add_generation_prompt=True,
            return_dict=False,
        )
        for prompt in PROMPTS
    ]
    assert seen["prompts"] == [ids for ids in expected for _ in range(2)]
    assert len({seed for seed, _, _ in seen["params"]}) == 10
    assert {(temperature, limit) for _, temperature, limit in seen["params"]} == {(0.7, 6)}
    responses = [r for row in rows_of(tmp_path / "v.jsonl") for r in row["responses"]]
    assert responses == list("abcdefghij")


def test_vllm_that_is_missing_or_cannot(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r'pip install "favor\[vllm\]"'):
        run_sample(vllm_words(inputs, tmp_path / "v.jsonl"))
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm({}))
    for word in ("engine.batch=3", "engine.model.layout=rows", "engine.model.device=cpu"):
        with pytest.raises(ConfigError, match=f"unknown key '{word.split('=')[0]}'"):
            run_sample(vllm_words(inputs, tmp_path / "v.jsonl", word))


def loop_words(inputs, run, *more):
    return [
        *[w.removeprefix("engine.").replace("batch", "sample.batch") for w in words(inputs, "")[1:]],
        f"run={run}",
        "rounds=2",
        "prompts_per_round=3",
        "train.batch_prompts=1",
        "save.every=1",
        "optim.lr=1e-3",
        *by_length(inputs),
        *more,
    ]


def run_loop(words, progress=quiet, stop_at=None):
    """Run; `stop_at` asks for a stop as soon as a training run has taken its first step."""

    def open_session(root):
        stop = StopRequest(15 if stop_at is not None and root.name == "train" and stop_at in str(root) else None)
        return Session(RunFolder(root), World(), Console(quiet=True), stop)

    loop(load(OnlineConfig, None, words), open_session, progress)


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("loop") / "run"
    run_loop(loop_words(inputs, run))
    return run


def weights(run):
    return (run / "round-2/train/model/model.safetensors").read_bytes()


def test_each_round_starts_from_the_last(inputs, unbroken):
    rounds = read_jsonl(unbroken / "rounds.jsonl")
    assert [r["round"] for r in rounds] == [1, 2]
    assert all(r["comparisons"] > 0 and r["mean_score"] > 0 for r in rounds)
    first, second = (unbroken / f"round-{n}/train/config.toml" for n in (1, 2))
    assert f'path = "{inputs / "model"}"' in first.read_text()
    assert f'path = "{unbroken / "round-1/train/model"}"' in second.read_text()
    asked = [[row["prompt"] for row in rows_of(unbroken / f"round-{n}/prompts.jsonl")] for n in (1, 2)]
    assert asked == [PROMPTS[:3], [*PROMPTS[3:], PROMPTS[0]]]
    resolved = load(OnlineConfig, unbroken / "config.toml")
    assert resolved == load(OnlineConfig, None, loop_words(inputs, unbroken))
    with pytest.raises(ConfigError, match="already holds a run; continue it with resume=true"):
        run_loop(loop_words(inputs, unbroken))


def test_a_killed_loop_continues_to_the_same_model(inputs, unbroken, tmp_path):
    """Killed while sampling, stopped in training, killed in round 2, its training folder without a checkpoint."""
    run = tmp_path / "run"
    with pytest.raises(Killed):
        run_loop(loop_words(inputs, run), kill_after(2))
    again = loop_words(inputs, run, "resume=true")
    with pytest.raises(StoppedError, match="resume=true"):
        run_loop(again, stop_at="round-1")
    assert (run / "round-1/train/checkpoints").exists()
    first = (run / "round-1/preferences.jsonl").read_bytes()
    with pytest.raises(Killed):
        run_loop(again, lambda label, done, total: kill_after(1)(label, done, total))
    assert len(read_jsonl(run / "rounds.jsonl")) == 1
    (run / "round-2/train").mkdir()
    (run / "round-2/train/metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    labels = set()
    run_loop(again, lambda label, done, total: labels.add(label))
    assert labels == {"round 2: samples"}
    assert (run / "round-1/preferences.jsonl").read_bytes() == first
    assert (run / "rounds.jsonl").read_bytes() == (unbroken / "rounds.jsonl").read_bytes()
    assert weights(run) == weights(unbroken)
    with pytest.raises(ConfigError, match="another recipe"):
        run_loop(loop_words(inputs, run, "resume=true", "rounds=3"))


def test_a_signal_while_sampling_stops_the_loop(inputs, tmp_path):
    stop = StopRequest(2)
    # what only training reads is not handed to the engine
    words = loop_words(inputs, tmp_path / "run", "model.layout=rows", "model.gradient_checkpointing=true")
    config = load(OnlineConfig, None, words)
    with pytest.raises(StoppedError, match="while sampling round 1"):
        loop(config, lambda root: Session(RunFolder(root), World(), Console(quiet=True), stop), quiet)
    assert (tmp_path / "run/round-1/preferences.jsonl.partial").exists()


def test_adapters_are_refused(inputs, tmp_path):
    with pytest.raises(ConfigError, match=r"model.lora"):
        load(OnlineConfig, None, loop_words(inputs, tmp_path / "run", "model.lora.rank=4"))


def test_everybody_reads_the_same_samples(inputs, tmp_path, monkeypatch):
    """`favor sample`, `favor eval` and `favor winrate` show what was sampled, with the white space around it."""
    ids = tuple(tiny.tokenizer()(" good \n", add_special_tokens=False).input_ids)
    monkeypatch.setattr("favor.model.sample._sample_batch", lambda policy, prompts, *more: [ids] * len(prompts))
    run_sample(words(inputs, tmp_path / "s.jsonl", "max_prompts=1"))
    assert rows_of(tmp_path / "s.jsonl")[0]["responses"] == [" good \n"]
    sides = [f"{side}.model.path={inputs / 'model'}" for side in "ab"]
    rated = [f"run={tmp_path / 'rated'}", *sides, f"prompts={inputs / 'prompts.jsonl'}", "max_prompts=1"]
    (tmp_path / "j.py").write_text("def judge(prompt, a, b):\n    return 'tie'\n")
    judge = ["judge.kind=callable", f"judge.path={tmp_path / 'j.py'}:judge"]
    winrate(load(WinrateConfig, None, [*rated, *judge]), lambda text: None, quiet)
    assert rows_of(tmp_path / "rated/responses-a.jsonl")[0]["responses"] == [" good \n"]
    pairs = [{"prompt": "A film", "chosen": "good", "rejected": "bad"}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pairs[0]) + "\n")
    data = [f"data.train={tmp_path / 'pairs.jsonl'}", f"data.eval={tmp_path / 'pairs.jsonl'}"]
    more = [f"run={tmp_path / 'run'}", f"model.path={inputs / 'model'}", "train.max_steps=1", "train.batch_prompts=1"]
    train(
        load(TrainConfig, None, [*more, *data]),
        lambda root: Session(RunFolder(root), World(), Console(quiet=True), StopRequest()),
    )
    evaluate(load(EvalConfig, None, [f"run={tmp_path / 'run'}", "samples_per_prompt=1"]), lambda text: None, quiet)
    assert [rows_of(tmp_path / "run/samples.jsonl")[0][side] for side in ("reference", "policy")] == [[" good \n"]] * 2


@pytest.mark.parametrize("kind", ["transformers", "openai", "vllm"])
def test_a_recipe_comes_back_from_its_own_toml(inputs, tmp_path, kind):
    """Of every engine, with and without a reward; nothing that another engine reads is written down."""
    engine = {"transformers": ["engine.model=m"], "vllm": ["engine.model=m"]}.get(
        kind, ["engine.server.url=http://x/v1", "engine.server.model=m"]
    )
    base = ["out=o", "prompts=p", f"engine.kind={kind}", *engine]
    for schema, more in (
        (SamplesConfig, []),
        (SamplesConfig, ["best_of=2", *by_length(inputs)]),
        (PreferConfig, by_length(inputs)),
    ):
        found = load(schema, None, [*base, *more])
        (tmp_path / "r.toml").write_text(dump(found))
        assert load(schema, tmp_path / "r.toml") == found


def test_known_settings_are_those_of_the_place_that_is_not_known():
    """Below a section that the command does not have, no setting is made up."""
    with pytest.raises(ConfigError, match=r"unknown key 'data\.columns\.qqq'; known here: out, ") as refused:
        load(SamplesConfig, None, ["out=o", "prompts=p", "engine.model.path=m", "data.columns.qqq=x"])
    assert "data.columns.out" not in str(refused.value)


def test_a_recipe_of_an_earlier_version_is_told_the_new_names():
    for word, said in {
        "model.path=m": "engine.model",
        "server.url=x": "engine.server",
        "tokens.template=plain": "engine.template",
        "sample.batch=3": "engine.batch",
        "engine=openai": "engine.kind",
    }.items():
        with pytest.raises(ConfigError, match=said):
            load(SamplesConfig, None, ["out=o", "prompts=p", word])
