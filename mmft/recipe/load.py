"""Reading a recipe: a YAML file and overrides in, a checked `Recipe` or all of its problems out."""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmft.recipe.combinations import impossible
from mmft.recipe.secrets import hide_secrets, remember_secrets
from mmft.recipe.sections import Recipe
from mmft.recipe.strict_yaml import Document, Key, RecipeError, describe, dotted, load_document, override


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


def _check(document: Document) -> Recipe | None:
    wrong: list[Key] = []
    recipe: Recipe | None
    try:
        recipe = Recipe.model_validate(document.data, context={"lines": True})
    except ValidationError as error:
        wrong = describe(Recipe, document, error)
        try:  # the rest of the file may hold impossible combinations: say so in the same breath
            recipe = Recipe.model_validate(_without(document.data, wrong), context={"lines": True})
        except ValidationError:
            return None
    for key, others, text in impossible(recipe):
        if not any(_overlap(bad, part) for bad in wrong for part in [key, *others]):
            given = [part for part in [key, *others] if part in document.places] or [key]
            # Look first at what the command line changed, else at the first that the file mentions.
            typed = next((part for part in given if document.line(part) == 0), given[0])
            document.add(document.line(typed), f"{dotted(key)}: {text}")
    return recipe


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
    document = load_document(path)
    for text in overrides or []:
        override(document, text)
    remember_secrets(document.data)
    recipe = _check(document)
    document.raise_if_any()
    assert recipe is not None
    card = recipe.data.name
    beside = Path(path).parent / card
    if card.endswith((".yaml", ".yml")) and not Path(card).exists() and beside.is_file():
        data = recipe.data.model_copy(update={"name": str(beside)})  # a card kept next to its recipe
        recipe = recipe.model_copy(update={"data": data})
    return recipe


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
