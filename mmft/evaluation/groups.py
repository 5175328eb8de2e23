"""Where a metric moved: by kind of picture, as far as the data tell kinds apart.

Groups are made from references and columns of the data, never from the score before: pictures picked for a bad score
get better by chance alone (regression to the mean).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmft.evaluation import slices
from mmft.evaluation.captioning import metric_info
from mmft.evaluation.curves import is_number
from mmft.evaluation.statistics import mean, paired_intervals

LEAST = 10  # rows below which a group says nothing
Sample = Mapping[str, Any]


@dataclass
class Group:
    """Some pictures of one kind, and how the metric moved on them.

    Attributes:
        column: what the kind is a kind of.
        state: good or bad where the interval leaves out zero, else open.
    """

    column: str
    label: str
    size: int
    before: float
    after: float
    change: dict[str, float]
    state: str


def groups_of(samples: Sequence[Sample], name: str, level: float = 0.95) -> list[Group]:
    """How a metric moved in each group of pictures, columns in the order of the data.

    The intervals hold for all groups together (Bonferroni): of many groups some look worse by luck.
    """
    pairs = [(s, *scores_of(s, name)) for s in samples]
    pairs = [(s, old, new) for s, old, new in pairs if is_number(old) and is_number(new)]
    kinds = [kind for kind in _kinds([s for s, _, _ in pairs]) if len(kind[2]) >= LEAST]
    better = metric_info(name).better or 1
    found = []
    for column, label, rows in kinds:
        old, new = (np.array([pairs[i][side] for i in rows], dtype=float) for side in (1, 2))
        stricter = 1 - (1 - level) / len(kinds)
        change = paired_intervals({"": mean(old)}, {"": mean(new)}, level=stricter)[""]
        low, high = sorted((better * change["low"], better * change["high"]))
        state = "good" if low > 0 else "bad" if high < 0 else "open"
        found.append(Group(column, label, len(rows), float(old.mean()), float(new.mean()), change, state))
    return found


def scores_of(sample: Sample, name: str) -> tuple[Any, Any]:
    """A metric of one sample, before and after; None where it was not scored."""
    return (sample.get("scores_before") or {}).get(name), (sample.get("scores_after") or {}).get(name)


def _kinds(samples: Sequence[Sample]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(column, group, row numbers); columns that sort nothing are left out."""
    said = [s["columns"] if isinstance(s.get("columns"), dict) else {} for s in samples]
    columns = {name: [row.get(name) for row in said] for name in dict.fromkeys(name for row in said for name in row)}
    columns["words per reference"] = [_reference_length(s) for s in samples]
    for name, values in columns.items():
        try:
            kinds = slices.groups_of(name, values)
        except ValueError:
            continue
        for label, rows in kinds.items() if len(kinds) > 1 else ():
            yield name.replace("_", " "), label, rows


def _reference_length(sample: Sample) -> float | None:
    references = [r for r in sample.get("references") or [] if isinstance(r, str)]
    return sum(len(r.split()) for r in references) / len(references) if references else None
