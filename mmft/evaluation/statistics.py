"""How sure a held-out number is: bootstrap intervals over rows, and paired differences.

Percentile bootstrap (Efron 1979, "Bootstrap methods: another look at the jackknife"; for corpus scores and paired
system comparison Koehn 2004, "Statistical significance tests for machine translation evaluation"): draw n of the n rows
with replacement, compute the score again, take quantiles of what comes out.

Every score here is a function of sums over rows (a mean is sum / count, an accuracy sum / sum, corpus BLEU a function
of ten summed counts), so a resample is a vector of row weights and all resamples of all scores are one matrix product.
A paired comparison draws the same rows for both sides: what makes a picture hard cancels.

Permutation test (Fisher 1935; for systems on the same test set Yeh 2000, "More accurate tests for the statistical
significance of result differences"): if two models were alike, either could have written either caption. Swap the
two captions of each picture by a coin, and count how often the difference is as large as the one seen. For a mean that
is a flip of the signs of the rows' differences; swapping rows serves corpus scores as well.

Left out on purpose: bias-corrected intervals (BCa); over hundreds of rows they differ little from percentiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

# {"mean", "low", "high"}; a difference has "relative" (to the score before) too
Interval = dict[str, float | None]

_RESAMPLES, _LEVEL, _SEED = 2000, 0.95, 0
_SWAPS = 10_000  # random swaps of a permutation test ...
_EXACT = 12  # ... of more rows than this; up to here all of them
_ROUNDING = 1e-9  # what a difference may lose by another order of adding, as a share of itself
_CELLS = 4_000_000  # row weights held at once, so that memory does not grow with the rows


class Statistic(NamedTuple):
    """A score as a function of sums over rows.

    Attributes:
        columns: (n, k) float64, one line per row.
        value: (..., k) sums over rows -> (...) scores.
    """

    columns: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Statistic:
    """sum(numerators) / sum(denominators), both (n,): an accuracy over claims, not a mean of per-row accuracies."""
    return Statistic(np.stack([numerators, denominators], axis=1).astype(np.float64), _divide)


def mean(values: np.ndarray) -> Statistic:
    """The mean of values (n,); NaN = no value for this row, left out."""
    values = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0), known)


def _divide(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., 1] == 0, np.nan, sums[..., 0] / sums[..., 1])


def intervals(
    statistics: Mapping[str, Statistic], resamples: int = _RESAMPLES, level: float = _LEVEL, seed: int = _SEED
) -> dict[str, Interval]:
    """Name -> {"mean": the score over all rows, "low", "high": its percentile interval}, all from the same draws.

    Raises:
        ValueError: no rows, unequal numbers of rows, or a level outside (0, 1).
    """
    names = list(statistics)
    drawn = _resampled([statistics[name] for name in names], resamples, seed)
    return {
        name: {"mean": _exact(statistics[name])} | _percentiles(values, level)
        for name, values in zip(names, drawn, strict=True)
    }


def paired_intervals(
    before: Mapping[str, Statistic],
    after: Mapping[str, Statistic],
    resamples: int = _RESAMPLES,
    level: float = _LEVEL,
    seed: int = _SEED,
) -> dict[str, Interval]:
    """Name -> {"mean": after - before, "low", "high", "relative": difference / |before|, None where before is 0}.

    Row i of both sides is the same picture. Names that one side lacks are left out.
    """
    names = [name for name in before if name in after]
    drawn = _resampled([side[name] for side in (before, after) for name in names], resamples, seed)
    out: dict[str, Interval] = {}
    for i, name in enumerate(names):
        old, new = _exact(before[name]), _exact(after[name])
        out[name] = {"mean": new - old} | _percentiles(drawn[len(names) + i] - drawn[i], level)
        out[name]["relative"] = (new - old) / abs(old) if old else None
    return out


def separate_intervals(
    these: Mapping[str, Statistic],
    others: Mapping[str, Statistic],
    resamples: int = _RESAMPLES,
    level: float = _LEVEL,
    seed: int = _SEED,
) -> dict[str, Interval]:
    """Name -> {"mean": these - others, "low", "high"} for two sets of different rows, drawn independently."""
    names = [name for name in these if name in others]
    drawn = [
        _resampled([side[name] for name in names], resamples, seed + i) if names else []
        for i, side in enumerate((these, others))
    ]
    return {
        name: {"mean": _exact(these[name]) - _exact(others[name])} | _percentiles(left - right, level)
        for name, left, right in zip(names, *drawn, strict=True)
    }


def paired_permutation(
    before: Mapping[str, Statistic], after: Mapping[str, Statistic], resamples: int = _SWAPS, seed: int = _SEED
) -> dict[str, float]:
    """Name -> two-sided p of "the two sides are alike", by swapping the sides of rows. NaN where a score is undefined.

    Up to 12 rows every one of the 2^n swaps is counted, so that p is exact. Else `resamples` random ones are, and
    p = (1 + as large) / (1 + resamples), for what was seen is one of the possible outcomes (Phipson and Smyth 2010,
    "Permutation p-values should never be zero", equation 2).

    Raises:
        ValueError: no rows, or unequal numbers of rows.
    """
    names = [name for name in before if name in after]
    if not names:
        return {}
    old, new = (_side_by_side([side[name] for name in names]) for side in (before, after))
    if len(old) != len(new):
        raise ValueError(f"paired scores need equal rows: {len(old)} before, {len(new)} after")
    widths = [before[name].columns.shape[1] for name in names]
    larger, tried = np.zeros(len(names)), 0
    seen = [_exact(after[name]) - _exact(before[name]) for name in names]
    for swapped in _swaps(len(old), resamples, seed):
        moved = swapped @ (new - old)
        sides = (np.split(side, np.cumsum(widths)[:-1], axis=1) for side in (old.sum(0) + moved, new.sum(0) - moved))
        for i, (name, left, right) in enumerate(zip(names, *sides, strict=True)):
            found = np.abs(after[name].value(right) - before[name].value(left))
            larger[i] += (found >= abs(seen[i]) * (1 - _ROUNDING)).sum()
        tried += len(swapped)
    extra = 0 if len(old) <= _EXACT else 1
    return {
        name: float((extra + count) / (extra + tried)) if np.isfinite(difference) else float("nan")
        for name, count, difference in zip(names, larger, seen, strict=True)
    }


def permutation_test(
    difference: Callable[[np.ndarray], float], n: int, resamples: int = 999, seed: int = _SEED
) -> float:
    """`paired_permutation` of any score: `difference` takes which rows are swapped, (n,) of bool."""
    seen = abs(difference(np.zeros(n, bool))) * (1 - _ROUNDING)
    found = [abs(difference(row)) >= seen for swapped in _swaps(n, resamples, seed) for row in swapped > 0]
    extra = 0 if n <= _EXACT else 1
    return (extra + sum(found)) / (extra + len(found))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for how many were looked at (Holm 1979).

    Of m values the k-th smallest is taken m - k + 1 times, and none ends below a smaller one's. Holds for metrics that
    depend on each other, as these do. NaN stays, and is not counted.
    """
    known = sorted((p, name) for name, p in p_values.items() if np.isfinite(p))
    out, highest = {name: float("nan") for name in p_values}, 0.0
    for k, (p, name) in enumerate(known):
        highest = out[name] = max(highest, min(1.0, (len(known) - k) * p))
    return out


def mean_interval(values: np.ndarray, **options) -> Interval:
    """`intervals` of one mean; values (n,)."""
    return intervals({"": mean(values)}, **options)[""]


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray, **options) -> Interval:
    """`intervals` of one ratio of sums; both (n,)."""
    return intervals({"": ratio(numerators, denominators)}, **options)[""]


def paired_bootstrap(before: np.ndarray | Statistic, after: np.ndarray | Statistic, **options) -> Interval:
    """`paired_intervals` of one score: per-row values (n,), or a `Statistic` each.

    A row without a value (NaN) on one side is left out on both, so that equal rows are compared.
    """
    if not isinstance(before, Statistic) and not isinstance(after, Statistic):
        old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
        if old.shape != new.shape:
            raise ValueError(f"paired scores need equal rows: {old.shape} before, {new.shape} after")
        unknown = np.isnan(old) | np.isnan(new)
        before, after = (mean(np.where(unknown, np.nan, side)) for side in (old, new))
    return paired_intervals({"": before}, {"": after}, **options)[""]


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    n: int,
    resamples: int = _RESAMPLES,
    level: float = _LEVEL,
    seed: int = _SEED,
) -> Interval:
    """The interval of any score: `statistic` takes row indices (n,) and is called resamples + 1 times."""
    if n < 1:
        raise ValueError("no rows to resample; the held-out set is empty")
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(n, size=n)) for _ in range(resamples)], dtype=np.float64)
    return {"mean": float(statistic(np.arange(n)))} | _percentiles(values, level)


def jackknife_interval(value: float, left_out: np.ndarray, level: float = _LEVEL) -> Interval:
    """Normal interval around `value` from the n scores with one row left out each (Quenouille 1956, Tukey 1958).

    For scores that count distinct things: a resample repeats rows, so it holds fewer distinct things than n fresh
    rows and its percentiles need not even hold the score itself. The jackknife variance errs on the wide side
    (Efron and Stein 1981).
    """
    n = len(left_out)
    spread = np.sqrt((n - 1) / n * np.sum((left_out - np.mean(left_out)) ** 2))
    reach = NormalDist().inv_cdf(0.5 + level / 2) * float(spread)
    return {"mean": float(value), "low": float(value) - reach, "high": float(value) + reach}


def _swaps(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Which rows are swapped, (chunk, n) of 0.0 and 1.0: all 2^n ways, or `resamples` random ones."""
    if n <= _EXACT:
        yield (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.float64)
        return
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // n)
    for start in range(0, resamples, step):
        yield rng.integers(2, size=(min(step, resamples - start), n), dtype=np.int8).astype(np.float64)


def _side_by_side(statistics: Sequence[Statistic]) -> np.ndarray:
    """The columns of all statistics, (n, sum of k)."""
    sizes = {len(s.columns) for s in statistics}
    if len(sizes) > 1:
        raise ValueError(f"scores of one comparison need equal numbers of rows, got {sorted(sizes)}")
    if not sizes or not sizes.pop():
        raise ValueError("no rows to resample; the held-out set is empty")
    return np.concatenate([s.columns for s in statistics], axis=1)


def _resampled(statistics: list[Statistic], resamples: int, seed: int) -> list[np.ndarray]:
    """Per statistic its value in each resample, (resamples,)."""
    columns = _side_by_side(statistics)
    n = len(columns)
    sums = np.empty((resamples, columns.shape[1]))
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        picks = rng.integers(n, size=(size, n)) + np.arange(size)[:, None] * n
        weights = np.bincount(picks.ravel(), minlength=size * n).reshape(size, n)
        sums[start : start + size] = weights.astype(np.float64) @ columns
    ends = np.cumsum([s.columns.shape[1] for s in statistics])
    return [s.value(part) for s, part in zip(statistics, np.split(sums, ends[:-1], axis=1), strict=True)]


def _exact(statistic: Statistic) -> float:
    return float(statistic.value(statistic.columns.sum(axis=0)))


def _percentiles(values: np.ndarray, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level is a share between 0 and 1, got {level}")
    values = values[np.isfinite(values)]
    if not len(values):
        return {"low": float("nan"), "high": float("nan")}
    low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
    return {"low": float(low), "high": float(high)}
