"""Every interval that favor prints holds the truth in 93 % of cases or more; the meter itself notices one that does not."""

import numpy as np
import pytest
from favor_frontier.summary import crossed_reach
from interval_coverage import SETTINGS, measure
from scipy.stats import binom
from scipy.stats import t as student

from favor.eval import intervals
from favor.eval.intervals import SHARE, mean_interval, standard_error, t_quantile


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name.replace(" ", "-"))
def test_coverage(setting):
    for row in measure(setting, 300):
        # the promise less what 300 (or 60) trials leave open; the whole table is `python interval_coverage.py`
        assert row.coverage >= row.promised - 2 * row.error, row
        assert row.coverage > 0.85, row
        assert row.without == 0, row


def test_the_meter_notices_intervals_that_are_too_narrow(monkeypatch):
    """90 % intervals called 95 %."""
    monkeypatch.setattr(intervals, "_UPPER", 0.95)
    setting = next(s for s in SETTINGS if s.name == "80 prompts x 2, normal")
    assert all(row.coverage < row.promised - row.error for row in measure(setting, 2000))


@pytest.mark.parametrize("prompts", [2, 3, 5, 8, 12, 21, 28, 80, 300])
def test_a_share_is_covered_at_every_true_value(prompts):
    """Exact: sum of the binomial probabilities of the counts whose interval holds the share."""
    shares = np.concatenate([np.linspace(0.5, 0.99, 200), 1 - np.geomspace(0.01, 1e-5, 100)])
    ends = [mean_interval(np.arange(prompts) < wins, bounds=SHARE).ends for wins in range(prompts + 1)]
    low, high = np.array(ends).T
    holds = (low <= shares[:, None]) & (shares[:, None] <= high)
    coverage = (binom.pmf(np.arange(prompts + 1), prompts, shares[:, None]) * holds).sum(1)
    assert coverage.min() > 0.934


def test_twelve_of_twelve_by_hand():
    """13 of 14: mean 13/14, deviation sqrt(13/14 1/14 / 13), t of 11 degrees of freedom 2.200985."""
    found = mean_interval(np.ones(12), bounds=SHARE)
    assert found == pytest.approx((1.0, 13 / 14 - 2.200985 * np.sqrt(13 / 14 / 14 / 13), 1.0), abs=1e-6)
    ties = mean_interval(np.full(12, 0.5), bounds=SHARE)
    assert ties == pytest.approx(
        (0.5, 0.5 - 2.200985 * np.sqrt(0.5 / 14 / 13), 0.5 + 2.200985 * np.sqrt(0.5 / 14 / 13)), abs=1e-6
    )
    # one prompt of many pairs is one prompt
    assert mean_interval(np.ones(60), clusters=np.zeros(60, np.int64), bounds=SHARE).low == 0.0


def test_means_by_hand():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    # deviation 3.559026, t of 3 degrees of freedom 3.182446
    assert mean_interval(values) == pytest.approx(
        (4.0, 4 - 3.182446 * 3.559026 / 2, 4 + 3.182446 * 3.559026 / 2), abs=1e-5
    )
    # the same prompts four times are no more than once
    again = mean_interval(np.repeat(values, 4), clusters=np.repeat(np.arange(4), 4))
    assert again == pytest.approx(mean_interval(values))
    # a prompt of three and two of one: leaving each out moves the mean 2 to 3, 1.75 and 1.75
    error = standard_error(np.array([1.0, 2.0, 0.0, 3.0, 4.0]), np.array([0, 0, 0, 1, 2]))
    moved = np.array([3.5, 7 / 4, 6 / 4]) - 2
    assert error == pytest.approx(np.sqrt(2 / 3 * (moved**2).sum()))
    # 25 / 11 - 1 = 1.27 degrees of freedom: between t of 1 (12.71) and of 2 (4.30)
    assert t_quantile(np.array([3.0, 1.0, 1.0])) == pytest.approx(student.ppf(0.975, 25 / 11 - 1))


def test_the_mean_of_a_share_lies_inside_and_nothing_is_certain():
    """Random small samples, prompts of any size."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        count = rng.integers(1, 30)
        clusters = rng.integers(0, rng.integers(1, 15), count)
        found = mean_interval(
            rng.choice([0, 0.5, 1], count, p=rng.dirichlet([0.5, 0.2, 1])), clusters=clusters, bounds=SHARE
        )
        assert 0 <= found.low <= found.mean <= found.high <= 1
        assert found.high - found.low > 0.1


def test_no_spread_is_no_interval():
    """Equal values cannot say how sure an unbounded mean is."""
    for values, clusters in ((np.full(20, 0.3), None), (np.arange(5.0), np.zeros(5, np.int64)), (np.zeros(9), None)):
        found = mean_interval(values, clusters=clusters)
        assert found.ends is None
        assert found.mean == values.mean()


def test_crossed_reach_by_hand():
    """Parts without noise: seeds (-1, 0, 1), prompts (-2, 0, 2)."""
    seeds, prompts = np.array([-1.0, 0, 1]), np.array([-2.0, 0, 2])
    t = 4.302653
    assert crossed_reach(seeds[:, None] + np.zeros(3)) == pytest.approx(t * np.sqrt(1 / 3), rel=1e-6)
    assert crossed_reach(seeds[:, None] + prompts) == pytest.approx(t * np.sqrt((1 + 4) / 3), rel=1e-6)
    # one seed: over prompts alone; equal seeds add nothing to it
    assert crossed_reach(prompts[None]) == crossed_reach(np.tile(prompts, (3, 1))) == pytest.approx(t * np.sqrt(4 / 3))
    # seeds that agree better than their noise allows do not make it narrower than with the seeds as given
    noise = np.array([[1.0, -1, 1, -1], [-1, 1, -1, 1]])
    assert crossed_reach(noise + np.array([-3.0, -1, 1, 3])) >= crossed_reach(np.array([[-3.0, -1, 1, 3]])) > 0
