"""CIDEr-D (Vedantam, Zitnick and Parikh 2015, arXiv 1411.5726, section 4 and equation 5).

For n = 1..4, with tf-idf vectors g_n (tf = count, idf = log(documents) - log(max(1, df))):

    D_n(c, s) = exp(-(l(c) - l(s))^2 / (2 sigma^2)) * min(g_n(c), g_n(s)) . g_n(s) / (|g_n(c)| |g_n(s)|)
    CIDEr-D(c, S) = 10 / (4 |S|) * sum over s in S, n of D_n(c, s)

A candidate's n-gram of count t and idf w adds w^2 min(t, c) c to the product with a reference that holds it c times;
spread over its t occurrences that is w^2 c min(t, c)/t each, so no n-gram of the candidate has to be made unique.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np

from reward_models.metrics.ngrams import (
    MAX_ORDER,
    SHIFT,
    DocumentFrequencies,
    Growing,
    Tokens,
    Trie,
    grow,
    lay_out,
    multiplicities,
)
from reward_models.metrics.text import EOS, check_rows

_VERSION = 1


class _Pool:
    """The n-grams of all cached pictures. The postings of a node lie together: one per reference that holds it."""

    def __init__(self) -> None:
        self.trie = Trie()
        self.first = Growing(np.int64)  # per node: number of its first posting
        self.first.append(np.zeros(2, np.int64))  # one more than nodes, so that a node ends where the next begins
        self.column = Growing(np.int64)  # per posting: which of the picture's references
        self.count = Growing(np.int64)  # how often the n-gram occurs there
        self.weight = Growing(np.float64)  # count * idf^2 / norm of the reference at this order
        self.root = Growing(np.int64)  # per picture: its root node
        self.size = Growing(np.int64)  # its number of references
        self.start = Growing(np.int64)  # number of its first reference
        self.used = Growing(np.int64)  # when it was last asked for
        self.length = Growing(np.int64)  # per reference: in bigrams, as the reference implementation measures length

    def append_nodes(self, keys: np.ndarray, per_node: np.ndarray) -> None:
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
        self,
        df: DocumentFrequencies,
        *,
        eos: bool = True,
        sigma: float = 6.0,
        n: int = 4,
        cache_size: int = 8192,
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
        self._cache: dict[tuple[str, ...], int] = {}  # number of the picture in the pool
        self._cache_size = cache_size
        self._reset()

    def _reset(self) -> None:
        self._cache.clear()
        self._pool = _Pool()
        self._clock = 0
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
        rows = check_rows("cider_d", completions, references, ended, columns.get("id"), self._cache)
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
        return self._score(*check_rows("cider_d", candidates, references, ended, known=self._cache))

    def _score(self, texts: list[str], references: list[tuple[str, ...]], ended: list[bool]) -> np.ndarray:
        if not texts:
            return np.zeros(0)
        tokenize = self.df.tokenize
        lists = [tokenize(text) for text in texts]
        if self.eos:
            lists = [[*words, EOS] if words and end else words for words, end in zip(lists, ended, strict=True)]
        pool, picture = self._pool, self._pictures(references)
        tokens = lay_out(lists, self._words, {})
        times = multiplicities(tokens, self.n)

        # 1 / norm of each candidate, by (order, row)
        squares = self.df.idf(tokens, self.n)
        squares *= squares
        squares *= times
        scale = np.empty((self.n, len(texts)))
        for n in range(self.n):
            squares[n] *= tokens.left > n
            scale[n] = np.bincount(tokens.rows, squares[n], len(texts))
        np.sqrt(scale, out=scale)
        np.divide(1.0, scale, out=scale, where=scale > 0)

        # cosines summed over the orders, for all pairs (row, reference) laid end to end
        sizes = pool.size.data[picture]
        begin = np.cumsum(sizes) - sizes
        pair, cosine = self._products(tokens, times, scale, pool.root.data[picture], begin)
        cosines = np.bincount(pair, cosine, int(sizes.sum()))
        lengths = pool.length.data[np.repeat(pool.start.data[picture] - begin, sizes) + np.arange(len(cosines))]
        delta = np.repeat(np.maximum(tokens.lengths - 1, 0), sizes) - lengths
        cosines = cosines * np.exp(delta * delta / (-2 * self.sigma**2))  # bincount of nothing is integer
        if len(self._cache) > self._cache_size:
            self._forget()  # words that only they had go, too
        return 10.0 * np.add.reduceat(cosines, begin) / (self.n * sizes)

    def _products(
        self, tokens: Tokens, times: np.ndarray, scale: np.ndarray, roots: np.ndarray, begin: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Every common n-gram of a candidate and one of its references: the pair it belongs to, what it adds there.

        scale (n, N): 1 / norm of the candidates; roots, begin (N,): root node and first pair of each row.
        """
        pool = self._pool
        levels = list(pool.trie.descend(tokens, np.arange(len(tokens.words)), roots.take(tokens.rows), 1, self.n))
        at = np.concatenate([at for at, _ in levels])
        node = np.concatenate([node for _, node in levels])
        order = np.repeat(np.arange(self.n), [len(at) for at, _ in levels])
        row = tokens.rows.take(at)
        # from here on one entry per posting instead of one per common n-gram
        first = pool.first.data.take(node)
        number = pool.first.data.take(node + 1) - first
        hit = np.repeat(np.arange(len(node)), number)
        posting = (first - np.cumsum(number) + number).take(hit) + np.arange(len(hit))
        value = pool.weight.data.take(posting)
        value *= scale.take(order * scale.shape[1] + row).take(hit)
        t = times.take(order * times.shape[1] + at)
        again = np.flatnonzero((t > 1).take(hit))
        if len(again):
            t = t.take(hit.take(again))
            value[again] *= np.minimum(t, pool.count.data.take(posting.take(again))) / t
        return begin.take(row).take(hit) + pool.column.data.take(posting), value

    def _pictures(self, references: list[tuple[str, ...]]) -> np.ndarray:
        """(N,) numbers in the pool of the reference sets; those not there are added, all in one go."""
        cache = self._cache
        picture = np.fromiter(map(cache.get, references, repeat(-1)), np.int64, len(references))
        missing = picture < 0
        if missing.any():
            self._add(list(dict.fromkeys(references[i] for i in np.flatnonzero(missing))))
            picture = np.fromiter(map(cache.__getitem__, references), np.int64, len(references))
        self._clock += 1
        self._pool.used.data[picture] = self._clock
        return picture

    def _forget(self) -> None:
        """Start over with the half of the pictures that was used last; bounds the memory, changes no score."""
        last_used = np.argsort(self._pool.used.data[: len(self._cache)], kind="stable")
        known = list(self._cache)
        kept = [known[i] for i in last_used[len(known) - self._cache_size // 2 :]]
        self._reset()
        if kept:
            self._add(kept)

    def _add(self, reference_sets: list[tuple[str, ...]]) -> None:
        """Vectorise reference sets that are not in the pool."""
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
        pool.append_nodes(np.full(len(sizes), -1), np.zeros(len(sizes), np.int64))
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
            pool.append_nodes(keys + (parents << SHIFT), np.bincount(nodes, minlength=len(keys)))
            parents = first
            pool.column.append(columns)
            pool.count.append(counts)
            pool.weight.append(np.divide(counts * weight**2, norm, out=np.zeros(len(norm)), where=norm > 0))
        pool.root.append(roots + np.arange(len(sizes)))
        pool.size.append(sizes)
        pool.start.append(begin + pool.length.size)
        pool.length.append(np.maximum(tokens.lengths - 1, 0))
        pool.used.append(np.zeros_like(sizes))
        self._cache.update(zip(reference_sets, range(len(self._cache), len(self._cache) + len(sizes)), strict=True))
