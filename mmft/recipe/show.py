"""The resolved recipe as YAML that says beside each value where it came from: file and line, command line, default."""

from __future__ import annotations

from collections.abc import Iterator

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from mmft.recipe.root import Root
from mmft.recipe.strict_yaml import Document, Key

_COLUMN = 40  # where the comments begin, if the values let them


def annotated(recipe: Root, document: Document) -> str:
    """Every key of a recipe with its value and origin, without secrets; loading the text gives an equal recipe."""
    text = recipe.as_yaml()
    lines = text.splitlines()
    origins: dict[int, list[str]] = {}
    for key, line in _values(YAML(typ="safe", pure=True).compose(text), ()):
        origins.setdefault(line, []).append(str(document.places.get(key, "default")))
    for line, places in origins.items():
        lines[line] = f"{lines[line]:<{_COLUMN}}  # {', '.join(dict.fromkeys(places))}"
    return "\n".join(lines) + "\n"


def _values(node: Node, key: Key) -> Iterator[tuple[Key, int]]:
    """The key of each single value and the line, from 0, on which it ends."""
    if isinstance(node, MappingNode) and node.value:
        for name, value in node.value:
            yield from _values(value, (*key, name.value))
    elif isinstance(node, SequenceNode) and node.value:
        for index, value in enumerate(node.value):
            yield from _values(value, (*key, index))
    else:
        yield key, node.end_mark.line
