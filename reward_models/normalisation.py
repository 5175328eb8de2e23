"""Scores brought to mean 0 and standard deviation 1: over all training so far, over the call, or within groups.

Every way is one affine map per row, normalised = (score - shift) * scale, so that the increments of a dense reward can
follow it. Standard deviations are those of the population (divided by n). Where all scores are equal, scale is exactly
0 and the normalised score 0: nothing is added to the deviation, so no score depends on the size of such a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

NORMALISATIONS = ("running", "batch", "group")
_ROUNDING = 1e-9  # a deviation below this part of the mean is rounding, not spread


@dataclass
class Moments:
    """Count, mean and sum of squared deviations, merged batch by batch (Chan, Golub and LeVeque 1979, eq. 2.1)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, other: Moments) -> None:
        if not other.count:
            return
        count, delta = self.count + other.count, other.mean - self.mean
        self.squares += other.squares + delta * delta * (self.count * other.count / count)
        self.mean += delta * (other.count / count)
        self.count = count

    def affine(self) -> tuple[float, float]:
        """(shift, scale); nothing known yet: (0, 1), which changes nothing. ValueError for squares beyond float64."""
        if not self.count:
            return 0.0, 1.0
        if not math.isfinite(self.squares):
            raise ValueError("the scores are so large that their variance overflows; scale them down")
        deviation = math.sqrt(self.squares / self.count)
        return self.mean, 1 / deviation if deviation > _ROUNDING * abs(self.mean) else 0.0

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Moments:
        return Moments(int(state["count"]), float(state["mean"]), float(state["squares"]))


def moments_of(values: np.ndarray, reduce: Callable[[np.ndarray], np.ndarray] | None = None) -> Moments:
    """Moments of (N,) scores without the NaNs, in two passes; `reduce` sums an array over processes."""
    known = values[~np.isnan(values)]
    with np.errstate(over="ignore"):
        sums = np.array([len(known), known.sum()], dtype=float)
    if reduce is not None:
        sums = reduce(sums)
    count, total = sums.tolist()
    mean = total / count if count else 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # `affine` refuses it
        squares = np.array([np.square(known - mean).sum()])
    if reduce is not None:
        squares = reduce(squares)
    return Moments(int(count), mean, float(squares[0]))


def in_groups(values: np.ndarray, group_size: int | None) -> Iterator[np.ndarray]:
    """(N,) cut into runs of group_size, as the responses to one prompt lie together; None: one group."""
    if group_size is None:
        yield values
        return
    if len(values) % group_size:
        raise ValueError(f"{len(values)} completions do not make groups of {group_size}")
    yield from values.reshape(-1, group_size)


def is_constant(values: np.ndarray) -> bool:
    """Whether no spread is left beyond rounding."""
    return moments_of(values).affine()[1] == 0.0


def group_affine(values: np.ndarray, group_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """shift (N,) and scale (N,) of each row's group."""
    shift, scale = np.zeros_like(values), np.ones_like(values)
    for group, a, b in zip(
        in_groups(values, group_size), in_groups(shift, group_size), in_groups(scale, group_size), strict=True
    ):
        a[:], b[:] = moments_of(group).affine()
    return shift, scale
