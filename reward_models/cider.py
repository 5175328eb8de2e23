"""CIDEr-D (Vedantam, Zitnick and Parikh 2015, arXiv 1411.5726, section 4 and equation 5).

For n = 1..4, with tf-idf vectors g_n (tf = count, idf = log(documents) - log(max(1, df))):

    D_n(c, s) = exp(-(l(c) - l(s))^2 / (2 sigma^2)) * min(g_n(c), g_n(s)) . g_n(s) / (|g_n(c)| |g_n(s)|)
    CIDEr-D(c, S) = 10 / (4 |S|) * sum over s in S, n of D_n(c, s)

A candidate's n-gram of count t and idf w adds w^2 min(t, c) c to the product with a reference that holds it c times;
spread over its t occurrences that is w^2 c min(t, c)/t each, so no n-gram of the candidate has to be made unique.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from reward_models.ngrams import (
    MAX_ORDER,
    SHIFT,
    DocumentFrequencies,
    Growing,
    Trie,
    grow,
    lay_out,
    multiplicities,
)
from reward_models.text import EOS, check_rows

_VERSION = 1


class _References(NamedTuple):
    """Where the vectorised references of one picture are: the root of their n-grams, and their lengths.

    lengths (R,): in bigrams, as the reference implementation measures length.
    """

    root: int
    lengths: np.ndarray


class _Pool:
    """The n-grams of all cached pictures. The postings of a node lie together: one per reference that holds it."""

    def __init__(self) -> None:
        self.trie = Trie()
        self.first = Growing(np.int64)  # per node: number of its first posting
        self.first.append(np.zeros(2, np.int64))  # one more than nodes, so that a node ends where the next begins
        self.column = Growing(np.int64)  # per posting: which of the picture's references
        self.count = Growing(np.int64)  # how often the n-gram occurs there
        self.weight = Growing(np.float64)  # count * idf^2 / norm of the reference at this order

    def append(self, keys: np.ndarray, per_node: np.ndarray) -> None:
        """New nodes with that many postings each; the postings themselves are appended by the caller."""
        self.trie.append(keys)
        self.first.append(np.cumsum(per_node) + self.first.data[self.first.size - 1])


class CiderD:
    """CIDEr-D as a reward: `CiderD(df)(prompts=..., completions=..., references=...) -> list[float]` in [0, 10].

    df: document frequencies of a corpus. eos: put an end token behind every reference and every candidate that
    ended, so that stopping early or running on costs. cache_size: pictures whose vectorised references are kept
    (least recently used go first; about 10 kB each).
    """

    __name__ = "cider_d"

    def __init__(
        self, df: DocumentFrequencies, *, eos: bool = True, sigma: float = 6.0, n: int = 4, cache_size: int = 8192
    ) -> None:
        if not isinstance(df, DocumentFrequencies):
            raise ValueError(f"cider_d: df must be DocumentFrequencies of a corpus, got {type(df).__name__}")
        if not 1 <= n <= MAX_ORDER:
            raise ValueError(f"cider_d: n must be 1 to {MAX_ORDER}, got {n!r}")
        if not sigma > 0:
            raise ValueError(f"cider_d: sigma must be above 0, got {sigma!r}")
        if cache_size < 1:
            raise ValueError(f"cider_d: cache_size must be at least 1, got {cache_size!r}")
        self.df, self.eos, self.sigma, self.n = df, bool(eos), float(sigma), int(n)
        self._cache: OrderedDict[tuple[str, ...], _References] = OrderedDict()
        self._cache_size = cache_size
        self._reset()

    def _reset(self) -> None:
        self._cache.clear()
        self._pool = _Pool()
        self._words = dict(self.df.ids)  # + words that only references of the cache have

    @property
    def signature(self) -> str:
        """Everything a score depends on, in one line: scores with equal signatures can be compared."""
        return (
            f"CIDEr-D|n:{self.n}|sigma:{self.sigma:g}|df:{self.df.hash}|docs:{self.df.documents}"
            f"|eos:{'yes' if self.eos else 'no'}|tok:{self.df.tokenizer}|version:{_VERSION}"
        )

    def __call__(
        self,
        prompts: Any = None,
        completions: Sequence[Any] = (),
        references: Sequence[Sequence[str]] | None = None,
        ended: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        rows = check_rows("cider_d", completions, references, ended, columns.get("id"))
        return self._score(*rows).tolist()

    def score(
        self,
        candidates: Sequence[str],
        references: Sequence[Sequence[str]],
        ended: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """Scores (N,) float64 of N candidates, each against its own list of references; an empty candidate gets 0.

        ended (N,): did the candidate finish by itself (None: all did); only used with eos. Raises ValueError naming
        the row for empty references or wrong types.
        """
        return self._score(*check_rows("cider_d", candidates, references, ended))

    def _score(
        self, texts: list[str], references: list[tuple[str, ...]], ended: list[bool]
    ) -> np.ndarray:
        if not texts:
            return np.zeros(0)
        tokenize = self.df.tokenize
        lists = [tokenize(text) for text in texts]
        if self.eos:
            lists = [[*words, EOS] if words and end else words for words, end in zip(lists, ended, strict=True)]
        sets = self._vectorised(references)
        tokens = lay_out(lists, self._words, {})
        times = multiplicities(tokens, self.n)

        # 1 / norm of each candidate, by (order, row)
        squares = self.df.idf(tokens, self.n)
        squares *= squares
        squares *= times
        squares[tokens.left <= np.arange(self.n)[:, None]] = 0.0
        cell = tokens.rows + len(texts) * np.arange(self.n)[:, None]
        own = np.sqrt(np.bincount(cell.ravel(), squares.ravel(), self.n * len(texts))).reshape(self.n, -1)
        scale = np.divide(1.0, own, out=np.zeros_like(own), where=own > 0)

        # cosines summed over the orders, for all pairs (row, reference) laid end to end
        sizes = np.array([len(refs) for refs in references])
        begin = np.cumsum(sizes) - sizes
        roots = np.array([s.root for s in sets])
        pair, cosine = self._products(tokens, times, scale, roots, begin)
        cosines = np.bincount(pair, cosine, int(sizes.sum()))
        delta = np.repeat(np.maximum(tokens.lengths - 1, 0), sizes) - np.concatenate([s.lengths for s in sets])
        cosines *= np.exp(delta * delta / (-2 * self.sigma**2))
        if len(self._cache) > self._cache_size:
            self._forget()
        return 10.0 * np.add.reduceat(cosines, begin) / (self.n * sizes)

    def _products(
        self, tokens: Tokens, times: np.ndarray, scale: np.ndarray, roots: np.ndarray, begin: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Every common n-gram of a candidate and one of its references: the pair it belongs to, what it adds there.

        scale (n, N): 1 / norm of the candidates; roots, begin (N,): root node and first pair of each row.
        """
        pool = self._pool
        everywhere = np.arange(len(tokens.words))
        levels = list(pool.trie.descend(tokens, everywhere, roots[tokens.rows], 1, self.n))
        at = np.concatenate([level[0] for level in levels])
        node = np.concatenate([level[1] for level in levels])
        orders = np.repeat(np.arange(self.n), [len(level[0]) for level in levels])
        rows = tokens.rows[at]
        first = pool.first.data.take(node)
        number = pool.first.data.take(node + 1) - first
        posting = np.repeat(first - np.cumsum(number) + number, number) + np.arange(int(number.sum()))
        value = pool.weight.data.take(posting) * np.repeat(scale[orders, rows], number)
        t = np.repeat(times[orders, at], number)
        again = np.flatnonzero(t > 1)
        value[again] *= np.minimum(t[again], pool.count.data[posting[again]]) / t[again]
        return np.repeat(begin[rows], number) + pool.column.data.take(posting), value

    def _vectorised(self, references: list[tuple[str, ...]]) -> list[_References]:
        """The reference sets, from the cache or made now (all missing ones in one go)."""
        cache = self._cache
        missing = list(dict.fromkeys(refs for refs in references if refs not in cache))
        if missing:
            cache.update(zip(missing, self._vectorise(missing), strict=True))
        for refs in references:
            cache.move_to_end(refs)
        return list(map(cache.__getitem__, references))

    def _forget(self) -> None:
        """Start over with the half of the pictures that was used last; keeps memory bounded, changes no score."""
        kept = list(self._cache)[len(self._cache) - self._cache_size // 2 :]
        self._reset()
        if kept:
            self._cache.update(zip(kept, self._vectorise(kept), strict=True))

    def _vectorise(self, reference_sets: list[tuple[str, ...]]) -> list[_References]:
        tail = [EOS] if self.eos else []
        lists = [self.df.tokenize(ref) + tail for refs in reference_sets for ref in refs]
        sizes = np.array([len(refs) for refs in reference_sets])
        fresh: dict[str, int] = {}
        tokens = lay_out(lists, self._words, fresh)
        self._words.update(fresh)
        picture_of_list = np.repeat(np.arange(len(sizes)), sizes)
        begin = np.cumsum(sizes) - sizes
        column_of_list = np.arange(len(lists)) - begin[picture_of_list]
        column = column_of_list[tokens.rows]
        width = int(sizes.max())

        pool = self._pool
        roots = parents = pool.trie.keys.size  # number of the first node of the order before
        pool.append(np.full(len(sizes), -1), np.zeros(len(sizes), np.int64))
        idf = self.df.idf(tokens, self.n)
        owner = np.arange(len(sizes))  # picture of each node of the order before
        for n, (keys, at, node) in enumerate(grow(tokens, picture_of_list[tokens.rows], self.n)):
            pairs, counts = np.unique(node * width + column[at], return_counts=True)
            nodes, columns = pairs // width, pairs % width
            weight = np.zeros(len(keys))
            weight[node] = idf[n][at]
            weight = weight[nodes]
            owner = owner[keys >> SHIFT]
            cell = owner[nodes] * width + columns
            norm = np.sqrt(np.bincount(cell, (counts * weight) ** 2, len(sizes) * width))[cell]
            first = pool.trie.keys.size
            pool.append(keys + (parents << SHIFT), np.bincount(nodes, minlength=len(keys)))
            parents = first
            pool.column.append(columns)
            pool.count.append(counts)
            pool.weight.append(np.divide(counts * weight**2, norm, out=np.zeros(len(norm)), where=norm > 0))
        lengths = np.split(np.maximum(tokens.lengths - 1, 0), begin[1:])
        return [_References(roots + i, length.copy()) for i, length in enumerate(lengths)]
