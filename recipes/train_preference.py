"""Teaches a reward from preferences: a vision-language model with a head that says which of two texts is better.

    python recipes/train_preference.py [recipe.yaml] [key.sub=value ...] [--resume]

Without arguments: the bundled model on pairs from the built-in world, with train_preference.yaml beside this file.
One process trains it; several (torchrun, accelerate) are refused.
The folder `output.dir` can then be named as a reward in any other recipe; its summary.json says how good the head is.
"""

from mmft.recipe import recipe_main
from mmft.recipe.preference import load_preference_recipe


def main() -> None:
    # A wrong recipe ends here, before anything heavy is imported.
    recipe, resume, allow_change = recipe_main(__doc__, load=load_preference_recipe)
    if resume not in (None, "latest") or allow_change:
        raise SystemExit("a head goes on from its own newest checkpoint, and unchanged: --resume alone")

    from mmft.training.preference import run_preference

    run_preference(recipe, resume is not None)


if __name__ == "__main__":
    main()
