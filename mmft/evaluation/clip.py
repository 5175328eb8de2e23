"""Similarity of picture and caption by a CLIP of the user's: CLIPScore and RefCLIPScore (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmft.evaluation import statistics
from mmft.evaluation.scores import Captioned, Scores

_PREFIX, _SCALE, _BATCH = "A photo depicts ", 2.5, 32


def clip_score(given: Captioned, scores: Scores) -> None:
    """clip_score = 2.5 max(0, cos(picture, caption)), without references; ref_clip_score: the harmonic mean of that
    and of the largest cos(caption, reference) (arXiv 2104.08718, sections 3.1 and 3.2). Texts begin "A photo depicts".

    The published figures are of OpenAI's ViT-B/32; another CLIP gives other numbers.
    """
    if given.clip is None:
        raise ValueError("needs a CLIP model: --clip FOLDER")
    if given.picture is None:
        raise ValueError("needs the pictures: give --data beside the predictions")
    clip = Clip(given.clip)
    captions = clip.texts(given.captions)
    pictures = clip.pictures(given.picture, len(given.captions))
    found = {"clip_score": _SCALE * np.maximum(0.0, (pictures * captions).sum(-1))}
    if all(given.references):
        flat = clip.texts([reference for references in given.references for reference in references])
        ends = np.cumsum([len(references) for references in given.references])[:-1]
        nearest = [max(0.0, (own @ refs.T).max()) for own, refs in zip(captions, np.split(flat, ends), strict=True)]
        with np.errstate(invalid="ignore"):
            both = 2 * found["clip_score"] * nearest / (found["clip_score"] + nearest)
        found["ref_clip_score"] = np.nan_to_num(both)
    for name, values in found.items():
        scores.rows[name] = values.astype(np.float64)
        scores.sums[name] = statistics.mean(values)
        scores.signatures[name] = f"{name}|model:{Path(given.clip).name}|prefix:{_PREFIX!r}|scale:{_SCALE}|version:1"


def expect_clip(name: str | Path) -> None:
    """ValueError for what is no CLIP; loads its configuration alone."""
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is no CLIP model that transformers can load: {error}") from error
    if kind != "clip":
        raise ValueError(f"{name} is a model of type {kind!r}; expected 'clip'")


class Clip:
    """A CLIP model of transformers; embeddings have length 1."""

    def __init__(self, name: str | Path) -> None:
        from transformers import AutoProcessor, CLIPModel

        expect_clip(name)
        try:
            self.model = CLIPModel.from_pretrained(name).eval()
            self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        except OSError as error:
            raise ValueError(f"{name} is no CLIP model that transformers can load: {error}") from error

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, d) of the texts, cut off where CLIP's own limit is."""
        limit = self.model.config.text_config.max_position_embeddings

        def embed(chunk: list[str]) -> Any:
            inputs = self.processor(
                text=[_PREFIX + text for text in chunk],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=limit,
            )
            return self.model.get_text_features(**inputs)

        return self._batches(embed, list(texts))

    def pictures(self, picture: Any, count: int) -> np.ndarray:
        """(count, d) of the pictures ``picture(0)``, …, opened a batch at a time."""

        def embed(chunk: list[int]) -> Any:
            opened = [picture(place) for place in chunk]
            if any(image is None for image in opened):
                raise ValueError("a row has no picture; CLIP compares captions with single pictures")
            return self.model.get_image_features(**self.processor(images=opened, return_tensors="pt"))

        return self._batches(embed, list(range(count)))

    def _batches(self, embed: Any, things: list[Any]) -> np.ndarray:
        import torch

        out = []
        with torch.no_grad():
            for start in range(0, len(things), _BATCH):
                found = embed(things[start : start + _BATCH])
                found = getattr(found, "pooler_output", found)  # what newer versions of transformers return
                out.append(torch.nn.functional.normalize(found.float(), dim=-1).numpy())
        return np.concatenate(out)
