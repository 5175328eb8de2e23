"""What a reward object was made with, read off the object: so that a recipe can make it again."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward_models.own import parameters

_LONGEST = 20_000  # characters of an option; a recipe with more could not be read again


def options_of(function: Any) -> dict[str, Any]:
    """The options of a reward object that are not the default, as plain data.

    An option ``x`` of the constructor is the object's attribute ``_x`` (what was given, where `x` holds what was made
    of it) or ``x``. Left out is what is no plain data, such as document frequencies, what is too long for a recipe,
    such as everybody's captions, and what the object did not keep. Of a `functools.partial` its keywords.
    """
    if isinstance(function, functools.partial):
        said = {key: _short(value) for key, value in function.keywords.items()}
        return {key: value for key, value in said.items() if value is not _NOT_PLAIN}
    if isinstance(function, type) or inspect.isroutine(function):
        return {}
    try:
        named = parameters(type(function))
    except (TypeError, ValueError):  # written in C
        return {}
    kept = vars(function) if hasattr(function, "__dict__") else {}
    found: dict[str, Any] = {}
    for name, parameter in named.items():
        value = _short(kept.get(f"_{name}", kept.get(name, _NOT_PLAIN)))
        if value is not _NOT_PLAIN and value != _plain(parameter.default):
            found[name] = value
    return found


_NOT_PLAIN = object()


def _short(value: Any) -> Any:
    plain = _plain(value)
    return plain if plain is _NOT_PLAIN or len(json.dumps(plain)) <= _LONGEST else _NOT_PLAIN


def _plain(value: Any) -> Any:
    """The value as JSON and YAML have it; `_NOT_PLAIN` where they have no such thing."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        found = {key: _plain(item) for key, item in value.items()}
        plain = all(isinstance(key, str) and item is not _NOT_PLAIN for key, item in found.items())
        return found if plain else _NOT_PLAIN
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item) for item in (value if isinstance(value, list | tuple) else sorted(value, key=repr))]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else items
    if isinstance(value, float) and not math.isfinite(value):
        return _NOT_PLAIN
    return value if value is None or type(value) in (bool, int, float, str) else _NOT_PLAIN
