"""The verbs as a page of the documentation: `python -m mmft.cli.page` writes docs/cli.md anew below its marker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from mmft.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
MARKER = "<!-- From here on written by `python -m mmft.cli.page`. -->\n"


def verbs() -> str:
    """Every verb with its examples, arguments and options, as Markdown."""
    command = get_command(app)
    return "\n".join(_verb(command.commands[name], f"mmft {name}") for name in command.list_commands(None))


def written_anew(page: str) -> str:
    """A page with the verbs as they are now below its marker."""
    return f"{page.partition(MARKER)[0]}{MARKER}\n{verbs()}"


def _verb(command: Any, name: str, depth: int = 2) -> str:
    text, _, examples = (command.help or "").partition("Examples:\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]
    parts = [f"{'#' * depth} {name}", *paragraphs]
    if examples:
        parts += ["\n".join(["```sh", *(line.strip() for line in examples.strip().splitlines()), "```"])]
    context = typer.Context(command)
    if rows := [_row(*param.get_help_record(context)) for param in command.params]:
        parts += ["\n".join(["| | |", "|---|---|", *rows])]
    below = command.commands.items() if isinstance(command, TyperGroup) else ()
    return "\n\n".join(parts) + "\n" + "".join("\n" + _verb(sub, f"{name} {key}", depth + 1) for key, sub in below)


def _row(name: str, meaning: str) -> str:
    """A line of the table. The type of an argument says no more than its name does."""
    name = re.sub(r"^([^-].*) <[^>]*>$", r"\1", name).replace("|", ", ").replace(" range>", ">")
    return f"| `{name}` | {meaning.replace('|', ', ').replace('  [', ' [')} |"


if __name__ == "__main__":
    PAGE.write_text(written_anew(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
