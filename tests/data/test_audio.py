"""Sounds: one channel at the wanted rate, and every broken file named."""

from __future__ import annotations

import numpy as np
import pytest
from data.clips import write_clip, write_sound

from mmft.data import load_rows
from mmft.data.audio import Sounds


def test_a_sound_is_resampled_and_its_channels_are_averaged(tmp_path):
    sound = Sounds().open(write_sound(tmp_path / "a.wav", seconds=1.0), "row 1")
    array = sound["array"]
    assert sound["sampling_rate"] == 16_000 and array.dtype == np.float32
    assert abs(len(array) - 16_000) <= 16
    spectrum = np.abs(np.fft.rfft(array[:16_000], 16_000))  # bins of 1 Hz
    assert spectrum.argmax() == 440
    assert np.abs(array[2000:-2000]).max() == pytest.approx(0.25, abs=0.01)  # 0.5 on one of two channels


def test_arrays_pass_and_long_or_broken_sounds_are_named(tmp_path):
    given = {"array": np.zeros(100, np.float64), "sampling_rate": 16_000}
    assert Sounds().open(given, "row 1")["array"].dtype == np.float32
    path = write_sound(tmp_path / "a.wav", seconds=2.0)
    with pytest.raises(ValueError, match="row 1 is longer than 1.5 seconds"):
        Sounds(max_seconds=1.5).open(path, "row 1")
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="row 1 is no sound or is damaged"):
        Sounds().open(tmp_path / "b.wav", "row 1")
    with pytest.raises(ValueError, match="row 1 holds no audio, only video"):
        Sounds().open(write_clip(tmp_path / "a.mp4", [0, 100]), "row 1")


def test_a_folder_of_sounds(tmp_path):
    (tmp_path / "sounds").mkdir()
    write_sound(tmp_path / "sounds" / "a.wav")
    (tmp_path / "captions.csv").write_text("audio,caption\na.wav,a tone\n")
    rows = load_rows(str(tmp_path), "all", sounds=Sounds(sampling_rate=8_000))
    assert rows.column_names == ["id", "prompt", "audio", "references"]
    assert len(rows[0]["audio"]["array"]) == pytest.approx(8_000, abs=16)
