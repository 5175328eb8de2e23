"""BLEU (Papineni et al. 2002), for a corpus and for single sentences.

    BLEU-n = BP * (p_1 p_2 ... p_n)^(1/n),   BP = min(1, exp(1 - r/c))

p_k: clipped k-gram precision; c: length of the candidate; r: length of the reference closest to it (the shorter one
on a tie). Lengths are counted in tokens.

Smoothing of the sentence score: Lin and Och 2004 ("ORANGE", section 4), method 2 of Chen and Cherry 2014: one is added
to the numerator and the denominator of p_k for k > 1. Without smoothing the scores are those of pycocoevalcap: its
1e-15 and 1e-9 are part of the formula, so a sentence without a common 4-gram gets about 1e-4, not 0.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from reward_models.metrics.text import EOS, check_rows, tokenizer_named

_TINY, _SMALL = 1e-15, 1e-9
_VERSION = 1


def _ngrams(words: list[str], n: int) -> list[list[Any]]:
    """Per k = 1..n the list of k-grams (k-tuples) in order."""
    return [list(zip(*(words[i:] for i in range(k)), strict=False)) for k in range(1, n + 1)]


class _References:
    """Lengths of the references and, per order, the most often each n-gram occurs in any one of them."""

    __slots__ = ("lengths", "most")

    def __init__(self, token_lists: list[list[str]], n: int) -> None:
        self.lengths = sorted(map(len, token_lists))
        self.most: list[dict[Any, int]] = [{} for _ in range(n)]
        for words in token_lists:
            for most, grams in zip(self.most, _ngrams(words, n), strict=True):
                for gram, count in Counter(grams).items():
                    if count > most.get(gram, 0):
                        most[gram] = count

    def closest(self, length: int) -> int:
        return min(self.lengths, key=lambda r: (abs(r - length), r))


def _combine(correct: Sequence[int], guess: Sequence[int], length: int, closest: int) -> list[float]:
    """BLEU-1..n from counts, as pycocoevalcap computes it."""
    ratio = (length + _TINY) / (closest + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    out, product = [], 1.0
    for k, (right, tried) in enumerate(zip(correct, guess, strict=True), 1):
        product *= (right + _TINY) / (tried + _SMALL)
        out.append(product ** (1 / k) * penalty)
    return out


def _combine_smooth(correct: Sequence[int], guess: Sequence[int], length: int, closest: int) -> list[float]:
    """BLEU-1..n with one added above and below for orders past the first; 0 without a common word."""
    if not correct[0]:
        return [0.0] * len(correct)
    penalty = math.exp(min(0.0, 1 - closest / length))
    out, logs = [], 0.0
    for k, (right, tried) in enumerate(zip(correct, guess, strict=True), 1):
        add = 0 if k == 1 else 1
        logs += math.log((right + add) / (tried + add))
        out.append(math.exp(logs / k) * penalty)
    return out


class Bleu:
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
        if not isinstance(n, int) or not 1 <= n <= 9:
            raise ValueError(f"bleu: n must be 1 to 9, got {n!r}")
        if cache_size < 1:
            raise ValueError(f"bleu: cache_size must be at least 1, got {cache_size!r}")
        self.n, self.smooth, self.eos, self.tokenizer = n, bool(smooth), bool(eos), tokenizer
        self.__name__ = f"bleu_{n}"
        self._tokenize = tokenizer_named(tokenizer)
        self._cache: OrderedDict[tuple[str, ...], _References] = OrderedDict()
        self._cache_size = cache_size

    @property
    def signature(self) -> str:
        """Everything a score depends on, in one line: scores with equal signatures can be compared."""
        smoothing = "lin-och-add-1" if self.smooth else "none"
        return (
            f"BLEU|n:{self.n}|smooth:{smoothing}|len:closest|eos:{'yes' if self.eos else 'no'}"
            f"|tok:{self.tokenizer}|version:{_VERSION}"
        )

    def __call__(
        self,
        prompts: Any = None,
        completions: Sequence[Any] = (),
        references: Sequence[Sequence[str]] | None = None,
        ended: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        rows = check_rows("bleu", completions, references, ended, columns.get("id"))
        return self._scores(*rows)[:, -1].tolist()

    def score(
        self,
        candidates: Sequence[str],
        references: Sequence[Sequence[str]],
        ended: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """Sentence BLEU-n (N,) float64; an empty candidate gets 0. ValueError naming the row for bad references."""
        return self.orders(candidates, references, ended)[:, -1]

    def orders(
        self,
        candidates: Sequence[str],
        references: Sequence[Sequence[str]],
        ended: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """Sentence BLEU-1..n (N, n) float64."""
        return self._scores(*check_rows("bleu", candidates, references, ended))

    def corpus(
        self,
        candidates: Sequence[str],
        references: Sequence[Sequence[str]],
        ended: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """Corpus BLEU-1..n (n,): counts and lengths are summed over all rows first; never smoothed."""
        rows = check_rows("bleu", candidates, references, ended)
        correct, guess, length, closest = [0] * self.n, [0] * self.n, 0, 0
        for right, tried, c, r in map(self._counts, *rows):
            correct = [a + b for a, b in zip(correct, right, strict=True)]
            guess = [a + b for a, b in zip(guess, tried, strict=True)]
            length, closest = length + c, closest + r
        return np.array(_combine(correct, guess, length, closest)) if length else np.zeros(self.n)

    def _scores(self, texts: list[str], references: list[tuple[str, ...]], ended: list[bool]) -> np.ndarray:
        combine = _combine_smooth if self.smooth else _combine
        out = np.zeros((len(texts), self.n))
        for i, counts in enumerate(map(self._counts, texts, references, ended)):
            if counts[2]:
                out[i] = combine(*counts)
        return out

    def _counts(self, text: str, references: tuple[str, ...], ended: bool) -> tuple[list[int], list[int], int, int]:
        """Clipped matches and number of k-grams per order, length of the candidate, length of the closest reference."""
        words = self._tokenize(text)
        if words and self.eos and ended:
            words.append(EOS)
        refs = self._vectorised(references)
        correct = []
        for grams, most in zip(_ngrams(words, self.n), refs.most, strict=True):
            found = [gram for gram in grams if gram in most]
            # a set is cheaper than a Counter, and most sentences repeat no n-gram
            if len(set(found)) == len(found):
                correct.append(len(found))
            else:
                correct.append(sum(min(count, most[gram]) for gram, count in Counter(found).items()))
        guess = [max(0, len(words) - k) for k in range(self.n)]
        return correct, guess, len(words), refs.closest(len(words))

    def _vectorised(self, references: tuple[str, ...]) -> _References:
        found = self._cache.get(references)
        if found is None:
            tail = [EOS] if self.eos else []
            found = _References([self._tokenize(ref) + tail for ref in references], self.n)
            self._cache[references] = found
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(references)
        return found


def corpus_bleu(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, n: int = 4, tokenizer: str = "simple"
) -> np.ndarray:
    """Corpus BLEU-1..n, (n,) float64 in [0, 1]: one geometric mean over the summed counts, not a mean of sentences."""
    return Bleu(n, smooth=False, tokenizer=tokenizer).corpus(candidates, references)
