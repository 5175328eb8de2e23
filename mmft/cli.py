"""`mmft VERB`: each verb calls one function elsewhere."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mmft.recipe import RecipeError, load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 fine, 1 the doctor found something, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="mmft", description="Actor-critic fine-tuning of vision-language models.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    doctor = verbs.add_parser("doctor", help="looks at a recipe before it costs anything")
    subjects = doctor.add_subparsers(dest="subject", required=True)
    rewards = subjects.add_parser("rewards", help="which rewards pay bad responses more than honest ones")
    rewards.add_argument("recipe", metavar="RECIPE.yaml")
    rewards.add_argument("overrides", nargs="*", metavar="key.sub=value")
    rewards.add_argument("--rows", type=int, default=64, help="held-out rows that are probed (default: 64)")
    rewards.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, too")
    options, rest = parser.parse_known_args(arguments)
    if wrong := [word for word in rest if "=" not in word or word.startswith("-")]:
        parser.error(f"unknown argument: {wrong[0]}")
    options.overrides += rest  # overrides after an option
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except RecipeError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    return _doctor_rewards(recipe, options.rows, options.json)


def _doctor_rewards(recipe, rows: int, file: Path | None) -> int:
    from mmft.training.doctor import doctor_rewards  # torch and transformers: only once the recipe is sound

    try:
        report = doctor_rewards(recipe, rows)
        if file:
            file.write_text(json.dumps(report.as_dict(), indent=1))
    except (ValueError, OSError, RuntimeError) as error:
        print("error:", str(error).partition("\n")[0], file=sys.stderr)
        return 2
    print(report.table())
    return 1 if report.flagged else 0


if __name__ == "__main__":
    sys.exit(main())
