"""`mmft VERB`: each verb calls one function elsewhere. A file per verb, and what they share here.

A verb imports what it calls inside its function: `mmft --help`, completion and a wrong recipe must not wait for torch.
Errors are raised, and said here in one place, in one line each. A verb's docstring ends in a paragraph `Examples:`
with one command a line; its help and docs/cli.md show them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mmft
from mmft.cli import caption, doctor, evaluate, hub, interrupts, merge, recipe, report
from mmft.recipe import RecipeError
from mmft.recipe.secrets import hide_secrets

FINE, FOUND, WRONG_INPUT, UNPUBLISHED = 0, 1, 2, 3  # exit codes; docs/cli.md
# Panels of `mmft --help`; each verb is registered in one of them.
PANELS = BEFORE, LOOK, USE, PUBLISH = "Before training", "Look at a result", "Use it", "Publish"


class _Verbs(TyperGroup):
    """Verbs panel by panel, in the order in which a person comes to them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: PANELS.index(self.commands[name].rich_help_panel))


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print("mmft", mmft.__version__)
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    """Actor-critic fine-tuning of vision-language models.

    Training itself is launched, on one process or many:
      accelerate launch recipes/caption_ppo.py

    Exit codes: 0 fine, 1 something was found, 2 wrong input, 3 the Hub failed, 130 Ctrl-C.
    """


app.add_typer(doctor.app, name="doctor", rich_help_panel=BEFORE)
app.add_typer(recipe.app, name="recipe", rich_help_panel=BEFORE)
app.command(rich_help_panel=LOOK)(report.report)
app.command(rich_help_panel=LOOK)(report.compare)
app.command(rich_help_panel=USE)(caption.caption)
app.command(rich_help_panel=USE)(merge.merge)
app.command(rich_help_panel=LOOK)(evaluate.evaluate)
app.command(rich_help_panel=PUBLISH)(hub.push)
app.command(rich_help_panel=PUBLISH)(hub.pull)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        0 fine, 1 something was found, 2 wrong input, 3 the Hub failed, 130 ended by Ctrl-C.
    """
    hide_secrets()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the bars of transformers, too
    try:
        with interrupts.remembered():
            code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has enough (`mmft … | head`). Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    return interrupts.CODE if interrupts.asked() else code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        app(args=arguments, prog_name="mmft")
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            raise BrokenPipeError from end  # typer has met it first
        return end.code if isinstance(end.code, int) else FINE if end.code is None else WRONG_INPUT
    except BrokenPipeError:
        raise
    except RecipeError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return WRONG_INPUT
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if not interrupts.asked():  # else what Ctrl-C left behind
            print("error:", error, file=sys.stderr)
        return _code_of(error)
    return FINE


def _code_of(error: Exception) -> int:
    from mmft.hub import PublishError

    return UNPUBLISHED if isinstance(error, PublishError) else WRONG_INPUT
