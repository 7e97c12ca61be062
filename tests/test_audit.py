"""The audit of a judge: closed forms, planted judges found by their own figure, stretched and soft labels, the command."""

import json
import random

import numpy as np
import pytest

from favor.audit.figures import Judged, agreement_figures, judged, length_figures, order_figures, repeat_figures
from favor.audit.pairs import Pair, Votes, take
from favor.audit.powered import powered
from favor.audit.run import audit
from favor.audit.settings import AuditConfig
from favor.audit.soft import soft_labels
from favor.config import load
from favor.data.read import read
from favor.data.settings import DataConfig
from favor.errors import ConfigError, DataError

# an answer is "good" or "bad" with filler; a tilde ends the judge's own ones
JUDGES = """
import hashlib, random
def share(prompt, a, b):
    return int.from_bytes(hashlib.sha256((prompt + min(a, b) + max(a, b)).encode()).digest()[:4], "big") / 2**32
def perfect(prompt, a, b): return "tie" if a[:4] == b[:4] else "A" if a.startswith("good") else "B"
def inverted(prompt, a, b): return {"A": "B", "B": "A"}[perfect(prompt, a, b)]
def first(prompt, a, b): return "A"
def leaning(prompt, a, b): return "A" if share(prompt, a, b) < 0.3 else perfect(prompt, a, b)
def longer(prompt, a, b): return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
def noisy(prompt, a, b): return (inverted if share(prompt, a, b) < 0.2 else perfect)(prompt, a, b)
def flips(prompt, a, b): return (inverted if random.random() < 0.2 else perfect)(prompt, a, b)
def own(prompt, a, b): return perfect(prompt, a, b) if a.endswith("~") == b.endswith("~") else "A" if a.endswith("~") else "B"
def garbled(prompt, a, b): return "invalid" if share(prompt, a, b) < 0.1 else perfect(prompt, a, b)
"""


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def world(count=150, seed=0):
    """Pairs of a good and a bad answer in any order. People prefer the good one, which is the longer and the judge's own more often."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = rng.normal(60, 20, 2) + (8, 0)
        own = rng.random(2) < (0.6, 0.4)
        texts = [
            f"{word} {i} " + "x" * max(int(n), 1) + "~" * int(mine)
            for word, n, mine in zip(("good", "bad."), length, own, strict=True)
        ]
        swap = rng.random() < 0.5
        rows.append(
            {
                "prompt": f"p{i}",
                "first": texts[swap],
                "second": texts[1 - swap],
                "verdict": "second" if swap else "first",
                "models": ["me" if own[k] else "other" for k in (int(swap), 1 - int(swap))],
            }
        )
    return rows


def words(here, judge, *more, rows=None, human=True):
    (here / "judges.py").write_text(JUDGES)
    data = write(here / "pairs.jsonl", world() if rows is None else rows)
    return [
        f"run={here / 'run'}",
        f"data={data}",
        *([f"human={data}"] if human else []),
        "judge.kind=callable",
        f"judge.path={here / 'judges.py'}:{judge}",
        *more,
    ]


def look(*given):
    random.seed(1)
    return audit(load(AuditConfig, None, given), lambda text: None, lambda *_: None)


def of(figures, level):
    return {one["kind"] for one in figures["findings"] if one["level"] == level}


# --- planted judges ---

OWN = ("source=models", "own=me")


@pytest.mark.parametrize(
    ("judge", "found"),
    [
        ("perfect", set()),
        ("inverted", {"people"}),
        ("noisy", {"people"}),
        ("first", {"position", "people"}),
        ("leaning", {"position", "people"}),
        ("longer", {"length", "people"}),
        ("own", {"self", "people"}),
        ("flips", {"flips", "people"}),
        ("garbled", {"unusable"}),
    ],
)
def test_a_planted_bias_is_found_by_its_own_figure(tmp_path, judge, found):
    """And by no other's, although people prefer longer answers and the judge's own; of all but flawless ones people's labels tell."""
    figures = look(*words(tmp_path, judge, *OWN))
    assert of(figures, "found") == found, [one["said"] for one in figures["findings"]]
    assert of(figures, "unknown") <= {"position"}
    expected = {"inverted": 0.0, "perfect": 1.0, "garbled": 1.0, "first": 0.0, "noisy": 0.8}.get(judge)
    if expected is not None:
        assert figures["agreement"] == pytest.approx(expected, abs=0.08)
    assert any("the wrong way round" in one["said"] for one in figures["findings"]) == (judge == "inverted")
    if judge == "flips":
        # two independent verdicts differ in 2 p (1 - p) = 0.32
        assert figures["flip_rate_interval"][0] < 0.32 < figures["flip_rate_interval"][1]
        assert figures["order_effect_interval"][0] < 0 < figures["order_effect_interval"][1]
    if judge == "first":
        assert (figures["position_bias"], figures["inconsistency"], figures["order_effect"]) == (0.5, 1.0, 1.0)
    if judge == "leaning":
        # 0.3 of the pairs go to the first in either order, the rest to the good one
        assert figures["position_bias"] == pytest.approx(0.15, abs=0.05)


def test_without_peoples_labels_length_is_named_an_association(tmp_path):
    figures = look(*words(tmp_path, "longer", *OWN, human=False))
    assert of(figures, "unknown") == {"length", "self", "people"}
    assert (figures["length_bias"], figures["agreement"], figures["win_rate"], figures["soft_labels"]) == (None,) * 4
    assert figures["length_association_interval"][0] > 2
    assert figures["longer_rate"] > 0.97
    assert not (tmp_path / "run/soft-labels.jsonl").exists()
    assert "without people's labels" in figures["findings"][2]["said"]


def test_a_rate_beside_peoples_moves_with_mere_noise_and_the_bias_does_not(tmp_path):
    """Why the bias holds people's verdict fixed: 20 % random errors pull any rate towards one half."""
    rows = world(400, seed=3)
    for row in rows:
        # people nearly always prefer the judge's own answer
        good = row["verdict"]
        for side in ("first", "second"):
            row[side] = row[side].rstrip("~") + "~" * (side == good)
        row["models"] = ["me" if side == good else "other" for side in ("first", "second")]
    rows[0]["models"].reverse()
    figures = look(*words(tmp_path, "noisy", *OWN, "pairs=400", "repeats=0", rows=rows))
    assert figures["self_preference_interval"][1] < 0
    assert figures["self_bias_interval"][0] < 0 < figures["self_bias_interval"][1]


# --- closed forms ---


def test_repetition_by_hand():
    """One pair that flips once of three in the first order, one that never does; and orders that differ always."""
    asked = [[("A", "B"), ("A", "B"), ("B", "B")], [("A", "A")] * 3]
    found = repeat_figures([0, 1], asked)
    # couples of three: 2 of 3 differ, in one of two questions; the other pair 0
    assert found["flip_rate"] == pytest.approx((2 / 3 / 2 + 0) / 2)
    # across the orders: of the first pair 1 of 3 differs, of the second all
    assert found["order_effect"] == pytest.approx((1 / 3 - 1 / 3 + 1 - 0) / 2)
    assert repeat_figures([], [])["flip_rate"] is None


def arrays(judge, votes, named=True):
    count = len(judge)
    votes_P3 = np.array(votes, np.float64)
    share = (votes_P3[:, 0] + votes_P3[:, 1] / 2) / np.maximum(votes_P3.sum(1), 1e-9)
    human = np.where(votes_P3.sum(1) > 0, share, np.nan)
    flat = np.zeros(count)
    return Judged(np.array(judge, float), human, votes_P3, flat, flat, np.arange(count), np.full(count, named))


def test_agreement_by_hand():
    """Cohen's kappa against scikit-learn; a vote at random where people differ; the ceiling from couples of votes."""
    from sklearn.metrics import cohen_kappa_score

    judge = [1, 1, 1, 0, 0, 0.5, 1, 0.75]
    said = [0, 0, 2, 2, 0, 1, 0, 1]
    found = agreement_figures(arrays(judge, np.eye(3)[said]))
    mine = [0, 0, 0, 2, 2, 1, 0, 0]
    assert found["agreement"] == pytest.approx(np.mean(np.array(mine) == said))
    assert found["kappa"] == pytest.approx(cohen_kappa_score(mine, said))
    assert found["agreement_decided"] == pytest.approx(4 / 6)
    assert (found["ceiling"], found["ceiling_pairs"]) == (None, 0)
    # seen from both sides: the same pairs and their mirror images
    both = agreement_figures(arrays(judge, np.eye(3)[said], named=False))["kappa"]
    mirrored = [[2 - x for x in each] for each in (mine, said)]
    assert both == pytest.approx(cohen_kappa_score(mine + mirrored[0], said + mirrored[1]))
    # 2 : 1 votes agree in 1 of 3 couples, 2 : 0 in all; the judge meets 2/3 and 1 of the votes
    several = agreement_figures(arrays([1, 0], [(2, 0, 1), (0, 0, 2)]))
    assert (several["ceiling"], several["agreement"]) == pytest.approx((2 / 3, 5 / 6))


def test_orders_by_hand():
    pairs = [Pair(f"p{i}", i, "x", "y") for i in range(4)]
    found = order_figures(pairs, [("A", "B"), ("A", "A"), ("tie", "tie"), ("invalid", "A")])
    assert found["inconsistency"] == pytest.approx(1 / 3)
    assert found["position_bias"] == pytest.approx(3 / 4 - 1 / 2)
    assert (found["ties"], found["unusable"]) == pytest.approx((2 / 7, 1 / 8))


def test_which_answer_is_called_a_does_not_matter():
    rng = np.random.default_rng(0)
    rows = [
        Pair(f"p{i // 2}", i // 2, "x" * int(n), "y" * 20, Votes(*np.eye(3)[k]))
        for i, (n, k) in enumerate(zip(rng.integers(1, 40, 60), rng.integers(0, 3, 60), strict=True))
    ]
    both = [("A", "B") if len(p.a) + n > 20 else ("B", "A") for p, n in zip(rows, rng.normal(0, 9, 60), strict=True)]
    turned = [
        (p.swapped, (b, a)) if i % 3 else (p, (a, b)) for i, (p, (a, b)) in enumerate(zip(rows, both, strict=True))
    ]
    one, other = judged(rows, both), judged(*zip(*turned, strict=True))
    for figures in (length_figures, agreement_figures):
        for name, value in figures(one).items():
            if value is not None and not name.endswith("_interval"):
                assert figures(other)[name] == pytest.approx(value, abs=1e-3), name


# --- stretched labels ---


def test_prediction_powered_by_hand():
    """Pairs of a prompt each: PPI++'s weight and mean in closed form; and its two ends."""
    rng = np.random.default_rng(0)
    human = (rng.random(200) < 0.6) * 1.0
    judge = np.where(rng.random(200) < 0.85, human, 1 - human)
    shown = np.where(np.arange(200) < 40, human, np.nan)
    found = powered(judge, shown, np.arange(200))
    h, f, g = human[:40], judge[:40], judge[40:]
    weight = np.cov(h, f, bias=True)[0, 1] / 40 / (f.var() / 40 + g.var() / 160)
    assert found.weight == pytest.approx(weight)
    assert found.both.mean == pytest.approx(h.mean() + weight * (g.mean() - f.mean()))
    assert found.worth > 50
    # a judge that says the same of all tells nothing, and neither does one without further pairs
    for same in (powered(np.full(200, 0.5), shown, np.arange(200)), powered(f, h, np.arange(40))):
        assert same.weight == 0
        assert same.both.mean == pytest.approx(h.mean())
        # G - 1 over G of the jackknife counts all prompts
        assert same.both.ends == pytest.approx(same.human.ends, abs=0.002)
        assert same.worth == pytest.approx(40)


def test_the_jackknife_of_prompts_by_a_loop():
    """Clusters with labelled and other pairs: every prompt left out by hand, the weight found anew each time."""
    from favor.audit import powered as module

    rng = np.random.default_rng(1)
    sums = np.stack(
        [rng.integers(0, 3, 12), rng.random(12), rng.random(12), rng.integers(1, 4, 12), rng.random(12)], 1
    ).astype(float)
    sums[:, 1:3] *= sums[:, :1]

    def rate(rows):
        n, h, f, rest, g = rows.sum(0)
        u = (rows[:, 1] - rows[:, 0] * h / n) / n
        v = (rows[:, 4] - rows[:, 3] * g / rest) / rest - (rows[:, 2] - rows[:, 0] * f / n) / n
        return h / n + np.clip(-(u @ v) / (v @ v), 0, 1) * (g / rest - f / n)

    moved = np.array([rate(np.delete(sums, i, 0)) for i in range(12)]) - rate(sums)
    assert module._jackknife(sums, 1.0) == pytest.approx((rate(sums), np.sqrt(11 / 12 * (moved**2).sum())))


def test_few_labels_that_all_agree_are_not_certain():
    judge = (np.arange(300) % 10 > 0) * 1.0
    shown = np.where(np.arange(300) < 20, judge, np.nan)
    found = powered(judge, shown, np.arange(300))
    assert found.both.high - found.both.low > 0.1
    assert found.worth > 20


# --- soft labels ---


def labelled(count, told, accuracy=0.8, seed=0):
    rng = np.random.default_rng(seed)
    human = rng.integers(0, 2, count)
    judge = np.where(rng.random(count) < accuracy, human, 1 - human)
    votes = np.eye(3)[2 - 2 * human] * (np.arange(count) < told)[:, None]
    return arrays(judge, votes)


def test_soft_labels_are_the_measured_reliability():
    found = soft_labels(labelled(600, 400), 0)
    chance = np.maximum(found.chance_P, 1 - found.chance_P)
    assert np.abs(chance - 0.8).max() < 0.05
    assert found.calibration["ece"] < 0.05
    assert found.calibration["loss"] < np.log(2)
    assert found.smoothing == pytest.approx(0.2, abs=0.04)
    # few labels say little, none nothing
    few = soft_labels(labelled(600, 3, accuracy=1.0), 0)
    assert 0.6 < np.maximum(few.chance_P, 1 - few.chance_P)[3:].min() < 0.9
    assert soft_labels(labelled(600, 0), 0) is None


def test_a_soft_label_has_not_seen_the_label_of_its_own_pair():
    pairs = labelled(60, 60)
    before = soft_labels(pairs, 0).chance_P[7]
    human, votes = pairs.human_P.copy(), pairs.votes_P3.copy()
    human[7], votes[7] = 1 - human[7], votes[7, ::-1]
    assert soft_labels(pairs._replace(human_P=human, votes_P3=votes), 0).chance_P[7] == before


def test_soft_labels_train(tmp_path):
    """Rows of format votes, read back as soft labels; what people said stands beside."""
    look(*words(tmp_path, "noisy"))
    path = str(tmp_path / "run/soft-labels.jsonl")
    trees, report = read(path, DataConfig(train=path), "train")
    assert report.format == "votes"
    labels = [comparison.label for tree in trees for comparison in tree.comparisons]
    assert len(labels) == 150
    assert np.mean(labels) == pytest.approx(0.8, abs=0.06)
    row = json.loads((tmp_path / "run/soft-labels.jsonl").read_text().splitlines()[0])
    assert row["verdicts"] in (["A", "B"], ["B", "A"])
    assert row["human"] in (0.0, 1.0)


# --- pairs ---


def taken(here, rows, *more, human=None):
    data = write(here / "d.jsonl", rows)
    people = [] if human is None else [f"human={write(here / 'h.jsonl', human)}"]
    given = [f"run={here / 'r'}", f"data={data}", "judge.kind=callable", "judge.path=j.py:f", *people, *more]
    return take(load(AuditConfig, None, given))


def test_labels_of_people_are_found_by_the_texts(tmp_path):
    rows = [
        {"prompt": "p", "first": "x", "second": "y"},
        {"prompt": "q", "first": "x", "second": "y", "verdict": "tie"},
    ]
    human = [
        {"prompt": "p", "first": "y", "second": "x", "verdict": ["first", "tie", "both_bad", "second"]},
        {"prompt": [{"role": "user", "content": "p"}], "chosen": "y", "rejected": "x"},
        {"prompt": "r", "chosen": "y", "rejected": "x"},
    ]
    found = taken(tmp_path, rows, human=human)
    assert [pair.votes for pair in found.pairs] == [Votes(1, 2, 2), Votes()]
    assert [(pair.a, pair.named) for pair in found.pairs] == [("x", True)] * 2
    assert found.left_out["labels of people on other pairs"] == 1
    # without human= the data's own labels are nobody's
    assert [pair.votes for pair in taken(tmp_path, rows).pairs] == [Votes(), Votes()]


def test_any_format_gives_pairs(tmp_path):
    rows = [
        {"prompt": "p", "responses": ["x", "y", "z"], "scores": [1, 1, 3]},
        {"prompt": "p", "responses": ["y", "z", "w"], "scores": [3, 2, 1]},
    ]
    data = write(tmp_path / "d.jsonl", rows)
    pairs = taken(tmp_path, rows, f"human={data}").pairs
    assert len({frozenset((p.a, p.b)) for p in pairs}) == len(pairs) == 5
    votes = {(p.a, p.b): p.votes for p in pairs} | {(p.b, p.a): p.votes.swapped for p in pairs}
    # z > y in one row, y > z in the other
    assert (votes["z", "y"], votes["x", "y"], votes["x", "z"]) == (Votes(1, 0, 1), Votes(0, 1, 0), Votes(0, 0, 1))
    assert {p.group for p in pairs} == {0}
    assert not any(p.named for p in pairs)


def test_the_side_that_is_asked_for_is_a(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "x", "rejected": "y", "c": "me", "r": "other"},
        {"prompt": "q", "chosen": "x", "rejected": "y", "c": "other", "r": "me"},
        {"prompt": "s", "chosen": "x", "rejected": "y", "c": "other", "r": "other"},
    ]
    pairs = taken(tmp_path, rows, 'source=["c", "r"]', "side=me", "own=other").pairs
    assert [(p.a, p.named, p.own) for p in pairs[:2]] == [("x", True, -1), ("y", True, -1)]
    assert (pairs[2].named, pairs[2].own) == (False, 0)


def test_labelled_pairs_come_first_and_the_seed_draws_the_rest(tmp_path):
    rows = [{"prompt": f"p{i}", "first": "x", "second": "y"} for i in range(30)]
    human = [{"prompt": f"p{i}", "chosen": "x", "rejected": "y"} for i in (3, 28)]
    drawn = [
        [p.prompt for p in taken(tmp_path, rows, "pairs=6", f"seed={seed}", human=human).pairs] for seed in (0, 0, 1)
    ]
    assert all({"p3", "p28"} <= set(each) and len(each) == 6 for each in drawn)
    assert drawn[0] == drawn[1] != drawn[2]


# --- the command ---


def test_the_command(favor, tmp_path):
    given = words(tmp_path, "noisy", *OWN, "pairs=60", "repeats=1")
    code, out, err = favor("audit", *given)
    assert (code, err) == (0, "")
    assert "agreement with people" in out
    assert "judgments: 120 to make" in out
    assert "judgments: 80 to make" in out
    figures = json.loads((tmp_path / "run/audit.json").read_text())
    assert (figures["pairs"], figures["repeated_pairs"], figures["human_pairs"]) == (60, 40, 60)
    page = (tmp_path / "run/audit.html").read_text()
    assert 'content="favor audit"' in page
    assert str(tmp_path) not in page
    # again: nothing is asked, and the same is said
    code, again, _ = favor("audit", *given)
    assert "judgments: 0 to make, 120 kept" in again
    assert json.loads((tmp_path / "run/audit.json").read_text()) == figures
    # a threshold that is crossed, and one that cannot be measured, fail
    code, out, _ = favor("audit", *given, "fail_on.agreement=0.9", "fail_on.position_bias=0.1")
    assert code == 1
    assert "below fail_on.agreement = 0.9" in out
    assert "position_bias" not in out.split("done in")[1]
    code, out, _ = favor("audit", *words(tmp_path, "garbled"), "fail_on.unusable=0.5", "--json")
    assert code == 0
    assert json.loads(out)["paths"]["soft_labels"] == str(tmp_path / "run/soft-labels.jsonl")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["source=models"], "source names columns in which own or side"),
        (["own=me"], "source names columns in which own or side"),
        (['source=["a", "b", "c"]', "own=me"], "source names 3 columns"),
        (["source=model", "own=me"], "row 1: column 'model', which source names, is missing"),
        (["source=prompt", "own=me"], "row 1: source prompt must name the source of each of 2 answers"),
        (["repeats=0", "repeat_pairs=3"], "repeat_pairs is not read"),
        (["repeats=0", "fail_on.flip_rate=0.1"], "fail_on.flip_rate needs repeats above 0"),
        (["fail_on.self_bias=0.1"], "fail_on.self_bias needs human=FILE and own=SOURCE"),
        (["fail_on.kappa=0.1"], "unknown key 'fail_on.kappa'"),
        (["judge.path=none.py:f"], "none.py: no such Python file"),
    ],
)
def test_mistakes_are_one_line(tmp_path, more, said):
    with pytest.raises((ConfigError, DataError), match=said):
        look(*words(tmp_path, "perfect", *more))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_judged_is_said(tmp_path):
    rows = [{"prompt": "p", "completion": "x"}]
    with pytest.raises(DataError, match="row 1: it compares no two answers"):
        taken(tmp_path, rows)
    with pytest.raises(DataError, match=r"h\.jsonl: none of its labels is of a pair of"):
        taken(
            tmp_path,
            [{"prompt": "p", "first": "x", "second": "y"}],
            human=[{"prompt": "p", "chosen": "x", "rejected": "z"}],
        )
    with pytest.raises(DataError, match="nothing to judge"):
        taken(tmp_path, [{"prompt": "p", "chosen": "x", "rejected": "x"}])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text('prompts = "x"\n')
    with pytest.raises(ConfigError, match="already holds a run of another kind|holds files, but no run of favor"):
        look(*words(tmp_path, "perfect"))
