"""N-grams of a whole batch as integer arrays, and document frequencies from a corpus.

N-grams are the nodes of a trie. Node 0 is no n-gram; the key of any other node is `parent << 32 | id of its last
word`, so a batch is looked up with one step per order, and each step is a handful of array operations. The hash table
behind it compares keys, so the answers are exact. Document frequencies take about 12 bytes per n-gram on disk.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reward_models.metrics.text import EOS, tokenizer_named

MAX_ORDER = 4
SHIFT = 32
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
_FORMAT = 1


class Tokens(NamedTuple):
    """N token lists laid end to end, T tokens in all.

    words (T,) int64 ids; rows (T,) which list a token is of; left (T,) how many tokens of its list are left from
    here, itself included: an n-gram starts at i iff left[i] >= n. lengths (N,).
    """

    words: np.ndarray
    rows: np.ndarray
    left: np.ndarray
    lengths: np.ndarray

    @property
    def places(self) -> np.ndarray:
        """(T,) place of each token in its own list, from 0."""
        return self.lengths.take(self.rows) - self.left


def lay_out(words: np.ndarray, lengths: np.ndarray) -> Tokens:
    """Tokens from the words (T,) of all lists and the lengths (N,) of the lists."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return Tokens(words, rows, np.cumsum(lengths).take(rows) - np.arange(len(words)), lengths)


def take_rows(tokens: Tokens, rows: np.ndarray) -> Tokens:
    """The lists with these numbers, in this order."""
    lengths = tokens.lengths[rows]
    starts = (np.cumsum(tokens.lengths) - tokens.lengths)[rows]
    at = spread(starts, lengths)
    return Tokens(tokens.words[at], np.repeat(np.arange(len(rows)), lengths), tokens.left[at], lengths)


def spread(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each (start, length), laid end to end."""
    out = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    out += np.arange(len(out))
    return out


def grow(tokens: Tokens, first: np.ndarray, order: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Build tries over all n-grams of `tokens`, one trie per value of `first` (T,).

    Yields per n = 1..order: keys (K,) sorted, whose upper half is `first` for n = 1 and then the index among the keys
    of order n - 1; at (M,) positions where an n-gram starts; node (M,) its index in keys.
    """
    prefix = first
    at = np.arange(len(tokens.words))
    for n in range(1, order + 1):
        keep = tokens.left[at] >= n
        at, prefix = at[keep], prefix[keep]
        keys, prefix = np.unique(prefix << SHIFT | tokens.words[at + n - 1], return_inverse=True)
        yield keys, at, prefix


class Growing:
    """A 1-d array that is appended to in amortised constant time; `data` may be longer than `size`."""

    def __init__(self, dtype: type) -> None:
        self.data: np.ndarray = np.zeros(1024, dtype=dtype)
        self.size = 0

    def append(self, values: np.ndarray) -> None:
        end = self.size + len(values)
        if end > len(self.data):
            self.data = np.concatenate([self.data, np.zeros(max(end, len(self.data)), self.data.dtype)])
        self.data[self.size : end] = values
        self.size = end


class Trie:
    """Keys of nodes, found through a cuckoo hash table: each key sits in one of two places, so two looks suffice."""

    def __init__(self) -> None:
        self.keys = Growing(np.int64)
        self.keys.append(np.array([-1]))
        self._bits = 12
        self._shift = np.uint64(64 - self._bits)
        self._table = np.zeros(1 << self._bits, dtype=np.int32)

    def append(self, keys: np.ndarray) -> None:
        """New nodes, numbered on from `keys.size`. The keys must be new and differ (roots: -1, never found)."""
        first = self.keys.size
        self.keys.append(keys)
        new = first + np.flatnonzero(keys >= 0)
        while 3 * self.keys.size > len(self._table) or not self._place(new):
            self._bits += 1
            self._shift = np.uint64(64 - self._bits)
            self._table = np.zeros(1 << self._bits, dtype=np.int32)
            new = np.flatnonzero(self.keys.data[: self.keys.size] >= 0)

    def _slot(self, keys: np.ndarray, multiplier: np.uint64) -> np.ndarray:
        slot = keys.view(np.uint64) * multiplier
        slot >>= self._shift
        return slot.view(np.int64)

    def _place(self, nodes: np.ndarray) -> bool:
        """Put nodes into the table, pushing others to their second place; False if that does not come to rest."""
        side = np.zeros(len(nodes), dtype=bool)  # which of its two places a node goes to
        for _ in range(200):
            if not len(nodes):
                return True
            keys = self.keys.data[nodes]
            slot = np.where(side, self._slot(keys, _MULTIPLIERS[1]), self._slot(keys, _MULTIPLIERS[0]))
            pushed = self._table[slot]
            self._table[slot] = nodes
            lost = self._table[slot] != nodes  # of several nodes for one slot the last stays
            left, first = np.unique(pushed, return_index=True)
            from_first = self._slot(self.keys.data[left], _MULTIPLIERS[0]) == slot[first]
            stay = left > 0
            nodes = np.concatenate([nodes[lost], left[stay]])
            side = np.concatenate([~side[lost], from_first[stay]])
        return False

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Nodes of the keys, int64, -1 where there is none."""
        known = self.keys.data
        node = self._table.take(self._slot(keys, _MULTIPLIERS[0])).astype(np.int64)
        wrong = known.take(node) != keys
        # no slot is ever emptied again, so a key whose first place is free is not in its second place either
        missed = np.flatnonzero(wrong & (node > 0))
        node = np.where(wrong, -1, node)
        if len(missed):
            keys = keys.take(missed)
            second = self._table.take(self._slot(keys, _MULTIPLIERS[1])).astype(np.int64)
            node[missed] = np.where(known.take(second) == keys, second, -1)
        return node

    def descend(
        self, tokens: Tokens, at: np.ndarray, node: np.ndarray, start: int, order: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Look n-grams up. `at` (ascending), `node`: positions and the nodes of their (start-1)-grams (start 1: roots).

        Yields per n = start..order the positions whose n-gram is there, ascending, and its node. An n-gram whose
        prefix is absent is absent, so the arrays shrink on the way.
        """
        for n in range(start, order + 1):
            if n > 1:
                keep = np.flatnonzero(tokens.left.take(at) >= n)
                at, node = at.take(keep), node.take(keep)
            keys = node.astype(np.int64)
            keys <<= SHIFT
            keys |= tokens.words.take(at + (n - 1))
            node = self.find(keys)
            keep = np.flatnonzero(node >= 0)
            at, node = at.take(keep), node.take(keep)
            yield at, node


def occurrences(tokens: Tokens, order: int) -> np.ndarray:
    """(order, T) int64: which occurrence in its own list, from 1, the n-gram starting at each position is.

    1 where none starts. A repeated n-gram has a repeated (n-1)-gram in front, so only those are looked at again.
    """
    out = np.ones((order, len(tokens.words)), dtype=np.int64)
    at = np.arange(len(tokens.words))
    group = tokens.rows
    for n in range(1, order + 1):
        keys = group << SHIFT | tokens.words[at + (n - 1)]
        sort = keys.argsort(kind="stable")
        keys = keys[sort]
        repeats = np.zeros(len(keys) + 1, dtype=bool)
        np.equal(keys[1:], keys[:-1], out=repeats[1:-1])
        again = np.flatnonzero(repeats[1:] | repeats[:-1])
        if not len(again):
            break
        at = at[sort[again]]
        group = np.cumsum(~repeats[again]) - 1
        first = np.flatnonzero(~repeats[again])
        out[n - 1][at] = np.arange(len(again)) - first[group] + 1
        keep = tokens.left[at] > n
        at, group = at[keep], group[keep]
    return out


class DocumentFrequencies:
    """In how many documents (the references of one picture together) each 1- to 4-gram occurs.

    Counted once over a corpus, never over the batch that is scored: over a batch of one every weight would be
    log(1/1) = 0 and a perfect caption would score 0. An end token is counted behind every reference; n-grams without
    it are not touched by that, so one object serves scoring with and without end token.

    Attributes: documents (int), tokenizer (name), hash (16 hex digits of the SHA-256 of the content; it does not
    depend on the order of the documents).
    """

    def __init__(
        self, words: Sequence[str], keys: np.ndarray, counts: np.ndarray, documents: int, tokenizer: str
    ) -> None:
        self.words = list(words)  # sorted; the id of a word is its place
        self.keys, self.counts = keys, counts  # (K,) int64, (K,) int32; entry 0 is the root
        self.documents = int(documents)
        self.tokenizer = tokenizer
        self.tokenize: Callable[[str], list[str]] = tokenizer_named(tokenizer)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.hash = self._digest()[:16]

    @classmethod
    def from_references(cls, references: Sequence[Sequence[str]], *, tokenizer: str = "simple") -> DocumentFrequencies:
        """Count over `references`: one list of strings per picture. ValueError with fewer than two documents."""
        if len(references) < 2:
            raise ValueError(
                f"document frequencies need at least 2 documents, got {len(references)}: with one, every n-gram is in "
                "every document and every weight is 0; give the references of the whole training split"
            )
        tokenize = tokenizer_named(tokenizer)
        lists: list[list[str]] = []
        sizes = []
        for i, refs in enumerate(references):
            if isinstance(refs, str) or not len(refs):
                raise ValueError(f"document {i}: expected a non-empty list of reference strings, got {refs!r}")
            lists.extend([*tokenize(ref), EOS] for ref in refs)
            sizes.append(len(refs))
        words = sorted(set(chain.from_iterable(lists)))
        ids = {word: i for i, word in enumerate(words)}
        flat = np.fromiter(map(ids.__getitem__, chain.from_iterable(lists)), np.int64)
        tokens = lay_out(flat, np.fromiter(map(len, lists), np.int64, len(lists)))
        document = np.repeat(np.arange(len(sizes)), sizes)[tokens.rows]
        all_keys, all_counts = [np.array([-1])], [np.array([len(sizes)], np.int32)]
        parents = 0  # number of the first node of the order before
        nodes = 1
        for keys, at, node in grow(tokens, np.zeros(len(tokens.words), dtype=np.int64), MAX_ORDER):
            pairs = np.unique(node * len(sizes) + document[at])
            all_keys.append(keys + (parents << SHIFT))
            all_counts.append(np.bincount(pairs // len(sizes), minlength=len(keys)).astype(np.int32))
            parents, nodes = nodes, nodes + len(keys)
        return cls(words, np.concatenate(all_keys), np.concatenate(all_counts), len(sizes), tokenizer)

    def __len__(self) -> int:
        return len(self.keys) - 1

    def __repr__(self) -> str:
        return f"DocumentFrequencies({self.hash}, {self.documents} documents, {len(self)} n-grams, {self.tokenizer})"

    def count(self, ngram: Sequence[str]) -> int:
        """Number of documents that hold the n-gram, given as a list of 1 to 4 tokens (not tokenised again)."""
        if not all(word in self.ids for word in ngram):
            return 0
        tokens = lay_out(np.array([self.ids[word] for word in ngram], np.int64), np.array([len(ngram)]))
        start = np.zeros(1, dtype=np.int64)
        *_, (at, node) = self._trie.descend(tokens, start, start, 1, len(ngram))
        return int(self.counts[node[0]]) if len(at) else 0

    @cached_property
    def _trie(self) -> Trie:
        trie = Trie()
        trie.append(self.keys[1:])
        return trie

    @cached_property
    def _weights(self) -> np.ndarray:
        """idf of an n-gram that 0, 1, 2, ... documents have."""
        counts = np.arange(int(self.counts.max()) + 1)
        return np.log(float(self.documents)) - np.log(np.maximum(counts, 1))

    def idf(self, tokens: Tokens, order: int) -> np.ndarray:
        """(order, T) float64: log(documents) - log(max(1, df)) of the n-gram starting at each position."""
        out = np.full((order, len(tokens.words)), np.log(float(self.documents)))
        at = np.flatnonzero(tokens.words < len(self.words))
        node = tokens.words.take(at) + 1  # the first nodes are the words, in order
        out[0][at] = self._weights.take(self.counts.take(node))
        for n, (found, nodes) in enumerate(self._trie.descend(tokens, at, node, 2, order), 1):
            out[n][found] = self._weights.take(self.counts.take(nodes))
        return out

    def _header(self) -> str:
        return f"document-frequencies format={_FORMAT} documents={self.documents} tokenizer={self.tokenizer}"

    def _word_bytes(self) -> bytes:
        return "\n".join(self.words).encode("utf-8", "surrogatepass")

    def _digest(self) -> str:
        digest = hashlib.sha256(self._header().encode() + b"\0" + self._word_bytes())
        digest.update(self.keys.astype("<i8").tobytes())
        digest.update(self.counts.astype("<i4").tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything into one file (an uncompressed .npz), with its SHA-256; replaced in one step."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            header=np.frombuffer(self._header().encode(), np.uint8),
            words=np.frombuffer(self._word_bytes(), np.uint8),
            sha256=np.array(self._digest()),
            keys=self.keys,
            counts=self.counts,
        )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        beside.write_bytes(buffer.getvalue())
        os.replace(beside, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DocumentFrequencies:
        """Read a file of `save`. FileNotFoundError; ValueError naming the file if it is damaged or another thing."""
        try:
            with np.load(path, allow_pickle=False) as file:
                header = dict(part.split("=") for part in file["header"].tobytes().decode().split()[1:])
                if int(header["format"]) != _FORMAT:
                    raise ValueError(f"format {header['format']}, this version reads {_FORMAT}")
                words = file["words"].tobytes().decode("utf-8", "surrogatepass").split("\n")
                found = cls(words, file["keys"], file["counts"], int(header["documents"]), header["tokenizer"])
                recorded = str(file["sha256"])
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file of document frequencies") from None
        except Exception as error:  # zipfile, numpy and json-like errors differ by version; the user needs the file
            raise ValueError(
                f"{path}: not a readable file of document frequencies ({error}); make it again with "
                "DocumentFrequencies.from_references(...).save(path)"
            ) from error
        if found._digest() != recorded:
            raise ValueError(f"{path}: content does not match its SHA-256 {recorded[:16]}; the file is damaged")
        return found
