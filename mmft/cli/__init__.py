"""`mmft VERB`: each verb calls one function elsewhere. A file per verb, and what they share here.

A verb imports what it calls inside its function: `mmft --help`, completion and a wrong recipe must not wait for torch.
Errors are raised, and said here in one place, in one line each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from mmft.cli import doctor, hub
from mmft.recipe import RecipeError
from mmft.recipe.secrets import hide_secrets

FINE, FOUND, WRONG_INPUT, UNPUBLISHED = 0, 1, 2, 3  # exit codes; docs/cli.md

app = typer.Typer(
    help="Actor-critic fine-tuning of vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(doctor.app, name="doctor")
app.command()(hub.push)
app.command()(hub.pull)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit codes: 0 fine, 1 something was found, 2 wrong input, 3 the Hub failed."""
    hide_secrets()
    try:
        app(args=arguments, prog_name="mmft")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FINE if end.code is None else WRONG_INPUT
    except RecipeError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return WRONG_INPUT
    except (ValueError, OSError, RuntimeError) as error:
        print("error:", error, file=sys.stderr)
        return _code_of(error)
    return FINE


def _code_of(error: Exception) -> int:
    from mmft.hub import PublishError

    return UNPUBLISHED if isinstance(error, PublishError) else WRONG_INPUT
