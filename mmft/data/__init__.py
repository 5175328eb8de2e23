"""Data: rows from the built-in world, from cards and from folders. See `load_rows`."""

from mmft.data.audio import Sounds
from mmft.data.rows import OpenedRows, Rows, UsableRows, check_rows, opened_here
from mmft.data.sources import load_rows
from mmft.data.video import Clips

__all__ = ["Clips", "OpenedRows", "Rows", "Sounds", "UsableRows", "check_rows", "load_rows", "opened_here"]
