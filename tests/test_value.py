"""`favor value`: shares of planted wrong labels and which they are; heads, features and gradients against slow oracles."""

import json
import random

import numpy as np
import pytest
import tiny
import torch
from oracles import plain_logps
from scipy.optimize import minimize
from scipy.special import expit

from favor.config import load
from favor.data.types import TokenTree
from favor.errors import ConfigError
from favor.model.load import ModelConfig, load_policy
from favor.value.cheap import Cases, head, margins
from favor.value.features import features
from favor.value.gradients import cosines
from favor.value.noise import Noise, beside_trusted, mixture
from favor.value.run import read_parts
from favor.value.settings import ValueConfig, ValueSettings
from favor.value.verdict import Judged, judge

FAIR = ["warm", "funny", "humane", "bright", "clever", "tender", "lively", "moving"]
POOR = ["dull", "clumsy", "tired", "hollow", "bland", "noisy", "cheap", "stale"]


def labelled(count, share, seed, spread=3.0):
    """Margins by the label, when a pair's own logit of being right is drawn with this spread and a share is turned round."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, spread, count)
    clean = np.where(rng.random(count) < expit(logit), 1.0, -1.0)
    return logit * clean * np.where(rng.random(count) < share, -1.0, 1.0)


def rows(count=120, share=0.0, seed=0, prompts=60):
    """Pairs told apart by their words, a share of them turned round; and which."""
    rng = random.Random(seed)
    found, wrong = [], []
    for i in range(count):
        better, worse = (" ".join(rng.choice(words) for _ in range(4)) for words in (FAIR, POOR))
        turned = rng.random() < share
        better, worse = (worse, better) if turned else (better, worse)
        found.append({"prompt": f"Review film {i % prompts}.", "chosen": better, "rejected": worse})
        wrong += [i + 1] if turned else []
    return found, wrong


def written(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("value") / "model")


# the share of wrong labels


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.4])
def test_the_interval_of_the_mixture_holds_the_planted_share(share):
    """At least 23 of 26 intervals of 95 %: with true coverage 95 % fewer happen once in 250 times."""
    held = [mixture(labelled(500, share, seed)[None], np.arange(500)) for seed in range(26)]
    assert sum(one.low <= share <= one.high for one in held) >= 23
    # of 40 % it may find none, with an interval that says that it does not know
    assert abs(np.median([one.share for one in held]) - share) < 0.03
    # an interval from none to a half would hold every share
    assert np.median([one.high - one.low for one in held]) < (0.25 if share < 0.4 else 0.5)


def test_heads_whose_margins_say_nothing_beyond_their_sign_cannot_tell():
    """They are right in seven of ten cases however large the margin: wrong labels, or weak heads? Nobody can tell."""
    told: list[float] = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        margin = np.abs(rng.normal(size=150)) * np.where(rng.random(150) < 0.7, 1.0, -1.0)
        told += [mixture(heads, np.arange(150)).low for heads in (margin[None], margin + rng.normal(0, 0.5, (10, 150)))]
    # at 95 %, one of twenty rises by chance
    assert sum(low > 0 for low in told) <= 2
    rng = np.random.default_rng(0)
    margin = rng.normal(size=1500) ** 2 * np.where(rng.random(1500) < 0.7, 1.0, -1.0)
    apart = rng.normal(0, 1, (5, 1500))
    unsteady = mixture(margin + np.concatenate([apart, -apart]), np.arange(1500))
    # heads that all say the same of every pair know what they say
    steady = mixture(np.repeat(margin[None], 10, 0), np.arange(1500))
    assert unsteady.low == 0 < 0.2 < steady.low < steady.high < 0.4


def test_the_mixture_is_the_likeliest_of_a_grid():
    margin = labelled(300, 0.2, seed=5)

    def likelihood(share, scale):
        return np.log((1 - share) * expit(scale * margin) + share * expit(-scale * margin)).sum()

    found = mixture(margin[None], np.arange(300))
    grid = max(likelihood(share, scale) for share in np.linspace(0, 0.495, 100) for scale in np.geomspace(0.2, 5, 200))
    assert likelihood(found.share, found.scale) >= grid - 1e-3


def test_pairs_of_one_prompt_are_not_several():
    """Every pair four times over: the estimate stays, and so must the interval."""
    margin = labelled(200, 0.2, seed=1)
    once = mixture(margin[None], np.arange(200))
    four = mixture(np.repeat(margin, 4)[None], np.repeat(np.arange(200), 4))
    assert (once.share, once.low, once.high) == pytest.approx((four.share, four.low, four.high), abs=0.011)
    naive = mixture(np.repeat(margin, 4)[None], np.arange(800))
    assert naive.high - naive.low < 0.7 * (once.high - once.low)


def test_beside_trusted_pairs_the_share_is_right_whatever_the_heads_are_worth():
    """Weak heads, scaled wrongly: the mixture cannot know, agreement with the trusted pairs can."""
    held = 0
    for seed in range(20):
        mine, trusted = (
            labelled(count, share, seed + shift, 0.8) / 5 for count, share, shift in ((2000, 0.25, 0), (1000, 0, 900))
        )
        found = beside_trusted(mine[None], np.arange(2000), trusted[None], np.arange(1000))
        held += found.low <= 0.25 <= found.high
        assert found.high - found.low < 0.35
    assert held >= 17


def test_heads_that_know_nothing_say_so():
    rng = np.random.default_rng(0)
    found = beside_trusted(
        rng.normal(size=(1, 400)), np.arange(400), -np.abs(rng.normal(size=(1, 100))), np.arange(100)
    )
    assert (found.low, found.high) == (0.0, 0.5)
    assert mixture(rng.normal(size=400)[None], np.arange(400)).certain == 0.0


def test_how_likely_a_label_is_wrong_is_bayes_rule():
    noise = Noise(0.2, 0.1, 0.3, 2.0, "mixture")
    right = expit(2.0 * 1.5)
    assert noise.wrong(np.array([-1.5, 1.5])) == pytest.approx(
        [0.2 * right / (0.2 * right + 0.8 * (1 - right)), 0.2 * (1 - right) / (0.2 * (1 - right) + 0.8 * right)]
    )
    assert noise._replace(low=0.0).wrong(np.array([-9.0])) == pytest.approx(0)


# heads


def test_a_head_is_ridge_bradley_terry():
    rng = np.random.default_rng(0)
    gap, weight = rng.normal(size=(40, 6)) * [1, 2, 5, 1, 1, 0.1], rng.uniform(0.5, 2, 40)
    scale = np.sqrt((gap**2).mean(0) * 6)

    def loss(theta):
        return 3.0 * (weight * np.logaddexp(0, -(gap / scale) @ theta)).sum() + theta @ theta / 2

    theta = minimize(loss, np.zeros(6), tol=1e-12).x
    found = head(Cases(gap, weight, np.arange(40)), 3.0)(gap)
    assert found == pytest.approx((gap / scale) @ theta, abs=2e-3)
    # the other way round every pair says the opposite
    assert head(Cases(-gap, weight, np.arange(40)), 3.0)(gap) == pytest.approx(-found, abs=2e-3)


def test_no_head_has_seen_the_prompt_it_is_asked_about():
    """Every prompt has a feature of its own and a label of chance: whoever saw it knows it, nobody else can."""
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(100), 3)
    gap = np.eye(100)[prompt] * rng.choice([-1.0, 1.0], 100)[prompt][:, None] + rng.normal(0, 0.01, (300, 100))
    cases = Cases(gap, np.ones(300), prompt)
    assert (head(cases, 30.0)(gap) > 0).mean() > 0.95
    out = margins(cases, gap[:0], models=4, folds=5, seed=0).out_MP
    assert 0.35 < (out > 0).mean() < 0.65


def test_weights_are_repeated_pairs():
    rng = np.random.default_rng(0)
    gap = rng.normal(size=(30, 4))
    twice = np.arange(30) < 10
    heavy = head(Cases(gap, 1.0 + twice, np.arange(30)), 1.0)
    # features are scaled by what is there, so the pairs repeated must have the same mean square
    gap[:10] *= np.sqrt((gap[10:] ** 2).mean(0) / (gap[:10] ** 2).mean(0))
    heavy = head(Cases(gap, 1.0 + twice, np.arange(30)), 1.0)
    repeated = head(Cases(np.concatenate([gap, gap[:10]]), np.ones(40), np.arange(40)), 1.0)
    assert heavy(gap) == pytest.approx(repeated(gap), abs=1e-3)


def test_trusted_pairs_are_asked_of_heads_that_did_not_see_their_prompts():
    """Hand-checked rows of one's own file: whoever was fitted to their prompts knows them, and would agree too often."""
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(60), 3)
    gap = np.eye(60)[prompt] * rng.choice([-1.0, 1.0], 60)[prompt][:, None] + rng.normal(0, 0.01, (180, 60))
    cases, others = Cases(gap, np.ones(180), prompt), np.concatenate([gap[::3], gap[::3]])
    # the second half is called by prompts of its own
    known = np.concatenate([prompt[::3], prompt[::3] + 100])
    said = margins(cases, others, 3, 4, 0, known)
    found = said.other_HT
    assert np.isfinite(found[:, :60]).sum() == 3 * 60
    assert np.isfinite(found[:, 60:]).all()
    # the head that is left is the one that its own pair is judged by
    assert np.nanmax(found[:, :60].reshape(3, 4, 60), 1) == pytest.approx(said.out_MP[:, ::3])
    assert margins(cases, others, 3, 4, 0).other_HT[:, :60] == pytest.approx(found[:, 60:])


# features and gradients


TREES = [
    TokenTree((1, 30, 40), ((50, 60, 2), (50, 61, 62, 2)), (True, True), (), 0, 1),
    TokenTree((1, 31), ((70, 2), (71, ~72, ~73, 74, 2)), (True, True), (), 2, 2),
]


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_features_are_those_of_plain_transformers(model, layout):
    from dataclasses import replace

    from favor.model.layout import settle

    policy, _ = settle(load_policy(ModelConfig(path=str(model)), frozen=True), layout, TREES)
    found = features(replace(policy), TREES, 4096, lambda done: None)
    plain = tiny.model()
    for place, (tree, response) in enumerate((one, ids) for one in TREES for ids in one.response_ids):
        ids = [i if i >= 0 else ~i for i in (*tree.prompt_ids, *response)]
        with torch.no_grad():
            hidden = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        scored = [len(tree.prompt_ids) + k for k, i in enumerate(response) if i >= 0]
        assert found[place, :32] == pytest.approx(hidden[[k - 1 for k in scored]].mean(0).numpy(), abs=2e-5)
        assert found[place, 32:64] == pytest.approx(hidden[-1].numpy(), abs=2e-5)
        assert found[place, 65] == len(scored)
    with torch.no_grad():
        logps = plain_logps(plain, TREES[:1])
    assert found[:2, 64] == pytest.approx(logps.numpy(), abs=1e-4)


def test_a_pair_pulls_where_itself_pulls_and_away_from_its_opposite(model):
    def pair(first, second):
        return TokenTree((1, 30, 40), (first, second), (True, True), (), 0, 1)

    one, other, third = (50, 60, 2), (51, 61, 62, 2), (80, 2)
    config = ModelConfig(path=str(model))
    trusted = [pair(one, other)]
    found = cosines(config, [pair(one, other), pair(other, one), pair(one, third)], trusted, 0, lambda done: None)
    assert found[:2] == pytest.approx([1, -1], abs=1e-5)
    # d log pi / d B of an adapter at its start, by plain autograd on the merged weights: A is drawn, B is zero
    assert -0.999 < found[2] < 0.999


def test_implicit_margins_are_those_of_plain_transformers(model, favor, tmp_path):
    """Mean and spread over two runs; a run from another start is refused."""
    from transformers import AutoModelForCausalLM

    found = rows(40, prompts=20)[0]
    data = written(tmp_path / "prefs.jsonl", found)
    for seed in (0, 1):
        words = [
            f"model={model}",
            f"data={data}",
            f"run=run-{seed}",
            f"seed={seed}",
            "lr=1e-2",
            "max_steps=4",
            "batch_prompts=4",
        ]
        assert favor("train", *words)[0] == 0
    asked = ["value.models=2", "value.out=worth.jsonl", "--json"]
    code, _, err = favor("value", f"model={model}", f"data={data}", 'value.policies=["run-0","run-1"]', *asked)
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "worth.jsonl").read_text().splitlines()]
    config = load(ValueConfig, None, [f"model.path={model}", f"data.train={data}"])
    trees = [pair.ids for pair in read_parts(config, lambda *told: None)["train"].pairs]
    with torch.no_grad():
        start, *runs = (
            plain_logps(AutoModelForCausalLM.from_pretrained(path), trees).reshape(-1, 2)
            for path in (model, tmp_path / "run-0/model", tmp_path / "run-1/model")
        )
    gaps = np.stack([((run - start)[:, 0] - (run - start)[:, 1]).numpy() for run in runs])
    assert np.abs(gaps).max() > 0.1
    assert [line["implicit"] for line in lines] == pytest.approx(gaps.mean(0), abs=1e-4)
    assert [line["implicit_spread"] for line in lines] == pytest.approx(gaps.std(0), abs=1e-4)
    code, _, err = favor("value", "model=run-0/model", f"data={data}", 'value.policies=["run-1"]', *asked)
    assert (code, "run-1 began at another model" in err) == (2, True)
    assert favor("value", f"model={model}", f"data={data}", 'value.policies=["run-1"]')[0] == 2


# verdicts


def test_verdicts_go_where_they_are_worth_most():
    wrong = np.array([0.01, 0.95, 0.95, 0.6, 0.55, 0.45, 0.3])
    margin = np.array([[2, -3, -3, -1, -0.5, 0.2, 1.0], [2, -3, 1, -1, -0.5, 0.2, 1.0]])
    found = judge(wrong, margin, ValueSettings(asks=2, flip=0.8))
    # the third is as surely wrong as the second, but half of the heads do not agree: it is left out, or asked about last
    assert [one.verdict for one in found] == ["keep", "flip", "drop", "drop", "ask", "ask", "keep"]
    assert [one.verdict for one in judge(wrong, margin, ValueSettings(asks=0))] == [
        "keep",
        "flip",
        *["drop"] * 3,
        "keep",
        "keep",
    ]
    assert found[1].worth == pytest.approx(-0.9)


# the command


def test_planted_wrong_labels_are_counted_found_and_turned_round(model, favor, tmp_path):
    found, wrong = rows(share=0.2)
    data = written(tmp_path / "prefs.jsonl", found)
    held = written(tmp_path / "test.jsonl", rows(40, seed=9, prompts=20)[0])
    outputs = ["value.out=worth.jsonl", "value.page=worth.html", "value.clean=clean.jsonl"]
    code, out, err = favor("value", f"model={model}", f"data={data}", f"data.eval={held}", *outputs, "--json")
    assert (code, err.count("error")) == (0, 0), err
    figures = json.loads(out)["figures"]
    low, high = figures["wrong_labels_interval"]
    assert 0.05 < low <= len(wrong) / 120 <= high < 0.35
    lines = [json.loads(line) for line in (tmp_path / "worth.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 121))
    flipped = {line["row"] for line in lines if line["verdict"] == "flip"}
    assert len(flipped - set(wrong)) <= 1
    assert len(flipped) >= 0.7 * len(wrong)
    clean = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    used = [line for line in lines if line["verdict"] in ("keep", "flip")]
    assert len(clean) == len(used)
    for row, line in zip(clean, used, strict=True):
        sides = [line["chosen"], line["rejected"]]
        assert [row["chosen"], row["rejected"]] == (sides if line["verdict"] == "keep" else sides[::-1])
    assert sum(row["chosen"].split()[0] in POOR for row in clean) <= 2
    whole = {row["share"]: row["accuracy"] for row in figures["curve"]}
    assert whole["cleaned"] >= whole[1.0]
    page = (tmp_path / "worth.html").read_text()
    assert 'content="favor value"' in page
    assert str(tmp_path) not in page
    # and the copy trains
    code, _, err = favor("train", f"model={model}", "data=clean.jsonl", "run=run", "max_steps=1")
    assert code == 0, err


SAYS = {"prompt": "Review.", "chosen": "warm", "rejected": "dull"}


@pytest.mark.parametrize(
    ("given", "kept", "flipped"),
    [
        (SAYS, SAYS, {"prompt": "Review.", "chosen": "dull", "rejected": "warm"}),
        (SAYS | {"margin": 2.0, "weight": 3.0}, None, {"prompt": "Review.", "chosen": "dull", "rejected": "warm"}),
        (
            {"prompt": "Review.", "responses": ["warm", "dull"], "ranking": [0, 1], "ended": [True, False]},
            None,
            {"prompt": "Review.", "responses": ["dull", "warm"], "ranking": [0, 1], "ended": [False, True]},
        ),
        (
            {"prompt": "Review.", "responses": ["warm", "dull"], "votes": [3, 1], "ended": [False, True]},
            {"prompt": "Review.", "responses": ["warm", "dull"], "votes": [0.75, 0.25], "ended": [False, True]},
            {"prompt": "Review.", "responses": ["dull", "warm"], "votes": [0.75, 0.25], "ended": [True, False]},
        ),
        (
            {"prompt": "Review.", "responses": ["warm", "dull"], "scores": [5, 2], "ended": [True, False]},
            {"prompt": "Review.", "responses": ["warm", "dull"], "scores": [3, 0], "ended": [True, False]},
            {"prompt": "Review.", "responses": ["dull", "warm"], "scores": [3, 0], "ended": [False, True]},
        ),
    ],
)
def test_the_cleaned_copy_says_what_the_rows_said(model, tmp_path, given, kept, flipped):
    """Read back, a pair that stays is the same comparison: label, weight, gap, answers that were cut; a flipped one its reverse."""
    from favor.value.clean import cleaned

    def tree(row, name):
        path = written(tmp_path / name, [row])
        config = load(ValueConfig, None, [f"model.path={model}", f"data.train={path}", "tokens.template=plain"])
        (pair,) = read_parts(config, lambda *told: None)["train"].pairs
        return pair

    before = tree(given, "before.jsonl")
    for verdict, expected in (("keep", kept or given), ("flip", flipped)):
        judged = Judged(verdict, 0.0, 1.0, 0.0, 1.0)
        (row,) = cleaned([before], [judged])
        assert {name: row[name] for name in expected} == expected
        after = tree(json.loads(json.dumps(row)), "after.jsonl")
        assert after.said._replace(order=()) == before.said._replace(order=())
        better = before.chosen if verdict == "keep" else before.rejected
        assert after.text.responses[after.chosen] == before.text.responses[better]
        assert {after.text.responses[i] for i in after.text.cut} == {before.text.responses[i] for i in before.text.cut}
        assert after.gap == before.gap


def test_right_labels_stay(model, favor, tmp_path):
    data = written(tmp_path / "prefs.jsonl", rows()[0])
    code, out, err = favor("value", f"model={model}", f"data={data}", "value.clean=clean.jsonl", "--json")
    assert code == 0, err
    figures = json.loads(out)["figures"]
    assert figures["verdicts"] == {"keep": 120, "flip": 0, "ask": 0, "drop": 0}
    assert figures["wrong_labels_interval"][0] == 0
    assert figures["label_smoothing"] == 0


def test_trusted_pairs_measure_the_share_and_add_their_columns(model, favor, tmp_path):
    data = written(tmp_path / "prefs.jsonl", rows(60, share=0.2, prompts=30)[0])
    trusted = written(tmp_path / "trusted.jsonl", rows(40, seed=3, prompts=20)[0])
    asked = [f"value.trusted={trusted}", "value.gradients=true", "value.out=worth.jsonl", "value.models=3"]
    code, out, err = favor("value", f"model={model}", f"data={data}", *asked, "--json")
    assert code == 0, err
    figures = json.loads(out)["figures"]
    assert figures["measured_by"] == "trusted"
    assert figures["wrong_labels_interval"][0] <= 0.2 <= figures["wrong_labels_interval"][1]
    lines = [json.loads(line) for line in (tmp_path / "worth.jsonl").read_text().splitlines()]
    right, turned = ([one for one in lines if (one["chosen"].split()[0] in POOR) == side] for side in (False, True))
    for column in ("gradient", "loss_gap"):
        # wrong labels pull away from the trusted pairs, and cost more by the trusted head than by their own
        means = [np.mean([one[column] for one in part]) for part in (right, turned)]
        assert means[0] > means[1], column


def test_what_cannot_be_used_is_refused_by_name(model, favor, tmp_path):
    data = written(tmp_path / "prefs.jsonl", rows(12, prompts=12)[0])
    code, _, err = favor("value", f"model={model}", f"data={data}")
    assert code == 2
    assert "12 prompts" in err
    assert "give more pairs" in err
    code, _, err = favor("value", f"model={model}", f"data={data}", f"value.out={data}", "value.overwrite=true")
    assert code == 2
    assert "is the file it reads" in err
    base = {"model": {"path": str(model)}, "data": {"train": str(data)}}
    for section, said in (({"gradients": True}, "value.trusted"), ({"overwrite": True}, "value.out")):
        with pytest.raises(ConfigError, match=said):
            load(
                ValueConfig,
                None,
                [
                    f"model.path={model}",
                    f"data.train={data}",
                    *(f"value.{k}={str(v).lower()}" for k, v in section.items()),
                ],
            )
    assert ValueConfig.model_validate(base | {"loss": {"kind": "ipo"}, "value": {"asks": 3}}).value.asks == 3
