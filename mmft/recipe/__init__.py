"""The recipe: one frozen object that says everything about a run, or every problem at once.

A recipe is a YAML file, what it ``extends``, and ``key.sub=value`` overrides. All mistakes are found before anything
heavy is imported (this room must not import torch or transformers), each named by file, line, key and nearest key.

`sections`, `rewards` and `preference` say what there is; `combinations`, what does not go together; `strict_yaml`,
`extends` and `overrides` read; `messages` says what is wrong; `load` does all of it, `show` and `schema` explain.

Left out on purpose: interpolation, environment variables. The resolved copy in the run folder is the whole truth
about a run.
"""

from mmft.recipe.load import load_recipe, recipe_main
from mmft.recipe.sections import Recipe
from mmft.recipe.strict_yaml import RecipeError

__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_main"]
