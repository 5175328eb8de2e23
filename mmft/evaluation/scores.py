"""What a metric suite is given and what it finds: scores with intervals, differences between two models, slices."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmft.evaluation import statistics
from mmft.evaluation.captioning import METRICS, distinct_difference, distinct_interval
from mmft.evaluation.statistics import Interval, Statistic
from reward_models import DocumentFrequencies

_LEVEL = 0.95
_FEW = 5  # pictures; drawn again and again, fewer vary less than as many others would: no interval is better
_NO_INTERVAL: Interval = {"low": None, "high": None}


@dataclass(frozen=True)
class Captioned:
    """N captions and what is known of their pictures.

    Attributes:
        ids: (N,) what the data call the pictures.
        captions: (N,) the captions that are scored.
        references: (N,) lists of human captions.
        samples: (N,) several captions of each picture by the same model, for measures of variety.
        ended: (N,) whether the model ended the caption by itself.
        columns: name -> (N,) further things that the data say of each picture.
        claims: caption, place -> (true claims, claims), where the world is known exactly.
        picture: place -> the opened picture.
        training: document frequencies of the training captions.
        objects: a word -> its synonyms, of the objects that count as hallucinated; None = derived from captions.
        clip: folder or name of a CLIP model.
    """

    ids: Sequence[Any]
    captions: Sequence[str]
    references: Sequence[Sequence[str]]
    samples: Sequence[Sequence[str]] | None = None
    ended: Sequence[bool] | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    claims: Callable[[str, int], tuple[int, int]] | None = None
    picture: Callable[[int], Any] | None = None
    training: DocumentFrequencies | None = None
    objects: Mapping[str, Sequence[str]] | None = None
    clip: str | Path | None = None


@dataclass
class Scores:
    """What metrics say of N captions. A metric has one entry, or several, by name.

    Attributes:
        rows: metric -> (N,) its value for each picture; NaN = none.
        sums: metric -> the score of all pictures as a function of sums over pictures.
        items: metric -> (N,) lists of things, of which the share of different ones is the score.
        numbers: metric -> a score of all pictures that has no interval.
        signatures: metric -> how exactly it is computed.
        left_out: metric -> why it could not be computed here.
    """

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, Statistic] = field(default_factory=dict)
    items: dict[str, list[list[Hashable]]] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def summary(self, **options) -> dict[str, Interval]:
        """Metric -> {"mean", "low", "high"} (95 %); low and high are None where there is no interval: of numbers, and
        of fewer than five pictures."""
        found = statistics.intervals(self.sums, **options) if self.sums else {}
        found |= {name: distinct_interval(items, _LEVEL) for name, items in self.items.items()}
        found |= {name: {"mean": value} | _NO_INTERVAL for name, value in self.numbers.items()}
        few = _NO_INTERVAL if self.pictures < _FEW else {}
        return in_order({name: score | few for name, score in found.items() if np.isfinite(score["mean"])})

    @property
    def pictures(self) -> int:
        """N."""
        return len(next(iter([*self.rows.values(), *self.items.values()]), ()))

    def slice(self, places: np.ndarray) -> dict[str, Statistic]:
        """The sums of some pictures alone."""
        return {name: Statistic(sums.columns[places], sums.value) for name, sums in self.sums.items()}


def differences(other: Scores, scores: Scores, **options) -> dict[str, dict[str, float | None]]:
    """Metric -> scores - other: {"mean", "low", "high", "relative", "p", "p_holm"}. Row i is the same picture in both.

    The interval is of the paired bootstrap, p of the paired permutation test (two-sided), and p_holm is p corrected for
    the number of metrics.
    """
    shared, few = other.sums.keys() & scores.sums.keys(), _NO_INTERVAL if scores.pictures < _FEW else {}
    found = statistics.paired_intervals(other.sums, scores.sums, **options) if shared else {}
    p_values = statistics.paired_permutation(other.sums, scores.sums)
    for name in [name for name in scores.items if name in other.items]:
        found[name] = distinct_difference(other.items[name], scores.items[name], _LEVEL)
        p_values[name] = _distinct_p(other.items[name], scores.items[name])
    corrected = statistics.holm(p_values)
    return in_order(
        {
            name: {key: _finite(value) for key, value in (score | few).items()}
            | {"p": _finite(p_values[name]), "p_holm": _finite(corrected[name])}
            for name, score in found.items()
            if np.isfinite(score["mean"])
        }
    )


def slices(
    scores: Scores, groups: Mapping[str, np.ndarray], other: Scores | None = None, **options
) -> dict[str, dict[str, Any]]:
    """Label -> {"rows": n, "scores", "to_the_rest", "against"}: metric -> interval.

    "scores" are of the slice's pictures, "to_the_rest" the difference to all other pictures, and "against" the paired
    difference to `other`, where that is given. Fewer than five pictures get no interval.
    """
    if not scores.sums:
        raise ValueError("slices need a metric that has a value for each picture, such as cider")
    every = np.arange(sum(map(len, groups.values())))
    found = {}
    for label, places in groups.items():
        here, rest = scores.slice(places), scores.slice(np.setdiff1d(every, places))
        kinds = {"scores": statistics.intervals(here, **options)}
        if len(places) < len(every):
            kinds["to_the_rest"] = statistics.separate_intervals(here, rest, **options)
        if other is not None:
            kinds["against"] = statistics.paired_intervals(other.slice(places), here, **options)
        few = _NO_INTERVAL if 0 < len(every) - len(places) < _FEW or len(places) < _FEW else {}
        found[label] = {"rows": len(places)} | {
            kind: in_order(
                {name: {key: _finite(value) for key, value in (score | few).items()} for name, score in by_name.items()}
            )
            for kind, by_name in kinds.items()
        }
    return found


def in_order(found: Mapping[str, Any]) -> dict[str, Any]:
    """In the order of `METRICS`, unknown ones last."""
    order = {name: i for i, name in enumerate(METRICS)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def _distinct_p(other: list[list[Hashable]], items: list[list[Hashable]]) -> float:
    """The permutation test of a share of different things: 999 swaps, for each has to be counted anew."""
    numbers: dict[Hashable, int] = {}
    sides = []
    for side in (other, items):
        flat = np.array([numbers.setdefault(item, len(numbers)) for row in side for item in row], dtype=np.int64)
        sides.append((flat, np.repeat(np.arange(len(side)), [len(row) for row in side])))

    def share(swapped: np.ndarray) -> float:
        kept = [flat[swapped[row] == taken] for taken, (flat, row) in enumerate(sides)]
        chosen = np.concatenate(kept)
        return np.count_nonzero(np.bincount(chosen)) / max(1, len(chosen))

    return statistics.permutation_test(lambda swapped: share(~swapped) - share(swapped), len(items))


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
