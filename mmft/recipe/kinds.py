"""The two kinds of recipe, where either may be meant."""

from __future__ import annotations

from pathlib import Path

from mmft.recipe.extends import load_extended
from mmft.recipe.load import finished
from mmft.recipe.preference import PreferenceRecipe
from mmft.recipe.root import Root
from mmft.recipe.sections import Recipe
from mmft.recipe.strict_yaml import Document


def read_any(path: str | Path, overrides: list[str] | None = None) -> tuple[Root, Document]:
    """Read a recipe of either kind, told by its sections, and where each of its values was written.

    Raises:
        RecipeError: as `mmft.recipe.load_recipe` does.
    """
    document = load_extended(path)
    return finished(document, overrides, kind_of(document)), document


def kind_of(document: Document, in_doubt: type[Root] = Recipe) -> type[Root]:
    """The kind of which a file has more sections."""
    said = set(document.data)
    head, policy = (len(said & set(kind.model_fields)) for kind in (PreferenceRecipe, Recipe))
    return in_doubt if head == policy else PreferenceRecipe if head > policy else Recipe
