"""The permutation test, Holm's correction, and differences of separate sets."""

from itertools import product

import numpy as np
import pytest

from mmft.evaluation import statistics
from mmft.evaluation.captioning import bleu_counts, corpus_bleu
from mmft.evaluation.statistics import (
    Statistic,
    holm,
    mean,
    paired_permutation,
    permutation_test,
    ratio,
    separate_intervals,
)


def p_of(before, after, **options) -> float:
    return paired_permutation({"": before}, {"": after}, **options)[""]


def test_three_rows_by_hand():
    """Differences 1, 2, 3: of the 8 signs only +++ and --- are as far from 0, so p = 2/8. One-sided: 1/8; with the
    seen one counted twice: 3/9."""
    before, after = np.zeros(3), np.array([1.0, 2.0, 3.0])
    assert p_of(mean(before), mean(after)) == 0.25
    assert p_of(mean(after), mean(before)) == 0.25  # two-sided: the order does not matter


def test_a_tie_counts():
    """Differences 1, 1, -1: the sum is 1, and all 8 sums are odd, so every one is at least as far from 0."""
    assert p_of(mean(np.zeros(3)), mean(np.array([1.0, 1.0, -1.0]))) == 1.0
    assert p_of(mean(np.ones(5)), mean(np.ones(5))) == 1.0


def test_rounding_does_not_break_ties():
    """0.1 + 0.2 + 0.3 added in another order is another number; every +++ must count as what was seen."""
    before, after = np.array([0.1, 0.2, 0.3, 0.7, 0.9]), np.array([0.3, 0.1, 0.8, 0.95, 1.0])
    exact = p_of(mean(before), mean(after))
    assert exact * 32 == int(exact * 32) and exact >= 2 / 32
    assert p_of(mean(before * 3), mean(after * 3)) == exact


@pytest.mark.parametrize("kind", ["mean", "ratio", "bleu"])
def test_small_sets_are_enumerated(kind):
    """Against all 2^n swaps written out row by row, with the score computed anew: signs that are flipped for one side
    alone, or sums whose sides are mixed up, give another p."""
    rng = np.random.default_rng(3)
    n = 7
    if kind == "mean":
        columns, value = [mean(rng.normal(size=n) + shift).columns for shift in (0.0, 0.6)], mean(np.ones(1)).value
    elif kind == "ratio":
        sides = [(rng.integers(0, 3, n), rng.integers(3, 9, n)) for _ in range(2)]
        columns, value = [ratio(*side).columns for side in sides], ratio(np.ones(1), np.ones(1)).value
    else:
        words = list("abcde")
        texts = [[list(rng.choice(words, 8)) for _ in range(n)] for _ in range(3)]
        columns = [bleu_counts(texts[i], [[ref] for ref in texts[2]]) for i in (0, 1)]
        value = corpus_bleu
    before, after = columns

    def difference(swapped) -> float:
        left = [a if s else b for s, b, a in zip(swapped, before, after, strict=True)]
        right = [b if s else a for s, b, a in zip(swapped, before, after, strict=True)]
        return float(value(np.sum(right, axis=0)) - value(np.sum(left, axis=0)))

    seen = abs(difference([False] * n))
    slow = np.mean([abs(difference(swaps)) >= seen - 1e-12 for swaps in product([False, True], repeat=n)])
    assert 2 / 2**n < slow < 1
    assert p_of(Statistic(before, value), Statistic(after, value)) == slow
    assert permutation_test(lambda swapped: difference(swapped), n) == slow


def test_many_rows_are_sampled_around_the_exact_value(monkeypatch):
    """With the exact enumeration switched off, 10,000 swaps of the same rows give nearly the same p."""
    rng = np.random.default_rng(5)
    before = rng.normal(size=12)
    after = before + rng.normal(0.35, 0.8, size=12)
    exact = p_of(mean(before), mean(after))
    monkeypatch.setattr(statistics, "_EXACT", 0)
    assert p_of(mean(before), mean(after)) == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 10_000))


def test_p_is_never_zero_and_says_how_many_were_tried():
    assert p_of(mean(np.zeros(100)), mean(np.ones(100)), resamples=99) == 1 / 100


def test_false_alarms_are_as_rare_as_the_level_says():
    """Of 200 comparisons of equal models about 5 % have p <= 0.05; a test that compares |d| with d has far more."""
    rng = np.random.default_rng(8)
    alarms = sum(
        p_of(mean(rng.exponential(size=30)), mean(rng.exponential(size=30)), resamples=200) <= 0.05 for _ in range(200)
    )
    assert 2 <= alarms <= 20


def test_unequal_rows_are_refused():
    with pytest.raises(ValueError, match="equal rows: 3 before, 4 after"):
        p_of(mean(np.ones(3)), mean(np.ones(4)))


def test_holm_by_hand():
    """0.01 * 4, 0.02 * 3, then 0.03 * 2 = 0.06 is not above it, 0.5 * 1. Bonferroni would give 0.04, 0.08, 0.12, 1."""
    found = holm({"c": 0.03, "a": 0.01, "d": 0.5, "b": 0.02})
    assert found == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.5})
    assert holm({"a": 0.4, "b": 0.5, "c": float("nan")})["b"] == 0.8  # nan is no third test, and order holds
    assert np.isnan(holm({"a": float("nan")})["a"])


def test_separate_sets_are_not_paired():
    """The width is that of two independent means. Drawn with the same seed, sets of equal size would move together:
    here they are the same numbers, and a paired difference would have no width."""
    values = np.random.default_rng(1).normal(size=400)
    found = separate_intervals({"m": mean(values), "x": mean(values)}, {"m": mean(values)}, resamples=4000)
    assert found.keys() == {"m"} and found["m"]["mean"] == 0.0
    half = 1.96 * np.sqrt(2 / 400) * values.std()
    assert found["m"]["high"] == pytest.approx(half, rel=0.1) and found["m"]["low"] == pytest.approx(-half, rel=0.1)
