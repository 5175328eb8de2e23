"""Files that a verb is told to write."""

from __future__ import annotations

import os
from pathlib import Path


def prepare(file: Path | None) -> None:
    """Makes the folder of a file that will be written: what is wrong with its place is said before the work.

    Raises:
        ValueError: the file can never be written.
    """
    if file is None:
        return
    if file.is_dir():
        raise ValueError(f"{file} is a folder; expected the name of a file in it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error.filename}: {error.strerror}") from error
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written: no permission")
