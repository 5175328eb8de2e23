"""A look at the tables of an MP4 file before FFmpeg reads them.

FFmpeg makes room for every sample that a table claims: about 70 bytes each, three gigabytes for a file of three
kilobytes that claims fifty million of one size. No file holds more samples than bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

_INNER = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"}
_COUNT_AT = {b"stsz": 8, b"stz2": 8, b"trun": 4}  # where in its body a table says how many samples it has
MAX_BOXES, MAX_DEPTH = 200_000, 10


def check_tables(stream: BinaryIO, where: str, called: str) -> None:
    """Raises ValueError for a table that claims more samples than the file has bytes. Other files pass."""
    size = stream.seek(0, 2)
    for number, (kind, body) in enumerate(_boxes(stream, 0, size)):
        if number == MAX_BOXES:
            raise ValueError(f"{where} has more than {MAX_BOXES} boxes, expected a {called}; convert the file")
        if kind in _COUNT_AT:
            stream.seek(body + _COUNT_AT[kind])
            claimed = int.from_bytes(stream.read(4), "big")
            if claimed > size:
                raise ValueError(
                    f"{where} is no {called} or is damaged: a table ({kind.decode()}) claims {claimed} samples, the "
                    f"file has {size} bytes; replace the file"
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
        if kind in _INNER and depth < MAX_DEPTH:
            yield from _boxes(stream, body, min(after, end), depth + 1)
        start = after
