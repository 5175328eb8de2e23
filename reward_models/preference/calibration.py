"""Is a preference right as often as it says? Temperature, expected calibration error, accuracy with its interval.

Everything is about differences d = r(chosen) - r(rejected), (N,) float64 in the unit of the reward, numpy alone. The
Bradley-Terry model says P(chosen is better) = sigmoid(d / T); its confidence is max(p, 1 - p), and it is right where
d > 0. A tie (d = 0) is half right, with confidence one half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

BINS = 15


class Bin(NamedTuple):
    """One row of the reliability table: pairs whose confidence lies in (low, high], and how often they are right."""

    low: float
    high: float
    pairs: int
    confidence: float  # mean; NaN in an empty bin
    accuracy: float


def preference_loss(differences: np.ndarray, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood in nats, log(1 + exp(-d / T))."""
    return float(np.mean(np.logaddexp(0.0, -_checked(differences) / temperature)))


def fit_temperature(differences: np.ndarray, low: float = 1e-3, high: float = 1e3) -> float:
    """The temperature T that makes held-out pairs likeliest (Guo et al. 2017, arXiv 1706.04599, section 4.2).

    The aim is t = (N + 1) / (N + 2) instead of certainty, as Platt (1999) proposes: without it, N pairs that are all
    right would ask for T = 0. The loss, mean of t * log(1 + exp(-d / T)) + (1 - t) * log(1 + exp(d / T)), is convex in
    1 / T; bisection finds where its slope, mean of d * (1 - t - sigmoid(-d / T)), changes sign. A reward that knows
    nothing gets `high`.
    """
    d = _checked(differences)
    spare = 1 / (len(d) + 2)
    flattest, steepest = 1.0 / high, 1.0 / low
    for _ in range(100):
        middle = math.sqrt(flattest * steepest)
        if np.mean(d * (spare - _sigmoid(-d * middle))) < 0:
            flattest = middle
        else:
            steepest = middle
    return 1.0 / flattest


def accuracy(differences: np.ndarray) -> float:
    """Share of pairs in which the chosen text gets the higher reward; a tie counts one half."""
    return float(np.mean(_right(_checked(differences))))


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share seen in n independent trials (Wilson 1927).

    (s + z²/2n ± z sqrt(s(1-s)/n + z²/4n²)) / (1 + z²/n): within [0, 1] and of positive width even at s = 0 or 1.
    """
    if n < 1:
        raise ValueError("an interval needs at least one pair")
    centre = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def reliability_table(differences: np.ndarray, temperature: float = 1.0, bins: int = BINS) -> list[Bin]:
    """Pairs by confidence, in bins of equal width over [1/2, 1], where the confidences of a choice of two lie."""
    d = _checked(differences)
    confidence = _sigmoid(np.abs(d) / temperature)
    right = _right(d)
    edges = np.linspace(0.5, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    table = []
    for i in range(bins):
        inside = place == i
        count = int(inside.sum())
        mean = float(confidence[inside].mean()) if count else math.nan
        share = float(right[inside].mean()) if count else math.nan
        table.append(Bin(float(edges[i]), float(edges[i + 1]), count, mean, share))
    return table


def expected_calibration_error(differences: np.ndarray, temperature: float = 1.0, bins: int = BINS) -> float:
    """Sum over bins of |B|/N * |accuracy(B) - confidence(B)| (Naeini et al. 2015; Guo et al. 2017, equation 3)."""
    table = [row for row in reliability_table(differences, temperature, bins) if row.pairs]
    n = sum(row.pairs for row in table)
    return sum(row.pairs / n * abs(row.accuracy - row.confidence) for row in table)


def pair_metrics(differences: np.ndarray, temperature: float = 1.0, kinds: Sequence[str] = ()) -> dict[str, Any]:
    """Accuracy with its 95 % interval, calibration error and loss of N pairs, and the accuracy per kind of pair."""
    d = _checked(differences)
    by_kind = {}
    for kind in sorted(set(kinds) - {""}):
        own = d[np.array([k == kind for k in kinds])]
        by_kind[kind] = {"accuracy": accuracy(own), "pairs": len(own)}
    low, high = wilson_interval(accuracy(d), len(d))
    return {
        "pairs": len(d),
        "accuracy": accuracy(d),
        "accuracy_low": low,
        "accuracy_high": high,
        "ece": expected_calibration_error(d, temperature),
        "loss": preference_loss(d, temperature),
        "by_kind": by_kind,
    }


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def _right(d: np.ndarray) -> np.ndarray:
    return (np.sign(d) + 1) / 2


def _checked(differences: np.ndarray) -> np.ndarray:
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or not len(d):
        raise ValueError(f"expected the differences of at least one pair, (N,), got shape {d.shape}")
    if not np.isfinite(d).all():
        raise ValueError(f"the difference of pair {int(np.flatnonzero(~np.isfinite(d))[0])} is not finite")
    return d
