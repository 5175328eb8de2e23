"""Data: rows from the built-in world, from cards and from folders. See `load_rows`."""

from mmft.data.rows import Rows, check_rows
from mmft.data.sources import load_rows

__all__ = ["Rows", "check_rows", "load_rows"]
