"""``key.sub=value`` of the command line, laid over what a file says."""

from __future__ import annotations

from typing import Any

from mmft.recipe.messages import show
from mmft.recipe.strict_yaml import COMMAND_LINE, EXTENDS, Document, Walk, compose, dotted, parse_key


def override(document: Document, text: str) -> None:
    """Apply one ``key.sub=value``; the value is read as YAML. The last one of a key wins."""
    name, equals, raw = text.partition("=")
    name = name.strip()
    if not equals or not name or not all(name.split(".")):
        document.add(COMMAND_LINE, f"{text!r}: expected key.sub=value, for example train.steps=10")
        return
    if name == EXTENDS:
        document.add(
            COMMAND_LINE, f"{EXTENDS}: got {show(raw)}, expected it in the file; here, name that recipe itself"
        )
        return
    key = parse_key(name)
    before = len(document.found)
    node = compose(document, raw, COMMAND_LINE)
    if len(document.found) > before:
        return
    here: Any = document.data
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(part, int):
            if not isinstance(here, list) or part >= len(here):
                length = len(here) if isinstance(here, list) else 0
                said = f"{name}: got item {part}, but {dotted(key[:depth])} has {length} in the file"
                document.add(COMMAND_LINE, said)
                return
        elif not isinstance(here, dict):
            said = f"{name}: {dotted(key[:depth])} is {show(here)}, expected a section with keys"
            document.add(COMMAND_LINE, said)
            return
        if last:
            document.forget(key)
            whole = document.whole
            here[part] = None if node is None else Walk(document, COMMAND_LINE).value(node, key)
            if document.whole != whole:  # too much to be read in full
                document.spoilt.add(key)
            document.places[key] = COMMAND_LINE
        elif isinstance(here, dict) and here.get(part) is None and isinstance(key[depth + 1], str):
            here[part] = {}
            document.places[key[: depth + 1]] = COMMAND_LINE
        if not last:
            here = here.get(part) if isinstance(here, dict) else here[part]
