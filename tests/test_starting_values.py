"""The sweep behind docs/choose.md: which point counts as best, its table, its picture."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def point(lr, score, kl=5.0, ended=0.9, **more):
    ends = {"accuracy": 0.6, "accuracy_interval": [0.5, 0.7], "score_interval": [score - 0.1, score + 0.1]}
    row = {
        "size": "3 layers",
        "lr": lr,
        "beta": 0.1,
        "epochs": 1,
        "kl": kl,
        "kl_se": 0.5,
        "score": score,
        "ended": ended,
    }
    return row | ends | {"score_start": 0.5} | more


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import starting_values

    return starting_values


def test_a_high_score_from_far_away_or_without_an_end_is_not_the_best(sweep):
    near, far, endless = point(1e-4, 0.7), point(1e-3, 0.9, kl=33.0), point(3e-4, 0.8, ended=0.1)
    assert sorted([far, endless, near, point(1e-5, 0.6)], key=sweep.order) == [near, point(1e-5, 0.6), far, endless]


def test_the_table_has_a_line_a_point(sweep):
    head, rule, line = sweep.table([point(3e-4, 0.71)])
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line == "| 3 layers | 0.0003 | 0.1 | 1 | 0.60 [0.50, 0.70] | 5.0 ± 0.5 | 0.71 [0.61, 0.81] (0.50) | 0.90 |"


def test_the_picture_names_rates_and_sizes_and_draws_beta_and_epochs_of_the_rest_alone(sweep):
    near = [point(1e-5, 0.5, kl=0.01), point(3e-4, 0.7)]
    other = [point(1e-4, 0.7, size="10 layers"), point(1e-3, 0.99, beta=0.5)]
    drawn = str(sweep.picture(near + other))
    assert "0.0003" in drawn
    assert "10 layers" in drawn
    # too near to the start to be told apart; another beta
    assert ">1e-05<" not in drawn
    assert ">0.001<" not in drawn


def test_failures_are_made_from_the_same_start(sweep):
    import failures

    assert failures.fine_tuned is sweep.fine_tuned
    for name, fault in failures.FAULTS.items():
        assert (Path(__file__).parent.parent / f"docs/failures/{name}.svg").exists()
        assert fault.settings or fault.pairs
