"""Supervised fine-tuning on captions with TRL's SFTTrainer: the warm start alone, and its held-out scores.

    accelerate launch recipes/caption_sft.py [recipe.yaml] [key.sub=value ...] [--resume]

The trained model (not an adapter) is saved in `output.dir`/warm_start; name that folder as `model.name` to go on from
it with caption_ppo.py.
"""

from mmft.recipe import recipe_main


def main() -> None:
    # A wrong recipe ends here, before anything heavy is imported.
    recipe, resume, allow_change = recipe_main(__doc__)
    if resume not in (None, "latest") or allow_change:
        raise SystemExit("a warm start goes on from its own newest checkpoint, and unchanged: --resume alone")

    from mmft.training.run import run_supervised

    run_supervised(recipe, resume is not None)


if __name__ == "__main__":
    main()
