"""A look at the tables of an MP4 file before FFmpeg reads them.

FFmpeg makes room for every sample that a table claims: about 70 bytes each, three gigabytes for a file of three
kilobytes that claims fifty million of one size. No file holds more samples than bytes.

FFmpeg takes a table in whatever box it finds it, so every box is searched but the one of the media itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

_COUNT_AT = {b"stsz": 8, b"stz2": 8, b"trun": 4}  # where in its body a table says how many samples it has
MAX_BOXES, MAX_DEPTH = 200_000, 10


def check_tables(stream: BinaryIO, where: str, called: str) -> None:
    """Raises ValueError for tables that claim more samples than the file has bytes. Other files pass."""
    size, claimed = stream.seek(0, 2), 0
    for number, (kind, body) in enumerate(_boxes(stream, 0, size)):
        if number == MAX_BOXES:
            raise ValueError(f"{where} has more than {MAX_BOXES} boxes, expected a {called}; convert the file")
        if kind == b"cmov":  # QuickTime's, unpacked by FFmpeg; nobody has written them for long
            raise ValueError(f"{where} has compressed tables (cmov), which are not read; convert the file")
        if kind in _COUNT_AT:
            stream.seek(body + _COUNT_AT[kind])
            claimed += int.from_bytes(stream.read(4), "big")
            if claimed > size:
                raise ValueError(
                    f"{where} is no {called} or is damaged: its tables (up to {kind.decode()}) claim {claimed} "
                    f"samples, the file has {size} bytes; replace the file"
                )


def _boxes(stream: BinaryIO, start: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int]]:
    """Kind and place of the body of each box between two places, and of the boxes within."""
    while start + 8 <= end:
        stream.seek(start)
        head = stream.read(16)
        length, kind, body = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if length == 1:
            length, body = int.from_bytes(head[8:16], "big"), start + 16
        after = end if length == 0 else start + length
        if after < body:
            return  # no box at all
        yield kind, body
        if kind.isalpha() and kind != b"mdat" and kind not in _COUNT_AT and depth < MAX_DEPTH:
            for inner in (body, body + 4) if kind == b"meta" else (body,):  # which may have a version first
                yield from _boxes(stream, inner, min(after, end), depth + 1)
        start = after
