"""`mmft push` and `mmft pull`: a run to the Hub and back (docs/hub.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Repository = Annotated[str, typer.Argument(metavar="user/name")]


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    repository: Repository,
    public: Annotated[bool, typer.Option("--public", help="if the repository has to be made; else private")] = False,
    dry_run: Annotated[
        Path | None, typer.Option("--dry-run", metavar="FOLDER", help="write the files there and ask nobody")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="user/name", help="the base model on the Hub, where the recipe names a folder"),
    ] = None,
    licence: Annotated[str | None, typer.Option(metavar="ID", help="for the card, such as apache-2.0")] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="with sample pictures of your own data, if you may")
    ] = False,
) -> None:
    """Publishes a finished run on the Hub, in one commit.

    Examples:
      mmft push runs/caption_ppo user/name --dry-run out
      mmft push runs/caption_ppo user/name
    """
    from mmft.hub import push as publish

    print(publish(run, repository, not public, dry_run, base=base, licence=licence, pictures=pictures))


def pull(
    repository: Repository,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit (default: main)")] = None,
) -> None:
    """Fetches a published run and compares every file with the Hub's hashes.

    Examples:
      mmft pull user/name folder
    """
    from mmft.hub import pull as fetch

    print(fetch(repository, folder, revision))
