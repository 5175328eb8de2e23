"""Sounds: a file as one channel of samples at the rate a model expects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mmft.data.containers import is_file, opened
from mmft.data.rows import Reader


@dataclass(frozen=True)
class Sounds:
    """How sounds are read; the keys of ``data.audio`` in a recipe.

    Attributes:
        sampling_rate: in Hz; what the model's feature extractor wants.
        max_seconds: longer sounds are refused, for a cut would go unseen.
    """

    sampling_rate: int = 16_000
    max_seconds: float = 30.0

    @property
    def reader(self) -> Reader:
        return Reader("audio", self.open, check_sound, decoded=50)

    def open(self, source: Any, where: str) -> dict[str, Any]:
        """``{"array": (samples,) float32 in [-1, 1], "sampling_rate": Hz}``, several channels averaged.

        Args:
            source: a path, ``{"path", "bytes"}``, or what this function returns (passed on as it is).
            where: names row and file in errors.

        Raises:
            ValueError: no such file, no sound in it, damaged, or longer than ``max_seconds``.
        """
        if isinstance(source, Mapping) and source.get("array") is not None:
            return {"array": np.asarray(source["array"], np.float32), "sampling_rate": int(source["sampling_rate"])}
        if not is_file(source):
            raise ValueError(f"{where}: expected a path, or 'array' and 'sampling_rate'; got {type(source)}")
        with opened(source, "audio", where) as (file, stream):
            array = self._samples(file, stream, where)
        if not array.size:
            raise ValueError(f"{where} holds no samples; expected a sound")
        return {"array": array, "sampling_rate": self.sampling_rate}

    def _samples(self, file: Any, stream: Any, where: str) -> np.ndarray:
        import av

        # Channels are averaged here: FFmpeg's own mix would make a sound in one channel louder, by the root of two.
        resampler = av.AudioResampler(format="fltp", rate=self.sampling_rate)
        parts: list[np.ndarray] = []
        most, total = int(self.max_seconds * self.sampling_rate), 0
        for frame in chain(file.decode(stream), [None]):  # None: what the resampler still holds
            for piece in resampler.resample(frame):
                parts.append(piece.to_ndarray().mean(0))
                total += parts[-1].size
            if total > most:
                raise ValueError(f"{where} is longer than {self.max_seconds:g} seconds; cut it")
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def check_sound(path: Path, where: str) -> None:
    """Raises ValueError if the header shows no sound; decodes nothing."""
    with opened(path, "audio", where):
        pass
