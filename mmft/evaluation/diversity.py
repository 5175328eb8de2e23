"""Variety: how many different words and word pairs a model uses, and how differently it describes one picture."""

from __future__ import annotations

import numpy as np

from mmft.evaluation import statistics
from mmft.evaluation.scores import Captioned, Scores
from reward_models import Cider, DocumentFrequencies
from reward_models.metrics.text import simple


def distinct_words(given: Captioned, scores: Scores) -> None:
    """distinct_1, distinct_2 (Li et al. 2016, arXiv 1510.03055) and the number of different words."""
    words = [simple(caption) for caption in given.captions]
    if not any(words):
        raise ValueError("no caption has a word")
    scores.items["distinct_1"] = [list(row) for row in words]
    if any(len(row) > 1 for row in words):
        scores.items["distinct_2"] = [list(zip(row, row[1:], strict=False)) for row in words]
    scores.numbers["vocabulary"] = float(len({word for row in words for word in row}))


def self_cider(given: Captioned, scores: Scores) -> None:
    """Self-CIDEr (Wang and Chan 2019, arXiv 1903.12020, section 3.3) of several captions of each picture, 0 to 1."""
    if given.samples is None or max(map(len, given.samples)) < 2:
        raise ValueError("self_cider compares several captions of one picture: --method sample --num 5")
    frequencies = DocumentFrequencies.from_references(given.references, tokenizer="ptb")
    cider = Cider(frequencies, eos=False)
    values = []
    for texts in given.samples:
        pairs = cider.score([text for text in texts for _ in texts], [[text] for _ in texts for text in texts])
        values.append(spread(pairs.reshape(len(texts), len(texts)) / 10))
    scores.rows["self_cider"] = np.array(values)
    scores.sums["self_cider"] = statistics.mean(scores.rows["self_cider"])
    scores.signatures["self_cider"] = f"self-{cider.signature}|captions:{max(map(len, given.samples))}"


def spread(kernel: np.ndarray) -> float:
    """-log_m(sqrt(l_1) / sum of sqrt(l_i)) for the eigenvalues l of the similarities (m, m) of m captions.

    0: all captions are the same; 1: no two have anything in common. NaN for fewer than two captions, or where no
    caption has a word that counts.
    """
    roots = np.sqrt(np.clip(np.linalg.eigvalsh((kernel + kernel.T) / 2), 0, None))
    if len(kernel) < 2 or not roots.sum():
        return float("nan")
    return float(max(0.0, -np.log(roots.max() / roots.sum()) / np.log(len(kernel))))
