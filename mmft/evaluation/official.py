"""The scores of the official COCO caption code on one file of captions, under its names.

`pycocoevalcap` (the server's code) takes Penn Treebank tokens, document frequencies from the references of the file
that it scores, and no end token. So its CIDEr (which is CIDEr-D) depends on which pictures are scored together, and is
another number than the CIDEr-D of training, whose frequencies come from the training captions. BLEU and METEOR are
scores of the whole file, from summed counts; ROUGE-L, CIDEr and SPICE are means over pictures. Java is needed for
METEOR and SPICE alone. `benchmarks/evaluate_parity.py` compares with the original.

Each function fills in what it computes: per picture, and as a function of sums over pictures.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from mmft.evaluation import statistics
from mmft.evaluation.captioning import bleu_counts, corpus_bleu
from mmft.evaluation.scores import Captioned, Scores
from mmft.evaluation.statistics import Statistic
from reward_models import Bleu, CiderD, DocumentFrequencies, Meteor, RougeL, Spice
from reward_models.metrics.ptb import ptb

_TOKENIZER = "ptb"


def bleu(given: Captioned, scores: Scores) -> None:
    """Bleu_1 to Bleu_4."""
    scorer = Bleu(4, smooth=False, tokenizer=_TOKENIZER)
    orders = scorer.orders(given.captions, given.references)
    counts = bleu_counts([ptb(text) for text in given.captions], [[ptb(ref) for ref in r] for r in given.references])
    for n in range(1, 5):
        scores.rows[f"Bleu_{n}"] = orders[:, n - 1]
        scores.sums[f"Bleu_{n}"] = Statistic(counts, partial(corpus_bleu, n=n))
        scores.signatures[f"Bleu_{n}"] = scorer.signature


def cider(given: Captioned, scores: Scores) -> None:
    """CIDEr-D with the document frequencies of these references."""
    if len(given.references) < 2:
        raise ValueError("CIDEr needs at least two pictures: its word weights come from the references of the file")
    frequencies = DocumentFrequencies.from_references(given.references, tokenizer=_TOKENIZER)
    _means("CIDEr", CiderD(frequencies, eos=False), given, scores)


def rouge_l(given: Captioned, scores: Scores) -> None:
    _means("ROUGE_L", RougeL(tokenizer=_TOKENIZER), given, scores)


def spice(given: Captioned, scores: Scores) -> None:
    _means("SPICE", Spice(tokenizer=_TOKENIZER), given, scores)


def meteor(given: Captioned, scores: Scores) -> None:
    with Meteor(tokenizer=_TOKENIZER) as scorer:
        counts = scorer.counts(given.captions, given.references)
    # In its sums METEOR counts no chunk for a caption that is its reference word for word.
    whole = (counts[:, 21:23] == counts[:, :2]).all(-1) & (counts[:, 20] == 1)
    counts[whole, 20] = 0
    scores.rows["METEOR"] = meteor_score(counts)
    scores.sums["METEOR"] = Statistic(counts, meteor_score)
    scores.signatures["METEOR"] = scorer.signature


def meteor_score(counts: np.ndarray) -> np.ndarray:
    """METEOR 1.5 from its counts (..., 23) -> (...), see `reward_models.Meteor.counts`.

    Denkowski and Lavie 2014, equations 1 to 4, with the weights of the English task "rank" (table 1): matches of the
    four stages count 1, 0.6, 0.8, 0.6, content words 0.75 and function words 0.25; precision against recall 0.85; the
    penalty for fragments is 0.6 (chunks / matches)^0.2.
    """
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    words, function_words, chunks, matches = counts[..., 0:2], counts[..., 2:4], counts[..., 20], counts[..., 21:23]
    stages = counts[..., 4:20].reshape(*counts.shape[:-1], 4, 2, 2)  # stage, content or function, side
    matched = np.einsum("...skt,s,k->...t", stages, [1.0, 0.6, 0.8, 0.6], [delta, 1 - delta])
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = matched / (delta * (words - function_words) + (1 - delta) * function_words)
        mean = 1 / ((1 - alpha) / shares[..., 0] + alpha / shares[..., 1])
        penalty = gamma * (chunks / matches.mean(-1)) ** beta
        return np.nan_to_num(mean * (1 - penalty), nan=0.0)


def _means(name: str, scorer, given: Captioned, scores: Scores) -> None:
    scores.rows[name] = scorer.score(given.captions, given.references)
    scores.sums[name] = statistics.mean(scores.rows[name])
    scores.signatures[name] = scorer.signature
