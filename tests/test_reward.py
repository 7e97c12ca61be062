"""The reward model and every scorer: closed forms, invariances, what transformers reads back, calibration."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from oracles import tree
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from favor.config import load
from favor.data import batches
from favor.data.read import DataConfig, read
from favor.data.types import Comparison
from favor.errors import CheckpointError, ConfigError, DataError
from favor.eval.figures import calibrate
from favor.eval.score import ScoreConfig, score
from favor.losses.pairwise import bradley_terry, centering, rao_kupper_tie
from favor.model.heads import load_scalar_model, response_scores, settle_scores
from favor.model.load import ModelConfig, load_policy
from favor.model.logprobs import response_logps
from favor.ranks import World
from favor.rewards.model import ScoredTokens, encode, implicit_scorer
from favor.rewards.source import CallableReward, ClassifierReward, ImplicitReward, ModelReward, make_scorer
from favor.run import RunFolder, read_jsonl
from favor.stop import StopRequest
from favor.train.preference import TrainConfig, train
from favor.train.reward import BradleyTerryConfig, RewardTrainConfig, make_objective, train_reward
from favor.train.session import Session


def open_session(root):
    return Session(RunFolder(root), World(), Console(quiet=True), StopRequest())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Planted preferences: the response with 'good' wins."""
    folder = tmp_path_factory.mktemp("reward")
    tiny.save(folder / "model")
    rng = np.random.default_rng(0)

    def words(mood):
        return " ".join([*rng.choice(["film", "warm", "never", "stops"], 3), mood])

    for name, count in (("train", 80), ("test", 24)):
        rows = [{"prompt": f"Film {i % 20}?", "chosen": words("good"), "rejected": words("bad")} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def words_of(inputs, run, *more):
    return [
        f"run={run}",
        f"model.path={inputs / 'model'}",
        "model.dtype=float32",
        f"data.train={inputs / 'train.jsonl'}",
        f"data.eval={inputs / 'test.jsonl'}",
        "optim.lr=3e-3",
        "train.batch_prompts=5",
        "train.epochs=6",
        *more,
    ]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    found = train_reward(load(RewardTrainConfig, None, words_of(inputs, run)), open_session)
    return run, found


# closed forms


def test_bradley_terry_margin_tie_and_centering():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert float(bradley_terry(zero, zero)) == pytest.approx(math.log(2))
    assert float(bradley_terry(one, zero)) == pytest.approx(0.313262, abs=1e-6)
    assert float(bradley_terry(one, one)) == pytest.approx(math.log(2))
    assert float(rao_kupper_tie(zero, math.log(3))) == pytest.approx(math.log(2))
    assert float(centering(one, 2 * one)) == 9.0
    # win, loss and tie are all there is
    gap, width = torch.tensor([0.7], dtype=torch.float64), 0.5
    total = sum(
        math.exp(-float(x)) for x in (bradley_terry(gap, width), bradley_terry(-gap, width), rao_kupper_tie(gap, width))
    )
    assert total == pytest.approx(1.0)


def test_calibration_of_known_odds():
    rng = np.random.default_rng(0)
    strength = rng.normal(0, 2, 20_000)
    wins = rng.random(20_000) < 1 / (1 + np.exp(-strength))
    gap = np.where(wins, strength, -strength)
    honest = calibrate(gap, np.arange(20_000) // 4)
    boastful = calibrate(3 * gap, np.arange(20_000) // 4)
    assert honest.ece < 0.01
    assert boastful.ece > 0.1
    assert boastful.accuracy == honest.accuracy
    assert honest.accuracy_interval[0] < honest.accuracy < honest.accuracy_interval[1]
    assert sum(part.num_pairs for part in honest.curve) == 20_000
    flat = calibrate(np.zeros(4), np.arange(4))
    assert (flat.accuracy, flat.ece) == (0.5, 0.0)
    assert flat.loss == pytest.approx(math.log(2))


def test_ece_by_hand():
    gap = np.array([math.log(9), math.log(9), -math.log(9), math.log(1.5)])
    found = calibrate(gap, np.arange(4))
    # three predicted at 0.9 of which two came true, one at 0.6 that did
    assert found.ece == pytest.approx((3 * abs(2 / 3 - 0.9) + abs(1 - 0.6)) / 4)


# data


def test_margins_and_ties_are_read(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.7},
        {"prompt": "p", "chosen": "a", "rejected": "c", "tie": True},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (p,), report = read(str(tmp_path / "r.jsonl"), DataConfig(train="x"), "train")
    scored = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1.0, 4.0, 1.0]}
    (tmp_path / "s.jsonl").write_text(json.dumps(scored) + "\n")
    (q,), again = read(str(tmp_path / "s.jsonl"), DataConfig(train="x"), "train")
    assert p.comparisons == (Comparison((0, 1), 1.0, (0.7,)),)
    assert p.ties == (Comparison((0, 2)),)
    assert q.comparisons == (Comparison((1, 0), 1.0, (3.0,)), Comparison((1, 2), 1.0, (3.0,)))
    assert q.ties == (Comparison((0, 2)),)
    assert (report.num_ties, again.num_ties) == (1, 1)


def test_a_ranking_by_scores_implies_every_margin():
    from dataclasses import replace

    ranked = replace(tree((5, 6), [(7, 2), (8, 2), (9, 2)]), comparisons=(Comparison((2, 0, 1), 1.0, (0.5, 2.0)),))
    batch = batches.build([ranked], "tree")
    assert list(zip(batch.chosen_P.tolist(), batch.rejected_P.tolist(), batch.margin_P.tolist(), strict=True)) == [
        (2, 0, 0.5),
        (2, 1, 2.5),
        (0, 1, 2.0),
    ]


# the model


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_score_is_what_transformers_reads_and_trees_do_not_change_it(family, tmp_path):
    """Also where pad and end of turn are one token, which would make transformers read one token too early."""
    tiny.model(family).save_pretrained(tmp_path / "lm")
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "lm")
    policy = load_scalar_model(ModelConfig(path=str(tmp_path / "lm")), fresh=True)
    assert not policy.causal_lm.score.weight.any()
    torch.nn.init.normal_(policy.causal_lm.score.weight)
    trees = [tree((5, 6, 7), [(8, 9, 2), (8, 10, 11, 2)]), tree((5, 9), [(12, 2)], first=2)]
    with torch.no_grad():
        plain = response_scores(policy, batches.build(trees, "rows"))
        settled, why = settle_scores(policy, "auto", trees)
        assert settled.layout == "tree", why
        packed = response_scores(settled, batches.build(trees, "tree"))
    torch.testing.assert_close(plain, packed, atol=1e-4, rtol=1e-4)
    policy.causal_lm.set_attn_implementation(policy.plain_attention)
    policy.causal_lm.save_pretrained(tmp_path / "rm")
    policy.tokenizer.save_pretrained(tmp_path / "rm")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    pad = AutoTokenizer.from_pretrained(tmp_path / "rm").pad_token_id
    rows = [t.prompt_ids + r for t in trees for r in t.response_ids]
    ids = torch.tensor([list(r) + [pad] * (7 - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (7 - len(r)) for r in rows])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    assert logits.shape == (3, 1)
    torch.testing.assert_close(logits[:, 0].double(), plain, atol=1e-4, rtol=1e-4)


def test_gradient_equals_that_of_separate_rows(inputs):
    trees = [
        tree((5, 6, 7), [(8, 9, 2), (8, 10, 2), (11, 2)], [(0, 1), (2, 1)]),
        tree((5, 9), [(12, 2), (13, 2)], [(1, 0)], first=3),
    ]
    grads = []
    for layout in ("tree", "rows"):
        policy = load_scalar_model(ModelConfig(path=str(inputs / "model")), fresh=True)
        torch.nn.init.constant_(policy.causal_lm.score.weight, 0.05)
        settled, _ = settle_scores(policy, layout, trees)
        objective = make_objective(BradleyTerryConfig(centering=0.1), settled)
        parts = [trees] if layout == "tree" else [[t] for t in trees]
        total = sum(objective.loss(batches.build(part, settled.layout))[0] for part in parts)
        grads.append(torch.autograd.grad(total, list(settled.trainable().values())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_planted_preference_is_learnt_from_ln_2(trained):
    run, found = trained
    steps = [r for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found.accuracy == 1.0
    assert found.loss < 0.2
    saved = json.loads((run / "eval.json").read_text())["calibration"]
    assert saved["accuracy"] == 1.0


def test_options_that_the_data_cannot_feed_are_refused(inputs, tmp_path):
    for option, message in (
        ("bradley_terry.margin_scale=1", "no row has a margin"),
        ("bradley_terry.tie_width=0.5", "holds no ties"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_reward(load(RewardTrainConfig, None, words_of(inputs, tmp_path / "r", option)), open_session)


@pytest.mark.parametrize("old", ["reward.ties=true", "reward.tie_width=0.5", "reward.margin_scale=1"])
def test_where_the_settings_of_earlier_versions_are_is_said(old):
    with pytest.raises(
        ConfigError,
        match=r"unknown key 'reward'; its settings are in \[bradley_terry\] now: .* tie_width \(ties count if set",
    ):
        load(RewardTrainConfig, None, ["run=r", "model.path=m", "data.train=t", old])


def test_ties_and_margins_reach_the_loss(inputs, tmp_path):
    rows = [{"prompt": f"p {i}", "responses": ["one", "two", "three"], "scores": [1.0, 1.0, i + 2.0]} for i in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = [
        "bradley_terry.tie_width=0.4",
        "bradley_terry.margin_scale=0.1",
        "train.batch_prompts=4",
        "train.max_steps=1",
    ]
    words = [w for w in words_of(inputs, tmp_path / "r", *options) if not w.startswith("data.")]
    train_reward(load(RewardTrainConfig, None, [*words, f"data.train={tmp_path / 't.jsonl'}"]), open_session)
    (step,) = [r for r in read_jsonl(tmp_path / "r" / "metrics.jsonl") if r["kind"] == "step"]
    wins = [float(bradley_terry(torch.zeros(1), 0.1 * (i + 1.0) + 0.4)) for i in range(4) for _ in range(2)]
    ties = [float(rao_kupper_tie(torch.zeros(1), 0.4))] * 4
    assert step["loss"] == pytest.approx(sum(wins + ties) / 12, abs=1e-6)


def test_lora_reward_model_trains_and_saves_its_head(inputs, tmp_path):
    words = words_of(inputs, tmp_path / "run", "model.lora.rank=4", "train.epochs=8", "optim.lr=1e-2")
    found = train_reward(load(RewardTrainConfig, None, words), open_session)
    assert found.accuracy > 0.9
    scorer = make_scorer(ModelReward(path=str(tmp_path / "run" / "model")))
    good, bad = scorer(["Film 1?", "Film 1?"], ["warm film good", "warm film bad"])
    assert good > bad


# scorers


def test_reward_model_as_scorer_in_any_order_and_repeated(trained):
    run, _ = trained
    scorer = make_scorer(ModelReward(path=str(run / "model")))
    prompts, texts = ["Film 1?", "Film 2?", "Film 1?", "Film 1?"], ["warm good", "warm bad", "warm bad", "warm good"]
    together = scorer(prompts, texts)
    alone = [scorer([p], [t])[0] for p, t in zip(prompts, texts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-4)
    assert together[0] == together[3] > together[2]
    assert all(map(math.isfinite, scorer(["Film 1?"] * 2, ["", "  "])))


@pytest.mark.parametrize(
    "loss", [["loss.beta=0.3"], ["loss.kind=sum", "loss.terms=[{kind='sft', weight=0.1}, {kind='dpo', beta=0.3}]"]]
)
def test_implicit_reward_is_beta_log_ratio(inputs, tmp_path, loss):
    words = words_of(inputs, tmp_path / "dpo", "train.epochs=2", *loss)
    train(load(TrainConfig, None, words), open_session)
    scorer = make_scorer(ImplicitReward(path=str(tmp_path / "dpo")))
    texts = ["warm film good", "warm film bad"]
    found = scorer(["Film 1?"] * 2, texts)
    policy, ref = (
        load_policy(ModelConfig(path=str(p), dtype="float32")) for p in (tmp_path / "dpo/model", inputs / "model")
    )
    trees, place = encode(["Film 1?"] * 2, texts, policy, ScoredTokens())
    batch = batches.build(trees, "rows")
    with torch.no_grad():
        expected = 0.3 * (response_logps(policy, batch) - response_logps(ref, batch))
    assert found == pytest.approx(expected[place].tolist(), abs=1e-4)
    assert found[0] > found[1]
    doubled = implicit_scorer(str(tmp_path / "dpo"), None, 0.6, ScoredTokens())(["Film 1?"] * 2, texts)
    assert doubled == pytest.approx([2 * x for x in found], abs=1e-4)
    figures = score(
        ScoreConfig(
            out=str(tmp_path / "scores.jsonl"),
            data=str(inputs / "test.jsonl"),
            reward=ImplicitReward(path=str(tmp_path / "dpo")),
        ),
        lambda label, done, total: None,
    )
    rows = read_jsonl(tmp_path / "scores.jsonl")
    right = sum(r["scores"][0] > r["scores"][1] for r in rows) / len(rows)
    assert figures["calibration"]["accuracy"] == pytest.approx(right)
    assert json.loads((tmp_path / "scores.jsonl.figures.json").read_text()) == json.loads(json.dumps(figures))


def test_scoring_samples_without_comparisons(tmp_path):
    (tmp_path / "s.jsonl").write_text(json.dumps({"prompt": "p", "responses": ["a", "bbb"]}) + "\n")
    (tmp_path / "r.py").write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    reward = CallableReward(path=f"{tmp_path / 'r.py'}:length")
    config = ScoreConfig(out=str(tmp_path / "o.jsonl"), data=str(tmp_path / "s.jsonl"), reward=reward)
    assert score(config, lambda *a: None) is None
    assert read_jsonl(tmp_path / "o.jsonl") == [{"prompt": "p", "responses": ["a", "bbb"], "scores": [1.0, 3.0]}]


def test_rows_of_one_prompt_are_scored_as_one_prompt(tmp_path):
    """However many rows it takes: 24 pairs of 2 prompts, all right, are not sure."""
    rows = [{"prompt": f"p{i % 2}", "chosen": f"long {i}", "rejected": f"s{i}"} for i in range(24)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    reward = CallableReward(path=f"{tmp_path / 'r.py'}:length")
    found = score(
        ScoreConfig(out=str(tmp_path / "o.jsonl"), data=str(tmp_path / "s.jsonl"), reward=reward), lambda *_: None
    )
    assert (found["calibration"]["pairs"], found["calibration"]["prompts"]) == (24, 2)
    assert found["calibration"]["accuracy_interval"][0] < 0.5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(p, r): return [1.0]", "1 scores for 2"),
        ("def f(p, r): return [float('nan')] * len(r)", "finite"),
        ("def f(p, r): return None", "one number per response"),
        ("g = 1", "no function 'f'"),
    ],
)
def test_a_callable_that_misbehaves_is_named(tmp_path, body, message):
    (tmp_path / "r.py").write_text(body)
    with pytest.raises((DataError, ConfigError), match=message):
        make_scorer(CallableReward(path=f"{tmp_path / 'r.py'}:f"))(["p", "p"], ["a", "b"])


def test_a_classifier_reads_text_and_label_alone(tmp_path):
    """The documented columns are enough: no film, no fresh."""
    rows = [{"text": f"a {'warm' if i % 2 else 'dull'} film {i}", "label": bool(i % 2)} for i in range(40)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = make_scorer(ClassifierReward(path=str(tmp_path / "labels.jsonl")))
    good, bad = score(["p", "p"], ["a warm film", "a dull film"])
    assert good > 0.5 > bad


def test_a_setting_of_another_kind_of_reward_is_refused():
    words = ["out=o", "data=d", "reward.kind=classifier", "reward.path=x", "reward.tokens.max_tokens=9"]
    with pytest.raises(ConfigError, match=r"reward\.tokens.*not read by kind 'classifier'.*model, implicit"):
        load(ScoreConfig, None, words)
    with pytest.raises(ConfigError, match=r"what is scored is never cut: raise reward\.tokens\.max_tokens"):
        load(
            ScoreConfig,
            None,
            ["out=o", "data=d", "reward.kind=model", "reward.path=x", "reward.tokens.truncation=drop"],
        )
    with pytest.raises(
        ConfigError, match=r"'reward\.kind' is 'oracle'; choose one of model, implicit, classifier, callable"
    ):
        load(ScoreConfig, None, ["out=o", "data=d", "reward.kind=oracle"])


def test_a_scored_response_ends_as_the_template_ends_it(inputs):
    """Also where the model names further end tokens with smaller ids (Llama 3 has two)."""
    policy = load_policy(ModelConfig(path=str(inputs / "model")))
    policy.causal_lm.generation_config.eos_token_id = [0, 1, policy.tokenizer.eos_token_id]
    trees, _ = encode(["Film 1?"] * 2, ["warm", " "], policy, ScoredTokens())
    assert min(policy.end_ids) == 0
    assert {ids[-1] for ids in trees[0].response_ids} == {policy.tokenizer.eos_token_id}


def test_scorers_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no such Python file"):
        make_scorer(CallableReward(path=f"{tmp_path / 'none.py'}:f"))
    with pytest.raises(ConfigError, match="no such Python module"):
        make_scorer(CallableReward(path="no_such_module_here:f"))
    with pytest.raises(CheckpointError, match="no finished run"):
        make_scorer(ImplicitReward(path=str(tmp_path)))
    with pytest.raises(CheckpointError, match="no such model folder"):
        make_scorer(ModelReward(path=str(tmp_path / "none")))
