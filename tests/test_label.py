"""`favor label` without its page: the store, files in, ability, agreement, routing, labels out."""

import json
import math
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from label_desk import prefers, said, some_pairs, write_jsonl

from favor.config import load
from favor.data.read import DataConfig, read
from favor.errors import ConfigError, DataError
from favor.label import ability, store
from favor.label.agreement import alpha, measured
from favor.label.export import export, exported
from favor.label.intake import take_in
from favor.label.routing import next_pair
from favor.label.run import label
from favor.label.settings import LabelConfig
from favor.label.store import Pair, Vote


@pytest.fixture
def db(tmp_path):
    with store.opened(tmp_path / "labels.sqlite") as opened:
        yield opened


# the store


def test_a_commit_is_on_the_disk_before_it_returns(db):
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_pairs_are_kept_once_whatever_their_order(db):
    pair = Pair("p", "a", "b", gold="first")
    other = Pair("p", "b", "a")
    assert store.add_pairs(db, [other, pair, pair]) == 1
    assert store.add_pairs(db, [pair]) == 0
    (kept,) = store.pairs(db).values()
    # the known answer is still "a"
    assert {kept.first, kept.second} == {"a", "b"}
    assert (kept.first if kept.gold == "first" else kept.second) == "a"


def test_the_stored_order_says_nothing_about_quality(db):
    store.add_pairs(db, some_pairs(400))
    first = sum(pair.first.startswith("good") for pair in store.pairs(db).values())
    assert abs(first - 200) < 4 * math.sqrt(100)


def test_texts_come_back_as_they_were(db):
    turns = ({"role": "user", "content": "Hi\r\n  there \u202e"},)
    tools = ({"type": "function", "function": {"name": "f"}},)
    answer, other = (
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]},),
        ({"role": "assistant", "content": "y"},),
    )
    store.add_pairs(db, [Pair(turns, answer, other, tools, (True, False), "f, row 1")])
    (kept,) = store.pairs(db).values()
    assert kept == store.ordered(Pair(turns, answer, other, tools, (True, False), "f, row 1"))


def test_one_vote_a_person_and_the_first_stands(db):
    store.add_pairs(db, some_pairs(1))
    said(db, 1, "Ana", "first")
    assert not store.add_vote(db, Vote(1, 1, "second"))
    said(db, 1, "Ben", "second")
    assert [vote.verdict for vote in store.votes(db)] == ["first", "second"]


def test_a_vote_taken_back_is_kept_and_does_not_count(db):
    store.add_pairs(db, some_pairs(2))
    said(db, 1, "Ana", "first")
    store.show(db, 2, 1, swapped=True)
    assert store.withdraw(db, 1)
    assert not store.withdraw(db, 1)
    assert store.votes(db) == []
    # the pair taken back comes before the one that was next
    assert store.open_pair(db, 1) == (1, False)
    assert store.add_vote(db, Vote(1, 1, "tie"))
    assert store.open_pair(db, 1) == (2, True)
    assert db.execute("SELECT count(*) FROM vote").fetchone() == (2,)


def test_a_vote_needs_a_pair_that_was_shown(db):
    store.add_pairs(db, some_pairs(1))
    store.annotator(db, "Ana")
    with pytest.raises(sqlite3.IntegrityError):
        store.add_vote(db, Vote(1, 1, "first"))
    assert store.votes(db) == []


def test_two_processes_may_write_one_file(db, tmp_path):
    store.add_pairs(db, some_pairs(1))
    with store.opened(tmp_path / "labels.sqlite") as other:
        said(other, 1, "Ben", "tie")
    assert len(store.votes(db)) == 1


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"not a database at all, but text that is long enough", "not a database"), (None, "not one of favor label")],
)
def test_another_file_is_refused_and_left_alone(content, what, tmp_path):
    path = tmp_path / "x.sqlite"
    if content is None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE mine (a)")
        other.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=what), store.opened(path):
        pass
    assert path.read_bytes() == before


def test_a_newer_layout_is_refused(db, tmp_path):
    db.execute("PRAGMA user_version=2")
    with pytest.raises(ConfigError, match="newer favor"), store.opened(tmp_path / "labels.sqlite"):
        pass


# files in


def taken(db, tmp_path, rows, **settings):
    ((tally, pairs),) = take_in(LabelConfig(data=write_jsonl(tmp_path / "in.jsonl", rows), **settings))
    return tally, store.add_pairs(db, pairs)


def answers(db):
    return {frozenset((pair.first, pair.second)) for pair in store.pairs(db).values()}


def test_samples_make_every_pair_of_different_answers(db, tmp_path):
    row = {"prompt": "p", "responses": ["a", "b ", " ", "b", "c"], "ended": [True, True, True, True, False]}
    tally, new = taken(db, tmp_path, [row])
    assert (tally.rows, tally.pairs, new, tally.blank, tally.same) == (1, 3, 3, 1, 1)
    assert answers(db) == {frozenset(x) for x in (("a", "b "), ("a", "c"), ("b ", "c"))}
    ended = {
        text: e
        for pair in store.pairs(db).values()
        for text, e in zip((pair.first, pair.second), pair.ended, strict=True)
    }
    assert ended == {"a": True, "b ": True, "c": False}


def test_the_same_file_again_adds_nothing(db, tmp_path):
    rows = [{"prompt": "p", "responses": ["a", "b"]}]
    assert taken(db, tmp_path, rows)[1] == 1
    assert taken(db, tmp_path, rows)[1] == 0


def test_answers_that_stand_alone_meet_by_their_prompt(db, tmp_path):
    rows = [{"prompt": p, "response": r} for p, r in (("p", "before"), ("q", "x"), ("p", "after"), ("q", "x"))]
    tally, _ = taken(db, tmp_path, rows)
    assert answers(db) == {frozenset(("before", "after"))}
    assert tally.same == 1


def test_two_answers_without_a_verdict(db, tmp_path):
    taken(
        db,
        tmp_path,
        [{"question": "p", "a": "x", "b": "y"}],
        columns={"prompt": "question", "first": "a", "second": "b"},
    )
    assert answers(db) == {frozenset(("x", "y"))}


def test_at_most_so_many_pairs_a_prompt_the_same_every_time(db, tmp_path):
    rows = [{"prompt": p, "responses": [p + x for x in "abcde"]} for p in "pq"]
    assert taken(db, tmp_path, rows, pairs_per_prompt=3)[1] == 6
    assert taken(db, tmp_path, rows, pairs_per_prompt=3)[1] == 0
    assert Counter(pair.prompt for pair in store.pairs(db).values()) == {"p": 3, "q": 3}


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "data/formats").glob("*.jsonl")), ids=lambda p: p.stem)
def test_every_format_can_be_labelled(path):
    """Whatever favor trains on can be shown; files with one answer a prompt have nothing to compare, and say so.

    Variables of a chat template, which labels do not keep, are refused.
    """
    config = LabelConfig(data=str(path), format="alpaca" if path.stem == "alpaca_ranking" else "auto")
    refused = {
        "sft": "nothing to compare",
        "sft_tools": "nothing to compare",
        "trl_thinking": "do not keep chat_template_kwargs",
    }
    if path.stem in refused:
        with pytest.raises(DataError, match=refused[path.stem]):
            take_in(config)
        return
    ((tally, pairs),) = take_in(config)
    assert tally.pairs == len(pairs) > 0
    assert all(pair.gold is None for pair in pairs)


def test_gold_keeps_its_verdict(db, tmp_path):
    rows = [
        {"prompt": "p", "first": "a", "second": "b", "verdict": ["second", "second", "first"]},
        {"prompt": "q", "first": "a", "second": "b", "verdict": "tie"},
        {"prompt": "r", "first": "a", "second": "b", "verdict": "both_bad"},
    ]
    ((_, found),) = take_in(LabelConfig(gold=write_jsonl(tmp_path / "g.jsonl", rows)))
    store.add_pairs(db, found)
    p, q, r = store.pairs(db).values()
    assert (p.first if p.gold == "first" else p.second) == "b"
    assert (q.gold, r.gold) == ("tie", "both_bad")


def test_gold_without_an_answer_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "g.jsonl", [{"prompt": "p", "completion": "a", "label": True}])
    with pytest.raises(DataError, match=r"g\.jsonl, row 1: it says of no two answers"):
        take_in(LabelConfig(gold=path))


def test_a_bad_row_is_named(db, tmp_path):
    with pytest.raises(DataError, match=r"in\.jsonl, row 2: .*fix the row"):
        taken(db, tmp_path, [{"prompt": "p", "responses": ["a", "b"]}, {"prompt": "p", "responses": [1]}])
    assert store.pairs(db) == {}


# ability


def planted(rng, rights, pairs, each, ties=0.15, known=0):
    """Votes of people who name the better answer so often, of whom `each` see every pair."""
    truth = np.where(rng.random(pairs) < ties, ability.NEITHER, rng.integers(0, 2, pairs))
    votes = []
    for pair in range(pairs):
        for person in rng.choice(len(rights), each, replace=False):
            if truth[pair] == ability.NEITHER:
                said = ability.NEITHER if rng.random() < 0.7 else rng.integers(0, 2)
            else:
                right = rng.random() < rights[person]
                said = truth[pair] if right else rng.choice([1 - truth[pair], ability.NEITHER], p=[0.7, 0.3])
            votes.append((pair, person, said))
    pins = np.full(pairs, ability.UNKNOWN)
    pins[:known] = truth[:known]
    return truth, ability.Votes(*np.array(votes).T, pins, len(rights))


def test_planted_abilities_are_recovered_and_beat_the_majority():
    rights = np.array([0.95, 0.9, 0.85, 0.7, 0.55, 0.5, 0.4])
    truth, votes = planted(np.random.default_rng(0), rights, 1500, 4)
    fitted = ability.fit(votes)
    # some 860 votes a person: three standard errors are 0.05
    assert np.abs(fitted.decided[:, 0] - rights).max() < 0.06
    assert abs(fitted.truth[1] - 0.15) < 0.04
    assert abs(fitted.even[:, 1].mean() - 0.7) < 0.08
    counts = np.zeros((1500, 3))
    np.add.at(counts, (votes.pair, votes.said), 1)
    majority = (counts.argmax(1) == truth).mean()
    assert (fitted.posterior.argmax(1) == truth).mean() > majority + 0.03
    # and the probabilities are honest: of those near 0.8, near 0.8 are right
    sure = fitted.posterior.max(1)
    some = (sure > 0.7) & (sure < 0.9)
    assert some.sum() > 100
    assert abs((fitted.posterior.argmax(1) == truth)[some].mean() - sure[some].mean()) < 0.1


def test_one_person_on_gold_alone_has_the_closed_form():
    """10 pairs with a better answer, of which 7 right, 2 wrong, 1 neither; 4 without, of which 3 seen as such."""
    known = np.array([0] * 5 + [1] * 5 + [2] * 4)
    said = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 1])
    votes = ability.Votes(np.arange(14), np.zeros(14, np.int64), said, known, 1)
    fitted = ability.fit(votes)
    assert fitted.decided[0] == pytest.approx(np.array([7 + 3, 2 + 1, 1 + 1]) / 15)
    assert fitted.even[0] == pytest.approx(np.array([1 + 1, 3 + 1]) / 6)
    assert fitted.truth == pytest.approx(np.array([10 + 4, 4 + 1]) / 19)
    assert fitted.entropy == pytest.approx(np.zeros(14))


def test_a_posterior_is_bayes_rule():
    """Two people who differ: the product of prior and likelihoods, normalised."""
    votes = ability.Votes(np.array([0, 0]), np.array([0, 1]), np.array([0, 1]), np.array([-1]), 2)
    decided, even, truth = (
        np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]]),
        np.array([[0.5, 0.5], [0.4, 0.6]]),
        np.array([0.9, 0.1]),
    )
    joint = np.array([0.45 * 0.8 * 0.3, 0.45 * 0.1 * 0.6, 0.1 * 0.25 * 0.2])
    assert ability.expected(votes, decided, even, truth)[0] == pytest.approx(joint / joint.sum())


def test_the_fit_is_a_maximum():
    """No small change of any parameter makes votes and priors likelier."""
    _, votes = planted(np.random.default_rng(1), np.array([0.9, 0.7, 0.6]), 80, 2, known=5)
    fitted = ability.fit(votes)
    best = ability.objective(votes, *fitted[1:])
    rng = np.random.default_rng(2)
    for place in (1, 2, 3):
        for _ in range(30):
            moved = [p.copy() for p in fitted[1:]]
            changed = moved[place - 1] * np.exp(rng.normal(0, 0.02, moved[place - 1].shape))
            moved[place - 1] = changed / changed.sum(-1, keepdims=True)
            assert ability.objective(votes, *moved) < best


def test_names_of_sides_do_not_matter():
    _, votes = planted(np.random.default_rng(3), np.array([0.9, 0.6, 0.7]), 60, 2)
    turned = votes._replace(said=np.array([1, 0, 2])[votes.said])
    a, b = ability.fit(votes), ability.fit(turned)
    assert b.posterior[:, [1, 0, 2]] == pytest.approx(a.posterior)
    assert b.decided == pytest.approx(a.decided)


def test_without_votes_it_is_the_prior():
    none = np.array([], np.int64)
    fitted = ability.fit(ability.Votes(none, none, none, np.array([-1, 0]), 0))
    assert fitted.posterior[0] == pytest.approx([0.4, 0.4, 0.2])
    assert fitted.posterior[1] == pytest.approx([1, 0, 0])


# agreement


def krippendorff_by_hand(counts):
    """1 - observed / expected disagreement, straight from the definition: over couples of values of one pair, and of all."""
    counts = [row for row in counts if sum(row) > 1]
    values = [(k, unit) for unit, row in enumerate(counts) for k, n in enumerate(row) for _ in range(n)]
    n = len(values)
    observed = 0.0
    for unit, row in enumerate(counts):
        mine = [k for k, u in values if u == unit]
        differ = sum(a != b for i, a in enumerate(mine) for j, b in enumerate(mine) if i != j)
        observed += differ / (sum(row) - 1)
    expected = sum(a != b for i, (a, _) in enumerate(values) for j, (b, _) in enumerate(values) if i != j) / (n - 1)
    return 1 - observed / expected


@pytest.mark.parametrize(
    ("counts", "closed"),
    [
        # Krippendorff 2011, the example with four observers and twelve units, nominal
        (
            [
                [3, 0, 0, 0, 0],
                [0, 3, 1, 0, 0],
                [0, 0, 4, 0, 0],
                [0, 0, 4, 0, 0],
                [0, 4, 0, 0, 0],
                [1, 1, 1, 1, 0],
                [0, 0, 0, 4, 0],
                [3, 1, 0, 0, 0],
                [0, 4, 0, 0, 0],
                [0, 0, 0, 0, 3],
                [2, 0, 0, 0, 0],
                [0, 0, 1, 0, 0],
            ],
            0.743,
        ),
        # every pair agrees; every pair differs: 1 - (4/4) / (8/12)
        ([[2, 0], [0, 2]], 1.0),
        ([[1, 1], [1, 1]], -0.5),
    ],
)
def test_alpha_is_the_published_one(counts, closed):
    assert alpha(np.array(counts)) == pytest.approx(closed, abs=5e-4)
    assert alpha(np.array(counts)) == pytest.approx(krippendorff_by_hand(counts))


def test_alpha_of_random_votes_is_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.multinomial(4, [0.4, 0.3, 0.2, 0.1], 12) * (rng.random((12, 1)) < 0.9)
        assert alpha(counts) == pytest.approx(krippendorff_by_hand(counts.tolist()))


@pytest.mark.parametrize("counts", [[[0, 0], [1, 0]], [[2, 0], [3, 0]], [[1, 0], [0, 1]]])
def test_alpha_is_not_known_without_something_to_compare(counts):
    assert alpha(np.array(counts)) is None


def test_the_figures_count_gold_sides_and_people(db):
    store.add_pairs(db, [*some_pairs(4), *(Pair(f"g{i}", "yes", "no", gold="first") for i in range(5))])
    for i in range(5):
        prefers(db, 5 + i, "Ana", "yes")
        prefers(db, 5 + i, "Ben", "yes" if i == 0 else "no")
    said(db, 1, "Ana", "skip")
    prefers(db, 2, "Ben", "good 1", edit="better", comment="so")
    found = measured(db)
    ana, ben = found.people
    assert (found.pairs, found.voted, found.doubly, found.alike) == (9, 6, 5, pytest.approx(0.2))
    assert (ana.votes, ana.skips, ana.gold.mean, ana.num_gold) == (5, 1, 1.0, 5)
    assert (ben.votes, ben.edits, ben.gold.mean) == (6, 1, 0.2)
    assert ana.gold.low < 0.9
    assert ana.right > 0.75 > 0.45 > ben.right
    # nothing was swapped, so left is first
    first = sum(vote.verdict == "first" for vote in store.votes(db))
    assert found.left.mean == pytest.approx(first / 11)


# routing


def test_nobody_meets_a_pair_twice_and_all_are_met(db):
    store.add_pairs(db, some_pairs(12))
    person, config = store.annotator(db, "Ana"), LabelConfig()
    met = []
    while (found := next_pair(db, person, config)) is not None:
        # the same until it is answered, in the same order
        assert next_pair(db, person, config) == found
        met.append(found[0])
        store.add_vote(db, Vote(found[0], person, ("skip", "first", "tie")[len(met) % 3]))
    assert sorted(met) == list(range(1, 13))


def test_sides_are_swapped_half_the_time(db):
    store.add_pairs(db, some_pairs(100))
    swapped = 0
    for name in ("Ana", "Ben"):
        person = store.annotator(db, name)
        for _ in range(50):
            number, turned = next_pair(db, person, LabelConfig())
            swapped += turned
            store.add_vote(db, Vote(number, person, "first"))
    assert abs(swapped - 50) < 4 * math.sqrt(25)


def test_the_least_certain_pair_comes_next(db):
    store.add_pairs(db, some_pairs(4))
    config = LabelConfig(votes_per_pair=9)
    for pair in (1, 2, 3):
        said(db, pair, "Ana", "first")
    new = store.annotator(db, "New")
    # a pair without a vote, then one whose votes differ, then one whose votes agree
    assert next_pair(db, new, config)[0] == 4
    store.add_vote(db, Vote(4, new, "skip"))
    said(db, 1, "Ben", "second")
    said(db, 2, "Ben", "first")
    said(db, 3, "Ben", "first")
    said(db, 3, "Eve", "first")
    order = []
    for _ in range(3):
        number, _ = next_pair(db, new, config)
        order.append(number)
        store.add_vote(db, Vote(number, new, "skip"))
    assert order == [1, 2, 3]


def test_enough_votes_are_enough(db):
    store.add_pairs(db, some_pairs(1))
    for name in ("Ana", "Ben"):
        said(db, 1, name, "first")
    assert next_pair(db, store.annotator(db, "Eve"), LabelConfig(votes_per_pair=2)) is None
    assert next_pair(db, store.annotator(db, "Eve"), LabelConfig(votes_per_pair=3))[0] == 1


def test_two_people_at_once_see_different_pairs(db):
    store.add_pairs(db, some_pairs(2))
    ana, ben = (next_pair(db, store.annotator(db, name), LabelConfig())[0] for name in ("Ana", "Ben"))
    assert {ana, ben} == {1, 2}


def test_gold_is_mixed_in_at_its_share_and_never_keeps_anybody(db):
    store.add_pairs(db, some_pairs(150))
    store.add_pairs(db, [Pair(f"g{i}", "yes", "no", gold="first") for i in range(100)])
    person, met = store.annotator(db, "Ana"), []
    while (found := next_pair(db, person, LabelConfig(gold_share=0.25))) is not None:
        met.append(found[0] > 150)
        store.add_vote(db, Vote(found[0], person, "tie"))
    # until the 150 are answered
    assert abs(sum(met) / len(met) - 0.25) < 0.1
    assert len(met) - sum(met) == 150


def test_gold_alone_can_be_answered_too(db):
    store.add_pairs(db, some_pairs(3, gold="first"))
    person = store.annotator(db, "Ana")
    for _ in range(3):
        store.add_vote(db, Vote(next_pair(db, person, LabelConfig())[0], person, "tie"))
    assert next_pair(db, person, LabelConfig()) is None


# labels out


@pytest.fixture
def labelled(db, tmp_path):
    """Six pairs: agreed, split, tie, both bad, edited, gold; and one without a vote."""
    store.add_pairs(db, some_pairs(5))
    store.add_pairs(db, [Pair("gold?", "yes", "no", gold="first"), Pair("none?", "a", "b")])
    for name in ("Ana", "Ben"):
        prefers(db, 1, name, "good 0")
        said(db, 3, name, "tie")
        said(db, 4, name, "both_bad")
        prefers(db, 6, name, "yes")
    prefers(db, 2, "Ana", "good 1", comment="clearer")
    prefers(db, 2, "Ben", "good 1")
    prefers(db, 2, "Eve", "bad 1")
    prefers(db, 5, "Ana", "good 4", edit="excellent 4")
    said(db, 7, "Ana", "skip")
    return tmp_path / "labels.sqlite"


def trees(path):
    found, report = read(str(path), DataConfig(train=str(path)), "train")
    return {tree.prompt: tree for tree in found}, report


def test_what_is_written_says_what_was_said(db, labelled, tmp_path):
    config = LabelConfig(db=str(labelled), out=str(tmp_path / "out.jsonl"))
    told = export(config)
    by_prompt, report = trees(config.out)
    assert (told.rows, told.pairs, told.votes, told.people) == (7, 5, 10, 3)
    assert (told.ties, told.both_bad, told.mostly_bad, told.edits) == (2, 2, 1, 1)
    assert (told.gold, told.skips, told.unvoted) == (1, 1, 1)
    assert report.format == "verdict"
    assert report.both_bad == 1

    def order(prompt):
        tree = by_prompt[prompt]
        return [([tree.responses[i] for i in c.order], c.label) for c in tree.comparisons]

    assert order("Prompt 0?") == [(["good 0", "bad 0"], 1.0)]
    # two of three
    assert order("Prompt 1?") == [(["good 1", "bad 1"], pytest.approx(2 / 3))]
    assert by_prompt["Prompt 2?"].comparisons == ()
    assert len(by_prompt["Prompt 2?"].ties) == 1
    assert [thumb.good for thumb in by_prompt["Prompt 3?"].thumbs] == [False, False]
    assert sorted(pair for pair, _ in order("Prompt 4?")) == [
        ["excellent 4", "bad 4"],
        ["excellent 4", "good 4"],
        ["good 4", "bad 4"],
    ]
    assert "gold?" not in by_prompt
    rows = [json.loads(line) for line in Path(config.out).read_text("utf-8").splitlines()]
    assert rows[1]["annotators"] == ["Ana", "Ben", "Eve"]
    assert rows[1]["comments"] == ["clearer", "", ""]


def test_posteriors_become_soft_labels(db, labelled, tmp_path):
    config = LabelConfig(db=str(labelled), out=str(tmp_path / "out.jsonl"), labels="posterior")
    told = export(config)
    by_prompt, report = trees(config.out)
    assert report.format == "votes"
    assert told.rows == 6
    agreed, split = (by_prompt[f"Prompt {i}?"].comparisons[0].label for i in (0, 1))
    assert 0.5 < split < agreed < 1
    assert "Prompt 3?" not in by_prompt


def test_an_answer_that_was_cut_is_still_cut(db, tmp_path):
    store.add_pairs(db, [Pair("p", "whole", "cut", ended=(True, False))])
    prefers(db, 1, "Ana", "cut", edit="cut, and ended")
    for labels in ("votes", "posterior"):
        config = LabelConfig(db=str(tmp_path / "labels.sqlite"), out=str(tmp_path / f"{labels}.jsonl"), labels=labels)
        export(config)
        tree = trees(config.out)[0]["p"]
        assert [tree.responses[i] for i in tree.cut] == ["cut"]


def test_an_edit_of_a_turn_is_a_turn(db, tmp_path):
    prompt = ({"role": "user", "content": "Hi"},)
    one, two = (({"role": "assistant", "content": text},) for text in ("yes", "no"))
    store.add_pairs(db, [Pair(prompt, one, two)])
    said(db, 1, "Ana", "first", edit="yes!")
    rows, _ = exported(db)
    made = [row["first"] if row["verdict"] == ["first"] else row["second"] for row in rows if row.get("edited")]
    assert made == [({"role": "assistant", "content": "yes!"},)] * 2


def test_the_file_is_replaced_only_when_asked(db, labelled, tmp_path):
    config = LabelConfig(db=str(labelled), out=str(tmp_path / "out.jsonl"))
    export(config)
    export(config)
    said(db, 7, "Ben", "tie")
    with pytest.raises(ConfigError, match="overwrite=true"):
        export(config)
    assert export(config.model_copy(update={"overwrite": True})).unvoted == 0
    with pytest.raises(ConfigError, match="is the file it reads"):
        export(LabelConfig(db=str(labelled), out=str(labelled)))


def test_the_command_says_what_it_wrote_and_what_comes_next(labelled, favor, tmp_path):
    words = ("label", f"db={labelled}", "out=my labels.jsonl")
    code, out, err = favor(*words)
    assert (code, err) == (0, "")
    rows = (tmp_path / "my labels.jsonl").read_text().splitlines()
    assert f"my labels.jsonl: {len(rows)} rows from" in out
    assert "next: favor lint 'data.train=my labels.jsonl'\n" in out
    told = json.loads(favor(*words, "--json")[1])
    assert (told["figures"]["rows"], told["paths"]) == (len(rows), {"labels": "my labels.jsonl"})
    assert told["next"][1] == "favor train model.path=MODEL 'data.train=my labels.jsonl' run=runs/dpo"
    # labels that became more are another file, or asked for
    with store.opened(labelled) as db:
        said(db, 1, "Zoe", "tie")
    code, out, err = favor(*words)
    assert code == 2
    assert "was made with another set of votes; choose another out=FILE, or replace it with overwrite=true" in err
    assert favor(*words, "overwrite=true")[0] == 0


def test_nothing_to_write_or_to_open_is_said(db, tmp_path):
    with pytest.raises(DataError, match="no pair has a vote yet"):
        export(LabelConfig(db=str(tmp_path / "labels.sqlite"), out=str(tmp_path / "out.jsonl")))
    with pytest.raises(ConfigError, match="no such file"):
        label(LabelConfig(db=str(tmp_path / "none.sqlite")), print, print)
    assert not (tmp_path / "none.sqlite").exists()
    with pytest.raises(ConfigError, match="holds no pairs"):
        label(LabelConfig(db=str(tmp_path / "labels.sqlite")), print, print)


def test_a_missing_package_is_named(db, tmp_path, monkeypatch):
    store.add_pairs(db, some_pairs(1))
    monkeypatch.setattr("favor.label.run.find_spec", lambda name: None if name == "uvicorn" else True)
    with pytest.raises(ConfigError, match=r"needs uvicorn, not installed here; run: pip install 'favor\[label\]'"):
        label(LabelConfig(db=str(tmp_path / "labels.sqlite")), print, print)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data=x.jsonl", "out=y.jsonl"], "data would be ignored: out=FILE writes the labels and ends"),
        (["port=1", "seed=2", "out=y.jsonl"], "port, seed would be ignored"),
        (["max_rows=3", "gold=g.jsonl"], "max_rows would be ignored: there is no data=FILE"),
        (["data=x.jsonl", "overwrite=true"], "overwrite would be ignored"),
        (["data=x.jsonl", "columns.answer=a"], "columns names answer, which no format reads"),
        (["data=x.jsonl", "format=pear"], "did you mean"),
    ],
)
def test_nothing_is_accepted_and_ignored(words, said):
    with pytest.raises(ConfigError, match=said):
        load(LabelConfig, None, words)


def test_a_file_that_cannot_be_read_leaves_no_store(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        label(LabelConfig(data=str(tmp_path / "none.jsonl"), db=str(tmp_path / "l.sqlite")), print, print)
    assert list(tmp_path.iterdir()) == []
