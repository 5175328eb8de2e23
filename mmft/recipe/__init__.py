"""The recipe: one frozen object that says everything about a run, or every problem at once.

A recipe is a YAML file plus ``key.sub=value`` overrides. All mistakes are found before anything heavy is
imported (this room must not import torch or transformers), each named by file, line, key and nearest key.

Left out on purpose: interpolation, environment variables. The resolved copy in the run folder is the whole truth
about a run.
"""

from mmft.recipe.load import load_recipe, recipe_main
from mmft.recipe.sections import Recipe
from mmft.recipe.strict_yaml import RecipeError

__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_main"]
