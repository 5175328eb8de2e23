"""Shaping terms: small named rewards that add up. `TERMS` holds them by their recipe names.

A class with `needs_training` takes `DocumentFrequencies` of the training captions (or the captions themselves, one
list of strings per picture) as its first argument; everything else is a keyword option.
"""

from reward_models.terms.form import Format, MissingEos
from reward_models.terms.grounding import Coverage, Hallucination
from reward_models.terms.vocabulary import Vocabulary
from reward_models.terms.wording import LengthWindow, Novelty, Repetition, Richness

TERMS = {
    "coverage": Coverage,
    "hallucination": Hallucination,
    "length": LengthWindow,
    "repetition": Repetition,
    "missing_eos": MissingEos,
    "novelty": Novelty,
    "richness": Richness,
    "format": Format,
}

__all__ = ["TERMS", *sorted({cls.__name__ for cls in TERMS.values()}), "Vocabulary"]
