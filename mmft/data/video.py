"""Clips: some frames of a file, evenly spread in time, upright and in RGB.

Only the frames that are wanted become pictures, and only the parts of a file that lead up to them are decoded, so a
long clip costs no more memory than a short one. A first pass reads the packets' times without decoding: they are
the truth about a clip whose frames are not evenly spaced, which a frame count and a rate are not.

A row gets its clip in one of two forms. By default as ``images``, which every family that reads several pictures
understands; or, for processors with video inputs of their own, as
``video: {"frames": [PIL.Image, ...], "times": [seconds, ...], "duration": seconds}``.

Left out: mirrored clips (a flip in the display matrix; rotations are applied), and the sound of a clip.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from mmft.data.containers import is_file, opened
from mmft.data.rows import Reader

_RATE = 25  # frames a second of a file that tells neither times nor a rate


@dataclass(frozen=True)
class Clips:
    """How clips are read; the keys of ``data.video`` in a recipe.

    Attributes:
        frames: pictures per clip. A file gives exactly so many, and shows a frame again where it has fewer, so that
            all clips of a batch have one shape; a list of frames is thinned to at most so many.
        native: rows keep the clip in one piece, for the processor's own video inputs.
        max_side: longer frames are made smaller, in pixels; bounds the memory of a batch.
    """

    frames: int = 8
    native: bool = False
    max_side: int = 768

    @property
    def reader(self) -> Reader:
        return Reader("video" if self.native else "images", self.open, check_clip, decoded=50)

    def open(self, source: Any, where: str) -> Any:
        """The value of the row's column ``video`` or ``images``; see `open_clip` for sources and errors."""
        clip = open_clip(source, where, self.frames, self.max_side)
        return clip if self.native else clip["frames"]


def open_clip(source: Any, where: str, frames: int = 8, max_side: int = 768) -> dict[str, Any]:
    """Frames shown in the middle of ``frames`` equal stretches of a clip.

    Args:
        source: a path, ``{"path", "bytes"}``, a list of pictures (taken to be one second apart), or what this
            function returns.
        where: names row and file in errors.

    Returns:
        ``frames``: RGB pictures; ``times``: when each is on the screen, in seconds from the first frame;
        ``duration``: in seconds, to the end of the last frame.

    Raises:
        ValueError: no such file, no clip, no frames in it, or damaged before the last frame that is wanted.
    """
    if frames < 1:
        raise ValueError(f"{where}: {frames} frames were asked for; expected at least 1")
    if not is_file(source):
        return _thinned(source, where, frames)
    with opened(source, "video", where) as (file, stream):
        line = _timeline(file, stream, where)
    step = (line.end - line.stamps[0]) / Fraction(frames)
    places = [line.stamps[0] + step * (2 * i + 1) / 2 for i in range(frames)]
    shown = [line.stamps[bisect_right(line.stamps, place) - 1] for place in places]
    pictures = _pictures(source, where, sorted(set(shown)), line.keys, max_side)
    seconds = float(line.unit)
    return {
        "frames": [pictures[stamp] for stamp in shown],
        "times": [float(place - line.stamps[0]) * seconds for place in places],
        "duration": float(line.end - line.stamps[0]) * seconds,
    }


def check_clip(path: Path, where: str) -> None:
    """Raises ValueError if the header shows no clip; decodes nothing."""
    with opened(path, "video", where):
        pass


@dataclass(frozen=True)
class _Timeline:
    stamps: list[int]  # when each frame appears, in units, ascending
    keys: list[int]  # those of them that decoding can start at; empty where it has to start with the file
    end: int
    unit: Fraction  # seconds


def _timeline(file: Any, stream: Any, where: str) -> _Timeline:
    """The times of a clip's frames, from its packets alone."""
    packets = []
    for packet in file.demux(stream):
        if packet.is_corrupt:
            raise ValueError(f"{where} is damaged after {len(packets)} frames (cut off?); replace the file")
        if packet.size and not packet.is_discard:
            packets.append((packet.pts, packet.is_keyframe, packet.duration))
    if not packets:
        raise ValueError(f"{where} has no frames; expected a clip with at least one")
    rate = stream.average_rate or _RATE
    if any(stamp is None for stamp, *_ in packets):  # a bare stream without a container: count instead
        return _Timeline(list(range(len(packets))), [], len(packets), 1 / Fraction(rate))
    packets.sort()
    stamps = [stamp for stamp, *_ in packets]
    # How long the last frame stays is often not said: then as long as most others.
    gaps = sorted(after - before for before, after in pairwise(stamps)) or [int(1 / (rate * stream.time_base))]
    end = stamps[-1] + max(packets[-1][2] or gaps[len(gaps) // 2], 1)
    return _Timeline(stamps, [stamp for stamp, is_key, _ in packets if is_key], end, stream.time_base)


def _pictures(source: Any, where: str, wanted: list[int], keys: list[int], max_side: int) -> dict[int, Image.Image]:
    """The frames with the wanted stamps (ascending), each decoded from the last key frame before it."""
    pictures: dict[int, Image.Image] = {}
    with opened(source, "video", where) as (file, stream):
        frames, frame, reached = enumerate(file.decode(stream)), None, keys[0] if keys else None
        for stamp in wanted:
            key = keys[bisect_right(keys, stamp) - 1] if keys and keys[0] <= stamp else None
            if key is not None and key > reached:  # nearer than decoding on
                file.seek(key, stream=stream)
                frames = enumerate(file.decode(stream))
            found = next((f for n, f in frames if (n if f.pts is None else f.pts) >= stamp), None)
            if keys and (found is None or (found.pts is not None and found.pts > stamp)):
                # A wrong index, or none (MPEG-TS), and the jump went too far: read the file from its start.
                return _pictures(source, where, wanted, [], max_side)
            frame = found or frame
            if frame is None:
                raise ValueError(f"{where} is damaged: nothing can be decoded; replace the file")
            pictures[stamp], reached = _picture(frame, stream, max_side), stamp
    return pictures


def _picture(frame: Any, stream: Any, max_side: int) -> Image.Image:
    """A frame as RGB: square pixels, turned upright, at most ``max_side`` pixels long."""
    width = frame.width * float(stream.sample_aspect_ratio or 1)
    scale = min(1.0, max_side / max(width, frame.height))
    size = {"width": max(1, round(width * scale)), "height": max(1, round(frame.height * scale))}
    picture = frame.to_image(**size)
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _thinned(source: Any, where: str, frames: int) -> dict[str, Any]:
    clip = source if isinstance(source, Mapping) else {"frames": source}
    pictures = clip.get("frames")
    if not isinstance(pictures, list | tuple) or any(not isinstance(p, Image.Image) for p in pictures):
        raise ValueError(f"{where}: expected a path, a list of pictures, or 'frames' with one; got {type(source)}")
    if not pictures:
        raise ValueError(f"{where} has no frames; expected at least one picture")
    times = clip.get("times") or [float(i) for i in range(len(pictures))]
    if len(times) != len(pictures):
        raise ValueError(f"{where}: {len(times)} times for {len(pictures)} frames; expected one each")
    frames = min(frames, len(pictures))
    chosen = [(2 * i + 1) * len(pictures) // (2 * frames) for i in range(frames)]
    return {
        "frames": [pictures[i] for i in chosen],
        "times": [float(times[i]) for i in chosen],
        "duration": float(clip.get("duration") or times[-1] + 1),
    }
