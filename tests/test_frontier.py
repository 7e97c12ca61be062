"""The frontier: its statistics by planted cases, the shrunken model, and a whole small picture that resumes."""

import json

import numpy as np
import pytest
import tiny
import torch
from favor_frontier import style
from favor_frontier.page import SECTIONS, frontier_rows
from favor_frontier.recipe import FrontierConfig, Point, calls, points
from favor_frontier.run import frontier
from favor_frontier.shrink import shrink
from favor_frontier.summary import Cell, _point, _settled, dominance, envelope, p_value
from rich.console import Console
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from favor.config import load
from favor.errors import ConfigError
from favor.ranks import World
from favor.report.page import write_page
from favor.report.records import collect
from favor.run import RunFolder
from favor.stop import StoppedError, StopRequest
from favor.train.session import Session


def open_session(root, stop=None):
    return Session(RunFolder(root), World(), Console(quiet=True), stop or StopRequest())


def test_envelope_is_the_best_reward_so_far():
    kl, reward = np.array([4.0, 0.0, 2.0]), np.array([0.4, 0.5, 0.9])
    # the point at KL 4 is worse than what KL 2 already reached
    np.testing.assert_allclose(envelope(kl, reward, np.array([0.0, 1.0, 2.0, 3.0, 4.0])), [0.5, 0.7, 0.9, 0.9, 0.9])


def planted(level, noise, seed, kl=(2.0, 5.0)):
    rng = np.random.default_rng(seed)
    return [Cell(k, level * k / kl[-1] + rng.normal(0, noise, (3, 40)), k + rng.normal(0, 0.1, (3, 40))) for k in kl]


def test_dominance_is_found_where_it_is_and_only_there():
    start = [Cell(0, np.random.default_rng(9).normal(0, 0.2, (3, 40)), np.zeros((3, 40)))]
    better, worse, same = planted(1.0, 0.2, 1), planted(0.4, 0.2, 2), planted(0.4, 0.2, 3, (1.5, 4.0, 5.5))
    same = [Cell(c.strength, c.reward_SP - c.reward_SP.mean() + 0.4 * c.kl_SP.mean() / 5, c.kl_SP) for c in same]
    found = dominance(start, {"a": better, "b": worse, "c": same})
    verdict = {(d["a"], d["b"]): d for d in found}
    assert verdict["a", "b"]["wins"] == "a"
    # mean over 0..5 of (1.0 - 0.4) k / 5
    assert verdict["a", "b"]["difference"] == pytest.approx(0.3, abs=0.05)
    assert verdict["a", "c"]["wins"] == "a"
    assert verdict["b", "c"]["wins"] == "neither"
    # for all three together, 95 % becomes 98.3 % of each: with 3 seeds and t of 2, wider by up to 7.65 / 4.30
    for d in found:
        low, high = d["together"]
        assert (low + high) / 2 == pytest.approx(d["difference"])
        assert 1.2 < (high - low) / (d["high"] - d["low"]) < 7.65 / 4.30


def one_seed(cells):
    return [Cell(c.strength, c.reward_SP[:1], c.kl_SP[:1]) for c in cells]


def test_one_seed_decides_nothing_and_no_common_range_is_said():
    start = [Cell(0, np.random.default_rng(9).normal(0, 0.2, (3, 40)), np.zeros((3, 40)))]
    better, worse = planted(1.0, 0.2, 1), planted(0.4, 0.2, 2)
    (found,) = dominance(one_seed(start), {"dpo": one_seed(better), "ppo": one_seed(worse)})
    assert found["low"] > 0
    assert found["wins"] == "one seed"
    unmoved = [Cell(1.0, better[0].reward_SP, np.zeros((3, 40)))]
    (none,) = dominance(start, {"dpo": better, "ppo": unmoved})
    assert (none["difference"], none["low"], none["high"], none["wins"]) == (None, None, None, "neither")
    # equal rewards everywhere have no spread to judge by
    flat = [Cell(k, np.full((3, 40), k / 5), np.full((3, 40), k)) for k in (2.0, 5.0)]
    low = [Cell(k, np.full((3, 40), k / 9), np.full((3, 40), k)) for k in (2.0, 5.0)]
    (exact,) = dominance([Cell(0, np.zeros((3, 40)), np.zeros((3, 40)))], {"dpo": flat, "ppo": low})
    assert exact["difference"] > 0
    assert exact["wins"] == "neither"


def test_prompts_are_drawn_once_for_all_seeds():
    """A prompt's own level is shared by all seeds, so 3 seeds of one prompt set say no more about it than one."""
    level = np.random.default_rng(3).normal(0, 0.2, (1, 40))
    noise = np.random.default_rng(4).normal(0, 0.001, (3, 40))
    once, thrice = (_point(Cell(1.0, rewards, rewards))["reward"] for rewards in (level, level + noise))
    assert thrice["high"] - thrice["low"] > 0.97 * (once["high"] - once["low"])


def test_points_and_refusals():
    config = FrontierConfig()
    found = points(config)
    # each strength, and four methods with a quarter of the calls
    one_seed = sum(map(len, config.methods.model_dump().values())) + 4
    assert len(found) == len({p.name for p in found}) == 5 * one_seed
    for words, message in (
        (["budgets=[0.5, 0.5]"], "a share twice"),
        (["budgets=[0.01]"], "raise offline.prompts"),
        (["fresh.rounds=57"], "raise offline.prompts"),
        (
            [
                "embedded=format",
                "task.model=m",
                "task.prompts=p",
                "task.eval_prompts=e",
                "task.reward.kind=callable",
                "task.reward.path=f.py:f",
            ],
            "embedded is about",
        ),
        (["methods.best_of_n=[1.5]"], "whole numbers"),
        (["seeds=[1, 1]"], "distinct"),
        ([f"methods.{name}=[]" for name in config.methods.model_dump()], "no point"),
        (["methods.dopo=[1]"], "did you mean 'methods.dpo'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(FrontierConfig, None, words)


def test_every_method_asks_as_often_and_says_so():
    """224 prompts x 4 answers; 4 rounds of 56 prompts; 14 rollouts of 16 prompts. A quarter of each, in whole rollouts."""
    config = FrontierConfig()
    asked = {p.name: calls(config, p) for p in points(config) if p.seed == 0}
    whole = {count for name, count in asked.items() if "share" not in name}
    assert whole == {896}
    assert asked["dpo-0.1-share0.25-seed0"] == asked["dpo_fresh-0.5-share0.25-seed0"] == 224
    assert asked["ppo-6-share0.25-seed0"] == 224
    # 3.5 rollouts are 4
    assert asked["ppo_true-8-share0.25-seed0"] == 4 * 64
    smaller = FrontierConfig.model_validate({"ppo": {"rollouts": 28, "batch_prompts": 8}})
    assert calls(smaller, Point("ppo_true", 6, 0, 0.25)) == 224
    assert calls(config, Point("start", 0, 0)) == 0


def test_the_format_is_scored_exactly():
    texts = [
        "one two three four five six seven eight!",
        "one two three four",
        "",
        "one two three! four",
        "a " * 30 + "!",
    ]
    # 8 words and the mark; half the length; nothing; half the length, the mark not at the end; far too long
    assert style.score([""] * 5, texts) == [1.0, 0.25, 0.0, 0.25, 0.5]


def test_p_is_that_of_students_t_where_one_seed_is_all_there_is():
    values = np.random.default_rng(0).normal(0.3, 1.0, (1, 25))
    found = p_value(float(values.mean()), values)
    assert found == pytest.approx(stats.ttest_1samp(values[0], 0).pvalue, rel=1e-6)
    assert p_value(50.0, values - values.mean()) == 1e-9


def test_verdicts_stand_for_having_looked_at_all_pairs():
    """Holm: 0.05/4, 0.05/3, 0.05/2, 0.05. The third fails, so the fourth does not count though it is below 5 %."""
    pairs = [{"p": p} for p in (0.04, 0.012, 0.03, 0.016)]
    assert [said["p"] for said in _settled(pairs)] == [0.012, 0.016]
    assert _settled([{"p": 0.013}, {"p": 0.04}, {"p": 0.04}, {"p": 0.04}]) == []


def test_shrunken_model_splits_the_texts_alike_and_computes_the_kept_layer(tmp_path):
    tiny.save(tmp_path / "full")
    texts = ["A warm, funny film", "maybe not"]
    size = shrink(tmp_path / "full", texts, [0], tmp_path / "small")
    full, small = (AutoTokenizer.from_pretrained(tmp_path / n) for n in ("full", "small"))
    assert size == len(small) < len(full)
    for text in texts:
        assert small.tokenize(text) == full.tokenize(text)
    assert small.decode(small("any other words: ü").input_ids) == "any other words: ü"
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n).eval() for n in ("full", "small")]
    models[0].model.layers = models[0].model.layers[:1]
    models[0].config.num_hidden_layers = 1
    kept = full.convert_tokens_to_ids(small.convert_ids_to_tokens(list(range(size))))
    with torch.no_grad():
        first = models[0](torch.tensor([full(texts[0]).input_ids])).logits[..., kept]
        second = models[1](torch.tensor([small(texts[0]).input_ids])).logits
    torch.testing.assert_close(first, second)
    assert models[1].generation_config.eos_token_id == small.eos_token_id
    with pytest.raises(ConfigError, match="cannot be cut"):
        shrink(tmp_path / "full", texts, [7], tmp_path / "none")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    tiny.save(folder / "model")
    for name in ("prompts", "eval"):
        rows = [{"prompt": f"{name} {i}:"} for i in range(6)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "reward.py").write_text("def vowels(p, r):\n    return [sum(c in 'aeiou' for c in x) / 8 for x in r]\n")
    return folder


def recipe(task, run):
    return load(
        FrontierConfig,
        None,
        [
            f"run={run}",
            "seeds=[0, 1]",
            f"task.model={task / 'model'}",
            f"task.prompts={task / 'prompts.jsonl'}",
            f"task.eval_prompts={task / 'eval.jsonl'}",
            "task.reward.kind=callable",
            f"task.reward.path={task / 'reward.py'}:vowels",
            "offline.prompts=6",
            "budgets=[0.5]",
            "fresh.rounds=2",
            "offline.batch_prompts=3",
            "offline.probe_every=1",
            "ppo.rollouts=2",
            "ppo.batch_prompts=3",
            "evaluate.prompts=4",
            "evaluate.max_new_tokens=6",
            *(f"methods.{name}=[0.5]" for name in ("dpo", "dpo_fresh", "ipo", "kto", "unlikelihood")),
            *(f"methods.{name}=[2]" for name in ("ppo", "ppo_true", "preferred_ft", "best_of_n")),
        ],
    )


def test_a_whole_picture_and_its_resumption(task, tmp_path):
    config = recipe(task, tmp_path / "run")
    found = frontier(config, open_session)
    assert found["finished"] == found["wanted"] == 2 * (9 + 4)
    assert set(found["points"]) == {"start", *config.methods.model_dump()}
    (start,) = found["points"]["start"]
    assert start["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert found["points"]["best_of_n"][0]["kl"]["mean"] == pytest.approx(np.log(2) - 0.5)
    assert len(found["dominance"]) == 9 * 8 / 2
    budgets = {(b["method"], b["share"]): b for b in found["budgets"]}
    assert set(budgets) == {(m, s) for m in ("dpo", "dpo_fresh", "ppo", "ppo_true") for s in (0.5, 1.0)}
    for method in ("dpo", "dpo_fresh"):
        assert budgets[method, 0.5]["calls"] < budgets[method, 1.0]["calls"]
        # each from its own labels: another model comes out
        assert budgets[method, 0.5]["kl"]["mean"] != budgets[method, 1.0]["kl"]["mean"]
    assert budgets["ppo", 0.5]["kl"]["mean"] != budgets["ppo", 1.0]["kl"]["mean"]
    assert all(b["core_seconds"] > 0 for b in budgets.values())
    assert {c["method"] for c in found["stability"]} == {"dpo", "ppo", "ppo_true"}
    assert not list((tmp_path / "run").glob("points/**/model"))
    # a point that is missing is computed again, to the same figures; the others are left alone
    paths = {p.parent.name: p for p in (tmp_path / "run").glob("points/*/point.json")}
    before = {name: (p.stat().st_mtime_ns, p.read_text()) for name, p in paths.items()}
    paths["dpo-0.5-seed1"].unlink()
    again = frontier(config, open_session)
    assert again["points"] == found["points"]
    changed = [name for name, p in paths.items() if p.stat().st_mtime_ns != before[name][0]]
    assert changed == ["dpo-0.5-seed1"]
    rows = frontier_rows(again)
    assert len(rows.points) == 10
    assert len(rows.budgets) == 8
    write_page(collect(tmp_path / "run", SECTIONS), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Who dominates whom" in page
    assert "PPO, learnt reward" in page
    # the frontier, wide and small; two costs; KL and reward over training of three methods
    assert page.count('<svg class="plot"') == 2 + 2 + 6
    with pytest.raises(ConfigError, match="another recipe"):
        frontier(config.model_copy(update={"jobs": 1}), open_session)


def test_a_stop_signal_keeps_what_is_done(task, tmp_path):
    stop = StopRequest(15)
    with pytest.raises(StoppedError, match="the same command continues"):
        frontier(recipe(task, tmp_path / "run"), lambda root: open_session(root, stop))
    assert not (tmp_path / "run" / "frontier.json").exists()
