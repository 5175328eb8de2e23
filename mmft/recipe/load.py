"""Reading a recipe: a YAML file and overrides in, a checked `Recipe` or all of its problems out."""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mmft.recipe.extends import load_extended
from mmft.recipe.messages import describe
from mmft.recipe.overrides import override
from mmft.recipe.root import Root
from mmft.recipe.secrets import hide_secrets, remember_secrets
from mmft.recipe.sections import Recipe
from mmft.recipe.strict_yaml import COMMAND_LINE, Document, Key, RecipeError, dotted

_Kind = TypeVar("_Kind", bound=Root)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: ``key.sub=value`` each, the value read as YAML, for example
            ``["train.steps=10", "rewards.1.weight=0.5"]``.

    Raises:
        RecipeError: anything at all is wrong; ``problems`` lists every mistake as
            ``file:line: key: got VALUE, expected ..., did you mean ...?`` (``command line:`` for overrides).
    """
    return read_recipe(path, overrides, Recipe)[0]


def read_recipe(path: str | Path, overrides: list[str] | None, kind: type[_Kind]) -> tuple[_Kind, Document]:
    """Read a recipe of one kind, and where each of its values was written. Raises as `load_recipe`."""
    document = load_extended(path)
    return finished(document, overrides, kind), document


def finished(document: Document, overrides: list[str] | None, kind: type[_Kind]) -> _Kind:
    """The recipe of a document that was read, with overrides; raises as `load_recipe`."""
    for text in overrides or []:
        override(document, text)
    remember_secrets(document.data)
    recipe = _check(document, kind)
    document.raise_if_any()
    assert recipe is not None
    return _card_beside(recipe, document) if isinstance(recipe, Recipe) else recipe


def _check(document: Document, kind: type[_Kind]) -> _Kind | None:
    wrong: list[Key] = []
    recipe: _Kind | None
    try:
        recipe = kind.model_validate(document.data, context={"lines": True})
    except ValidationError as error:
        if _of_another_kind(document, kind):
            return None
        wrong = describe(kind, document, error)
        try:  # the rest of the file may hold impossible combinations: say so in the same breath
            recipe = kind.model_validate(_without(document.data, wrong), context={"lines": True})
        except ValidationError:
            return None
    # Of a file that is not all there, nothing can be said of what goes with what.
    for key, others, text in recipe.impossible() if document.whole else []:
        if not any(_overlap(bad, part) for bad in wrong for part in [key, *others]):
            given = [part for part in [key, *others] if part in document.places] or [key]
            # Look first at what the command line changed, then at the file, then at what it extends.
            place = min((document.place(part) for part in given), key=document.rank)
            document.add(place, f"{dotted(key)}: {text}")
    return recipe


def _of_another_kind(document: Document, kind: type[Root]) -> bool:
    """Whether a recipe is meant for another script: one problem that says so, in place of all that follow from it."""
    from mmft.recipe.kinds import kind_of  # which imports this file

    meant = kind_of(document, in_doubt=kind)
    if meant is kind:
        return False
    key = next(name for name in document.data if name in meant.model_fields and name not in kind.model_fields)
    document.problem((key,), f"belongs to another kind of recipe; launch this one by `{meant.launched_by}`")
    return True


def _without(data: dict[str, Any], keys: list[Key]) -> dict[str, Any]:
    """A copy of the data in which wrong keys fall back to their defaults; lists go as a whole."""
    data = copy.deepcopy(data)
    for key in keys:
        while any(isinstance(part, int) for part in key):
            key = key[:-1]
        here: Any = data
        for part in key[:-1]:
            here = here.get(part) if isinstance(here, dict) else None
        if isinstance(here, dict) and key:
            here.pop(key[-1], None)
    return data


def _overlap(one: Key, two: Key) -> bool:
    return one[: len(two)] == two or two[: len(one)] == one


def _card_beside(recipe: Any, document: Document) -> Any:
    """The recipe, its data card found next to the file that names it."""
    card, place = recipe.data.name, document.place(("data", "name"))
    beside = Path(document.source if place == COMMAND_LINE else place.source).parent / card
    if not card.endswith((".yaml", ".yml")) or Path(card).exists() or not beside.is_file():
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"name": str(beside)})})


def recipe_main(
    description: str,
    argv: list[str] | None = None,
    default: str | Path | None = None,
    load: Callable[[str | Path, list[str]], Any] = load_recipe,
) -> tuple[Any, str | None, list[str]]:
    """The command line of every recipe: ``[recipe.yaml] [key.sub=value ...] [--resume [PATH]]``.

    Call it before importing anything heavy: a wrong recipe ends the process with code 2, all problems on
    stderr.

    Args:
        description: first line of ``--help``.
        argv: arguments; default ``sys.argv[1:]``.
        default: recipe used when none is named; default: the YAML next to the script, of the same stem.
        load: what reads the file and its overrides; another one for recipes of another kind.

    Returns:
        the recipe; what to resume: None, ``"latest"`` (newest whole checkpoint of ``output.dir``) or a path; and the
        fields that may have changed since that checkpoint was made.
    """
    hide_secrets()
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Overrides are written key.sub=value, for example: train.steps=10 output.dir=runs/short",
    )
    parser.add_argument("words", nargs="*", metavar="recipe.yaml | key.sub=value")
    parser.add_argument(
        "--resume", nargs="?", const="latest", metavar="PATH", help="go on from the newest whole checkpoint, or from it"
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="resume although FIELD is another than in the checkpoint (dataset, seed ...; may be repeated)",
    )
    arguments = parser.parse_intermixed_args(argv)
    words, resume = arguments.words, arguments.resume
    if arguments.allow_change and resume is None:
        parser.error("--allow-change goes with --resume")
    if resume is not None and resume != "latest" and not os.path.isdir(resume):
        if "=" not in resume and not resume.endswith((".yaml", ".yml")):
            parser.error(f"--resume {resume}: no such folder, expected a checkpoint or a run folder")
        words, resume = [*words, resume], "latest"  # `--resume train.steps=10` means resume, then an override
    files = [word for word in words if "=" not in word or os.path.isfile(word)]  # Path's raises for a long word
    if len(files) > 1:
        parser.error(f"got {' and '.join(files)}, expected one recipe file (overrides: key.sub=value)")
    path = files[0] if files else default or Path(sys.argv[0]).with_suffix(".yaml")
    try:
        return load(path, [word for word in words if word not in files]), resume, arguments.allow_change
    except RecipeError as error:
        if os.environ.get("RANK", "0") == "0":  # one copy of the list, not one per process
            print("\n".join([*error.problems, _count(len(error.problems))]), file=sys.stderr)
        sys.exit(2)


def _count(number: int) -> str:
    return f"{number} problem{'s' if number != 1 else ''} in the recipe; nothing was started."
