"""Pictures in groups by what a column of the data says of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

_SHOWN = 20  # groups of one column; the smaller ones are taken together
_FEW = 8  # a column of numbers with more different values is cut at its quartiles
_NONE = "(none)"


def groups_of(column: str, values: Sequence[Any]) -> dict[str, np.ndarray]:
    """Label -> places of the pictures, (n,) int.

    Texts and flags group by value (of more than 20, the rare ones together), numbers of more than eight values by
    quartile, lists by their length.

    Raises:
        ValueError: every one of many pictures has a value of its own.
    """
    sizes = [len(value) if isinstance(value, list | tuple) else _known(value) for value in values]
    numbers = [_number(value) for value in sizes if value is not None]
    if numbers and all(number is not None for number in numbers) and len(set(numbers)) > _FEW:
        labels = _quartiles(sizes)
    else:
        labels = [_NONE if value is None else str(value) for value in sizes]
    counted = Counter(labels).most_common()
    if len(counted) > _SHOWN:
        kept = {label for label, times in counted[: _SHOWN - 1] if times > 1}
        if not kept:
            raise ValueError(f"column {column!r} has another value for every picture; it makes no groups")
        labels = [label if label in kept else f"({len(counted) - len(kept)} others)" for label in labels]
    order = sorted(set(labels), key=_by_value)
    return {label: np.flatnonzero([own == label for own in labels]) for label in order}


def _known(value: Any) -> Any:
    """None for what stands for no value: an empty cell, not-a-number."""
    return None if value == "" or (isinstance(value, float) and math.isnan(value)) else value


def _number(value: Any) -> float | None:
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if number is not None and math.isfinite(number) else None


def _quartiles(values: Sequence[Any]) -> list[str]:
    """Labels such as "12 to 15.5"; the lower end is left out of all but the first."""
    known = np.array([np.nan if value is None else float(value) for value in values])
    edges = np.unique(np.nanquantile(known, [0, 0.25, 0.5, 0.75, 1]))
    place = np.clip(np.searchsorted(edges, known, side="left") - 1, 0, max(0, len(edges) - 2))
    return [
        _NONE if np.isnan(value) else f"{edges[i]:g} to {edges[min(i + 1, len(edges) - 1)]:g}"
        for value, i in zip(known, place, strict=True)
    ]


def _by_value(label: str) -> tuple[bool, float, str]:
    number = _number(label.split(" to ")[0])
    return label.startswith("("), float("inf") if number is None else number, label
