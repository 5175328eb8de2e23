"""Which fields of a recipe a program reads, found in its source: a small interpreter that follows sections of recipes.

It starts at every parameter called `recipe`, and follows sections through attributes, assignments, loops, calls of
functions of the tree and nested functions. `section.model_dump()` reads nothing by itself: it hands the fields on, to
be looked for where they arrive.
"""

from __future__ import annotations

import ast
import typing
from collections import defaultdict
from pathlib import Path
from typing import Any

from mmft.recipe.messages import is_section, without_null
from mmft.recipe.preference import PreferenceRecipe
from mmft.recipe.sections import Recipe
from mmft.recipe.strict_yaml import Section

ROOT = Path(__file__).resolve().parents[2]
Function = ast.FunctionDef | ast.AsyncFunctionDef
Read = tuple[type[Section], str]


def sources(*folders: str) -> list[ast.Module]:
    return [ast.parse(path.read_text()) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def functions_of(modules: list[ast.Module]) -> dict[str, list[Function]]:
    """Name -> the functions and methods of that name; a class stands for its ``__init__``."""
    found: dict[str, list[Function]] = defaultdict(list)
    for module in modules:
        for node in ast.walk(module):
            if isinstance(node, Function):
                found[node.name].append(node)
            elif isinstance(node, ast.ClassDef):
                found[node.name] += [n for n in node.body if isinstance(n, Function) and n.name == "__init__"]
    return found


def reads(modules: list[ast.Module], start: str | None = None) -> tuple[set[Read], set[type[Section]]]:
    """Fields that are read, and sections that are handed on whole.

    Args:
        start: the one function that is given a recipe; None = all that have a parameter `recipe`.
    """
    functions = functions_of(modules)
    found: set[Read] = set()
    handed_on: set[type[Section]] = set()
    waiting: list[tuple[Function, dict[str, Any]]] = []
    seen: set[tuple[int, str]] = set()

    def follow(function: Function, types: dict[str, Any]) -> None:
        key = (id(function), repr(sorted((name, repr(kind)) for name, kind in types.items())))
        if key not in seen:
            seen.add(key)
            waiting.append((function, types))

    for function in functions[start] if start else [f for found_here in functions.values() for f in found_here]:
        for argument in _parameters(function):
            if argument.arg == "recipe":
                said = ast.unparse(argument.annotation) if argument.annotation else ""
                follow(function, {"recipe": PreferenceRecipe if "PreferenceRecipe" in said else Recipe})
    while waiting:
        function, types = waiting.pop()
        _Follower(types, functions, follow, found, handed_on).run(function)
    return found, handed_on


class _Follower(ast.NodeVisitor):
    """Walks one function, knowing which of its names hold sections."""

    def __init__(self, types, functions, follow, found, handed_on):
        self.types, self.functions, self.follow = dict(types), functions, follow
        self.found, self.handed_on = found, handed_on

    def run(self, function: Function) -> None:
        for node in function.body:
            self.visit(node)

    def kind(self, node: ast.AST | None) -> Any:
        """The section, or list of sections, that an expression holds."""
        if isinstance(node, ast.Name):
            return self.types.get(node.id)
        if isinstance(node, ast.Attribute) and is_section(owner := self.kind(node.value)):
            field = {info.alias or name: info for name, info in owner.model_fields.items()}.get(node.attr)
            inner = without_null(field.annotation)[0] if field else None
            return inner if is_section(inner) or _item(inner) else None
        if isinstance(node, ast.IfExp):
            return self.kind(node.body) or self.kind(node.orelse)
        if isinstance(node, ast.Subscript):
            return _item(self.kind(node.value))
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.kind(node.value)
        if is_section(owner) and isinstance(node.ctx, ast.Load):
            name = next((n for n, info in owner.model_fields.items() if (info.alias or n) == node.attr), node.attr)
            if name in owner.model_fields:
                self.found.add((owner, name))
            elif node.attr == "model_dump":
                self.handed_on.add(owner)
        self.generic_visit(node)

    def bind(self, target: ast.AST, kind: Any, value: ast.AST | None = None) -> None:
        if isinstance(target, ast.Name):
            self.types.pop(target.id, None)
            if kind is not None:
                self.types[target.id] = kind
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts):
                self.bind(one, self.kind(its), its)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.bind(target, self.kind(node.value), node.value)

    def visit_For(self, node: ast.For) -> None:
        self._loop(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        self._loop(node.target, node.iter)
        for test in node.ifs:
            self.visit(test)

    def _loop(self, target: ast.AST, over: ast.AST) -> None:
        if isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and over.func.id == "enumerate":
            target, over = target.elts[1], over.args[0]
        if _item(self.kind(over)):
            self.bind(target, _item(self.kind(over)))

    def _made_of_loops(self, node) -> None:  # the names are bound before what is made of them is looked at
        for loop in node.generators:
            self.visit(loop)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _made_of_loops

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        own = {argument.arg for argument in _parameters(node)}
        inside = {name: kind for name, kind in self.types.items() if name not in own}
        self.follow(node, inside)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        given = {at: kind for at, value in enumerate(node.args) if (kind := self.kind(value))}
        named = {word.arg: kind for word in node.keywords if word.arg and (kind := self.kind(word.value))}
        for function in self.functions.get(name, []) if given or named else []:
            parameters = [a.arg for a in _parameters(function) if a.arg != "self"]
            types = {parameters[at]: kind for at, kind in given.items() if at < len(parameters)}
            self.follow(function, types | {name: kind for name, kind in named.items() if name in parameters})


def _parameters(function: Function) -> list[ast.arg]:
    given = function.args
    return [*given.posonlyargs, *given.args, *given.kwonlyargs]


def _item(kind: Any) -> type[Section] | None:
    inner = typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
    return inner if is_section(inner) else None


def attributes_of(modules: list[ast.Module], *owners: str) -> set[str]:
    """The attributes that are read of anything with one of these names, ``self.config.seed`` among them."""
    nodes = (node for module in modules for node in ast.walk(module))
    loads = (n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load))
    return {n.attr for n in loads if (getattr(n.value, "id", None) or getattr(n.value, "attr", None)) in owners}
