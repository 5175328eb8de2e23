"""What a reward function returned, as an array; and the policies for values that are no finite number.

Reward functions are other people's code. Whatever comes back is either understood or refused by the name of the reward
and the row, before it reaches a gradient.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

POLICIES = ("raise", "drop", "zero")


class Scored(NamedTuple):
    """What a reward may return instead of a list: its values, and columns that are only logged, as parts NAME/KEY."""

    values: Sequence[float | None]
    logged: Mapping[str, Sequence[float | None]] = {}


class Values(NamedTuple):
    """values (N,) float64, NaN = no opinion; bad (N,) bool: was not finite, and the policy let it pass as NaN or 0."""

    values: np.ndarray
    bad: np.ndarray


def row_name(samples: Mapping[str, Any], i: int) -> str:
    """How an error names a row: by its place, and by its id where there is one."""
    ids = samples.get("id")
    return f"row {i}" if ids is None else f"row {i} (id {ids[i]!r})"


def read_values(name: str, returned: Any, rows: int, samples: Mapping[str, Any], policy: str = "raise") -> Values:
    """(N,) numbers from a list, tuple, array or tensor of N numbers or Nones.

    policy for NaN and infinities: raise; drop: NaN here, and the row is marked; zero: 0 here, and the row is marked.
    Anything else (text, a wrong number of values, a wrong shape) is a mistake in the reward and raises ValueError
    under every policy.
    """
    if hasattr(returned, "detach"):  # a torch tensor, without importing torch here
        returned = returned.detach().cpu().double().numpy()
    if isinstance(returned, np.ndarray):
        if returned.ndim != 1:
            raise ValueError(f"reward {name!r} returned an array of shape {returned.shape}, expected ({rows},)")
        returned = returned.tolist()
    if not isinstance(returned, Sequence) or isinstance(returned, str | bytes):
        raise ValueError(f"reward {name!r} returned {type(returned).__name__}, expected a list of {rows} numbers")
    if len(returned) != rows:
        raise ValueError(f"reward {name!r} returned {len(returned)} values for {rows} completions")
    out, bad = np.full(rows, np.nan), np.zeros(rows, dtype=bool)
    for i, value in enumerate(returned):
        if value is None:
            continue
        number = value if type(value) is float else _number(value)
        if number is None:
            raise ValueError(
                f"reward {name!r}, {row_name(samples, i)}: returned {value!r} ({type(value).__name__}), "
                "expected a number or None"
            )
        if math.isfinite(number):
            out[i] = number
        elif policy == "raise":
            raise ValueError(
                f"reward {name!r}, {row_name(samples, i)}: returned {value!r}; rewards must be finite (None = no "
                "opinion; nonfinite: drop leaves such rows out of the update, zero counts them as 0)"
            )
        else:
            out[i], bad[i] = (0.0 if policy == "zero" else np.nan), True
    return Values(out, bad)


def _number(value: Any) -> float | None:
    """Python numbers, numpy scalars and tensors of one element as a float; None for anything else."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except OverflowError:  # an integer beyond float64
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        return None


def wait_for(returned: dict[str, Any]) -> dict[str, Any]:
    """The same dict with awaitables replaced by their results; they run concurrently, in one new event loop.

    An exception gets a note with the reward's name and keeps its type.
    """
    waiting = {name: value for name, value in returned.items() if inspect.isawaitable(value)}
    if not waiting:
        return returned
    import asyncio  # here: it takes as long to import as half of numpy

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        results = asyncio.run(_gather(waiting))
    else:  # called from a notebook or a server: their loop is busy with us, so ours gets a thread
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            results = pool.submit(asyncio.run, _gather(waiting)).result()
    return returned | results


async def _gather(waiting: dict[str, Awaitable[Any]]) -> dict[str, Any]:
    import asyncio

    return dict(zip(waiting, await asyncio.gather(*(_noted(*item) for item in waiting.items())), strict=True))


async def _noted(name: str, waiting: Awaitable[Any]) -> Any:
    try:
        return await waiting
    except Exception as error:
        error.add_note(f"in reward {name!r}")
        raise
