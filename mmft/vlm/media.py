"""What a row brings beside its words: pictures, clips and sounds. Looked over, named by content, and processed.

A row holds ``image`` or ``images`` (PIL), ``video`` (``{"frames": [PIL], "times": [s], "duration": s}``, a list of
such, or a list of frames taken to be a second apart) and ``audio`` (``{"array": (samples,), "sampling_rate": Hz}``, or
a list of such). `mmft.data` makes these of files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from reward_models.picture_files import as_rgb

Media = dict[str, list[Any]]  # "image", "video", "audio" -> what the row has of it; no empty lists
NAMES = {"image": "pictures", "video": "clips", "audio": "sounds"}
_TICKS = 1000  # the times of frames are told to processors in frames of a clip with so many a second


def media_of(row: Mapping[str, Any], row_id: str) -> Media:
    """The row's pictures, clips and sounds. Raises ValueError for anything that is not opened yet."""
    images = row.get("images")
    found = {
        "image": [_picture(p, row_id) for p in _listed(row.get("image") if images is None else images)],
        "video": [_clip(clip, row_id) for clip in _clips(row.get("video"))],
        "audio": [_sound(sound, row_id) for sound in _listed(row.get("audio"))],
    }
    return {name: values for name, values in found.items() if values}


def media_key(media: Media) -> str | None:
    """An identity by content, so that one picture in many rows (VQA) is encoded once; None for no media."""
    if not media:
        return None
    digest = hashlib.sha1(usedforsecurity=False)
    for image in media.get("image", ()):
        _digest(digest, image)
    for clip in media.get("video", ()):
        digest.update(f"video{len(clip['frames'])}{clip['times']}{clip['duration']}".encode())
        for frame in clip["frames"]:
            _digest(digest, frame)
    for sound in media.get("audio", ()):
        digest.update(f"audio{sound['sampling_rate']}{len(sound['array'])}".encode())
        digest.update(sound["array"].tobytes())
    return digest.hexdigest()


def process(processor: Any, text: str, media: Media, row_id: str) -> Mapping[str, Tensor]:
    """The processor's output for one row: ``input_ids`` (1, P), and the tensors of its media.

    Raises:
        ValueError: naming the row, when the processor does not take what the row has.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    bos = tokenizer.bos_token
    options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": not (bos and text.startswith(bos))}
    if "image" in media:
        options["images"] = [media["image"]]
    if "video" in media:
        if getattr(processor, "video_processor", None) is None:
            raise ValueError(
                f"row {row_id}: {type(processor).__name__} takes no clips; with data.video.native false their frames "
                "go in as pictures"
            )
        options |= _clip_options(media["video"])
    if "audio" in media:
        options |= _sound_options(processor, media["audio"], row_id)
    try:
        return (processor if media else tokenizer)(text=[text], **options)
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, LookupError) as error:
        has = ", ".join(f"{len(values)} {NAMES[name]}" for name, values in media.items()) or "no pictures"
        raise ValueError(f"row {row_id}: the processor refused it ({has}): {error}") from error


def blank(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with grey pictures and frames of the same sizes, and silence."""
    row = dict(row)

    def grey(value: Any) -> Any:
        if isinstance(value, Image.Image):
            return Image.new("RGB", value.size, (128, 128, 128))
        if isinstance(value, Mapping):
            return {**value, **{key: grey(value[key]) for key in ("frames", "array") if key in value}}
        return np.zeros_like(value) if isinstance(value, np.ndarray) else [grey(part) for part in value]

    for column in ("image", "images", "video", "audio"):
        if row.get(column) is not None:
            row[column] = grey(row[column])
    return row


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _clips(value: Any) -> list[Any]:
    frames = isinstance(value, list | tuple) and value and all(isinstance(v, Image.Image) for v in value)
    return [{"frames": list(value)}] if frames else _listed(value)


def _picture(image: Any, row_id: str) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"row {row_id}: a picture is {type(image).__name__}, expected PIL.Image.Image; "
            "mmft.data.load_rows opens paths"
        )
    return as_rgb(image, f"row {row_id}: a picture")


def _clip(clip: Any, row_id: str) -> dict[str, Any]:
    frames = clip.get("frames") if isinstance(clip, Mapping) else None
    if not frames or any(not isinstance(frame, Image.Image) for frame in frames):
        raise ValueError(
            f"row {row_id}: a clip is {type(clip).__name__}, expected 'frames' with pictures; "
            "mmft.data.load_rows opens paths, and mmft.data.OpenedRows those in rows of your own"
        )
    times = [float(time) for time in clip.get("times") or range(len(frames))]
    if len(times) != len(frames):
        raise ValueError(f"row {row_id}: {len(times)} times for {len(frames)} frames; expected one each")
    duration = float(clip.get("duration") or times[-1] + 1)
    return {"frames": [_picture(frame, row_id) for frame in frames], "times": times, "duration": duration}


def _sound(sound: Any, row_id: str) -> dict[str, Any]:
    if not isinstance(sound, Mapping) or sound.get("array") is None or not sound.get("sampling_rate"):
        raise ValueError(
            f"row {row_id}: a sound is {type(sound).__name__}, expected 'array' and 'sampling_rate'; "
            "mmft.data.load_rows opens paths, and mmft.data.OpenedRows those in rows of your own"
        )
    array = np.asarray(sound["array"], np.float32)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"row {row_id}: a sound has shape {array.shape}, expected (samples,), one channel")
    return {"array": array, "sampling_rate": int(sound["sampling_rate"])}


def _clip_options(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """Frames were chosen by the data; the processor is told when each was shown and chooses none itself."""
    from transformers.video_utils import VideoMetadata

    metadata = [
        VideoMetadata(
            total_num_frames=max(1, round(clip["duration"] * _TICKS)),
            fps=_TICKS,
            duration=clip["duration"],
            frames_indices=[round(time * _TICKS) for time in clip["times"]],
            width=clip["frames"][0].width,
            height=clip["frames"][0].height,
        )
        for clip in clips
    ]
    return {"videos": [clip["frames"] for clip in clips], "video_metadata": metadata, "do_sample_frames": False}


def _sound_options(processor: Any, sounds: list[dict[str, Any]], row_id: str) -> dict[str, Any]:
    extractor = getattr(processor, "feature_extractor", None)
    if extractor is None:
        raise ValueError(f"row {row_id}: {type(processor).__name__} takes no sounds; take out the column 'audio'")
    for sound in sounds:
        if sound["sampling_rate"] != extractor.sampling_rate:
            raise ValueError(
                f"row {row_id}: a sound has {sound['sampling_rate']} samples a second, the model expects "
                f"{extractor.sampling_rate}; set data.audio.sampling_rate to that"
            )
        most = getattr(extractor, "n_samples", None)
        if most is not None and len(sound["array"]) > most:  # the extractor would cut it without a word
            raise ValueError(
                f"row {row_id}: a sound of {len(sound['array']) / extractor.sampling_rate:.1f} s, the model hears at "
                f"most {most / extractor.sampling_rate:g} s; cut it"
            )
    return {"audio": [sound["array"] for sound in sounds], "sampling_rate": extractor.sampling_rate}


def _digest(digest: Any, image: Image.Image) -> None:
    # A palette is part of the picture, and its indices are not: hash what is seen.
    image = image if image.mode in ("RGB", "L") else image.convert("RGBA")
    digest.update(f"{image.mode}{image.size}".encode())
    digest.update(image.tobytes())
