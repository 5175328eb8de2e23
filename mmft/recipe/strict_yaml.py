"""Strict YAML for people: every mistake of a file at once, each with its line, key and nearest right key.

Used for recipes and for dataset cards. Plain YAML libraries keep the last of two equal keys, expand alias bombs
and build objects from tags; all of that is refused here. Numbers follow YAML 1.2, so that ``1e-5`` is a number,
``010`` is ten and ``no`` is text. Knows nothing about any particular recipe.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel, ConfigDict, Tag, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

Key = tuple[str | int, ...]

COMMAND_LINE = "command line"
MAX_BYTES = 256 * 1024
MAX_NODES = 10_000  # aliases count once per use, which defuses alias bombs
_TAG = "tag:yaml.org,2002:"
_NUMBER = re.compile(r"[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?")


class Section(BaseModel):
    """Base of the sections of a file: strict, unknown keys refused, immutable, dumped under the names of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, serialize_by_alias=True)


class RecipeError(ValueError):
    """A recipe or card that cannot be used. ``problems`` holds one line per mistake, in file order."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass
class Document:
    """Plain data of one YAML file, where each key stood, and what was wrong with it so far."""

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, int] = field(default_factory=dict)  # line from 1; 0 = command line
    found: list[tuple[int, str]] = field(default_factory=list)
    spoilt: set[Key] = field(default_factory=set)  # values that could not be read; no second complaint about them

    def line(self, key: Key) -> int:
        """The line of a key, or of the nearest section around it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, 1)

    def add(self, line: int, text: str) -> None:
        place = f"{self.source}:{line}" if line else COMMAND_LINE
        entry = (line, f"{place}: {text}")
        if entry not in self.found:
            self.found.append(entry)

    def problem(self, key: Key, text: str) -> None:
        name = dotted(key)
        self.add(self.line(key), f"{name}: {text}" if name else text)

    def raise_if_any(self) -> None:
        if self.found:
            # The command line was typed last and is looked at first; then the file from top to bottom.
            raise RecipeError([text for _, text in sorted(self.found, key=lambda entry: entry[0])])


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def parse_key(name: str) -> Key:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def load_document(path: str | Path) -> Document:
    """Read a YAML file whose top level is a mapping.

    Raises:
        RecipeError: the file cannot be read, or is not YAML at all. Lesser mistakes are collected in the
            document.
    """
    path = Path(path)
    document = Document(source=str(path))
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read: {error.strerror or error}"]) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError([f"{path}: longer than {MAX_BYTES // 1024} KiB, expected a short YAML file"])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            [f"{path}:{line}: byte {raw[error.start]:#04x} is not UTF-8, expected the file saved as UTF-8"]
        ) from None
    node = _compose(document, text)
    document.raise_if_any()
    if node is None:
        raise RecipeError([f"{path}:1: the file is empty, expected keys with values"])
    if not isinstance(node, MappingNode):
        line = node.start_mark.line + 1
        raise RecipeError([f"{path}:{line}: got {_shape(node)} at the top, expected keys with values"])
    data = _Walk(document).value(node, ())
    if data is None:
        document.raise_if_any()
    document.data = data
    return document


def _compose(document: Document, text: str, line: int | None = None) -> Node | None:
    try:
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = line if line is not None else (mark.line + 1 if mark else 1)
        reason = " ".join(filter(None, [error.context, error.problem]))
        document.add(at, f"not valid YAML: {reason}")
    except YAMLError as error:
        position = getattr(error, "position", 0)
        at = line if line is not None else text.count("\n", 0, position) + 1
        document.add(at, f"not valid YAML: {getattr(error, 'reason', None) or error}")
    except RecursionError:
        document.add(line or 1, "nested too deeply, expected at most a few levels")
    except ValueError as error:
        document.add(1 if line is None else line, f"not valid YAML: {error}")
    return None


class _Walk:
    """Turns YAML nodes into plain data, noting the line of each key."""

    def __init__(self, document: Document, line: int | None = None):
        self.document, self.fixed_line, self.count = document, line, 0
        self.scalars = YAML(typ="safe", pure=True).constructor

    def line(self, node: Node) -> int:
        return node.start_mark.line + 1 if self.fixed_line is None else self.fixed_line

    def complain(self, node: Node, key: Key, text: str) -> None:
        name = dotted(key)
        self.document.add(self.line(node), f"{name}: {text}" if name else text)

    def spoil(self, node: Node, key: Key, text: str) -> None:
        self.complain(node, key, text)
        self.document.spoilt.add(key)

    def value(self, node: Node, key: Key) -> Any:
        self.count += 1
        if self.count > MAX_NODES or len(key) > 12:
            if not any("too many values" in text for _, text in self.document.found):
                self.complain(node, (), f"too many values (over {MAX_NODES}, or 12 levels), check aliases")
            return None
        self.document.places.setdefault(key, self.line(node))
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
            name = name_node.value if isinstance(name_node, ScalarNode) else None
            if name is None or str(name_node.tag) != _TAG + "str":
                shown = name if name is not None else _shape(name_node)
                self.complain(name_node, key, f"got the key {shown}, expected plain words as keys")
                continue
            inner = (*key, name)
            if name in result:
                first = self.document.places[inner]
                self.complain(name_node, inner, f"given twice (first on line {first}), expected once")
                continue
            self.document.places[inner] = self.line(name_node)
            result[name] = self.value(value_node, inner)
        return result

    def scalar(self, node: Node, key: Key) -> Any:
        tag = str(node.tag).removeprefix(_TAG)
        if tag == "timestamp":
            return node.value
        if tag == "str" and getattr(node, "style", None) is None and _NUMBER.fullmatch(node.value):
            return float(node.value.replace("_", ""))  # a number that YAML 1.1 would call text, such as 1e-5
        if tag not in ("str", "int", "float", "bool", "null"):
            return self.spoil(node, key, f"got the tag {node.tag}, expected a plain value without a tag")
        try:
            return self.scalars.construct_object(node, deep=True)
        except (ValueError, KeyError, YAMLError):
            return self.spoil(node, key, f"got {node.value!r} tagged {node.tag}, expected a plain value")


def _shape(node: Node) -> str:
    kinds: dict[type[Node], str] = {MappingNode: "a mapping", SequenceNode: "a list"}
    return kinds.get(type(node), f"the single value {node.value!r}")


def override(document: Document, text: str) -> None:
    """Apply one ``key.sub=value`` of the command line; the value is read as YAML. The last one of a key wins."""
    name, equals, raw = text.partition("=")
    name = name.strip()
    if not equals or not name or not all(name.split(".")):
        document.add(0, f"{text!r}: expected key.sub=value, for example train.steps=10")
        return
    key = parse_key(name)
    before = len(document.found)
    node = _compose(document, raw, line=0)
    if len(document.found) > before:
        return
    here: Any = document.data
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(part, int):
            if not isinstance(here, list) or part >= len(here):
                length = len(here) if isinstance(here, list) else 0
                document.add(0, f"{name}: got item {part}, but {dotted(key[:depth])} has {length} in the file")
                return
        elif not isinstance(here, dict):
            document.add(0, f"{name}: {dotted(key[:depth])} is {show(here)}, expected a section with keys")
            return
        if last:
            for old in [place for place in document.places if place[: len(key)] == key]:
                del document.places[old]
            document.spoilt.discard(key)
            here[part] = None if node is None else _Walk(document, line=0).value(node, key)
            document.places[key] = 0
        elif isinstance(here, dict) and here.get(part) is None and isinstance(key[depth + 1], str):
            here[part] = {}
            document.places[key[: depth + 1]] = 0
        if not last:
            here = here.get(part) if isinstance(here, dict) else here[part]


# --- from pydantic's errors to sentences -----------------------------------------------------------


def describe(model: type[BaseModel], document: Document, error: ValidationError) -> list[Key]:
    """Add every error of a validation to the document; returns the keys concerned."""
    keys: list[Key] = []
    for item in error.errors(include_url=False):
        path: Key = tuple(item["loc"])
        key = tuple(part for part in path if not _is_form(part))
        keys.append(key)
        if key in document.spoilt:
            continue
        if item["type"] == "extra_forbidden":
            document.problem(key, _unknown_key(model, path))
        elif item["type"] == "missing":
            document.problem(key, f"missing, expected {expected(model, path)}")
        else:
            got = item["input"]
            document.problem(key, f"got {show(got)}, expected {expected(model, path)}{_hint(model, path, got)}")
    return keys


def _is_form(part: str | int) -> bool:
    """Whether a part of pydantic's path is no key but the tag of one form of several, written `<form>`."""
    return isinstance(part, str) and part.startswith("<")


def _fields(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields by the name they have in the file."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def show(value: Any) -> str:
    """A value as it would be written in YAML, quoted where it is text, cut where it is long."""
    if isinstance(value, dict):
        return "a section with keys" if value else "an empty section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _inner(annotation: Any) -> tuple[Any, bool]:
    """The type without ``| None`` and ``Annotated``, and whether null is allowed."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        kinds = typing.get_args(annotation)
        rest = [kind for kind in kinds if kind is not type(None)]
        return (rest[0] if len(rest) == 1 else annotation), type(None) in kinds
    return annotation, False


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _resolve(model: type[BaseModel], key: Key) -> tuple[Any, FieldInfo | None]:
    """The type standing at a key (None if there is no such key), and its field."""
    kind: Any = model
    info: FieldInfo | None = None
    for part in key:
        kind, _ = _inner(kind)
        if isinstance(part, int):
            kind, info = (*typing.get_args(kind), None)[0], None
        elif _is_form(part):
            forms = [form for form in typing.get_args(kind) if Tag(part) in getattr(form, "__metadata__", ())]
            kind = forms[0] if forms else None
        elif _is_section(kind):
            info = _fields(kind).get(part)
            kind = info.annotation if info else None
        elif typing.get_origin(kind) is dict:
            kind, info = typing.get_args(kind)[1], None
        else:
            return None, None
    return kind, info


def expected(model: type[BaseModel], key: Key) -> str:
    """What may stand at a key, in words: type, range, choices."""
    kind, info = _resolve(model, key)
    if info is not None and info.description:
        return info.description
    kind, nullable = _inner(kind)
    tail = " or null" if nullable else ""
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(str(choice) for choice in typing.get_args(kind)) + tail
    if _is_section(kind):
        return f"a section with keys ({', '.join(_fields(kind))}){tail}"
    origin = typing.get_origin(kind) or kind
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    words |= {list: "a list", dict: "a section with keys"}
    limits = []
    for limit in info.metadata if info else []:
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if hasattr(limit, name):
                limits.append(f"{sign} {getattr(limit, name)}")
        if isinstance(limit, annotated_types.MinLen):
            limits.append("of one or more items" if origin is list else "that is not empty")
    return " ".join(filter(None, [words.get(origin, str(origin)), " and ".join(limits)])) + tail


def _hint(model: type[BaseModel], key: Key, got: Any) -> str:
    kind, info = _resolve(model, key)
    kind, _ = _inner(kind)
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else info.examples if info else None
    if choices:
        text = "none" if got is None else str(got).lower()
        near = difflib.get_close_matches(text, [str(choice) for choice in choices], 1)
        return f", did you mean {near[0]}?" if near else ""
    if isinstance(got, str) and kind in (int, float) and _NUMBER.fullmatch(got):
        return f", did you mean {got} without quotes?"
    if isinstance(got, str) and kind is bool and got.lower() in ("yes", "on", "no", "off", "true", "false"):
        return f", did you mean {'true' if got.lower() in ('yes', 'on', 'true') else 'false'}?"
    return ""


def _all_keys(model: type[BaseModel], before: Key = ()) -> list[Key]:
    keys: list[Key] = []
    for name, info in _fields(model).items():
        kind, _ = _inner(info.annotation)
        keys.append((*before, name))
        if _is_section(kind):
            keys += _all_keys(kind, (*before, name))
    return keys


def _unknown_key(model: type[BaseModel], key: Key) -> str:
    name = str(key[-1])
    section, _ = _inner(_resolve(model, key[:-1])[0])
    names = list(_fields(section))
    near = [
        dotted((*(part for part in key[:-1] if not _is_form(part)), other))
        for other in difflib.get_close_matches(name.lower(), names, 1)
    ]
    if not near:  # right key, wrong section
        leaves = {str(other[-1]): dotted(other) for other in _all_keys(model)}
        near = [leaves[other] for other in difflib.get_close_matches(name.lower(), list(leaves), 1, 0.75)]
    hint = f", did you mean {near[0]}?" if near else ""
    return f"got an unknown key, expected one of {', '.join(names)}{hint}"
