"""`mmft VERB`: each verb calls one function elsewhere."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmft.recipe import RecipeError, load_recipe
from mmft.recipe_secrets import hide_secrets


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes: 0 fine, 1 the doctor found something, 2 wrong input, 3 the Hub failed."""
    hide_secrets()
    options, rest = _parser().parse_known_args(arguments)
    if wrong := [word for word in rest if "=" not in word or word.startswith("-") or options.verb != "doctor"]:
        _parser().error(f"unknown argument: {wrong[0]}")
    return {"doctor": _doctor, "push": _push, "pull": _pull}[options.verb](options, rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmft", description="Actor-critic fine-tuning of vision-language models.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    doctor = verbs.add_parser("doctor", help="looks at a recipe before it costs anything")
    subjects = doctor.add_subparsers(dest="subject", required=True)
    rewards = subjects.add_parser("rewards", help="which rewards pay bad responses more than honest ones")
    rewards.add_argument("recipe", metavar="RECIPE.yaml")
    rewards.add_argument("overrides", nargs="*", metavar="key.sub=value")
    rewards.add_argument("--rows", type=int, default=64, help="held-out rows that are probed (default: 64)")
    rewards.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, too")
    memory = subjects.add_parser("memory", help="how much memory each phase will take, before anything is loaded")
    memory.add_argument("recipe", metavar="RECIPE.yaml")
    memory.add_argument("overrides", nargs="*", metavar="key.sub=value")
    memory.add_argument("--rows", type=int, default=4, help="training rows; the longest prompt counts (default: 4)")
    memory.add_argument("--ranks", type=int, default=1, help="processes that share a step (default: 1)")
    memory.add_argument("--zero", type=int, choices=range(4), default=0, help="DeepSpeed's stage (default: 0, DDP)")
    memory.add_argument("--device-gib", type=float, help="memory of the GPU; without it, this machine's CPU")
    memory.add_argument("--json", type=Path, metavar="FILE", help="write the plan there, too")
    push = verbs.add_parser("push", help="publishes a finished run on the Hub, in one commit (docs/hub.md)")
    push.add_argument("run", metavar="RUN", type=Path, help="run folder")
    push.add_argument("repository", metavar="user/name")
    push.add_argument("--public", action="store_true", help="if the repository has to be made (default: private)")
    push.add_argument("--dry-run", metavar="FOLDER", type=Path, help="write the files there and ask nobody")
    push.add_argument("--base", metavar="user/name", help="the base model on the Hub, where the recipe names a folder")
    push.add_argument("--licence", metavar="ID", help="for the card, such as apache-2.0")
    push.add_argument("--pictures", action="store_true", help="with sample pictures of your own data, if you may")
    pull = verbs.add_parser("pull", help="fetches a published run and compares every file with the Hub's hashes")
    pull.add_argument("repository", metavar="user/name")
    pull.add_argument("folder", metavar="FOLDER", type=Path)
    pull.add_argument("--revision", help="branch, tag or commit (default: main)")
    return parser


def _doctor(options, rest: list[str]) -> int:
    try:
        recipe = load_recipe(options.recipe, options.overrides + rest)  # overrides after an option
    except RecipeError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    return _doctor_memory(recipe, options) if options.subject == "memory" else _doctor_rewards(recipe, options)


def _doctor_rewards(recipe, options) -> int:
    from mmft.training.doctor import doctor_rewards  # torch and transformers: only once the recipe is sound

    return _show(lambda: doctor_rewards(recipe, options.rows), lambda report: not report.flagged, options.json)


def _doctor_memory(recipe, options) -> int:
    from mmft.training.memory import plan_memory

    plan = partial(plan_memory, recipe, options.ranks, options.zero, options.device_gib, options.rows)
    return _show(plan, lambda plan: plan.fits, options.json)


def _push(options, _) -> int:
    from mmft.hub import push

    chosen = {"base": options.base, "licence": options.licence, "pictures": options.pictures}
    return _tell(lambda: push(options.run, options.repository, not options.public, options.dry_run, **chosen))


def _pull(options, _) -> int:
    from mmft.hub import pull

    return _tell(lambda: pull(options.repository, options.folder, options.revision))


def _tell(action: Callable[[], str]) -> int:
    """Prints what an exchange with the Hub came to."""
    from mmft.hub import UNPUBLISHED, PublishError

    try:
        print(action())
    except (ValueError, OSError, PublishError) as error:
        print("error:", error, file=sys.stderr)
        return UNPUBLISHED if isinstance(error, PublishError) else 2
    return 0


def _show(look: Callable[[], Any], fine: Callable[[Any], bool], file: Path | None) -> int:
    """Prints what a doctor found; 0 where it is fine."""
    try:
        found = look()
        if file:
            file.write_text(json.dumps(found.as_dict(), indent=1))
    except (ValueError, OSError, RuntimeError) as error:
        print("error:", str(error).partition("\n")[0], file=sys.stderr)
        return 2
    print(found.table())
    return 0 if fine(found) else 1


if __name__ == "__main__":
    sys.exit(main())
