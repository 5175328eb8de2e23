"""Strict YAML for people: every mistake of a file at once, each with its line, key and nearest right key.

Used for recipes and for dataset cards. Plain YAML libraries keep the last of two equal keys, expand alias bombs
and build objects from tags; all of that is refused here. Numbers follow YAML 1.2, so that ``1e-5`` is a number,
``010`` is ten and ``no`` is text. Knows nothing about any particular recipe; `mmft.recipe.messages` has the sentences.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

Key = tuple[str | int, ...]

EXTENDS = "extends"  # the key of mmft/recipe/extends.py
MAX_BYTES = 256 * 1024
MAX_NODES = 10_000  # aliases count once per use, which defuses alias bombs
MAX_DEPTH = 12
_TAG = "tag:yaml.org,2002:"
NUMBER = re.compile(r"[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?")


class Section(BaseModel):
    """Base of the sections of a file: strict, unknown keys refused, immutable, dumped under the names of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, serialize_by_alias=True)


class RecipeError(ValueError):
    """A recipe or card that cannot be used. ``problems`` holds one line per mistake, in file order."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class Place(NamedTuple):
    """Where a value was written: file and line (from 1), or the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


COMMAND_LINE = Place("command line")


@dataclass
class Document:
    """Plain data of a YAML file (and of those it extends), where each key stood, and what was wrong with it so far."""

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    found: dict[tuple[Place, str], None] = field(default_factory=dict)  # each problem once, in the order of finding
    spoilt: set[Key] = field(default_factory=set)  # values that could not be read; no second complaint about them
    sources: list[str] = field(default_factory=list)  # the files read, in the order of their problems
    whole: bool = True  # False: a file could not be read at all
    extendable: bool = False  # whether the file may say `extends`

    def __post_init__(self) -> None:
        self.sources = [self.source]

    def place(self, key: Key) -> Place:
        """The place of a key, or of the nearest section around it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, Place(self.source, 1))

    def add(self, place: Place, text: str) -> None:
        self.found[place, text] = None

    def problem(self, key: Key, text: str) -> None:
        self.add(self.place(key), _about(key, text))

    def give_up(self, line: int | None, text: str) -> None:
        """A problem after which nothing of the file is left to be looked at."""
        self.add(Place(self.source, line), text)
        self.whole = False

    def forget(self, key: Key) -> None:
        """Drops what is known of a key and all below it: something else takes its place."""
        self.places = {other: place for other, place in self.places.items() if other[: len(key)] != key}
        self.spoilt = {other for other in self.spoilt if other[: len(key)] != key}

    def rank(self, place: Place) -> int:
        """Which is looked at first: the command line, typed last; then the file; then what it extends, in turn."""
        return -1 if place == COMMAND_LINE else self.sources.index(place.source)

    def raise_if_any(self) -> None:
        if self.found:
            entries = sorted(self.found, key=lambda entry: (self.rank(entry[0]), entry[0].line or 0))
            raise RecipeError([f"{place}: {text}" for place, text in entries])


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def parse_key(name: str) -> Key:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _about(key: Key, text: str) -> str:
    return f"{dotted(key)}: {text}" if key else text


def load_document(path: str | Path) -> Document:
    """Read a YAML file whose top level is a mapping.

    Raises:
        RecipeError: the file cannot be read, or is not YAML at all. Lesser mistakes are collected in the
            document.
    """
    document = read_document(path)
    if not document.whole:
        document.raise_if_any()
    return document


def read_document(path: str | Path) -> Document:
    """As `load_document`, but raises nothing: a file that cannot be read is a document that is not ``whole``."""
    path = Path(path)
    document = Document(source=str(path))
    text = _text(document, path)
    node = None if text is None else compose(document, text)
    if document.found:
        document.whole = False
    elif node is None:
        document.give_up(1, "the file is empty, expected keys with values")
    elif not isinstance(node, MappingNode):
        document.give_up(node.start_mark.line + 1, f"got {_shape(node)} at the top, expected keys with values")
    else:
        data = Walk(document).value(node, ())
        document.data, document.whole = data or {}, document.whole and data is not None
    return document


def _text(document: Document, path: Path) -> str | None:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        document.give_up(None, f"cannot be read: {getattr(error, 'strerror', None) or error}")
        return None
    if len(raw) > MAX_BYTES:
        document.give_up(None, f"longer than {MAX_BYTES // 1024} KiB, expected a short YAML file")
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        said = f"byte {raw[error.start]:#04x} is not UTF-8, expected the file saved as UTF-8"
        document.give_up(line, said)
        return None


def compose(document: Document, text: str, place: Place | None = None) -> Node | None:
    """The YAML nodes of a text, or None and a problem: at ``place``, or where the text has it."""
    if line := _too_deep(text):
        document.add(place or Place(document.source, line), _DEEP)
        return None
    try:
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reason = " ".join(filter(None, [error.context, error.problem]))
    except YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        reason = str(getattr(error, "reason", None) or error)
    except RecursionError:
        document.add(place or Place(document.source, 1), _DEEP)
        return None
    except ValueError as error:
        line, reason = 1, str(error)
    document.add(place or Place(document.source, line), f"not valid YAML: {reason}{_advice(reason)}")
    return None


_DEEP = "nested too deeply, expected at most a few levels"


def _too_deep(text: str) -> int:
    """The line on which brackets are opened within brackets for the hundredth time, or 0; the parser takes seconds."""
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if bracket[0] in "[{" else -1))
        if depth == 100:
            return text.count("\n", 0, bracket.start()) + 1
    return 0


# What the parser says, and what a person who writes YAML by hand has usually done.
_ADVICE = {
    "character '\\t'": "indent with spaces, not tabs",
    "mapping values are not allowed here": "quote a text that holds a colon, or mend the indentation",
    "could not find expected ':'": "expected key: value",
    "another document": "expected one recipe per file, without ---",
    "'%'": "quote a text that begins with %",
    "'@'": "quote a text that begins with @",
    "'`'": "quote a text that begins with `",
}


def _advice(reason: str) -> str:
    return next((f"; {advice}" for said, advice in _ADVICE.items() if said in reason), "")


class Walk:
    """Turns YAML nodes into plain data, noting the place of each key (or one place for all of them)."""

    def __init__(self, document: Document, place: Place | None = None):
        self.document, self.fixed, self.count = document, place, 0
        self.scalars = YAML(typ="safe", pure=True).constructor

    def place(self, node: Node) -> Place:
        return self.fixed or Place(self.document.source, node.start_mark.line + 1)

    def complain(self, node: Node, key: Key, text: str) -> None:
        self.document.add(self.place(node), _about(key, text))

    def spoil(self, node: Node, key: Key, text: str) -> None:
        self.complain(node, key, text)
        self.document.spoilt.add(key)

    def too_many(self, key: Key) -> bool:
        self.count += 1
        if self.count <= MAX_NODES and len(key) <= MAX_DEPTH:
            return False
        if self.document.whole:  # once; and at the key that asks for so much, not where its alias leads
            said = f"too many values (over {MAX_NODES}, or {MAX_DEPTH} levels), check aliases"
            self.document.add(self.fixed or self.document.place(key[:1]), _about(key[:1], said))
            self.document.whole = False
        return True

    def value(self, node: Node, key: Key) -> Any:
        if self.too_many(key):
            return None
        self.document.places.setdefault(key, self.place(node))
        if isinstance(node, MappingNode):
            return self.mapping(node, key)
        if isinstance(node, SequenceNode):
            if str(node.tag) != _TAG + "seq":
                return self.spoil(node, key, f"got the tag {node.tag}, expected a plain list")
            return [self.value(item, (*key, index)) for index, item in enumerate(node.value)]
        return self.scalar(node, key)

    def mapping(self, node: MappingNode, key: Key) -> dict[str, Any] | None:
        if str(node.tag) != _TAG + "map":
            self.spoil(node, key, f"got the tag {node.tag}, expected plain keys and values")
            return None
        result: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if self.too_many(key):
                break
            name = name_node.value if isinstance(name_node, ScalarNode) else None
            if name is None or str(name_node.tag) != _TAG + "str":
                shown = name if name is not None else _shape(name_node)
                hint = "; another recipe is taken over by extends" if name == "<<" else ""
                self.complain(name_node, key, f"got the key {shown}, expected plain words as keys{hint}")
                continue
            inner = (*key, name)
            if name in result:
                first = self.document.places[inner].line
                self.complain(name_node, inner, f"given twice (first on line {first}), expected once")
                continue
            self.document.places[inner] = self.place(name_node)
            result[name] = self.value(value_node, inner)
        return result

    def scalar(self, node: Node, key: Key) -> Any:
        tag = str(node.tag).removeprefix(_TAG)
        if tag == "timestamp":
            return node.value
        if tag == "str" and getattr(node, "style", None) is None and NUMBER.fullmatch(node.value):
            return float(node.value.replace("_", ""))  # a number that YAML 1.1 would call text, such as 1e-5
        if tag not in ("str", "int", "float", "bool", "null"):
            return self.spoil(node, key, f"got the tag {node.tag}, expected a plain value without a tag")
        try:
            return self.scalars.construct_object(node, deep=True)
        except (ValueError, KeyError, YAMLError):
            return self.spoil(node, key, f"got {node.value!r} tagged {node.tag}, expected a plain value")


def _shape(node: Node) -> str:
    kinds: dict[type[Node], str] = {MappingNode: "a mapping", SequenceNode: "a list"}
    return kinds.get(type(node), f"the single value {node.value!r}"[:80])
