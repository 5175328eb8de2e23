"""How sure a held-out number is: bootstrap intervals over rows, and paired differences.

Percentile bootstrap (Efron 1979, "Bootstrap methods: another look at the jackknife"; for corpus scores and paired
system comparison Koehn 2004, "Statistical significance tests for machine translation evaluation"): draw n of the n rows
with replacement, compute the score again, take quantiles of what comes out.

Every score here is a function of sums over rows (a mean is sum / count, an accuracy sum / sum, corpus BLEU a function
of ten summed counts), so a resample is a vector of row weights and all resamples of all scores are one matrix product.
A paired comparison draws the same rows for both sides: what makes a picture hard cancels.

Left out on purpose: bias-corrected intervals (BCa); over hundreds of rows they differ little from percentiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

# {"mean", "low", "high"}; a difference has "relative" (to the score before) too
Interval = dict[str, float | None]

_RESAMPLES, _LEVEL, _SEED = 2000, 0.95, 0
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


def _resampled(statistics: list[Statistic], resamples: int, seed: int) -> list[np.ndarray]:
    """Per statistic its value in each resample, (resamples,)."""
    sizes = {len(s.columns) for s in statistics}
    if len(sizes) > 1:
        raise ValueError(f"scores of one comparison need equal numbers of rows, got {sorted(sizes)}")
    n = sizes.pop() if sizes else 0
    if not n:
        raise ValueError("no rows to resample; the held-out set is empty")
    columns = np.concatenate([s.columns for s in statistics], axis=1)
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
