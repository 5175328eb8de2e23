"""Signs that a text was written for the reward and not for a reader: one number per text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmft.evaluation.captioning import FUNCTION_WORDS
from reward_models.metrics.text import simple


def text_health(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Per text (N,) float64: ``words``; ``bad_ending``, 1.0 where it is empty or ends in a function word;
    ``repetition``, the share of its word pairs (bigrams) that occurred in it before, 0 with fewer than two pairs."""
    tokens = [simple(text) for text in texts]
    repetition = []
    for words in tokens:
        pairs = list(zip(words, words[1:], strict=False))
        repetition.append(1 - len(set(pairs)) / len(pairs) if pairs else 0.0)
    return {
        "words": np.array([len(words) for words in tokens], dtype=np.float64),
        "bad_ending": np.array([not words or words[-1] in FUNCTION_WORDS for words in tokens], dtype=np.float64),
        "repetition": np.array(repetition, dtype=np.float64),
    }
