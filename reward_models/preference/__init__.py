"""A learned reward that sees the picture: a vision-language backbone, a fusion head, preferences to learn from.

    train_preference(pairs, "judge", backbone="HuggingFaceTB/SmolVLM-256M-Instruct", calibration=held_out)
    reward = PreferenceReward.load("judge", kappa=1.0)

Importing this package costs nothing; torch is loaded with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from reward_models.preference.pairs import Pair, Rating, open_picture

_HOMES = {
    "PreferenceReward": "reward",
    "backbone_name": "folder",
    "train_preference": "training",
    "bradley_terry_loss": "training",
    "FUSIONS": "fusion",
    "FusionHead": "fusion",
    "PreferenceHead": "fusion",
    "Backbone": "backbone",
    "load_backbone": "backbone",
}

__all__ = ["Pair", "Rating", "open_picture", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
