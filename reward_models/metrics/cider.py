"""CIDEr and CIDEr-D (Vedantam, Zitnick and Parikh 2015, arXiv 1411.5726, sections 4 and 5).

For n = 1..4, with tf-idf vectors g_n (tf = count, idf = log(documents) - log(max(1, df))):

    CIDEr    D_n(c, s) = g_n(c) . g_n(s) / (|g_n(c)| |g_n(s)|)                                          equation 2
    CIDEr-D  D_n(c, s) = exp(-(l(c) - l(s))^2 / (2 sigma^2)) min(g_n(c), g_n(s)) . g_n(s) / (|g_n(c)| |g_n(s)|)
    score(c, S) = 10 / (4 |S|) * sum over s in S, n of D_n(c, s)

The paper divides tf by the length, which the cosine cancels, and has the factor 10 in CIDEr-D alone; the authors' code
has it in both. Lengths are counted in bigrams, as that code does.

An n-gram of idf w that occurs c times in a reference adds w^2 min(t, c) c to the product with a candidate that holds
it t times. Spread over the candidate's occurrences that is w^2 c for each of the first c, and w^2 (2 i - 1) to the
squared norm for the i-th: sums over positions, so that a prefix is a partial sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from reward_models.metrics.ngrams import MAX_ORDER, DocumentFrequencies, Growing, Tokens, occurrences
from reward_models.metrics.reference_metric import Level, ReferenceMetric, Slots
from reward_models.metrics.text import flag, real, whole

_VERSION = 1


class _Products(NamedTuple):
    """What candidates and references have in common at one order: Q pairs of a matched n-gram and a reference with it.

    at (Q,): position of the n-gram; slot (Q,): place in the table of references, see `ReferenceMetric._slots`; value
    (Q,): what it adds to the product of the vectors, divided by the reference's norm.
    """

    at: np.ndarray
    slot: np.ndarray
    value: np.ndarray


class _TfIdfCosine(ReferenceMetric):
    """What CIDEr and CIDEr-D share. sigma None: neither clipping nor length penalty."""

    sigma: float | None

    def __init__(self, df: DocumentFrequencies, *, eos: bool, n: int, cache_size: int) -> None:
        if not isinstance(df, DocumentFrequencies):
            raise ValueError(f"{self.__name__}: df must be DocumentFrequencies of a corpus, got {type(df).__name__}")
        self.df, self.eos = df, flag(self.__name__, "eos", eos)
        self.n = whole(self.__name__, "n", n, most=MAX_ORDER)
        self._set_up(df.tokenizer, df.ids, cache_size)

    def _signature(self, name: str, options: str = "") -> str:
        return (
            f"{name}|n:{self.n}{options}|df:{self.df.hash}|docs:{self.df.documents}"
            f"|eos:{'yes' if self.eos else 'no'}|tok:{self.df.tokenizer}|version:{_VERSION}"
        )

    def _start(self) -> None:
        self._count = Growing(np.int64)  # per posting: how often the n-gram occurs in that reference
        self._weight = Growing(np.float64)  # count * idf^2 / norm of the reference at this order

    def _keep(self, tokens: Tokens, columns: np.ndarray, levels: list[Level], roots: int) -> None:
        squares = self.df.idf(tokens, self.n) ** 2
        for n, level in enumerate(levels):
            lists = tokens.rows[level.at]
            # summed by position, not by n-gram: the order of n-grams depends on what was seen before
            norm = np.sqrt(np.bincount(lists, level.times[level.posting] * squares[n][level.at], len(columns)))
            of_list = np.empty(len(level.node), np.int64)
            of_list[level.posting] = lists
            square = np.empty(len(level.node))
            square[level.posting] = squares[n][level.at]
            self._count.append(level.times)
            norm = norm[of_list]
            self._weight.append(np.divide(level.times * square, norm, out=np.zeros(len(norm)), where=norm > 0))

    def _squares(self, tokens: Tokens, nth: np.ndarray) -> np.ndarray:
        """(n, T): what the n-gram starting at each position adds to the squared norm of its list; 0 if none starts."""
        squares = self.df.idf(tokens, self.n)
        squares *= squares
        again = np.flatnonzero(nth > 1)
        squares.reshape(-1)[again] *= 2 * nth.reshape(-1)[again] - 1
        for n in range(1, self.n):
            squares[n] *= tokens.left > n
        return squares

    def _products(self, tokens: Tokens, picture: np.ndarray, nth: np.ndarray) -> Iterator[_Products]:
        """Per order."""
        for nth_of, (at, node) in zip(nth, self._matches(tokens, picture), strict=True):
            number, posting = self._postings(node)
            at = np.repeat(at, number)
            value = self._weight.data.take(posting)
            if self.sigma is not None:
                i = nth_of.take(at)
                again = np.flatnonzero(i > 1)
                value[again] *= i.take(again) <= self._count.data.take(posting.take(again))
            slot = self._pool.column.data.take(posting)
            slot *= len(picture)
            slot += tokens.rows.take(at)
            yield _Products(at, slot, value)

    def _scores(self, tokens: Tokens, picture: np.ndarray) -> np.ndarray:
        slots, nth = self._slots(picture), occurrences(tokens, self.n)
        cosines = np.zeros(slots.length.shape)
        squares = self._squares(tokens, nth)
        for n, (_, slot, value) in enumerate(self._products(tokens, picture, nth)):
            scale = np.zeros(len(picture))
            scale += np.bincount(tokens.rows, squares[n], len(picture))  # bincount of nothing is integer
            _invert_roots(scale)
            cosines += np.bincount(slot, value, slots.length.size).reshape(cosines.shape) * scale
        return self._mean(cosines, tokens.lengths, slots)

    def _paths(self, tokens: Tokens, picture: np.ndarray) -> np.ndarray:
        longest, slots, nth = int(tokens.lengths.max()), self._slots(picture), occurrences(tokens, self.n)
        places = tokens.places
        # by the word that completes the n-gram: (words, order, reference, row) and (words, order, row)
        products = np.zeros((longest + 1, self.n, *slots.length.shape))
        scale = np.zeros((longest + 1, self.n, len(picture)))
        squares = self._squares(tokens, nth)
        for n, (at, slot, value) in enumerate(self._products(tokens, picture, nth)):
            products.reshape(-1)[((places.take(at) + n + 1) * self.n + n) * slots.length.size + slot] = value
            whole = np.flatnonzero(tokens.left > n)
            scale[places[whole] + n + 1, n, tokens.rows[whole]] = squares[n, whole]
        for k in range(2, longest + 1):  # a loop over words, each step wide: numpy's cumsum is slower across an axis
            products[k] += products[k - 1]
            scale[k] += scale[k - 1]
        _invert_roots(scale)
        products *= scale[:, :, None]
        cosines = products[:, 0]
        for n in range(1, self.n):
            cosines += products[:, n]
        return self._mean(cosines, np.arange(longest + 1)[:, None], slots)

    def _mean(self, cosines: np.ndarray, lengths: np.ndarray, slots: Slots) -> np.ndarray:
        """Scores (..., N) from cosines (..., R, N) summed over the orders, for candidates of `lengths` tokens."""
        if self.sigma is not None:
            delta = np.maximum(lengths - 1, 0)[..., None, :] - np.maximum(slots.length - 1, 0)
            reach = int(np.abs(delta).max()) if delta.size else 0
            cosines = cosines * np.exp(np.arange(reach + 1.0) ** 2 / (-2 * self.sigma**2)).take(np.abs(delta))
        total = cosines[..., 0, :].copy()
        for column in range(1, cosines.shape[-2]):  # in turn: np.sum's order depends on the shape of the batch
            total += cosines[..., column, :]
        return 10.0 * total / (self.n * slots.size)


class CiderD(_TfIdfCosine):
    """CIDEr-D as a reward: `CiderD(df)(prompts=..., completions=..., references=...) -> list[float]` in [0, 10].

    df: document frequencies of a corpus. eos: put an end token behind every reference and every candidate that
    ended, so that stopping early or running on costs. cache_size: pictures whose vectorised references are kept
    (least recently used go first; about 10 kB each).
    """

    __name__ = "cider_d"

    def __init__(
        self,
        df: DocumentFrequencies,
        *,
        eos: bool = True,
        sigma: float = 6.0,
        n: int = 4,
        cache_size: int = 8192,
    ) -> None:
        if not real("cider_d", "sigma", sigma) > 0:
            raise ValueError(f"cider_d: sigma must be above 0, got {sigma!r}")
        self.sigma = float(sigma)
        super().__init__(df, eos=eos, n=n, cache_size=cache_size)

    @property
    def signature(self) -> str:
        """Everything a score depends on, in one line: scores with equal signatures can be compared."""
        return self._signature("CIDEr-D", f"|sigma:{self.sigma:g}")


class Cider(_TfIdfCosine):
    """The original CIDEr as a reward in [0, 10]: no clipping, no length penalty; see `CiderD` for the options.

    What the literature reports as "CIDEr" is CIDEr-D. This one is easily fooled: repeating a good word costs little.
    """

    __name__ = "cider"
    sigma = None

    def __init__(self, df: DocumentFrequencies, *, eos: bool = True, n: int = 4, cache_size: int = 8192) -> None:
        super().__init__(df, eos=eos, n=n, cache_size=cache_size)

    @property
    def signature(self) -> str:
        """Everything a score depends on, in one line: scores with equal signatures can be compared."""
        return self._signature("CIDEr")


def _invert_roots(squares: np.ndarray) -> None:
    """1 / sqrt in place; 0 stays 0."""
    np.sqrt(squares, out=squares)
    np.divide(1.0, squares, out=squares, where=squares > 0)
