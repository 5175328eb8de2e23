"""Rows: a lazy sequence of samples, and the one place that opens picture files.

A row is a dict with "id", "prompt", "image" (RGB), "references" and whatever else a data set brings. Rows of clips
have "images" or "video" instead of "image", rows of sounds "audio" (see `mmft.data.video`, `mmft.data.audio`). Files
are opened when a row is asked for and not kept, so a data set of any size costs only its text.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmft.data.containers import check_plain

MAX_PIXELS = 89_478_485  # where Pillow starts to warn of decompression bombs; refused from the header alone
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
        records: one dict per row with "id", "prompt", "picture" (path below ``root``), "references".
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
        record = self.records[index]
        return {**record, "references": list(record["references"])}

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

    def references(self) -> list[list[str]]:
        return self.rows.references()


# --- picture files ---------------------------------------------------------------------------------


def refuse_outward(name: str, where: str) -> None:
    """Raises ValueError for a picture name that is not a plain relative path (``..``, absolute, ``file://``)."""
    path, windows = PurePosixPath(name), PureWindowsPath(name)
    outward = path.is_absolute() or windows.is_absolute() or windows.drive or windows.root
    if not name or "\0" in name or "://" in name or outward or ".." in (*path.parts, *windows.parts):
        raise ValueError(
            f"{where}: picture {name!r} is refused; expected a path below the folder of pictures, without '..'"
        )


def inside(root: Path, name: str, where: str) -> Path:
    """The file ``root/name``, links followed. Raises ValueError where it lies outside ``root``."""
    refuse_outward(name, where)
    try:
        real = (root / name).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise ValueError(f"{where}: picture {root / name} cannot be looked up: {error}") from None
    if not real.is_relative_to(root.resolve()):
        raise ValueError(
            f"{where}: picture {root / name} is a link to {real}, outside of {root}; put a copy there instead"
        )
    return real


def open_picture(path: str | Path, row: str | None = None, where: str | None = None) -> Image.Image:
    """Opens a picture as 8-bit RGB, upright.

    EXIF rotation is applied; transparency is laid onto white; palettes, grey, 1-bit and CMYK are converted; 16-bit
    grey is scaled by 1/257 (Pillow alone would clip it to white); of an animation the first frame is taken.

    Raises:
        ValueError: naming row, path and reason: missing, not a plain file, not a picture, damaged, or more than
            ``MAX_PIXELS`` pixels (seen from the header, before anything is decoded).
    """
    where = where or (f"row {row}: picture {path}" if row is not None else f"picture {path}")
    with _opened(Path(path), where) as image:
        try:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), where)
        except ValueError as error:
            raise _as_said(error, where) from None
        except (OSError, SyntaxError, EOFError, IndexError, ArithmeticError, TypeError, MemoryError) as error:
            raise ValueError(f"{where} is damaged: {error}; replace the file or take the row out") from None


def check_file(path: Path, where: str) -> None:
    """Raises ValueError if the file is missing, no picture, too large or damaged; decodes only where it must."""
    with _opened(path, where) as image:
        if image.format == "PNG":
            try:
                return image.verify()  # reads the file and its checksums without unpacking it
            except Exception as error:  # Pillow's readers raise whatever their format's parser meets
                raise ValueError(f"{where} is damaged: {error}; replace the file or take the row out") from None
        if image.format in ("JPEG", "MPO"):
            with path.open("rb") as stream:
                stream.seek(-min(64, path.stat().st_size), os.SEEK_END)
                if b"\xff\xd9" in stream.read():  # the end marker: the file was not cut off
                    return None
    open_picture(path, where=where)
    return None


PICTURES = Reader("image", lambda path, where: open_picture(path, where=where), check_file, decoded=1000)


def _as_said(error: ValueError, where: str) -> ValueError:
    if str(error).startswith(where):
        return error
    return ValueError(f"{where} is damaged: {error}; replace the file or take the row out")


def _opened(path: Path, where: str) -> Image.Image:
    check_plain(path, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except UnidentifiedImageError:
        raise ValueError(f"{where} is not a picture in a known format; replace the file") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where} is too large: {error}; make it smaller") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"{where} cannot be opened: {error}; replace the file or take the row out") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{where} has {width} x {height} pixels, expected at most {MAX_PIXELS}; make it smaller")
    return image


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, or 32 bits that hold 16
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError(f"{where} has values beyond 16 bits; save it with 8 or 16 bits per channel")
        grey = Image.fromarray(((values + 128) // 257).astype(np.uint8), "L")
        return grey.convert("RGB")
    if image.mode == "F":
        raise ValueError(f"{where} has floating-point pixels; save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def check_rows(rows: Rows, decode: int | None = None) -> None:
    """Looks at every file before anything is trained on it.

    Every file must exist; up to 10,000 (evenly spread) must be sound as far as header, checksums and end of file
    tell; up to ``decode`` (evenly spread; 1,000 pictures, 50 clips or sounds) are decoded in full. Every row needs
    at least one non-empty reference. Rows that draw their own pictures pass.

    Raises:
        ValueError: lists the first ten bad rows with path and reason, and how many there are.
    """
    if not len(rows):
        raise ValueError("there are no rows; expected at least one")
    bad: list[str] = []
    if isinstance(rows, Prompted):
        rows = rows.rows
    if not isinstance(rows, FileRows):
        return
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
            bad.append(str(error))
    if bad:
        raise ValueError(listed(f"{len(bad)} of {len(rows)} rows cannot be used", bad))


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
