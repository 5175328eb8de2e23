"""Backbone and head together: rows -> rewards, pairs -> differences."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from reward_models.preference.backbone import Backbone, Row
from reward_models.preference.fusion import PreferenceHead
from reward_models.preference.pairs import Pair, open_picture
from reward_models.preference.sharing import borrowed

if TYPE_CHECKING:
    from PIL import Image

    from reward_models.preference.pairs import Picture


class Judge:
    """Scores rows with a backbone, one of its adapters (None: none) and a head."""

    def __init__(self, backbone: Backbone, head: PreferenceHead, adapter: str | None):
        self.backbone, self.head, self.adapter = backbone, head, adapter

    def rewards(self, rows: Sequence[Row], batch_size: int = 32, draws: int = 0) -> np.ndarray:
        """(S, N) float64 in the head's own unit, S = heads x max(draws, 1). The model is left as it was found."""
        if not rows:
            return np.zeros((len(self.head) * max(draws, 1), 0))
        self.head.to(self.backbone.device).eval()
        parts = []
        with self.borrowed():
            for start in range(0, len(rows), batch_size):
                states = self.backbone.read(rows[start : start + batch_size])
                parts.append(self.head(*states, draws=draws).double().cpu().numpy())
        return np.concatenate(parts, axis=1)

    def differences(
        self, pairs: Sequence[Pair], batch_size: int = 32, draws: int = 0, blank: bool = False
    ) -> np.ndarray:
        """(N,) mean reward of the chosen text minus that of the rejected; `blank` hides every picture."""
        rows = [row for pair in pairs for row in both(pair, blank)]
        mean = self.rewards(rows, batch_size, draws).mean(0)
        return mean[0::2] - mean[1::2]

    def borrowed(self) -> AbstractContextManager[Any]:
        return borrowed(self.backbone.model, self.adapter)


def both(pair: Pair, blank: bool = False) -> tuple[Row, Row]:
    """The chosen and the rejected text of a pair."""
    images = tuple(blanked(image) for image in pair.images) if blank else pair.images
    return Row(pair.prompt, images, pair.chosen), Row(pair.prompt, images, pair.rejected)


def blanked(picture: Picture) -> Image.Image:
    """A grey picture of the same size."""
    from PIL import Image

    return Image.new("RGB", open_picture(picture).size, (128, 128, 128))


def check_heads(kappa: float, heads: int, draws: int, dropout: float) -> None:
    """Refuses a lower confidence bound without anything that could disagree."""
    if kappa < 0:
        raise ValueError(f"kappa: expected 0 or more, got {kappa}; a negative one would reward being unsure")
    if draws and not dropout:
        raise ValueError("mc_samples: the head was trained without dropout, so every draw would be the same")
    if kappa and heads * max(draws, 1) < 2:
        raise ValueError("kappa: the head is one, so its std is 0; set mc_samples, or train with heads of 2 and more")


def as_unit(samples: np.ndarray, shift: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(S, N) in the head's unit -> mean and std (N,) of (r - shift) / scale."""
    values = (samples - shift) / scale
    return values.mean(0), values.std(0)


class Known(NamedTuple):
    """What a frozen backbone says of one text, on the CPU."""

    text: torch.Tensor  # (T, H)
    logprobs: torch.Tensor  # (T,)


def frozen_states(backbone: Backbone, rows: Sequence[Row], batch_size: int) -> list[Known]:
    """One `Known` per row: all that a head on a frozen backbone needs of the texts, pictures apart."""
    known = []
    with borrowed(backbone.model, None):
        for start in range(0, len(rows), batch_size):
            read = backbone.read(rows[start : start + batch_size])
            for text, logprobs, mask in zip(read.text, read.logprobs, read.text_mask, strict=True):
                known.append(Known(text[mask].cpu(), logprobs[mask].cpu()))
    return known
