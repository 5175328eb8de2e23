"""What the metrics that compare n-grams with references share: the reward protocol, the kept references, dense credit.

References are turned into a trie of n-grams once and kept, all pictures in one pool, so that a batch is looked up with
a few array operations. A row is computed in the same order whatever else is in the batch: scores do not depend on it,
to the last bit.

Dense credit. With S_k the plain score of a text's first k words (no end token), the token that completes words j+1..k
gets S_k - S_j, and the last token S - S_K besides, the end token's share. The sum is the plain score S. As a potential
this is Ng, Harada and Russell 1999: phi = score of the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np

from reward_models.metrics.ngrams import SHIFT, Growing, Tokens, Trie, grow, spread, take_rows
from reward_models.metrics.pieces import Reader, joined
from reward_models.metrics.text import check_rows, whole

_CELLS = 1 << 19  # words x references of a block of rows that is worked on at once: bounds memory, fits the cache
_REMEMBERED = 1 << 18  # chunks and words outside the corpus that are remembered


class Level(NamedTuple):
    """The n-grams of one order in references that are being added: M occurrences, K different ones, Q postings.

    A posting is an n-gram in one reference; postings of an n-gram lie together. size: K. at (M,): positions, ascending;
    posting (M,): of each occurrence. node (Q,): 0..K-1; column (Q,): which of the picture's references; times (Q,):
    how often there.
    """

    size: int
    at: np.ndarray
    posting: np.ndarray
    node: np.ndarray
    column: np.ndarray
    times: np.ndarray


class Pool:
    """The n-grams of all kept pictures. The postings of a node are first[node] to first[node + 1]."""

    def __init__(self) -> None:
        self.trie = Trie()
        self.first = Growing(np.int64)  # per node: its first posting
        self.first.append(np.zeros(2, np.int64))  # one more than nodes
        self.column = Growing(np.int64)  # per posting: which of the picture's references
        self.root = Growing(np.int64)  # per picture: its root node
        self.size = Growing(np.int64)  # its number of references
        self.start = Growing(np.int64)  # its first reference
        self.used = Growing(np.int64)  # when it was last asked for
        self.length = Growing(np.int64)  # per reference: in tokens

    def append_nodes(self, keys: np.ndarray, postings: np.ndarray) -> None:
        """New nodes with that many postings each."""
        self.trie.append(keys)
        self.first.append(np.cumsum(postings) + self.first.data[self.first.size - 1])


class Slots(NamedTuple):
    """The references of N rows as a table of R columns, cut to the rows' pictures.

    size (N,): references per row; length (R, N): in tokens; there (R, N) bool: False where a row has fewer than R.
    """

    size: np.ndarray
    length: np.ndarray
    there: np.ndarray


class ReferenceMetric:
    """Base of the metrics. A subclass says what it keeps of references (`_start`, `_keep`) and how it scores
    (`_scores`, `_paths`)."""

    __name__: str
    n: int
    eos: bool
    _scores_by_word = False  # whether `_scores`, as `_paths` does, makes a table of words x references x rows

    def _set_up(self, tokenizer: str, known: Mapping[str, int], cache_size: int) -> None:
        """known: words with ids of their own, before any text is seen."""
        self._tokenizer, self._known = tokenizer, known
        self._cache: dict[tuple[str, ...], int] = {}  # references -> number of the picture in the pool
        self._cache_size = whole(self.__name__, "cache_size", cache_size)
        self._reset()

    def _reset(self) -> None:
        self._cache.clear()
        self._reader = Reader(self._tokenizer, self._known)
        self._pool = Pool()
        self._clock = 0
        self._start()

    # What a subclass fills in.

    def _start(self) -> None:
        """Empty columns for what is kept besides the pool."""
        raise NotImplementedError

    def _keep(self, tokens: Tokens, columns: np.ndarray, levels: list[Level], roots: int) -> None:
        """Vectorise new references: `tokens` holds them as lists, columns (lists,) is the place of each in its
        picture; levels: order 1..n; roots: number of new pictures, whose root nodes come before those of the levels."""
        raise NotImplementedError

    def _scores(self, tokens: Tokens, picture: np.ndarray) -> np.ndarray:
        """(N,) scores of the candidates."""
        raise NotImplementedError

    def _paths(self, tokens: Tokens, picture: np.ndarray) -> np.ndarray:
        """(1 + longest, N): scores of the first 0, 1, 2, ... words; row k is only read where a list has k words."""
        raise NotImplementedError

    # The reward protocol.

    def __call__(
        self,
        prompts: Any = None,
        completions: Sequence[Any] = (),
        references: Sequence[Sequence[str]] | None = None,
        ended: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        rows = check_rows(self.__name__, completions, references, ended, columns.get("id"), self._cache)
        return self._in_blocks(*rows).tolist()

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
        return self._in_blocks(*check_rows(self.__name__, candidates, references, ended, known=self._cache))

    def increments(
        self,
        pieces: Sequence[Sequence[str]],
        *,
        references: Sequence[Sequence[str]] | None = None,
        ended: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[np.ndarray]:
        """Dense credit: what each token adds to the score, (T_i,) float64 per response; sums to the plain score.

        pieces: N lists of strings, one per token, which joined give the text (end token and other special tokens: "").
        A word counts at the last token that its characters need (see `reward_models.metrics.pieces`); the end token
        of a response that ended, with eos, at the last piece. ended, references: as in `score`. Raises ValueError
        naming the row.
        """
        texts = joined(self.__name__, pieces)
        _, references, flags = check_rows(self.__name__, texts, references, ended, columns.get("id"), self._cache)
        if not texts:
            return []
        picture = self._pictures(references)
        tokens, at = self._reader.pieces(pieces, texts, flags if self.eos else None)
        lengths = tokens.lengths
        start = np.cumsum(lengths + 1) - lengths - 1
        potential = np.zeros(int(start[-1] + lengths[-1] + 1))  # per row: scores of its first 0, 1, ... words
        for rows, block in self._blocks(tokens, picture, True):
            words = lengths[rows] + 1
            own = np.repeat(np.arange(len(rows)), words)
            paths = self._paths(block, picture[rows])
            potential[spread(start[rows], words)] = paths[spread(np.zeros_like(words), words), own]
        self._tidy()

        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        end = np.cumsum(sizes)
        total = int(end[-1])
        # words complete so far, of this row and all before, plus a place per row: that is how `potential` is laid out
        done = np.cumsum(np.bincount(at, minlength=total)) + np.repeat(np.arange(len(sizes)), sizes)
        now = potential.take(done)
        before = np.zeros(total)
        before[1:] = now[:-1]
        before[(end - sizes)[sizes > 0]] = 0.0
        credit = now - before
        return [credit[a:b] for a, b in zip((end - sizes).tolist(), end.tolist(), strict=True)]

    # References, vectorised once.

    def _in_blocks(self, texts: list[str], references: list[tuple[str, ...]], ended: list[bool]) -> np.ndarray:
        out = np.zeros(len(texts))
        for rows, block, picture in self._looked_up(texts, references, ended):
            out[rows] = self._scores(block, picture)
        return out

    def _looked_up(
        self, texts: list[str], references: list[tuple[str, ...]], ended: list[bool]
    ) -> Iterator[tuple[np.ndarray, Tokens, np.ndarray]]:
        """Rows, tokens and pictures of the batch, block by block."""
        if not texts:
            return
        picture = self._pictures(references)
        tokens = self._reader.texts(texts, ended if self.eos else None)
        for rows, block in self._blocks(tokens, picture, self._scores_by_word):
            yield rows, block, picture[rows]
        self._tidy()

    def _blocks(self, tokens: Tokens, picture: np.ndarray, by_word: bool) -> Iterator[tuple[np.ndarray, Tokens]]:
        """Rows in blocks of like size, so that a table of words x references has at most about _CELLS cells.

        by_word: the table is as wide as the longest row; otherwise a row takes the room of its own words only.
        """
        sizes = self._pool.size.data[picture]
        widths = np.maximum(tokens.lengths, 1)
        if (len(sizes) * int(widths.max()) if by_word else int(widths.sum())) * int(sizes.max()) <= _CELLS:
            yield np.arange(len(sizes)), tokens
            return
        order = np.lexsort((widths, sizes))
        while len(order):
            table = np.maximum.accumulate(widths[order]) * np.maximum.accumulate(sizes[order])
            room = np.searchsorted(table * np.arange(1, len(order) + 1), _CELLS, side="right")
            rows, order = np.split(order, [max(1, int(room))])
            rows = np.sort(rows)
            yield rows, take_rows(tokens, rows)

    def _slots(self, picture: np.ndarray) -> Slots:
        """The references of these pictures as a table; the place of a reference of row i is column * N + i."""
        pool = self._pool
        size = pool.size.data[picture]
        column = np.arange(int(size.max()))[:, None]
        there = column < size
        number = np.where(there, pool.start.data[picture] + column, 0)
        return Slots(size, np.where(there, pool.length.data[number], 0), there)

    def _matches(self, tokens: Tokens, picture: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per order 1..n: positions of the n-grams that the row's references have, ascending, and their nodes."""
        roots = self._pool.root.data[picture].take(tokens.rows)
        return list(self._pool.trie.descend(tokens, np.arange(len(tokens.words)), roots, 1, self.n))

    def _postings(self, node: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many postings each of the nodes has, and the numbers of all, laid end to end."""
        first = self._pool.first.data.take(node)
        number = self._pool.first.data.take(node + 1) - first
        return number, spread(first, number)

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

    def _tidy(self) -> None:
        """With too much in memory, start over with the pictures that were used last; changes no score."""
        if len(self._cache) <= self._cache_size and len(self._reader) <= len(self._known) + _REMEMBERED:
            return
        last_used = np.argsort(self._pool.used.data[: len(self._cache)], kind="stable")
        known = list(self._cache)
        kept = [known[i] for i in last_used[max(0, len(known) - self._cache_size // 2) :]]
        self._reset()
        if kept:
            self._add(kept)

    def _add(self, reference_sets: list[tuple[str, ...]]) -> None:
        """Vectorise reference sets that are not in the pool."""
        texts = list(chain.from_iterable(reference_sets))
        sizes = np.array([len(refs) for refs in reference_sets])
        tokens = self._reader.texts(texts, [True] * len(texts) if self.eos else None)
        picture_of_list = np.repeat(np.arange(len(sizes)), sizes)
        begin = np.cumsum(sizes) - sizes
        columns = np.arange(len(texts)) - begin[picture_of_list]
        column = columns[tokens.rows]
        width = int(sizes.max())

        pool = self._pool
        roots = parents = pool.trie.keys.size  # number of the first node of the order before
        pool.append_nodes(np.full(len(sizes), -1), np.zeros(len(sizes), np.int64))
        levels = []
        for keys, at, node in grow(tokens, picture_of_list[tokens.rows], self.n):
            pairs, posting, count = np.unique(node * width + column[at], return_inverse=True, return_counts=True)
            level = Level(len(keys), at, posting, pairs // width, pairs % width, count)
            first = pool.trie.keys.size
            pool.append_nodes(keys + (parents << SHIFT), np.bincount(level.node, minlength=len(keys)))
            pool.column.append(level.column)
            parents = first
            levels.append(level)
        self._keep(tokens, columns, levels, len(sizes))
        pool.root.append(roots + np.arange(len(sizes)))
        pool.size.append(sizes)
        pool.start.append(begin + pool.length.size)
        pool.length.append(tokens.lengths)
        pool.used.append(np.zeros_like(sizes))
        self._cache.update(zip(reference_sets, range(len(self._cache), len(self._cache) + len(sizes)), strict=True))
