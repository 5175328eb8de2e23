"""How much a part counts: a number, or a weight that follows the step, the sample's columns or the other parts.

    0.5                                                               the same for every row and step
    {schedule: linear, from: 0.0, to: 1.0, steps: 40, start: 0}       by step: constant, linear or cosine
    {column: confidence, scale: 1.0}                                  by row: scale x the number in that column
    {when: {kind: question}, weight: 1.0, otherwise: 0.0}             by row: where the columns hold these values
    {share: 0.3}                                                      adapted: 30 % of what moves the advantages

The last one is kept by `Shares`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from reward_models.normalisation import in_groups, is_constant
from reward_models.returned import row_name

Reduce = Callable[[np.ndarray], np.ndarray]

SCHEDULES = ("constant", "linear", "cosine")
MEMORY = 0.9  # of the running spreads: the last ten steps or so count
MAX_FACTOR = 1.25  # an adapted weight grows by no more than this per step
SMALLEST = 1e-3  # a spread counts as at least this part of the whole, so that no weight passes 1000 |share|


@dataclass(frozen=True)
class Scheduled:
    """From `begin` at step `start` to `end` at step `start + steps`, and `end` from then on.

    linear: a straight line; cosine: half a period, flat at both ends; constant: `begin` before step `start`, `end`
    from that step on (`steps` is not read).
    """

    schedule: str = "linear"
    begin: float = 0.0
    end: float = 1.0
    steps: int = 1
    start: int = 0

    def at(self, step: int) -> float:
        if self.schedule == "constant":
            return self.end if step >= self.start else self.begin
        done = min(max((step - self.start) / self.steps, 0.0), 1.0)
        if self.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.end if done == 1 else self.begin + (self.end - self.begin) * done

    def __str__(self) -> str:
        span = f"@{self.start}" if self.schedule == "constant" else f"@{self.start}..{self.start + self.steps}"
        return f"{self.schedule}({self.begin:g}->{self.end:g}{span})"


@dataclass(frozen=True)
class ByColumn:
    """`scale` times the number that the row has in `column`."""

    column: str
    scale: float = 1.0

    def of(self, columns: Mapping[str, Any], rows: int) -> np.ndarray:
        """(rows,) weights. Raises ValueError for a missing column or an entry that is no finite number."""
        out = np.empty(rows)
        for i, value in enumerate(_column(columns, self.column)):
            if not _is_number(value):
                raise ValueError(
                    f"{row_name(columns, i)}: weight column {self.column!r} is {value!r}, expected a number"
                )
            out[i] = self.scale * float(value)
        return out

    def __str__(self) -> str:
        return f"{self.scale:g}*{self.column}"


@dataclass(frozen=True)
class When:
    """`weight` for rows whose columns equal all these values, `otherwise` for the others."""

    when: tuple[tuple[str, Any], ...]
    weight: float = 1.0
    otherwise: float = 0.0

    def of(self, columns: Mapping[str, Any], rows: int) -> np.ndarray:
        """(rows,) weights. Raises ValueError for a missing column."""
        wanted = [(_column(columns, name), value) for name, value in self.when]
        return np.array(
            [self.weight if all(_equal(c[i], v) for c, v in wanted) else self.otherwise for i in range(rows)],
            dtype=float,
        )

    def __str__(self) -> str:
        condition = ",".join(f"{name}={value!r}" for name, value in self.when)
        return f"{self.weight:g} when {condition} else {self.otherwise:g}"


@dataclass(frozen=True)
class Share:
    """|share| of the total spread, between 0 and 1; below zero for a part that counts against the response."""

    share: float

    def __str__(self) -> str:
        return f"share({self.share:g})"


Weight = float | Scheduled | ByColumn | When | Share


def parse_weight(weight: Any) -> Weight:
    """A weight from plain data, as a recipe holds it. Raises ValueError saying which forms there are."""
    if isinstance(weight, Scheduled | ByColumn | When | Share):
        return weight
    if _is_number(weight):
        return float(weight)
    if not isinstance(weight, Mapping):
        raise ValueError(f"weight must be a finite number or one of {_FORMS}, got {weight!r}")
    for key, (allowed, build) in _PARSERS.items():
        if key in weight:
            unknown = [name for name in weight if name not in allowed]
            if unknown:
                raise ValueError(f"weight: unknown key {unknown[0]!r} beside {key!r}; allowed: {', '.join(allowed)}")
            return build(weight)
    raise ValueError(f"weight {dict(weight)!r}: expected a finite number or one of {_FORMS}")


def _scheduled(weight: Mapping[str, Any]) -> Scheduled:
    if weight["schedule"] not in SCHEDULES:
        raise ValueError(f"weight.schedule is {weight['schedule']!r}, expected one of {', '.join(SCHEDULES)}")
    steps, start = weight.get("steps", 1), weight.get("start", 0)
    for name, value, least in (("steps", steps, 1), ("start", start, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"weight.{name} is {value!r}, expected a whole number >= {least}")
    return Scheduled(weight["schedule"], _number(weight, "from", 0.0), _number(weight, "to", 1.0), steps, start)


def _by_column(weight: Mapping[str, Any]) -> ByColumn:
    if not isinstance(weight["column"], str):
        raise ValueError(f"weight.column is {weight['column']!r}, expected the name of a column")
    return ByColumn(weight["column"], _number(weight, "scale", 1.0))


def _when(weight: Mapping[str, Any]) -> When:
    when = weight["when"]
    if not isinstance(when, Mapping) or not when or not all(isinstance(name, str) for name in when):
        raise ValueError(f"weight.when is {when!r}, expected columns with their values, such as {{kind: question}}")
    return When(tuple(when.items()), _number(weight, "weight", 1.0), _number(weight, "otherwise", 0.0))


def _share(weight: Mapping[str, Any]) -> Share:
    share = _number(weight, "share", 0.0)
    if not 0 < abs(share) < 1:
        raise ValueError(f"weight.share is {share!r}, expected a number between 0 and 1, or -1 and 0 for a penalty")
    return Share(share)


_PARSERS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Weight]]] = {
    "schedule": (("schedule", "from", "to", "steps", "start"), _scheduled),
    "share": (("share",), _share),
    "column": (("column", "scale"), _by_column),
    "when": (("when", "weight", "otherwise"), _when),
}
_FORMS = "{schedule: ...}, {column: ...}, {when: ...}, {share: ...}"


def form_of(weight: Weight) -> str:
    """The key by which a recipe tells the form of a weight; "number" for a number."""
    kinds = {Scheduled: "schedule", Share: "share", ByColumn: "column", When: "when"}
    return kinds.get(type(weight), "number")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _number(weight: Mapping[str, Any], key: str, default: float) -> float:
    value = weight.get(key, default)
    if not _is_number(value):
        raise ValueError(f"weight.{key} is {value!r}, expected a finite number")
    return float(value)


def _column(columns: Mapping[str, Any], name: str) -> Sequence[Any]:
    if columns.get(name) is None:
        there = ", ".join(sorted(key for key, column in columns.items() if column is not None)) or "none"
        raise ValueError(f"the weight reads column {name!r}, which the samples do not have; there are: {there}")
    return columns[name]


def _equal(value: Any, wanted: Any) -> bool:
    # True == 1 in Python, but a column of flags is not a column of numbers.
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(np.array_equal(value, wanted))


class Shares:
    """Adapts the weights of `Share` parts, so that each holds its share of the total spread.

    The spread s of a part is the root of the mean variance of what it contributes, within the groups of responses to
    one prompt (within the batch without groups): a constant offset trains nothing, so it counts for nothing. With R
    the sum of the shares, F the sum of the spreads of all other parts and W = F / (1 - R) the whole,
    weight = share * W / max(s, now, SMALLEST * W).

    s and F are from running variances over training calls (`MEMORY`), which begin with the first call in which the
    part has any spread, as it is: until then it has no weight and adds nothing. `now` is the spread of this call alone:
    a penalty that fires once in a hundred calls makes its share of the whole when it does, not ten times as much. A
    weight falls at once and rises by at most a factor `MAX_FACTOR` per call.
    """

    def __init__(self, shares: Mapping[str, float], others: Sequence[str]) -> None:
        self.shares, self.others = dict(shares), list(others)
        if self.shares and not self.others:
            raise ValueError("every weight is a share; give at least one reward a weight of another kind to share with")
        if sum(map(abs, self.shares.values())) >= 1:
            raise ValueError(f"shares {self.shares} take everything; together they must stay below 1")
        self.variances: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def update(self, contributions: Mapping[str, np.ndarray], group_size: int | None, reduce: Reduce | None) -> None:
        """contributions: part -> (N,) weighted scores; scores before weighting for the parts with a share.

        NaN where a part has no opinion. `reduce` sums an array over processes.
        """
        names = [*self.shares, *self.others]
        sums = np.array([_squares(name, contributions[name], group_size) for name in names])
        if reduce is not None:
            sums = reduce(sums)
        now = dict.fromkeys(names, 0.0)
        for name, (squares, freedom) in zip(names, sums.tolist(), strict=True):
            if freedom and (squares or name in self.variances):
                now[name] = squares / freedom
                before = self.variances.get(name, now[name])
                self.variances[name] = MEMORY * before + (1 - MEMORY) * now[name]
        spread = {name: math.sqrt(self.variances.get(name, 0.0)) for name in names}
        whole = sum(spread[name] for name in self.others) / (1 - sum(map(abs, self.shares.values())))
        for name, share in self.shares.items():
            if not whole or name not in self.variances:
                continue
            weight = abs(share) * whole / max(spread[name], math.sqrt(now[name]), SMALLEST * whole)
            if name in self.weights:
                weight = min(weight, abs(self.weights[name]) * MAX_FACTOR)
            self.weights[name] = math.copysign(weight, share)

    def state(self) -> dict[str, dict[str, float]]:
        return {"variances": dict(self.variances), "weights": dict(self.weights)}

    def load_state(self, state: Mapping[str, Mapping[str, float]]) -> None:
        self.variances, self.weights = dict(state["variances"]), dict(state["weights"])


def _squares(name: str, values: np.ndarray, group_size: int | None) -> tuple[float, float]:
    """Squared deviations from the mean of their group, summed, and the degrees of freedom behind them."""
    squares = freedom = 0.0
    for group in in_groups(values, group_size if group_size and group_size > 1 else None):
        known = group[~np.isnan(group)]
        if len(known) > 1:
            freedom += len(known) - 1
            try:
                squares += 0.0 if is_constant(known) else float(np.square(known - known.mean()).sum())
            except ValueError as error:
                raise ValueError(f"reward {name!r}, for its share: {error}") from None
    return squares, freedom
