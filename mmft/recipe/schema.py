"""What a recipe may say, for editors (JSON Schema) and for readers (a page of every key).

Both are made from the sections themselves: types, ranges, defaults and descriptions are written there and only there.
What goes with what (`mmft/recipe/combinations.py`) is beyond a JSON Schema; `mmft recipe check` knows it.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmft.recipe.messages import expected, fields_of, is_section, show, without_null
from mmft.recipe.preference import PreferenceRecipe
from mmft.recipe.root import Root
from mmft.recipe.sections import Recipe
from mmft.recipe.strict_yaml import EXTENDS, Key, dotted

_EXTENDS = {
    "type": "string",
    "pattern": r"\.ya?ml$",
    "description": "another recipe, as seen from this file; what is not said here is as there",
}


def json_schema(kind: type[Root]) -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of one kind of recipe."""
    schema = _untitled(kind.model_json_schema())
    schema["properties"] = {EXTENDS: _EXTENDS} | schema["properties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def _untitled(schema: Any) -> Any:
    """Without pydantic's titles, which only say the key once more."""
    if isinstance(schema, dict):
        return {key: _untitled(value) for key, value in schema.items() if key != "title" or not isinstance(value, str)}
    return [_untitled(value) for value in schema] if isinstance(schema, list) else schema


def reference() -> str:
    """The page of every key, in Markdown."""
    return "\n".join([_INTRODUCTION, *_page(Recipe, "Training a policy"), *_page(PreferenceRecipe, _HEAD)]) + "\n"


_HEAD = "Training a preference head"
_INTRODUCTION = """# Every key of a recipe

Made by `mmft recipe reference` from the recipe's own sections. [How recipes work](recipe.md) has the rest.
A section that is left out has the defaults of its keys.
"""


def _page(kind: type[Root], title: str) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{kind.__doc__}\n"
    yield from _table(kind, kind, (), _row((EXTENDS,), "a path", "", str(_EXTENDS["description"])))
    for key, section in _sections(kind, ()):
        yield f"### `{dotted(key)}`\n"
        yield f"{section.__doc__}\n"
        yield from _table(kind, section, key)


def _sections(kind: Any, key: Key) -> Iterator[tuple[Key, type[BaseModel]]]:
    """Every section below a key, in the order of the file; an item of a list stands for all."""
    for name, info in fields_of(kind).items():
        for end, section in _inside(info.annotation):
            yield (*key, name, *end), section
            yield from _sections(section, (*key, name, *end))


def _inside(annotation: Any) -> list[tuple[Key, type[BaseModel]]]:
    """The sections that a field may hold, each with what is added to its key."""
    inner, _ = without_null(annotation)
    if is_section(inner):
        return [((), inner)]
    if typing.get_origin(inner) is list and is_section(typing.get_args(inner)[0]):
        return [((0,), typing.get_args(inner)[0])]
    forms = [typing.get_args(form)[0] for form in typing.get_args(inner) if typing.get_origin(form) is typing.Annotated]
    return [((f"<{next(iter(fields_of(form)))}>",), form) for form in forms if is_section(form)]


def _table(kind: type[Root], section: type[BaseModel], key: Key, *first: str) -> Iterator[str]:
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    yield from first
    for name, info in fields_of(section).items():
        inner, nullable = without_null(info.annotation)
        value = "a section" + " or null" * nullable if is_section(inner) else expected(kind, (*key, name))
        yield _row((*key, name), value, _default(info), info.description or "")
    yield ""


def _row(key: Key, value: str, default: str, meaning: str) -> str:
    name = dotted(tuple(part for part in key if not str(part).startswith("<")))
    cells = [f"`{name}`", value, default and f"`{default}`", meaning]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return ""
    value = info.default
    if isinstance(value, BaseModel) or (isinstance(value, list) and any(isinstance(v, BaseModel) for v in value)):
        return ""
    if isinstance(value, list):
        return f"[{', '.join(str(item) for item in value)}]"
    return value if isinstance(value, str) else "{}" if value == {} else show(value)
