"""Several rewards as one: named parts, weights, and the checks that stop a broken reward before it trains anything.

A reward function has TRL's form, `f(prompts=..., completions=..., **columns) -> list[float | None]`; `columns` are the
columns of the data set as lists aligned with the completions, plus `ended`. None means: no opinion on this row.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reward_models.metrics.bleu import Bleu
from reward_models.metrics.cider import CiderD
from reward_models.metrics.ngrams import DocumentFrequencies

RewardFunction = Callable[..., Sequence[float | None]]


class RewardScores(NamedTuple):
    """total (N,) float64, always finite; parts: name -> (N,) float64, NaN where the part had no opinion."""

    total: np.ndarray
    parts: dict[str, np.ndarray]


class WeightedRewards:
    """Weighted sum of named rewards: `WeightedRewards([(name, function, weight), ...])`.

    A weight of 0 logs the part and leaves the total alone. A part that returns None for a row adds nothing there.
    Raises ValueError at once for a repeated name, a weight that is not a finite number, or no parts at all; and when
    called, for a part that returns the wrong number, type or a non-finite value, naming the reward and the row.
    """

    def __init__(self, parts: Sequence[tuple[str, RewardFunction, float]]) -> None:
        if not parts:
            raise ValueError("no rewards given; name at least one, for example ('cider_d', CiderD(df), 1.0)")
        names = [name for name, _, _ in parts]
        for name, function, weight in parts:
            if names.count(name) > 1:
                raise ValueError(f"reward name {name!r} is used {names.count(name)} times; names must differ")
            if not callable(function):
                raise ValueError(f"reward {name!r}: expected a function, got {type(function).__name__}")
            if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
                raise ValueError(f"reward {name!r}: weight must be a finite number, got {weight!r}")
        self.parts = [(name, function, float(weight)) for name, function, weight in parts]

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.parts]

    @property
    def signature(self) -> str:
        """One line per part: name, weight and what the part says of itself."""
        return "\n".join(
            f"{name} x {weight:g}: {getattr(function, 'signature', None) or _qualified_name(function)}"
            for name, function, weight in self.parts
        )

    def __call__(self, prompts: Any = None, completions: Sequence[Any] = (), **columns: Any) -> RewardScores:
        """Score N completions. Columns whose length is not N are refused, for they would be misaligned silently."""
        rows = len(completions)
        for key, column in {"prompts": prompts, **columns}.items():
            if isinstance(column, (list, tuple, np.ndarray)) and len(column) != rows:
                raise ValueError(f"column {key!r} has {len(column)} rows but there are {rows} completions")
        ids = columns.get("id")
        total = np.zeros(rows)
        scores = {}
        for name, function, weight in self.parts:
            values = _checked(name, function(prompts=prompts, completions=completions, **columns), rows, ids)
            scores[name] = values
            if weight:
                total += weight * np.nan_to_num(values, nan=0.0)
        return RewardScores(total, scores)


def _qualified_name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__


def _checked(name: str, returned: Any, rows: int, ids: Sequence[Any] | None) -> np.ndarray:
    """What a reward function returned, as (N,) float64 with NaN for None; anything else is refused."""
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()
        raise ValueError(f"reward {name!r} is asynchronous; give a plain function")
    if hasattr(returned, "detach"):  # a torch tensor, without importing torch here
        returned = returned.detach().cpu().float().numpy()
    if isinstance(returned, np.ndarray):
        if returned.ndim != 1:
            raise ValueError(f"reward {name!r} returned an array of shape {returned.shape}, expected ({rows},)")
        returned = returned.tolist()
    if not isinstance(returned, Sequence) or isinstance(returned, (str, bytes)):
        raise ValueError(f"reward {name!r} returned {type(returned).__name__}, expected a list of {rows} numbers")
    if len(returned) != rows:
        raise ValueError(f"reward {name!r} returned {len(returned)} values for {rows} completions")
    out = np.full(rows, np.nan)
    for i, value in enumerate(returned):
        if value is None:
            continue
        row = f"row {i}" if ids is None else f"row {i} (id {ids[i]!r})"
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            out[i] = float(value)  # also numpy scalars and tensors of one element
        except (TypeError, ValueError):
            raise ValueError(
                f"reward {name!r}, {row}: returned {value!r} ({type(value).__name__}), expected a number or None"
            ) from None
        if not math.isfinite(out[i]):
            raise ValueError(f"reward {name!r}, {row}: returned {value!r}; rewards must be finite (None = no opinion)")
    return out


def _cider_d(df: DocumentFrequencies | None, **options: Any) -> CiderD:
    if df is None:
        raise ValueError("document frequencies are needed (df=...): DocumentFrequencies.from_references(training refs)")
    return CiderD(df, **options)


def _bleu(df: DocumentFrequencies | None, **options: Any) -> Bleu:
    if df is not None:
        options.setdefault("tokenizer", df.tokenizer)
    return Bleu(**options)


BUILT_IN: dict[str, Callable[..., RewardFunction]] = {"cider_d": _cider_d, "bleu": _bleu}


def build_rewards(specs: Sequence[Mapping[str, Any]], df: DocumentFrequencies | None = None) -> WeightedRewards:
    """Rewards from plain data, as a recipe holds them: `[{"name": "cider_d", "weight": 1.0}, {"name": "bleu"}]`.

    name: `cider_d` (options eos, sigma, n, cache_size), `bleu` (n, smooth, eos, tokenizer, cache_size), or a function
    of your own as `package.module:function` or `path/to/file.py:function`, to which the options are bound as keyword
    arguments. weight defaults to 1. `as` renames the part in logs (default: the name, or the function's name).
    Raises ValueError naming the entry, with the nearest name for a mistyped one.
    """
    parts = []
    for i, spec in enumerate(specs):
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise ValueError(f"rewards[{i}]: expected a mapping with a 'name', got {spec!r}")
        options = {key: value for key, value in spec.items() if key not in ("name", "weight", "as")}
        name = spec["name"]
        try:
            if ":" in name:
                function, label = _own(name, options), name.rpartition(":")[2]
            else:
                function, label = _built_in(name)(df, **options), name
        except (TypeError, ValueError) as error:
            raise ValueError(f"rewards[{i}] ({name}): {error}") from error
        parts.append((spec.get("as", label), function, spec.get("weight", 1.0)))
    return WeightedRewards(parts)


def _built_in(name: str) -> Callable[..., RewardFunction]:
    if name in BUILT_IN:
        return BUILT_IN[name]
    near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown reward {name!r}; {hint}There are {', '.join(BUILT_IN)}, and your own as 'package.module:function' or "
        "'path/to/file.py:function'"
    )


def _own(path: str, options: dict[str, Any]) -> RewardFunction:
    """The function `module:function` or `file.py:function`, with options bound."""
    source, _, attribute = path.rpartition(":")
    if source.endswith(".py"):
        file = Path(source).resolve()
        if not file.is_file():
            raise ValueError(f"no such file: {source}")
        spec = importlib.util.spec_from_file_location(f"reward_file_{file.stem}", file)
        if spec is None or spec.loader is None:
            raise ValueError(f"{source} cannot be loaded as Python")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickling look a module up by its name
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise ValueError(f"cannot import {source!r}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        raise ValueError(f"{source} has no function {attribute!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if not options:
        return function

    def bound(*args: Any, **columns: Any) -> Sequence[float | None]:
        return function(*args, **columns, **options)

    bound.__name__ = bound.__qualname__ = f"{attribute}({', '.join(f'{k}={v!r}' for k, v in options.items())})"
    return bound
