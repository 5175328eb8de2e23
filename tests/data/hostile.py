"""Picture files of sixteen awkward kinds, each with the truth about it, and bombs. Truths are numpy alone."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

Truth = np.ndarray | str  # (height, width, 3) in 0..255, or a part of the reason that the error gives


def smooth(height: int = 24, width: int = 40) -> np.ndarray:
    """(H, W, 3) uint8 that differs in all directions and colours, smooth enough for JPEG."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1).astype(np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, before: bytes = b"") -> bytes:
    """A PNG written by hand; ``pixels`` compressed, with a filter byte before each row."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def png_bomb(width: int, height: int) -> bytes:
    """A sound PNG of black pixels, a thousandth of their size."""
    packer, times, size = zlib.compressobj(9, wbits=-15), height // 64, height * (1 + 3 * width)
    assert height % 64 == 0
    piece = packer.compress(bytes(size // times)) + packer.flush(zlib.Z_FULL_FLUSH)  # the same bytes for each piece
    adler = (size % 65521) << 16 | 1  # of zeros
    return png(width, height, 8, 2, b"\x78\xda" + piece * times + packer.flush() + struct.pack(">I", adler))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    return png(width, height, 8, 2, zlib.compress(b""))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def sixteen_kinds(folder: Path) -> dict[str, Truth]:
    """Writes the kinds into a folder, all but the missing one; file name -> truth."""
    folder.mkdir(parents=True, exist_ok=True)
    rgb = smooth()
    whole_jpeg, whole_png = (saved(Image.fromarray(smooth(96, 128)), kind) for kind in ("JPEG", "PNG"))
    place = whole_png.index(b"IDAT") + 20
    files: dict[str, tuple[bytes, Truth]] = {
        "cut.jpg": (whole_jpeg[: len(whole_jpeg) // 2], "damaged"),
        "cut.png": (whole_png[: len(whole_png) // 2], "damaged"),
        "zero.jpg": (b"", "is empty"),
        "page.jpg": (b"<!doctype html><title>404 not found</title>", "not a picture"),
        "crc.png": (whole_png[:place] + bytes([whole_png[place] ^ 255]) + whole_png[place + 1 :], "damaged"),
    }
    cmyk = np.dstack([rgb, np.full(rgb.shape[:2], 51, np.uint8)])  # a fifth of black
    kept = (1 - cmyk[..., :3] / 255) * (1 - cmyk[..., 3:] / 255)
    files["cmyk.jpg"] = saved(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100, subsampling=0), kept * 255
    deep = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    files["deep.png"] = png(40, 24, 16, 0, zlib.compress(rows)), np.repeat(deep[..., None] / 257, 3, -1)
    colours = np.array([[200, 10, 10], [10, 200, 10], [10, 10, 200], [90, 90, 90]])
    opaque = np.array([255, 128, 64, 0])
    indices = (np.mgrid[:24, :40].sum(0) % 4).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in indices)
    tables = chunk(b"PLTE", colours.astype(np.uint8).tobytes()) + chunk(b"tRNS", opaque.astype(np.uint8).tobytes())
    share = opaque[:, None] / 255
    files["palette.png"] = (
        png(40, 24, 8, 3, zlib.compress(rows), tables),
        (colours * share + 255 * (1 - share))[indices],
    )
    grey, alpha = rgb[..., 0], rgb[..., 1]
    on_white = grey * (alpha / 255) + 255 * (1 - alpha / 255)
    la = Image.fromarray(np.dstack([grey, alpha]), "LA")
    files["la.png"] = saved(la, "PNG"), np.repeat(on_white[..., None], 3, -1)
    bits = np.mgrid[:24, :40].sum(0) % 3 == 0
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
    files["bits.png"] = png(40, 24, 1, 0, zlib.compress(rows)), np.repeat(bits[..., None] * 255.0, 3, -1)
    flat = [np.full((24, 40, 3), colour, np.uint8) for colour in ((250, 130, 10), (0, 0, 255))]
    first, second = (Image.fromarray(frame) for frame in flat)
    files["moving.gif"] = saved(first, "GIF", save_all=True, append_images=[second]), flat[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held turned: a quarter turn clockwise shows it upright
    files["turned.jpg"] = saved(Image.fromarray(rgb), "JPEG", quality=100, subsampling=0, exif=exif), np.rot90(rgb, -1)
    files["one.png"] = saved(Image.fromarray(rgb[:1, :1]), "PNG"), rgb[:1, :1]
    thin = smooth(2000, 1)
    files["thin.png"] = saved(Image.fromarray(thin), "PNG"), thin
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir(exist_ok=True)
    return {name: truth for name, (_, truth) in files.items()} | {
        "missing.png": "does not exist",
        "folder.png": "is a folder",
    }


def data_folder(root: Path) -> dict[str, Truth]:
    """The sixteen kinds as a data set of two captions each."""
    kinds = sixteen_kinds(root / "images")
    lines = ["image,caption", *(f"{name},a picture called {k} {name}" for k in range(2) for name in kinds)]
    (root / "captions.csv").write_text("\n".join(lines) + "\n")
    return kinds
