"""`mmft doctor`: looks at a recipe before it costs anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mmft.recipe import load_recipe

app = typer.Typer(help="Looks at a recipe before it costs anything.", no_args_is_help=True)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key.sub=value", show_default=False)]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the findings there, too")]


@app.command()
def rewards(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="held-out rows that are probed")] = 64,
    file: JsonFile = None,
) -> None:
    """Which rewards pay bad responses more than honest ones."""
    read = load_recipe(recipe, overrides)
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
    """How much memory each phase will take, before anything is loaded."""
    read = load_recipe(recipe, overrides)
    from mmft.training.memory import plan_memory

    plan = plan_memory(read, ranks, zero, device_gib, rows)
    _show(plan, plan.fits, file)


def _show(found: Any, fine: bool, file: Path | None) -> None:
    """Prints what a doctor found; exit code 1 where that is not fine."""
    if file:
        file.write_text(json.dumps(found.as_dict(), indent=1))
    print(found.table())
    raise typer.Exit(0 if fine else 1)
