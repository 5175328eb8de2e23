"""What one section of the page has made and a later one needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Parts:
    """Rows, captions and rewards of a recipe; None where they could not be had.

    Attributes:
        train, held_out: the rows of both splits.
        references: the captions of each training row.
        frequencies: of the words in them.
        rewards: what is paid.
    """

    train: Any = None
    held_out: Any = None
    references: list[list[str]] = field(default_factory=list)
    frequencies: Any = None
    rewards: Any = None
