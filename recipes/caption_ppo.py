"""Teaches a vision-language model to caption better, by reinforcement learning with PPO.

    accelerate launch recipes/caption_ppo.py [recipe.yaml] [key.sub=value ...] [--resume [PATH]]

Without arguments: the bundled model on the built-in world, with caption_ppo.yaml beside this file. The run folder
(`output.dir`) then holds the adapter, the value head, the metrics of every step and a report.
"""

from mmft.recipe import recipe_main


def main() -> None:
    # A wrong recipe ends here, before anything heavy is imported.
    recipe, resume, allow_change = recipe_main(__doc__)

    from mmft.training.run import run

    run(recipe, resume, allow_change)


if __name__ == "__main__":
    main()
