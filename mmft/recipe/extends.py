"""``extends: other.yaml``: a recipe that says only what is different in it.

Sections are merged key by key; everything else, lists and null included, takes the place of what the other recipe
says. The other recipe may extend a third one. Paths count from the file they are written in.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from mmft.recipe.messages import show
from mmft.recipe.strict_yaml import EXTENDS, Document, Key, Place, load_document, read_document

MAX_CHAIN = 8  # recipes; more than a few cannot be followed by a reader


def load_extended(path: str | Path) -> Document:
    """Read a recipe and all that it extends into one document; each key keeps the place where it was written.

    Raises:
        RecipeError: the recipe itself cannot be read. One that it extends and that cannot be used is a problem in
            the document, which is then not ``whole``.
    """
    document = load_document(path)
    document.extendable = True
    chain, given = [Path(path)], _taken(document)
    while given is not None:
        value, place = given
        base, wrong = _base(chain, value)
        if wrong:
            document.add(place, f"{EXTENDS}: got {show(value)}, {wrong}")
            document.whole = False
            break
        chain.append(base)
        lower = read_document(base)
        given = _taken(lower)
        _lay_under(document, lower)
    return document


def _taken(document: Document) -> tuple[Any, Place] | None:
    """Takes ``extends`` out of a document; its value and place."""
    if EXTENDS not in document.data:
        return None
    place = document.place((EXTENDS,))
    document.forget((EXTENDS,))
    return document.data.pop(EXTENDS), place


def _base(chain: list[Path], given: Any) -> tuple[Path, str]:
    """The recipe that the last one of a chain extends, and what is wrong with that."""
    if not isinstance(given, str) or not given.endswith((".yaml", ".yml")):
        return Path(), "expected the path of another recipe, such as base.yaml"
    if len(chain) == MAX_CHAIN:
        return Path(), f"expected at most {MAX_CHAIN} recipes that extend one another"
    base = chain[-1].parent / given
    try:
        if not base.is_file():
            there = "no plain file" if base.exists() else "no such file"
            return base, f"{there}, expected a path as seen from this file{_nearest(base, given)}"
        circle = next((at for at, earlier in enumerate(chain) if earlier.resolve() == base.resolve()), None)
    except (OSError, ValueError) as error:
        return base, f"which cannot be read: {getattr(error, 'strerror', None) or error}"
    if circle is not None:
        names = " -> ".join(file.name for file in [*chain[circle:], base])
        return base, f"which comes back to itself ({names}), expected a recipe that does not extend this one"
    return base, ""


def _nearest(base: Path, given: str) -> str:
    beside = [path.name for path in base.parent.glob("*.y*ml")] if base.parent.is_dir() else []
    near = difflib.get_close_matches(base.name, beside, 1)
    return f", did you mean {Path(given).with_name(near[0])}?" if near else ""


def _lay_under(document: Document, base: Document) -> None:
    """Adds to a document what it leaves open and its base says, and the problems of the base."""
    document.sources += base.sources
    document.found |= base.found
    document.whole &= base.whole
    merged, places = _merged(document.data, base.data, ())
    document.data = merged
    taken = {key: place for key, place in base.places.items() if any(key[: len(top)] == top for top in places)}
    document.places = taken | document.places
    document.spoilt |= {key for key in base.spoilt if key in taken}


def _merged(over: dict[str, Any], under: dict[str, Any], at: Key) -> tuple[dict[str, Any], list[Key]]:
    """Two sections as one, and the keys that were taken over from the lower one."""
    result, taken = dict(over), []
    for name, value in under.items():
        key = (*at, name)
        if name not in over:
            result[name] = value
            taken.append(key)
        elif isinstance(over[name], dict) and isinstance(value, dict):
            result[name], below = _merged(over[name], value, key)
            taken += below
    return result, taken
