"""Calibration of preferences: numbers worked by hand, identities, and one simulation with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reward_models.preference.calibration import (
    accuracy,
    expected_calibration_error,
    fit_temperature,
    pair_metrics,
    preference_loss,
    reliability_table,
    wilson_interval,
)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_interval_ends_are_where_the_normal_test_is_on_the_edge():
    """Kills the plain normal interval: Wilson's ends p solve |s - p| = z sqrt(p (1 - p) / n)."""
    for share, n in [(0.95, 100), (0.5, 7), (1.0, 20), (0.0, 3)]:
        for p in wilson_interval(share, n):
            if 0 < p < 1:
                assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), abs=1e-12)
    low, high = wilson_interval(1.0, 20)
    assert (low, high) == (pytest.approx(0.8389, abs=1e-4), 1.0)  # 20 / (20 + z²)


def test_temperature_is_found_again():
    """Kills a temperature that multiplies, and one that is fitted to the wrong sign."""
    rng = np.random.default_rng(0)
    log_odds = rng.normal(0, 2, 40_000)
    # What is judged right happens as often as the log-odds say; the model reports three times the log-odds.
    right = rng.random(40_000) < 1 / (1 + np.exp(-np.abs(log_odds)))
    d = np.where(right, 1, -1) * np.abs(log_odds) * 3
    temperature = fit_temperature(d)
    assert temperature == pytest.approx(3, rel=0.05)
    assert expected_calibration_error(d, temperature) < 0.01 < 0.05 < expected_calibration_error(d)


def test_temperature_is_the_lowest_point_of_the_loss():
    d = np.array([2.0, -0.5, 0.3, 1.7, -1.1, 0.9])
    aim = 7 / 8

    def loss(t: float) -> float:
        return aim * preference_loss(d, t) + (1 - aim) * preference_loss(-d, t)

    grid = np.exp(np.linspace(-4, 4, 8001))
    best = grid[np.argmin([loss(t) for t in grid])]
    assert fit_temperature(d) == pytest.approx(best, rel=2e-3)


def test_temperature_has_the_unit_of_the_reward():
    d = np.array([2.0, -0.5, 0.3, 1.7])
    assert fit_temperature(10 * d) == pytest.approx(10 * fit_temperature(d), rel=1e-9)


def test_a_few_pairs_that_are_all_right_do_not_ask_for_certainty():
    """Kills the fit to hard labels, whose best temperature is 0: with N = 8 alike, sigmoid(d / T) is 9 / 10."""
    assert fit_temperature(np.full(8, 2.0)) == pytest.approx(2.0 / logit(0.9), rel=1e-6)


def test_a_reward_that_is_wrong_more_often_than_right_is_made_unsure():
    assert fit_temperature(np.array([-1.0, -2.0, 0.5])) == pytest.approx(1e3)


def test_calibration_error_by_hand():
    """Kills unweighted bins, and confidence taken as P(chosen) where the rejected text won."""
    sure = np.array([logit(0.9)] * 8 + [-logit(0.9)] * 2)  # says 0.9, right in 8 of 10
    unsure = np.array([logit(0.6)] * 15 + [-logit(0.6)] * 15)  # says 0.6, right in half of 30
    d = np.concatenate([sure, unsure])
    assert expected_calibration_error(d) == pytest.approx(10 / 40 * 0.1 + 30 / 40 * 0.1)
    assert expected_calibration_error(sure) == pytest.approx(0.1)
    assert accuracy(d) == 23 / 40


def test_a_tie_is_half_right_and_well_calibrated():
    assert accuracy(np.zeros(4)) == 0.5
    assert expected_calibration_error(np.zeros(4)) == 0


def test_every_pair_is_in_one_bin():
    """Kills lost edges: confidence one half and confidence one belong to the first and the last bin."""
    d = np.concatenate([[0.0, 1e9, -1e9], np.linspace(-5, 5, 97)])
    table = reliability_table(d)
    assert sum(row.pairs for row in table) == 100
    assert table[0].pairs >= 1 and table[-1].pairs >= 2
    for row in table:
        assert row.pairs == 0 or row.low - 1e-12 <= row.confidence <= row.high


def test_metrics_by_kind():
    metrics = pair_metrics(np.array([1.0, -1.0, 2.0]), kinds=["colour", "colour", "size"])
    assert metrics["by_kind"] == {"colour": {"accuracy": 0.5, "pairs": 2}, "size": {"accuracy": 1.0, "pairs": 1}}
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["accuracy_low"] < 2 / 3 < metrics["accuracy_high"]


@pytest.mark.parametrize(("bad", "match"), [([], "at least one"), ([1.0, math.nan], "pair 1 is not finite")])
def test_refuses_what_cannot_be_calibrated(bad, match):
    with pytest.raises(ValueError, match=match):
        fit_temperature(np.array(bad))
