"""BLEU (Papineni et al. 2002), for a corpus and for single sentences.

    BLEU-n = BP * (p_1 p_2 ... p_n)^(1/n),   BP = min(1, exp(1 - r/c))

p_k: clipped k-gram precision; c: length of the candidate; r: length of the reference closest to it (the shorter one
on a tie). Lengths are counted in tokens.

Smoothing of the sentence score: Lin and Och 2004 ("ORANGE", section 4), method 2 of Chen and Cherry 2014: one is added
to the numerator and the denominator of p_k for k > 1. Without smoothing the scores are those of pycocoevalcap: its
1e-15 and 1e-9 are part of the formula, so a sentence without a common 4-gram gets about 1e-4, not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from reward_models.metrics.ngrams import Growing, Tokens, occurrences
from reward_models.metrics.reference_metric import Level, ReferenceMetric
from reward_models.metrics.text import check_rows, flag, whole

_TINY, _SMALL = 1e-15, 1e-9
_VERSION = 1


class _Counts(NamedTuple):
    """Clipped matches (n, ...), number of n-grams (n, ...), tokens (...), length of the closest reference (...)."""

    correct: np.ndarray
    guess: np.ndarray
    length: np.ndarray
    closest: np.ndarray


def _combine(counts: _Counts) -> np.ndarray:
    """BLEU-1..n (n, ...) from counts, as pycocoevalcap computes it; 0 for a candidate without words."""
    correct, guess, length, closest = counts
    ratio = (length + _TINY) / (closest + _SMALL)
    penalty = np.exp(1 - 1 / np.minimum(ratio, 1.0))
    product = np.ones_like(penalty)
    out = np.zeros(correct.shape)
    for k in range(len(correct)):
        product = product * ((correct[k] + _TINY) / (guess[k] + _SMALL))
        out[k] = product ** (1 / (k + 1)) * penalty
    return np.where(length > 0, out, 0.0)


def _combine_smooth(counts: _Counts) -> np.ndarray:
    """BLEU-1..n (n, ...) with one added above and below for orders past the first; 0 without a common word."""
    correct, guess, length, closest = counts
    penalty = np.exp(np.minimum(0.0, 1 - closest / np.maximum(length, 1)))
    some = correct[0] > 0
    logs = np.log(np.where(some, correct[0], 1) / np.where(some, guess[0], 1))
    out = np.zeros(correct.shape)
    for k in range(len(correct)):
        if k:
            logs = logs + np.log((correct[k] + 1) / (guess[k] + 1))
        out[k] = np.exp(logs / (k + 1)) * penalty
    return np.where(some, out, 0.0)


class Bleu(ReferenceMetric):
    """Sentence BLEU-n as a reward in [0, 1]: `Bleu()(prompts=..., completions=..., references=...) -> list[float]`.

    smooth: see the module docstring. eos: put an end token behind every reference and every candidate that ended
    (off by default: BLEU is defined without). tokenizer: see `reward_models.metrics.text`.
    """

    def __init__(
        self,
        n: int = 4,
        *,
        smooth: bool = True,
        eos: bool = False,
        tokenizer: str = "simple",
        cache_size: int = 8192,
    ) -> None:
        self.n, self.tokenizer = whole("bleu", "n", n, most=9), tokenizer
        self.smooth, self.eos = flag("bleu", "smooth", smooth), flag("bleu", "eos", eos)
        self.__name__ = f"bleu_{n}"
        self._set_up(tokenizer, {}, cache_size)

    @property
    def signature(self) -> str:
        """Everything a score depends on, in one line: scores with equal signatures can be compared."""
        smoothing = "lin-och-add-1" if self.smooth else "none"
        return (
            f"BLEU|n:{self.n}|smooth:{smoothing}|len:closest|eos:{'yes' if self.eos else 'no'}"
            f"|tok:{self.tokenizer}|version:{_VERSION}"
        )

    def orders(
        self,
        candidates: Sequence[str],
        references: Sequence[Sequence[str]],
        ended: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """Sentence BLEU-1..n (N, n) float64."""
        rows = check_rows("bleu", candidates, references, ended, known=self._cache)
        out = np.zeros((len(rows[0]), self.n))
        for at, tokens, picture in self._looked_up(*rows):
            out[at] = self._combined(self._counts(tokens, picture)).T
        return out

    def corpus(
        self,
        candidates: Sequence[str],
        references: Sequence[Sequence[str]],
        ended: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """Corpus BLEU-1..n (n,): counts and lengths are summed over all rows first; never smoothed."""
        rows = check_rows("bleu", candidates, references, ended, known=self._cache)
        sums = np.zeros((2 * self.n + 2, 1), np.int64)
        for _, tokens, picture in self._looked_up(*rows):
            sums += np.concatenate([np.atleast_2d(part) for part in self._counts(tokens, picture)]).sum(1)[:, None]
        return _combine(_Counts(sums[: self.n], sums[self.n : -2], sums[-2], sums[-1]))[:, 0]

    def _combined(self, counts: _Counts) -> np.ndarray:
        return (_combine_smooth if self.smooth else _combine)(counts)

    def _start(self) -> None:
        self._most = Growing(np.int64)  # per node: how often the n-gram occurs in the reference that has most of it
        self._most.append(np.zeros(1, np.int64))

    def _keep(self, tokens: Tokens, columns: np.ndarray, levels: list[Level], roots: int) -> None:
        self._most.append(np.zeros(roots, np.int64))
        for level in levels:
            most = np.zeros(level.size, np.int64)
            np.maximum.at(most, level.node, level.times)
            self._most.append(most)

    def _matched(self, tokens: Tokens, picture: np.ndarray) -> list[np.ndarray]:
        """Per order 1..n: positions of the n-grams that count as matched."""
        nth = occurrences(tokens, self.n)
        return [
            at[nth[n].take(at) <= self._most.data.take(node)]
            for n, (at, node) in enumerate(self._matches(tokens, picture))
        ]

    def _counts(self, tokens: Tokens, picture: np.ndarray) -> _Counts:
        rows, length = len(picture), tokens.lengths
        matched = self._matched(tokens, picture)
        correct = np.stack([np.bincount(tokens.rows.take(at), minlength=rows) for at in matched])
        guess = np.maximum(length - np.arange(self.n)[:, None], 0)
        return _Counts(correct, guess, length, self._closest(length, picture))

    def _closest(self, length: np.ndarray, picture: np.ndarray) -> np.ndarray:
        """Length of the closest reference, the shorter one on a tie, for candidates of `length` (..., N) tokens."""
        slots = self._slots(picture)
        best = np.full(np.broadcast_shapes(length.shape, slots.size.shape), np.iinfo(np.int64).max)
        for own, there in zip(slots.length, slots.there, strict=True):
            rank = np.abs(own - length) << 32 | own  # distance first, then length
            best = np.minimum(best, np.where(there, rank, best))
        return best & 0xFFFFFFFF

    def _scores(self, tokens: Tokens, picture: np.ndarray) -> np.ndarray:
        return self._combined(self._counts(tokens, picture))[-1]

    def _paths(self, tokens: Tokens, picture: np.ndarray) -> np.ndarray:
        longest = int(tokens.lengths.max())
        correct = np.zeros((self.n, longest + 1, len(picture)), np.int64)
        places = tokens.places
        for n, at in enumerate(self._matched(tokens, picture)):
            correct[n, places.take(at) + n + 1, tokens.rows.take(at)] = 1
        words = np.arange(longest + 1)[:, None]
        guess = np.maximum(words - np.arange(self.n)[:, None, None], 0)
        closest = self._closest(words, picture)
        return self._combined(_Counts(correct.cumsum(1), guess, np.broadcast_to(words, closest.shape), closest))[-1]


def corpus_bleu(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, n: int = 4, tokenizer: str = "simple"
) -> np.ndarray:
    """Corpus BLEU-1..n, (n,) float64 in [0, 1]: one geometric mean over the summed counts, not a mean of sentences."""
    return Bleu(n, smooth=False, tokenizer=tokenizer).corpus(candidates, references)
