"""From pydantic's errors to sentences: what was got, what is expected, and the nearest thing that would be right."""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import dataclass
from typing import Any

import annotated_types
from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from mmft.recipe.strict_yaml import EXTENDS, NUMBER, Document, Key, dotted


@dataclass(frozen=True)
class Expected:
    """In a field's `Annotated`: what errors say is expected, where its type and limits do not say it well."""

    words: str


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
            document.problem(key, _unknown_key(model, path, document.extendable))
        elif item["type"] == "missing":
            document.problem(key, f"missing, expected {expected(model, path)}")
        else:
            got = item["input"]
            document.problem(key, f"got {show(got)}, expected {expected(model, path)}{_hint(model, path, got)}")
    return keys


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


def expected(model: type[BaseModel], key: Key) -> str:
    """What may stand at a key, in words: type, range, choices."""
    kind, info = _resolve(model, key)
    for said in info.metadata if info else []:
        if isinstance(said, Expected):
            return said.words
    kind, nullable = without_null(kind)
    tail = " or null" if nullable else ""
    if typing.get_origin(kind) is typing.Literal:
        *most, last = [str(choice) for choice in typing.get_args(kind)] + ["null"] * nullable
        return f"{', '.join(most)} or {last}" if most else last
    if is_section(kind):
        return f"a section with keys ({', '.join(fields_of(kind))}){tail}"
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


# --- walking the models ----------------------------------------------------------------------------


def fields_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields by the name they have in the file."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def without_null(annotation: Any) -> tuple[Any, bool]:
    """The type without ``| None`` and ``Annotated``, and whether null is allowed."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        kinds = typing.get_args(annotation)
        rest = [kind for kind in kinds if kind is not type(None)]
        return (rest[0] if len(rest) == 1 else annotation), type(None) in kinds
    return annotation, False


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_form(part: str | int) -> bool:
    """Whether a part of pydantic's path is no key but the tag of one form of several, written `<form>`."""
    return isinstance(part, str) and part.startswith("<")


def _resolve(model: type[BaseModel], key: Key) -> tuple[Any, FieldInfo | None]:
    """The type standing at a key (None if there is no such key), and its field."""
    kind: Any = model
    info: FieldInfo | None = None
    for part in key:
        kind, _ = without_null(kind)
        if isinstance(part, int):
            kind, info = (*typing.get_args(kind), None)[0], None
        elif _is_form(part):
            forms = [form for form in typing.get_args(kind) if Tag(part) in getattr(form, "__metadata__", ())]
            kind = forms[0] if forms else None
        elif is_section(kind):
            info = fields_of(kind).get(part)
            kind = info.annotation if info else None
        elif typing.get_origin(kind) is dict:
            kind, info = typing.get_args(kind)[1], None
        else:
            return None, None
    return kind, info


# --- the nearest right thing -----------------------------------------------------------------------


def _hint(model: type[BaseModel], key: Key, got: Any) -> str:
    kind, info = _resolve(model, key)
    kind, _ = without_null(kind)
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else info.examples if info else None
    if choices:
        text = "none" if got is None else str(got).lower()
        near = difflib.get_close_matches(text, [str(choice) for choice in choices], 1)
        return f", did you mean {near[0]}?" if near else ""
    if isinstance(got, str) and kind in (int, float) and NUMBER.fullmatch(got):
        return f", did you mean {got} without quotes?"
    if isinstance(got, str) and kind is bool and got.lower() in ("yes", "on", "no", "off", "true", "false"):
        return f", did you mean {'true' if got.lower() in ('yes', 'on', 'true') else 'false'}?"
    return ""


def _all_keys(model: type[BaseModel], before: Key = ()) -> list[Key]:
    keys: list[Key] = []
    for name, info in fields_of(model).items():
        kind, _ = without_null(info.annotation)
        keys.append((*before, name))
        if is_section(kind):
            keys += _all_keys(kind, (*before, name))
    return keys


def _unknown_key(model: type[BaseModel], key: Key, extendable: bool) -> str:
    name = str(key[-1])
    section, _ = without_null(_resolve(model, key[:-1])[0])
    names = list(fields_of(section))
    if extendable and len(key) == 1:
        names.append(EXTENDS)
    near = [
        dotted((*(part for part in key[:-1] if not _is_form(part)), other))
        for other in difflib.get_close_matches(name.lower(), names, 1)
    ]
    if not near:  # right key, wrong section
        # Of several sections that have such a key the first is meant: train before warm_start.
        leaves = {str(other[-1]): dotted(other) for other in reversed(_all_keys(model))}
        near = [leaves[other] for other in difflib.get_close_matches(name.lower(), list(leaves), 1, 0.75)]
    allowed = f"xpected one of {', '.join(names)}"
    return f"got an unknown key, did you mean {near[0]}? E{allowed}" if near else f"got an unknown key, e{allowed}"
