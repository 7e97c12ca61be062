"""What judgments become: pairing, minimum gaps, votes, mixing and the held-out share, against slow oracles."""

import json
import random
from dataclasses import asdict
from itertools import combinations

import pytest

from favor.config import dump, load
from favor.data.formats import FORMATS
from favor.data.grow import ReadReport, Rules, arrange
from favor.data.read import DataConfig, read, read_splits
from favor.data.types import Comparison
from favor.errors import ConfigError, DataError
from favor.train.preference import TrainConfig

MODES = ("auto", "ranking", "all", "best_worst", "best_rest")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def oracle(scores, mode, gap):
    """(pairs and rankings, ties) by going through all pairs one by one."""
    count = len(scores)
    ordered = sorted(range(count), key=lambda i: -scores[i])
    pairs, ties = set(), set()
    for a, b in combinations(range(count), 2):
        if scores[a] == scores[b]:
            ties.add((a, b))
        else:
            better, worse = (a, b) if scores[a] > scores[b] else (b, a)
            if scores[better] - scores[worse] >= gap:
                pairs.add((better, worse))
    all_strict = len(set(scores)) == count and all(
        abs(scores[a] - scores[b]) >= gap for a, b in combinations(ordered, 2)
    )
    if mode == "auto":
        return ({tuple(ordered)} if all_strict else pairs), ties
    if mode == "all":
        return pairs, ties
    if mode == "ranking":
        chain = []
        for i in ordered:
            if not chain or (scores[chain[-1]] > scores[i] and scores[chain[-1]] - scores[i] >= gap):
                chain.append(i)
        return ({tuple(chain)} if len(chain) > 1 else set()), ties
    best, met = ordered[0], ordered[1:] if mode == "best_rest" else ordered[-1:]
    return {p for p in pairs if p[0] == best and p[1] in met}, {t for t in ties if best in t and set(t) & set(met)}


@pytest.mark.parametrize("mode", MODES)
def test_pairing_against_the_oracle(mode):
    chance = random.Random(mode)
    for _ in range(300):
        scores = [float(chance.randint(0, 5)) for _ in range(chance.randint(2, 5))]
        if len(set(scores)) == 1:
            continue
        gap = chance.choice([0.0, 1.0, 2.0, 3.5])
        responses = [f"r{i}" for i in range(len(scores))]
        judgment = FORMATS["ranked"]({"prompt": "p", "responses": responses, "scores": scores})
        found, left_out = arranged(judgment, pairing=mode, min_gap=gap)
        orders, ties = oracle(scores, mode, gap)
        assert (set(found.orders), set(found.ties)) == (orders, ties), (scores, gap)
        strict = [p for p in combinations(scores, 2) if p[0] != p[1]]
        assert left_out.close_pairs == sum(abs(a - b) < gap for a, b in strict)
        said = {pair for order in orders for pair in combinations(order, 2)}
        all_ties = len(scores) * (len(scores) - 1) // 2 - len(strict)
        assert len(said) + left_out.close_pairs + left_out.unasked_pairs == len(strict) + all_ties - len(ties)


def arranged(judgment, **rules):
    report = ReadReport("", "")
    return arrange(judgment, Rules(**rules), report), report


@pytest.mark.parametrize("mode", MODES)
def test_rankings_without_scores_are_paired_too(mode):
    judgment = FORMATS["ranked"]({"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 0, 1]})
    found, left_out = arranged(judgment, pairing=mode, min_gap=1.0)
    assert (
        set(found.orders)
        == {
            "auto": {(2, 0, 1)},
            "ranking": {(2, 0, 1)},
            "all": {(2, 0), (2, 1), (0, 1)},
            "best_worst": {(2, 1)},
            "best_rest": {(2, 0), (2, 1)},
        }[mode]
    )
    assert left_out.unchecked_gaps == len(found.orders)


def test_report_counts_what_is_left_out(tmp_path):
    rows = [
        {"prompt": "a", "responses": ["x", "y", "z"], "scores": [5, 4.5, 1]},
        {"prompt": "b", "chosen": "x", "rejected": "y", "margin": 0.5},
    ]
    path = write(tmp_path / "a.jsonl", rows[:1])
    (tree,), report = read(path, DataConfig(train=path, compare={"min_gap": 1.0}), "train")
    assert [c.order for c in tree.comparisons] == [(0, 2), (1, 2)]
    assert (report.close_pairs, report.unasked_pairs) == (1, 0)
    (tree,), report = read(path, DataConfig(train=path, compare={"min_gap": 1.0, "pairing": "best_worst"}), "train")
    assert [(c.order, c.gaps) for c in tree.comparisons] == [((0, 2), (4.0,))]
    assert (report.close_pairs, report.unasked_pairs) == (1, 1)
    path = write(tmp_path / "b.jsonl", rows[1:])
    (tree,), report = read(path, DataConfig(train=path, compare={"min_gap": 1.0}), "train")
    assert (tree.comparisons, report.close_pairs, report.num_comparisons) == ((), 1, 0)


@pytest.mark.parametrize("votes", ["soft", "weight", "majority"])
def test_votes_against_counting(votes):
    for a in range(6):
        for b in range(6):
            if a + b == 0:
                continue
            row = {"prompt": "p", "responses": ["x", "y"], "votes": [a, b], "weight": 2}
            found, _ = arranged(FORMATS["votes"](row), votes=votes)
            if a == b:
                assert (found.orders, found.ties, found.weight) == ((), ((0, 1),), 2)
                continue
            assert found.orders == (((0, 1) if a > b else (1, 0)),)
            assert found.weight == (2 * abs(a - b) if votes == "weight" else 2)
            assert found.labels == ((max(a, b) / (a + b),) if votes == "soft" else ())
            assert found.scores == ()
            close, left_out = arranged(FORMATS["votes"](row), min_gap=3.0, votes=votes)
            assert bool(close.orders) == (abs(a - b) >= 3)
            assert left_out.close_pairs == (abs(a - b) < 3)
    row = {"prompt": "p", "responses": ["x", "y", "z"], "votes": [1, 4, 2]}
    assert arranged(FORMATS["votes"](row), pairing="best_rest", votes=votes)[0].orders == ((1, 2), (1, 0))


def test_responses_scored_in_rows_of_their_own(tmp_path):
    rows = [{"prompt": p, "response": r, "helpfulness": s} for p, r, s in (("p", "a", 1), ("q", "a", 2), ("p", "b", 4), ("p", "a", 2), ("p", "c", 4))]  # fmt: skip
    path = write(tmp_path / "h.jsonl", rows)
    (p, q), report = read(path, DataConfig(train=path), "train")
    assert p.responses == ("a", "b", "c")
    assert p.comparisons == (Comparison((1, 0), gaps=(2.5,)), Comparison((2, 0), gaps=(2.5,)))
    assert p.ties == (Comparison((1, 2)),)
    assert (q.comparisons, report.lone_scores, report.merged_responses) == ((), 1, 1)
    assert read(path, DataConfig(train=path, compare={"min_gap": 3}), "train")[1].close_pairs == 2


def test_mixing_multiplies_weights_and_reports_each_source(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "y", "weight": 3}])
    b = write(tmp_path / "b.jsonl", [{"prompt": f"q{i}", "completion": "x", "label": True} for i in range(5)])
    c = write(tmp_path / "c.jsonl", [{"ask": "p", "chosen": "x", "rejected": "y", "tie": True}, {"ask": "r"}])
    config = load(
        TrainConfig,
        None,
        ["run=r", "model.path=m", f'data.sources=[{{path="{a}", weight=0.5}}, {{path="{b}", max_rows=2, weight=2}}, '
         f'{{path="{c}", format="pairs", columns={{prompt="ask"}}, weight=4}}]', "data.bad_rows=drop"],
    )  # fmt: skip
    (tmp_path / "r.toml").write_text(dump(config))
    assert load(TrainConfig, tmp_path / "r.toml") == config
    trees, report = read_splits(config.data)["train"]
    assert [(t.source, t.prompt) for t in trees] == [(a, "p"), (b, "q0"), (b, "q1"), (c, "p")]
    assert (trees[0].comparisons[0].weight, trees[1].thumbs[0].weight, trees[3].ties[0].weight) == (1.5, 2.0, 4.0)
    assert [(r.source, r.format, r.num_rows, len(r.dropped)) for r in report.sources] == [
        (a, "pairs", 1, 0),
        (b, "thumbs", 2, 0),
        (c, "pairs", 2, 1),
    ]
    assert (report.num_rows, report.num_trees, report.num_thumbs) == (5, 4, 2)
    assert report.dropped[0][1].startswith(f"{c}: column 'chosen' is missing")
    assert json.loads(json.dumps(asdict(report)))["sources"][1]["num_rows"] == 2


def held(path, **settings):
    parts = read_splits(DataConfig(train=path, **settings))
    return [
        {t.prompt if isinstance(t.prompt, str) else t.prompt[0]["content"] for t in parts[n][0]}
        for n in ("train", "eval")
    ]


def test_held_out_prompts_are_whole_and_stable(tmp_path):
    rows = [{"prompt": f"prompt {i % 1000}", "chosen": f"a{i}", "rejected": "b"} for i in range(2000)]
    path = write(tmp_path / "a.jsonl", rows)
    train, out = held(path, hold_out={"share": 0.2})
    assert not train & out
    assert len(train | out) == 1000
    assert abs(len(out) - 200) < 50
    shuffled = random.Random(0).sample(rows, len(rows))
    assert held(write(tmp_path / "b.jsonl", shuffled), hold_out={"share": 0.2}) == [train, out]
    more = [*rows, *({"prompt": f"new {i}", "chosen": "a", "rejected": "b"} for i in range(100))]
    new_train, new_out = held(write(tmp_path / "c.jsonl", more), hold_out={"share": 0.2})
    assert train <= new_train
    assert out <= new_out
    assert held(path, hold_out={"share": 0.2, "seed": 1})[1] != out
    assert out < held(path, hold_out={"share": 0.3})[1]
    chat = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    assert held(write(tmp_path / "d.jsonl", chat), hold_out={"share": 0.2}) == [train, out]


def test_held_out_rows_are_counted_once(tmp_path):
    rows = [{"prompt": f"p{i % 50}", "chosen": "a", "rejected": "b"} for i in range(100)] + [{"prompt": "bad"}]
    path = write(tmp_path / "a.jsonl", rows)
    parts = read_splits(DataConfig(train=path, hold_out={"share": 0.5}, bad_rows="drop"))
    train, out = parts["train"][1], parts["eval"][1]
    assert train.num_rows + out.num_rows == 101
    assert train.repeated_comparisons + out.repeated_comparisons == 50
    assert (len(train.dropped), len(out.dropped)) == (1, 0)
    lone = write(tmp_path / "b.jsonl", rows[:1])
    with pytest.raises(DataError, match=r"hold_out.share leaves no prompt for eval"):
        read_splits(DataConfig(train=lone, hold_out={"share": 0.01}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.max_rows=3"], "either data.train=FILE or tables"),
        (["data.train=x", 'data.sources=[{path="y"}]'], "one of the two"),
        (["data.train=x", "data.eval=y", "data.hold_out.share=0.1"], "hold_out\\] would be ignored"),
        (["data.train=x", "data.hold_out.seed=3"], "'data.hold_out.share' is not set"),
        (["data.train=x", "data.hold_out.share=0.6"], "less than or equal to 0.5"),
        (["data.train=x", "data.compare.min_gap=-1"], "greater than or equal to 0"),
        (["data.train=x", "data.format=thumbs", "data.compare.pairing=all"], "data.compare.pairing would be ignored"),
        (["data.train=x", "data.format=nectar", "data.compare.min_gap=1"], "data.compare.min_gap would be ignored"),
        (["data.train=x", "data.format=pairs", "data.compare.votes=weight"], "data.compare.votes would be ignored"),
        (["data.train=x", "data.compare.pairing=best"], "'data.compare.pairing' is 'best'"),
        (['data.sources=[{path="y", weight=0}]'], "greater than 0"),
        (['data.sources=[{path="y", format="pair"}]'], "did you mean 'pairs'"),
        (['data.sources=[{path="y", wieght=2}]'], "unknown key 'data.sources.0.wieght'"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, None, ["run=r", "model.path=m", *words])
