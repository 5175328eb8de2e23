"""`mmft doctor`: looks at the machine and at a recipe before it costs anything."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmft.cli.files import prepare
from mmft.cli.progress import Advance, progress
from mmft.recipe import Recipe, load_recipe


class _CheckUnlessSaid(TyperGroup):
    """`mmft doctor RECIPE` is `mmft doctor check RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if not ctx.resilient_parsing and first not in [*self.commands, *ctx.help_option_names]:
            near = get_close_matches(first, self.commands, n=1)
            if near and not os.path.exists(first):
                ctx.fail(f"No such command or recipe {first!r}. Did you mean {near[0]!r}?")
            args = ["check", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_CheckUnlessSaid)
SUPERVISED = "caption_sft.py"  # trains on captions alone


@app.callback()
def _doctor() -> None:
    """Looks at this machine and at a recipe before a run costs anything.

    Without a command, `check` is meant.

    Examples:
      mmft doctor
      mmft doctor recipes/caption_ppo.yaml
      mmft doctor recipes/caption_ppo.yaml train.steps=20 --quick
      mmft doctor rewards recipes/caption_ppo.yaml
      mmft doctor memory recipes/caption_ppo.yaml
    """


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key.sub=value", show_default=False, help="changes to the recipe")
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the findings there, too")]


@app.command()
def check(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE.yaml", help="without one, only the machine is looked at")
    ] = None,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="nothing that loads the model or plans its memory")] = False,
    file: JsonFile = None,
) -> None:
    """One page: machine, recipe, data, rewards, memory, model, and how long the run will take.

    Exit code 0: nothing was found that will hurt; 1: something was; 2: the recipe is wrong.

    Examples:
      mmft doctor
      mmft doctor recipes/caption_ppo.yaml
      mmft doctor recipes/caption_ppo.yaml train.steps=20 --quick --json doctor.json
    """
    if recipe is not None and "=" in recipe.name and not recipe.exists():
        raise ValueError(f"{recipe} changes a recipe; expected the recipe before it: mmft doctor RECIPE.yaml {recipe}")
    read, following, supervised = None, "mmft doctor recipes/caption_ppo.yaml", False
    if recipe is not None:
        read = load_recipe(recipe, overrides)
        script = _script(recipe, read)
        following = shlex.join(["accelerate", "launch", str(script), str(recipe), *(overrides or [])])
        supervised = script.name == SUPERVISED
    prepare(file)
    with _working("loading the libraries") as advance:
        from mmft.training.doctor import examine  # torch and transformers: only once the recipe is sound

        page = examine(read, following, quick, lambda title: advance(0, f"looking at: {title.lower()}"), supervised)
    if file:
        file.write_text(json.dumps(page.as_dict(), indent=1, default=str), encoding="utf-8")
    shown = (sys.stdout.encoding or "ascii").lower().replace("-", "")
    print(page.text(colour=_coloured(), plain=not shown.startswith("utf")))
    raise typer.Exit(0 if page.fine else 1)


def _script(file: Path, recipe: Recipe) -> Path:
    """The script that runs a recipe: its own, or the one for what its sections speak of.

    A file with a section `warm_start`, and none for reinforcement learning, is trained on captions alone.
    """
    own = file.with_suffix(".py")
    if own.is_file():
        return own
    learns = {"rewards", "algorithm", "train"} & recipe.model_fields_set
    alone = recipe.warm_start is not None and not learns
    return Path("recipes") / (SUPERVISED if alone else f"caption_{recipe.algorithm.name}.py")


def _require_rewards(file: Path, recipe: Recipe, what: str) -> None:
    if _script(file, recipe).name == SUPERVISED:
        raise ValueError(
            f"{file}: it is trained on captions alone ({SUPERVISED}), and {what}; expected a recipe with a section "
            f"rewards, algorithm or train. What there is to say of this one: mmft doctor {file}"
        )


def _coloured() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


@app.command()
def rewards(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="held-out rows that are probed")] = 64,
    file: JsonFile = None,
) -> None:
    """Which rewards pay bad responses more than honest ones. Exit code 1: the total does.

    Examples:
      mmft doctor rewards recipes/caption_ppo.yaml
    """
    read = load_recipe(recipe, overrides)
    _require_rewards(recipe, read, "nothing is rewarded")
    prepare(file)
    with _working("asking the rewards"):
        from mmft.training.doctor import doctor_rewards  # torch and transformers: only once the recipe is sound

        report = doctor_rewards(read, rows)
    _show(report, not report.flagged, file)


@app.command()
def memory(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="training rows; the longest prompt counts")] = 4,
    ranks: Annotated[int, typer.Option(min=1, help="processes that share a step")] = 1,
    zero: Annotated[int, typer.Option(min=0, max=3, help="DeepSpeed's stage; 0 = DDP")] = 0,
    device_gib: Annotated[float | None, typer.Option(help="memory of the GPU; without it, this machine's CPU")] = None,
    file: JsonFile = None,
) -> None:
    """How much memory each phase will take, before anything is loaded. Exit code 1: it does not fit.

    Examples:
      mmft doctor memory recipes/caption_ppo.yaml rollout.num_generations=16
      mmft doctor memory recipes/caption_ppo.yaml --device-gib 24 --ranks 4 --zero 2
    """
    if device_gib is not None and not 0 < device_gib < math.inf:
        raise ValueError(f"--device-gib {device_gib:g}: expected the GPU's memory in GiB, such as 24")
    read = load_recipe(recipe, overrides)
    _require_rewards(recipe, read, "the plan is of reinforcement learning")
    prepare(file)
    with _working("planning memory"):
        from mmft.training.memory import plan_memory

        plan = plan_memory(read, ranks, zero, device_gib, rows)
    _show(plan, plan.fits, file)


@contextmanager
def _working(label: str) -> Iterator[Advance]:
    """Progress. What libraries print meanwhile is no part of the result."""
    with progress(None, label) as advance, redirect_stdout(io.StringIO()):
        yield advance


def _show(found: Any, fine: bool, file: Path | None) -> None:
    """Prints what a doctor found; exit code 1 where that is not fine."""
    if file:
        file.write_text(json.dumps(found.as_dict(), indent=1), encoding="utf-8")
    print(found.table())
    raise typer.Exit(0 if fine else 1)
