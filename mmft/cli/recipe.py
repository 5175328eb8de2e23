"""`mmft recipe`: what a recipe says, whether it is right, and what it may say (docs/recipe.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmft.cli.files import prepare
from mmft.recipe import RecipeError

app = typer.Typer(help="Shows and checks recipes, and says what may stand in one.", no_args_is_help=True)

Output = Annotated[Path | None, typer.Option(metavar="FILE", help="write there instead of to the screen")]


@app.command()
def show(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="of either kind", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key.sub=value", help="changes to the recipe", show_default=False)
    ] = None,
) -> None:
    """Prints a recipe with every default filled in, and where each value came from.

    Examples:
      mmft recipe show recipes/caption_preference.yaml train.steps=10
    """
    from mmft.recipe.kinds import read_any
    from mmft.recipe.show import annotated

    typer.echo(annotated(*read_any(recipe, overrides)), nl=False)


@app.command()
def check(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE.yaml…", help="of either kind", show_default=False)],
) -> None:
    """Finds every mistake of some recipes; exit code 2 if there is one.

    Examples:
      mmft recipe check recipes/caption_ppo.yaml recipes/caption_photos.yaml
    """
    from mmft.recipe.kinds import read_any

    problems: list[str] = []
    for path in recipes:
        try:
            read_any(path)
            typer.echo(f"{path}: fine")
        except RecipeError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise RecipeError(problems)


@app.command()
def schema(
    preference: Annotated[bool, typer.Option("--preference", help="of recipes for a preference head")] = False,
    output: Output = None,
) -> None:
    """Writes a JSON Schema, with which editors complete and check recipes.

    Examples:
      mmft recipe schema --output recipe.schema.json
    """
    from mmft.recipe import Recipe
    from mmft.recipe.preference import PreferenceRecipe
    from mmft.recipe.schema import json_schema

    kind = PreferenceRecipe if preference else Recipe
    _give(json.dumps(json_schema(kind), indent=1) + "\n", output)


@app.command()
def reference(output: Output = None) -> None:
    """Writes a page about every key: type, range, default and meaning.

    Examples:
      mmft recipe reference --output docs/recipe_keys.md
    """
    from mmft.recipe.schema import reference as page

    _give(page(), output)


def _give(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=False)
    else:
        prepare(output)
        output.write_text(text, encoding="utf-8")
