"""Opening files of clips and sounds with PyAV, for `mmft.data.video` and `mmft.data.audio`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from mmft.data.mp4 import check_tables
from reward_models.picture_files import MAX_PIXELS, check_plain

# FFmpeg also knows playlists, which open other files and addresses, and would show a text file as a terminal.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,h264,hevc,"
    "wav,w64,mp3,flac,aac,aiff,caf,amr"
)


def is_file(source: Any) -> bool:
    """Whether a column's value is a file: a path, or ``{"path": ..., "bytes": ...}`` as `datasets` leaves it."""
    return isinstance(source, str | os.PathLike) or (
        isinstance(source, Mapping) and (source.get("path") is not None or source.get("bytes") is not None)
    )


@contextmanager
def opened(source: Any, kind: Literal["video", "audio"], where: str) -> Iterator[tuple[Any, Any]]:
    """The container of a file and its first stream of a kind; whatever FFmpeg says becomes a ValueError.

    Args:
        source: a path, or ``{"path": ..., "bytes": ...}``.
        where: names row and file in errors.

    Raises:
        ValueError: missing, empty, not a plain file, no such stream, damaged (here, or while it is decoded within
            the ``with``), or PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise ValueError(f"{where} needs PyAV; install it with: pip install 'mmft[video]'") from None
    called = {"video": "clip", "audio": "sound"}[kind]
    data = source.get("bytes") if isinstance(source, Mapping) else None
    if data is None:
        path = Path(source["path"] if isinstance(source, Mapping) else source)
        check_plain(path, where, called)
    elif not data:
        raise ValueError(f"{where} is empty (0 bytes); expected a {called}")
    with open(path, "rb") if data is None else io.BytesIO(data) as stream:
        check_tables(stream, where, called)
    try:
        # FFmpeg decodes the first frames to find out what they are, before anybody can ask for their size; and a frame
        # may be larger than the container says.
        limit = {"max_pixels": str(MAX_PIXELS)}
        options = {"format_whitelist": _FORMATS} | limit
        source = str(path) if data is None else io.BytesIO(data)
        with av.open(source, options=options, metadata_errors="replace") as file:
            # The cover of a music file is a stream of pictures, too.
            cover = av.stream.Disposition.attached_pic
            stream = next((s for s in file.streams if s.type == kind and not s.disposition & cover), None)
            if stream is None:
                found = ", ".join(sorted({s.type for s in file.streams})) or "nothing"
                raise ValueError(f"{where} holds no {kind}, only {found}; expected a {called}")
            if stream.codec_context is None:
                raise ValueError(f"{where} has {kind} in a format that FFmpeg cannot decode; convert the file")
            stream.codec_context.options = limit
            if kind == "video" and stream.width * stream.height > MAX_PIXELS:
                size = f"{stream.width} x {stream.height}"
                raise ValueError(f"{where} has {size} pixels, expected at most {MAX_PIXELS}; make it smaller")
            yield file, stream
    except av.FFmpegError as error:
        why = error.strerror
        if isinstance(error, av.ArgumentError):  # also what decoders say of a frame beyond the limit
            why += f", perhaps a frame of more than {MAX_PIXELS} pixels"
        raise ValueError(f"{where} is no {called} or is damaged: {why}; replace the file") from None
