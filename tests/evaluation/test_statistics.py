"""Intervals and paired differences."""

import time

import numpy as np
import pytest

from mmft.evaluation import statistics
from mmft.evaluation.statistics import (
    bootstrap_interval,
    jackknife_interval,
    mean_interval,
    paired_bootstrap,
    ratio_interval,
)


def test_constant_scores_have_no_width():
    assert mean_interval(np.full(20, 0.25)) == {"mean": 0.25, "low": 0.25, "high": 0.25}


def test_two_rows_by_hand():
    """Of the 4 draws of {0, 1}, one is all 0 and one is all 1 (1/4 each): the outer 2.5 % are 0 and 1. A bootstrap
    that draws without replacement would always give 0.5."""
    assert mean_interval(np.array([0.0, 1.0]), resamples=400) == {"mean": 0.5, "low": 0.0, "high": 1.0}


def test_width_is_that_of_the_normal_approximation():
    """Level read as one-sided, or resamples of the wrong size, change the width by far more than 5 %."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 1000)
    found = mean_interval(values, resamples=4000)
    half = 1.959964 * values.std() / np.sqrt(1000)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.05 * half * 2)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.05 * half * 2)


def test_coverage():
    """About 95 of 100 intervals hold the truth (here: 90 to 100 of them)."""
    rng = np.random.default_rng(2)
    held = 0
    for i in range(100):
        found = mean_interval(rng.exponential(1.0, 150), resamples=500, seed=i)
        held += found["low"] <= 1.0 <= found["high"]
    assert 88 <= held <= 100


def test_the_seed_decides():
    values = np.random.default_rng(3).normal(size=80)
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5)
    assert mean_interval(values, seed=5) != mean_interval(values, seed=6)


def test_memory_chunks_do_not_show(monkeypatch):
    """Rows drawn in one chunk must not leak into the next: every resample sums to n rows."""
    monkeypatch.setattr(statistics, "_CELLS", 70)
    found = mean_interval(np.ones(30))
    assert found == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_missing_rows_are_left_out_not_zero():
    assert mean_interval(np.array([2.0, np.nan, 2.0]))["mean"] == 2.0


def test_ratio_is_of_sums_not_a_mean_of_ratios():
    """1/1 and 0/3: 1 of 4 claims is true; the mean of accuracies would be 0.5."""
    found = ratio_interval(np.array([1.0, 0.0]), np.array([1.0, 3.0]))
    assert found["mean"] == 0.25
    assert (found["low"], found["high"]) == (0.0, 1.0)


def test_ratio_tolerates_draws_without_denominator():
    found = ratio_interval(np.array([1.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0]))
    assert found == {"mean": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_paired_difference_is_after_minus_before(shift):
    before = np.random.default_rng(4).normal(2.0, 1.0, 200)
    found = paired_bootstrap(before, before + shift)
    assert found["mean"] == pytest.approx(shift)
    assert found["relative"] == pytest.approx(shift / before.mean())
    # Equal rows: the spread between pictures cancels. Drawn apart, the interval would be 0.28 wide and hold 0.
    assert found["high"] - found["low"] < 1e-9


def test_paired_rows_must_match():
    with pytest.raises(ValueError, match="equal rows"):
        paired_bootstrap(np.ones(3), np.ones(4))


def test_paired_drops_a_row_missing_on_one_side():
    found = paired_bootstrap(np.array([1.0, 5.0]), np.array([2.0, np.nan]))
    assert found["mean"] == 1.0


def test_no_relative_change_from_nothing():
    assert paired_bootstrap(np.zeros(4), np.ones(4))["relative"] is None


def test_relative_keeps_the_sign_for_negative_scores():
    assert paired_bootstrap(np.full(4, -2.0), np.full(4, -1.0))["relative"] == 0.5


def test_general_statistic_agrees_with_the_sums():
    values = np.random.default_rng(6).normal(size=100)
    slow, fast = bootstrap_interval(lambda rows: values[rows].mean(), 100), mean_interval(values)
    assert slow["mean"] == pytest.approx(fast["mean"])
    assert slow["low"] == pytest.approx(fast["low"], abs=0.02)
    assert slow["high"] == pytest.approx(fast["high"], abs=0.02)


def test_jackknife_of_a_mean_is_the_standard_error():
    """Known identity: for the mean, the jackknife gives s / sqrt(n), s with n - 1. Here s = 1, n = 3."""
    values = np.array([1.0, 2.0, 3.0])
    found = jackknife_interval(2.0, (6.0 - values) / 2)
    assert found["high"] == pytest.approx(2.0 + 1.959964 / np.sqrt(3))


def test_empty_set_is_refused():
    with pytest.raises(ValueError, match="held-out set is empty"):
        mean_interval(np.array([]))
    with pytest.raises(ValueError, match="level"):
        mean_interval(np.ones(3), level=95)


def test_fast_enough():
    rng = np.random.default_rng(0)
    sides = [{f"m{i}": statistics.mean(rng.normal(size=1000)) for i in range(8)} for _ in range(2)]
    began = time.process_time()
    statistics.intervals(sides[0])
    statistics.intervals(sides[1])
    statistics.paired_intervals(*sides)
    assert time.process_time() - began < 2.0
