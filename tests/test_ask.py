"""`favor ask`: who is asked, whether a confidence sequence holds at all times, and a loop with a person who answers."""

import itertools
import json

import numpy as np
import pytest
import tiny
from test_value import FAIR, rows, written

from favor.ask.choose import by_margin, spread_out
from favor.ask.run import Foretold, drawn
from favor.ask.settings import AskConfig
from favor.config import load
from favor.errors import ConfigError
from favor.eval.sequence import sequence


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("ask") / "model")


def test_those_taken_differ_from_each_other():
    """Against every choice: the greedy one by its own rule, and two copies of a pair are not both asked."""
    rng = np.random.default_rng(0)
    gap = rng.normal(size=(12, 3))
    unit = gap / np.linalg.norm(gap, axis=1)[:, None]
    taken = spread_out(gap, 5)
    for k in range(1, 5):
        likest = {i: max(abs(unit[i] @ unit[j]) for j in taken[:k]) for i in set(range(12)) - set(taken[:k])}
        assert taken[k] == min(likest, key=likest.get)
    # a pair and its reverse ask the same
    both = np.concatenate([gap, -gap])
    assert len({i % 12 for i in spread_out(both, 3)}) == 3
    assert sorted(spread_out(gap, 40)) == list(range(12))


def test_candidates_are_the_least_certain():
    rng = np.random.default_rng(0)
    margin = rng.permutation(np.linspace(-5, 5, 101))
    found = by_margin(margin, rng.normal(size=(101, 6)), 5)
    assert margin[found[0]] == 0
    assert np.abs(margin[found]).max() <= np.sort(np.abs(margin))[19]


@pytest.mark.parametrize("share", [0.5, 0.85, 0.97])
def test_a_confidence_sequence_holds_at_all_times(share):
    """Of 200 sequences of 300 values at most 18 miss their mean at any of 60 looks; an interval looked at so often misses more."""
    missed = naive = 0
    for seed in range(200):
        values = (np.random.default_rng(seed).random(300) < share).astype(float)
        looks = range(5, 301, 5)
        missed += any(not low <= share <= high for low, high in (sequence(values[:n]) for n in looks))
        means = [(values[:n].mean(), 1.96 * max(values[:n].std(), 0.05) / n**0.5) for n in looks]
        naive += any(abs(mean - share) > reach for mean, reach in means)
    assert missed <= 18
    assert naive > 50


def test_a_confidence_sequence_by_hand_and_of_other_bounds():
    """Ones alone: K = mean over c of (1 - c + c / m)^t, which grows for every m < 1; where it is 40 is the end."""
    bets = (0.02, 0.06, 0.18, 0.45, 0.9)
    for count in (1, 2, 7):
        low, high = sequence(np.ones(count))
        assert high == 1
        assert np.mean([(1 - c + c / low) ** count for c in bets]) == pytest.approx(40, rel=1e-3)
    assert sequence(np.ones(0)) == (0, 1)
    values = np.random.default_rng(0).normal(0.4, 0.1, 400).clip(0, 1)
    narrow, wide = sequence(values), sequence(2 * values - 1, -1, 1)
    assert wide == pytest.approx(tuple(2 * end - 1 for end in narrow))
    assert narrow[0] <= 0.4 <= narrow[1]
    assert sequence(1 - values) == pytest.approx((1 - narrow[1], 1 - narrow[0]))
    # what was left out stays out
    ends = [sequence(values[:n]) for n in range(1, 400, 20)]
    assert all(a[0] <= b[0] and b[1] <= a[1] for a, b in itertools.pairwise(ends))
    # all alike: sure after a while, and never the other way round
    assert sequence(np.ones(200))[0] > 0.9


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_confidence_sequence_beside_a_slow_oracle(share):
    """Every mean of a grid, its capital multiplied value by value: what was refuted at any time is left out."""
    values = (np.random.default_rng(3).random(60) < share).astype(float)
    left = []
    for mean in np.linspace(0.0005, 0.9995, 1000):
        up, down, most = [1.0] * 5, [1.0] * 5, 0.0
        for x in values:
            for k, share in enumerate((0.02, 0.06, 0.18, 0.45, 0.9)):
                up[k] *= 1 + share / mean * (x - mean)
                down[k] *= 1 + share / (1 - mean) * (mean - x)
            most = max(most, sum(up) / 5, sum(down) / 5)
        left += [mean] if most < 40 else []
    assert sequence(values) == pytest.approx((left[0], left[-1]), abs=0.0011)


def answer(path, db):
    """What a person says who knows good words from poor ones."""
    said = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        fair = [sum(word in FAIR for word in text.split()) for text in row["responses"]]
        best = int(np.argmax(fair))
        said.append({"prompt": row["prompt"], "chosen": row["responses"][best], "rejected": row["responses"][1 - best]})
    with db.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in said)
    return said


def test_rounds_of_asking_and_answering(model, favor, tmp_path):
    """Nothing is asked twice, what was foretold is held against the answers, and good heads are found good."""
    found = rows(150, seed=4, prompts=75)[0]
    rng = np.random.default_rng(0)
    samples = [
        {"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]][:: rng.choice([1, -1])]} for r in found
    ]
    pool, labels = written(tmp_path / "pool.jsonl", samples), tmp_path / "labels.jsonl"
    seen, words = (
        [],
        [
            "ask",
            f"model={model}",
            f"pool={pool}",
            "out=ask.jsonl",
            "overwrite=true",
            "by_chance=0.5",
            "models=2",
            "--json",
        ],
    )
    for turn in itertools.count():
        data = [f"data={labels}"] if labels.exists() else []
        code, out, err = favor(*words, *data, f"count={40 if turn else 30}", "enough=0.7")
        assert code == 0, err
        figures = json.loads(out)["figures"]
        assert figures["labelled"] == len(seen)
        assert figures["waiting"] == 0
        if turn == 3:
            break
        new = answer(tmp_path / "ask.jsonl", labels)
        assert len(new) == figures["asked"]
        assert figures["by_chance"] == len(new) // 2
        seen += [(row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in new]
        assert len(set(seen)) == len(seen)
    # rounds 2 and 3 were foretold, 20 of each by chance, and chance drew some of those that were chosen in them
    assert 40 < figures["foretold"] <= 80
    assert figures["accuracy"] > 0.9
    assert figures["accuracy_sequence"][0] > 0.7
    assert figures["settled"]
    # label reads what was written
    code, _, err = favor("lint", "data=labels.jsonl")
    assert code == 0, err
    history = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert len({line["pair"] for line in history}) == 30 + 40 + 40 + 40
    twice = len(history) - 150
    assert 0 < twice == sum(line["by_chance"] for line in history) - 15 - 20 - 20 - 20
    assert history[0]["by_all"] is None


def test_chance_draws_from_the_whole_pool_whatever_was_chosen():
    """The hard pairs are chosen; among those still open they are missing, among those drawn they are as frequent as in the pool."""
    pool, hard = [f"p{i}" for i in range(200)], {f"p{i}" for i in range(60)}
    config = AskConfig.model_validate({"model": {"path": "m"}, "pool": "p", "out": "o", "count": 20, "by_chance": 0.5})
    shares, still_open = [], []
    for seed in range(60):
        rng, history = np.random.default_rng(seed), []
        for _ in range(6):
            asked = {line.pair for line in history}
            open_T = [i for i, name in enumerate(pool) if name not in asked]
            found, again = drawn(config, history, pool, open_T, rng)
            assert len(found) == 10
            chance = [pool[open_T[place]] for place in found]
            chosen = [pool[i] for i in open_T if pool[i] in hard and pool[i] not in chance][:10]
            history += [*again, *(Foretold(name, True, "", 1.0, 1.0) for name in chance)]
            history += [Foretold(name, False, "", 1.0, 1.0) for name in chosen]
        by_chance = [line.pair for line in history if line.by_chance]
        assert len(set(by_chance)) == len(by_chance)
        shares.append(np.mean([name in hard for name in by_chance]))
        still_open.append(
            np.mean([name in hard for name in by_chance if all(p.pair != name or p.by_chance for p in history)])
        )
    # of 60 means of about 80 pairs each: 0.3 with a standard error of 0.006
    assert np.mean(shares) == pytest.approx(0.3, abs=0.02)
    assert np.mean(still_open) < 0.2


def test_wrong_foretelling_is_seen(model, favor, tmp_path):
    """A person who answers by chance: nobody can foretell that, and it is never enough."""
    found = rows(100, seed=4, prompts=50)[0]
    pool = written(
        tmp_path / "pool.jsonl", [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]]} for r in found]
    )
    rng, labels, said = np.random.default_rng(1), tmp_path / "labels.jsonl", []
    for _ in range(3):
        data = [f"data={labels}"] if said else []
        code, out, err = favor(
            "ask",
            f"model={model}",
            f"pool={pool}",
            "out=ask.jsonl",
            "overwrite=true",
            "by_chance=1",
            "models=2",
            "count=30",
            "enough=0.6",
            "gain=0.001",
            "--json",
            *data,
        )
        assert code == 0, err
        for line in (tmp_path / "ask.jsonl").read_text().splitlines():
            row = json.loads(line)
            a, b = row["responses"][:: rng.choice([1, -1])]
            said.append({"prompt": row["prompt"], "chosen": a, "rejected": b})
        written(labels, said)
    figures = json.loads(out)["figures"]
    assert figures["foretold"] == 30
    assert 0.2 < figures["accuracy"] < 0.8
    assert not figures["settled"]


def test_what_cannot_be_used_is_refused(model, favor, tmp_path):
    pool = written(
        tmp_path / "pool.jsonl", [{"prompt": f"p {i}", "responses": ["good film", "bad film"]} for i in range(3)]
    )
    base = ["ask", f"model={model}", f"pool={pool}", "out=ask.jsonl"]
    assert favor(*base, "count=5", "by_chance=0")[0] == 0
    asked = (tmp_path / "ask.jsonl").read_bytes()
    code, _, err = favor(*base)
    assert (code, "label its pairs" in err) == (2, True)
    assert (tmp_path / "ask.jsonl").read_bytes() == asked
    base.append("overwrite=true")
    code, _, err = favor(*base)
    assert (code, "every pair has been asked about" in err) == (2, True)
    code, _, err = favor(*base, f"history={pool}")
    assert (code, "is the file it reads" in err) == (2, True)
    other = written(tmp_path / "other.jsonl", [{"a": 1}])
    code, _, err = favor(*base, f"history={other}")
    assert (code, "is no history of favor ask" in err) == (2, True)
    with pytest.raises(ConfigError, match="by_chance"):
        load(AskConfig, None, [f"model.path={model}", "pool=p", "out=o", "enough=0.9", "by_chance=0"])
    with pytest.raises(ConfigError, match="hold_out"):
        load(AskConfig, None, [f"model.path={model}", "pool=p", "out=o", "data.train=x", "data.hold_out.share=0.1"])
