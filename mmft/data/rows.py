"""Rows: a lazy sequence of samples, whose files are opened when a row is asked for.

A row is a dict with "id", "prompt", "image" (RGB), "references" and whatever else a data set brings. Rows of clips
have "images" or "video" instead of "image", rows of sounds "audio" (see `mmft.data.video`, `mmft.data.audio`). Files
are opened when a row is asked for and not kept, so a data set of any size costs only its text.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from reward_models.picture_files import as_rgb, check_picture_file, check_plain, inside, open_picture_file

MAX_FILE_CHECKS = 10_000
MAX_LISTED = 10


@runtime_checkable
class Rows(Protocol):
    """What the trainer reads. A list of dicts or a ``datasets.Dataset`` does as well there."""

    @property
    def column_names(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Any:
        """The row, its file opened there and then; for a slice, rows."""

    def text(self, index: int) -> dict[str, Any]:
        """The row without its file: no "image" key, and "picture", a name of it, instead."""

    def references(self) -> list[list[str]]:
        """The reference texts of every row, in order."""


@dataclass(frozen=True)
class Reader:
    """How the files of rows are read.

    Attributes:
        column: where an opened file stands in its row.
        open: (path, where) -> the column's value. Raises ValueError that begins with ``where``.
        check: (path, where): raises ValueError if the file looks unsound; cheaper than opening it.
        decoded: files that a look at all rows opens in full.
    """

    column: str
    open: Callable[[Any, str], Any]
    check: Callable[[Path, str], None]
    decoded: int


class FileRows(Sequence[dict[str, Any]]):
    """Rows whose pictures, clips or sounds are files below one folder.

    Args:
        records: one dict per row with "id", "prompt", "picture" (path below ``root``), "references", and perhaps
            "columns", what else the data say of it.
        root: the folder that no file may lie outside of.
        reader: how the files are read; as pictures where it is None.
    """

    def __init__(self, records: Sequence[dict[str, Any]], root: str | Path, reader: Reader | None = None) -> None:
        self.records = list(records)
        self.root = Path(root)
        self.reader = reader or PICTURES

    @property
    def column_names(self) -> list[str]:
        return ["id", "prompt", self.reader.column, "references"]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return FileRows(self.records[index], self.root, self.reader)
        record, path = self.text(index), self.path(index)
        opened = self.reader.open(path, self.where(index))
        return {key: opened if key == self.reader.column else record[key] for key in self.column_names}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def text(self, index: int) -> dict[str, Any]:
        record = {key: value for key, value in self.records[index].items() if key != "columns"}
        return {**record, "references": list(record["references"])}

    def columns(self, index: int) -> dict[str, Any]:
        """What else the data say of the row. No part of it: rewards would take a column "labels" for what they know."""
        return self.records[index].get("columns", {})

    def references(self) -> list[list[str]]:
        return [list(record["references"]) for record in self.records]

    def path(self, index: int) -> Path:
        """The row's file. Raises ValueError where it would lie outside the folder."""
        record = self.records[index]
        return inside(self.root, record["picture"], f"row {record['id']}")

    def where(self, index: int) -> str:
        """What errors call the row's file."""
        kind = {"image": "picture", "audio": "sound"}.get(self.reader.column, "clip")
        return f"row {self.records[index]['id']}: {kind} {self.path(index)}"


class OpenedRows(Sequence[dict[str, Any]]):
    """Any rows, the files (or frames, or samples) in one of their columns opened when a row is asked for.

    For rows that are not made here: ``OpenedRows(dataset, "video", Clips(frames=8).reader)``. A row without the
    column, or with None in it, stays as it is.
    """

    def __init__(self, rows: Any, column: str, reader: Reader) -> None:
        self.rows, self.column, self.reader = rows, column, reader

    @property
    def column_names(self) -> list[str]:
        return [self.reader.column if name == self.column else name for name in self.rows.column_names]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return OpenedRows([self.rows[i] for i in range(*index.indices(len(self)))], self.column, self.reader)
        row = dict(self.rows[index])
        source = row.pop(self.column, None)
        if source is not None:
            name = f" {source}" if isinstance(source, str | Path) else ""
            row[self.reader.column] = self.reader.open(source, f"row {row.get('id', index)}: {self.column}{name}")
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


class UsableRows(Sequence[dict[str, Any]]):
    """Rows without those that cannot be used.

    They are looked for at once (see `faults`). One that turns out to be damaged only when it is read (of very many
    files only some are decoded before) gives its place to the next good row, with a warning.

    Attributes:
        skipped: place in ``rows`` -> why it is left out.
    """

    def __init__(self, rows: Any, decode: int | None = None) -> None:
        self.rows, self.skipped = rows, faults(rows, decode)
        self.places = [i for i in range(len(rows)) if i not in self.skipped]
        if not self.places:
            raise ValueError(listed(f"none of {len(rows)} rows can be used", list(self.skipped.values())))

    @property
    def column_names(self) -> list[str]:
        return self.rows.column_names

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        for _ in self.places:
            place = self.places[index]
            try:
                return self.rows[place]
            except ValueError as error:
                self.skipped[place] = str(error)
                warnings.warn(f"left out: {error}", stacklevel=2)
                good = [other for other in self.places if other not in self.skipped]
                if not good:
                    break
                later = next((other for other in good if other > place), good[0])
                self.places = [later if other == place else other for other in self.places]
        raise ValueError(listed("no row is left that can be used", list(self.skipped.values())))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def text(self, index: int) -> dict[str, Any]:
        return self.rows.text(self.places[index])

    def columns(self, index: int) -> dict[str, Any]:
        return columns_of(self.rows, self.places[index])

    def references(self) -> list[list[str]]:
        every = self.rows.references()
        return [every[place] for place in self.places]


def write_skipped(folder: Path, **splits: Any) -> None:
    """``skipped_rows.jsonl``: split, row and reason of everything that `UsableRows` left out; says how much it is."""
    lines = [
        {"split": split, "row": rows.rows.text(place)["id"], "reason": why}
        for split, rows in splits.items()
        for place, why in sorted(getattr(rows, "skipped", {}).items())
    ]
    if lines:
        path = folder / "skipped_rows.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        counts = ", ".join(f"{sum(line['split'] == split for line in lines)} of {split}" for split in splits)
        print(f"rows left out: {counts}; reasons in {path}", file=sys.stderr)


class Prompted(Sequence[dict[str, Any]]):
    """Any rows with another prompt on each."""

    def __init__(self, rows: Any, prompt: str) -> None:
        self.rows, self.prompt = rows, prompt

    @property
    def column_names(self) -> list[str]:
        return self.rows.column_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Prompted(self.rows[index], self.prompt)
        return {**self.rows[index], "prompt": self.prompt}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def text(self, index: int) -> dict[str, Any]:
        return {**self.rows.text(index), "prompt": self.prompt}

    def columns(self, index: int) -> dict[str, Any]:
        return columns_of(self.rows, index)

    def references(self) -> list[list[str]]:
        return self.rows.references()


def columns_of(rows: Any, index: int) -> dict[str, Any]:
    """What the data say of a row beside the row itself; empty for rows that do not know."""
    return rows.columns(index) if hasattr(rows, "columns") else {}


# --- pictures --------------------------------------------------------------------------------------


def open_picture(source: Any, row: str | None = None, where: str | None = None) -> Image.Image:
    """A picture as 8-bit RGB, upright; see `open_picture_file` for what is done to it and what is refused.

    Args:
        source: a path, the bytes of a file, ``{"path": ..., "bytes": ...}`` as `datasets` leaves it, or a PIL image.
        row, where: what errors begin with: ``row 7: picture a.png``, or `where` itself.
    """
    name = f"picture {source}" if isinstance(source, str | Path) else "picture"
    where = where or (f"row {row}: {name}" if row is not None else name)
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, Image.Image):
        return as_rgb(source, where)
    if not isinstance(source, str | Path | bytes):
        raise ValueError(f"{where} is {type(source).__name__}; expected a path, the bytes of a file, or a PIL image")
    return open_picture_file(source, where)


def _open_all(sources: Any, where: str) -> list[Image.Image]:
    if not isinstance(sources, list | tuple):
        raise ValueError(f"{where} is {type(sources).__name__}; expected a list of pictures")
    return [open_picture(source, where=f"{where} {i}") for i, source in enumerate(sources)]


PICTURES = Reader("image", lambda source, where: open_picture(source, where=where), check_picture_file, decoded=1000)
_SEVERAL = Reader("images", _open_all, check_picture_file, decoded=1000)


def opened_here(rows: Any) -> Any:
    """The rows of a `datasets.Dataset` with their pictures opened by `open_picture`; any other rows as they are.

    The library would decode whatever the file holds, of any size, and turn 16-bit grey into white.
    """
    features = getattr(rows, "features", None)
    if not isinstance(features, Mapping) or not hasattr(rows, "cast_column"):
        return rows
    import datasets

    for column, reader in (("image", PICTURES), ("images", _SEVERAL)):
        feature, closed = features.get(column), datasets.Image(decode=False)
        if isinstance(feature, datasets.Image):
            rows = OpenedRows(rows.cast_column(column, closed), column, reader)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = OpenedRows(rows.cast_column(column, type(feature)(closed)), column, reader)
    return rows


# --- looking at all of them ------------------------------------------------------------------------


def check_rows(rows: Rows, decode: int | None = None) -> None:
    """Looks at every file before anything is trained on it.

    Every file must exist; up to 10,000 (evenly spread) must be sound as far as header, checksums and end of file
    tell; up to ``decode`` (evenly spread; 1,000 pictures, 50 clips or sounds) are decoded in full. Every row needs
    at least one non-empty reference. Rows that draw their own pictures pass.

    Raises:
        ValueError: lists the first ten bad rows with path and reason, and how many there are.
    """
    bad = faults(rows, decode)
    if bad:
        raise ValueError(listed(f"{len(bad)} of {len(rows)} rows cannot be used", list(bad.values())))


def faults(rows: Rows, decode: int | None = None) -> dict[int, str]:
    """Place -> what is wrong with the row, of the rows that cannot be used; see `check_rows`."""
    if not len(rows):
        raise ValueError("there are no rows; expected at least one")
    rows = rows.rows if isinstance(rows, Prompted) else rows
    if not isinstance(rows, FileRows):
        return {}
    bad: dict[int, str] = {}
    files = _spread(len(rows), MAX_FILE_CHECKS)
    decoded = _spread(len(rows), rows.reader.decoded if decode is None else decode)
    for index, record in enumerate(rows.records):
        try:
            if not any(reference.strip() for reference in record["references"]):
                raise ValueError(f"row {record['id']}: no references; expected at least one caption")
            path, where = rows.path(index), rows.where(index)
            if index in decoded:
                rows.reader.open(path, where)
            elif index in files:
                rows.reader.check(path, where)
            else:
                check_plain(path, where)
        except ValueError as error:
            bad[index] = str(error)
    return bad


def _spread(total: int, wanted: int) -> set[int]:
    if wanted >= total:
        return set(range(total))
    return {index * total // wanted for index in range(wanted)}


def listed(head: str, lines: Sequence[str]) -> str:
    """A heading and the first ten lines below it."""
    shown = [head + ":", *(f"  {line}" for line in lines[:MAX_LISTED])]
    if len(lines) > MAX_LISTED:
        shown.append(f"  ... and {len(lines) - MAX_LISTED} more")
    return "\n".join(shown)
