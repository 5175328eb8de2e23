"""Clips and sounds made on the spot, whose every frame says which one it is."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SIDE, STEP = 8, 4  # a white square of 8 pixels moves 4 to the right with each frame


def square(number: int, size: tuple[int, int] = (192, 48)) -> np.ndarray:
    """Frame `number` as (height, width, 3) uint8: the square at the left, above, `number` steps on."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[4 : 4 + SIDE, number * STEP : number * STEP + SIDE] = 255
    return pixels


def number_of(picture: Image.Image) -> int:
    """Which frame a picture is, read from where its square stands."""
    columns = np.asarray(picture.convert("L"), float)[4 : 4 + SIDE].mean(0) > 127
    return round(int(np.flatnonzero(columns)[0]) / STEP)


def write_clip(path: Path, stamps: list[int], codec: str = "libx264", gop: int = 12, size=(192, 48)) -> Path:
    """Frames that appear at the given milliseconds."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(square(number, size), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def turn(path: Path) -> None:
    """Makes an MP4 say that it is to be shown turned clockwise by 90 degrees, as a phone held upright does."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of header
    matrix = (0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    data[place : place + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)


def write_sound(path: Path, seconds: float = 1.0, rate: int = 44_100, hertz: float = 440.0, channels: int = 2) -> Path:
    """A sine tone, in one channel; the others are silent."""
    wave = (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate) * 32767).astype(np.int16)
    data = np.zeros((1, len(wave) * channels), np.int16)
    data[0, ::channels] = wave
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=rate, layout={1: "mono", 2: "stereo"}[channels])
        frame = av.AudioFrame.from_ndarray(data, format="s16", layout={1: "mono", 2: "stereo"}[channels])
        frame.sample_rate, frame.pts = rate, 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path
