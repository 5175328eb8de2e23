"""The one place that opens picture files: what nobody has looked at yet becomes 8-bit RGB, or an error with a reason.

Files are made by strangers. Their names may point anywhere, their headers may promise more pixels than there is memory,
and some formats are programs (PostScript) or ask for other files. So: plain files below their folder, formats of
pixels alone, and a limit that is read from the header.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # where Pillow starts to warn of decompression bombs; refused from the header alone
_FORMATS = (
    *("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "JPEG2000"),
    *("PPM", "TGA", "PCX", "QOI", "SGI"),  # no ICO: its header says nothing of the size of a PNG within
)

Source = str | os.PathLike[str] | bytes  # a file, or what is in one


def refuse_outward(name: str, where: str, called: str = "picture") -> None:
    """Raises ValueError for a name that is not a plain relative path (``..``, absolute, ``file://``)."""
    path, windows = PurePosixPath(name), PureWindowsPath(name)
    outward = path.is_absolute() or windows.is_absolute() or windows.drive or windows.root
    if not name or "\0" in name or "://" in name or outward or ".." in (*path.parts, *windows.parts):
        raise ValueError(f"{where}: {called} {name!r} is refused; expected a path below its folder, without '..'")


def inside(root: Path, name: str, where: str, called: str = "picture") -> Path:
    """The file ``root/name``, links followed. Raises ValueError where it lies outside ``root``."""
    refuse_outward(name, where, called)
    try:
        real = (root / name).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise ValueError(f"{where}: {called} {root / name} cannot be looked up: {error}") from None
    if not real.is_relative_to(root.resolve()):
        raise ValueError(
            f"{where}: {called} {root / name} is a link to {real}, outside of {root}; put a copy there instead"
        )
    return real


def check_plain(path: Path, where: str, called: str = "picture") -> None:
    """Raises ValueError for a file that is missing, empty, a folder or a device (reading which might never end)."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        missing = isinstance(error, FileNotFoundError)
        kind = "does not exist" if missing else f"cannot be read: {getattr(error, 'strerror', error)}"
        raise ValueError(f"{where} {kind}; expected a {called} file") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "special file"
        raise ValueError(f"{where} is a {kind}; expected a {called} file")
    if status.st_size == 0:
        raise ValueError(f"{where} is empty (0 bytes); expected a {called} file")


def open_picture_file(source: Source, where: str) -> Image.Image:
    """Opens a picture as 8-bit RGB, upright.

    EXIF rotation is applied; transparency is laid onto white; palettes, grey, 1-bit and CMYK are converted; 16-bit
    grey is scaled by 1/257 (Pillow alone would clip it to white); of an animation the first frame is taken.

    Args:
        source: a path, or the bytes of a file.
        where: names row and file in errors.

    Raises:
        ValueError: beginning with ``where``: missing, not a plain file, not a picture, damaged, or more than
            ``MAX_PIXELS`` pixels (seen from the header, before anything is decoded).
    """
    with _opened(source, where) as image:
        return as_rgb(image, where, upright=True)


def check_picture_file(path: Path, where: str) -> None:
    """Raises ValueError if the file is missing, no picture, too large or damaged; decodes only where it must."""
    with _opened(path, where) as image:
        if image.format == "PNG":
            try:
                return image.verify()  # reads the file and its checksums without unpacking it
            except Exception as error:  # as above
                raise _damaged(where, error) from None
        if image.format in ("JPEG", "MPO"):
            with path.open("rb") as stream:
                stream.seek(-min(64, path.stat().st_size), os.SEEK_END)
                if b"\xff\xd9" in stream.read():  # the end marker: the file was not cut off
                    return None
    open_picture_file(path, where)
    return None


class _Unfit(ValueError):
    """A sound picture that cannot be shown in 8 bits."""


def _damaged(where: str, error: Exception) -> ValueError:
    return ValueError(f"{where} is damaged: {error or type(error).__name__}; replace the file or take the row out")


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _opened(source: Source, where: str) -> Image.Image:
    if isinstance(source, bytes):
        if not source:
            raise ValueError(f"{where} is empty (0 bytes); expected a picture file")
        file: io.BytesIO | Path = io.BytesIO(source)
    else:
        file = Path(source)
        check_plain(file, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        raise ValueError(f"{where} is not a picture in a known format; replace the file") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where} is too large: {error}; make it smaller") from None
    except Exception as error:  # as above
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"{where} cannot be opened: {error.strerror}; mend that or take the row out") from None
        raise _damaged(where, error) from None
    check_size(image, where)
    return image


def check_size(image: Image.Image, where: str) -> None:
    """Raises ValueError for a picture of more than ``MAX_PIXELS`` pixels."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _Unfit(f"{where} has {width} x {height} pixels, expected at most {MAX_PIXELS}; make it smaller")


def as_rgb(image: Image.Image, where: str, upright: bool = False) -> Image.Image:
    """A picture that is open already, as 8-bit RGB; upright: by its EXIF. Raises as `open_picture_file` does."""
    check_size(image, where)
    try:
        image.load()  # it may be open and not yet decoded
        return _as_rgb(ImageOps.exif_transpose(image) if upright else image, where)
    except _Unfit:
        raise
    except Image.DecompressionBombError as error:  # a frame larger than the header says
        raise ValueError(f"{where} is too large: {error}; make it smaller") from None
    except Exception as error:  # Pillow's readers raise whatever their format's parser meets
        raise _damaged(where, error) from None


def _as_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, or 32 bits that hold 16
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise _Unfit(f"{where} has values beyond 16 bits; save it with 8 or 16 bits per channel")
        grey = Image.fromarray(((values + 128) // 257).astype(np.uint8), "L")
        return grey.convert("RGB")
    if image.mode == "F":
        raise _Unfit(f"{where} has floating-point pixels; save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
