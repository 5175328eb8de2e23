"""Which token of a response completes which word of its text.

A response is a list of pieces, one string per token, which joined are the text. The words are those of the whole text,
as the metric's tokeniser gives them. A word is complete at the first piece from which on the tokenised prefix always
begins with all words up to it: at " board" of " skate", "board" it is "skateboard" that is complete, and " skate"
completes nothing. Pieces that add no word (punctuation, blanks, special tokens) complete nothing either.

Looking at every prefix is quadratic. But `simple` and `whitespace` never look across a blank, so the text falls into
chunks, from one blank to the next, that can be treated alone; most chunks are a single piece, and chunks come back, so
what was found is remembered. A tokeniser that may look across blanks (`ptb` does, after abbreviations) is compared
with the words of the whole text, row by row, and where they differ every prefix is tokenised after all.

Whole texts need no pieces: their chunks are read as bytes, sixteen at a time, so that in a batch of words that were
seen before no word is made a string of Python at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain, repeat

import numpy as np

from reward_models.metrics.ngrams import Growing, Tokens, Trie, lay_out, spread
from reward_models.metrics.text import EOS, tokenizer_named

_SEPARABLE = ("simple", "whitespace")  # tokenize(a + " " + b) == tokenize(a) + tokenize(b) for all a, b
_MASK = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # the first `size` bytes of 8
_LONG = np.uint64(1 << 8)  # a second byte without a first
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_OPENS, _CLOSES, _EMPTY = 1, 2, 4  # a piece begins with a blank; ends with one; is ""


def joined(name: str, pieces: Sequence[Sequence[str]]) -> list[str]:
    """The texts of N lists of pieces. ValueError naming the reward and the row for anything else."""
    if pieces is None or isinstance(pieces, str):
        raise ValueError(f"{name}: pieces must be a list with one list of strings per response")
    texts = []
    for i, row in enumerate(pieces):
        try:
            if isinstance(row, str):
                raise TypeError
            texts.append("".join(row))
        except TypeError:
            raise ValueError(
                f"{name}: row {i}: pieces must be a list of strings, one per token, got {str(row)[:80]!r}"
            ) from None
    return texts


def completed(tokenize: Callable[[str], list[str]], pieces: Sequence[str]) -> tuple[list[str], list[int]]:
    """Words of the joined pieces, and for each the number of the piece that completes it: the definition, O(T^2)."""
    prefixes = list(accumulate(pieces))
    words = tokenize(prefixes[-1]) if prefixes else []
    ends: list[int] = []
    done = len(words)
    for t in range(len(prefixes) - 2, -1, -1):
        if not done:
            break
        found = tokenize(prefixes[t])
        same = next((i for i, (a, b) in enumerate(zip(found, words[:done], strict=False)) if a != b), None)
        now = min(done, len(found)) if same is None else same
        ends.extend(repeat(t + 1, done - now))
        done = now
    ends.extend(repeat(0, done))
    return words, ends[::-1]


def cut(text: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut at blanks: where each chunk stops, and its bytes 0 to 7 and 8 to 15 as two numbers.

    Bytes are taken XOR a blank, so that what is filled up with 0 cannot be mistaken for a byte of the chunk. Of a
    chunk that is longer than 16 bytes high is `_LONG`, which no bytes give.
    """
    flipped = np.frombuffer(text + b" " * 17, np.uint8) ^ np.uint8(ord(" "))
    stop = np.flatnonzero(flipped[: len(text) + 1] == 0)
    length = np.diff(stop, prepend=-1) - 1
    begin = stop - length
    words = np.ndarray(len(flipped) - 7, "<u8", flipped.data, strides=(1,))  # the 8 bytes from each place on
    low = words.take(begin) & _MASK.take(np.minimum(length, 8))
    high = words.take(np.minimum(begin + 8, len(words) - 1)) & _MASK.take(np.clip(length - 8, 0, 8))
    high[length > 16] = _LONG
    return stop, low, high


class ShortChunks:
    """Entries of chunks of up to 16 bytes, for all chunks of a batch at once; -1 for the others.

    A chunk is looked up by a number mixed from its bytes, and the bytes are compared, so the answers are exact.
    """

    def __init__(self) -> None:
        self._trie = Trie()
        self._low, self._high = Growing(np.uint64), Growing(np.uint64)  # per node, to compare
        self._entry = Growing(np.int64)
        for column in (self._low, self._high, self._entry):
            column.append(np.zeros(1, column.data.dtype))  # node 0 is none

    def find(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        node = self._trie.find(_mixed(low, high))
        same = (self._low.data.take(node) == low) & (self._high.data.take(node) == high) & (node >= 0)
        return np.where(same, self._entry.data.take(node), -1)

    def remember(self, low: np.ndarray, high: np.ndarray, entry: np.ndarray) -> None:
        """Add chunks that `find` did not find. Of two that mix to the same key only one is kept."""
        keys, first = np.unique(_mixed(low, high), return_index=True)
        first = first[(self._trie.find(keys) < 0) & (high.take(first) != _LONG)]
        self._trie.append(_mixed(low.take(first), high.take(first)))
        self._low.append(low.take(first))
        self._high.append(high.take(first))
        self._entry.append(entry.take(first))


def _mixed(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """One number of 63 bits per chunk."""
    mixed = high * _MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    mixed += low * _MULTIPLIER
    mixed >>= np.uint64(1)
    return mixed.view(np.int64)


class Reader:
    """Words of texts and of pieces as ids, for one tokeniser.

    `words`: word -> id; it begins as `known` and grows. Chunks are remembered, so that a word that was seen before is
    neither tokenised nor looked up again.
    """

    def __init__(self, tokenizer: str, known: Mapping[str, int]) -> None:
        self.words = dict(known)
        self._tokenize = tokenizer_named(tokenizer)
        self._separable = tokenizer in _SEPARABLE
        self._number: dict[str | tuple[str, ...], int] = {}  # a chunk or piece, or the pieces of a chunk -> its entry
        self._short = ShortChunks()
        self._kind = Growing(np.int64)  # per entry
        self._size = Growing(np.int64)  # number of its words
        self._first = Growing(np.int64)  # where its part of the next two begins
        self._word = Growing(np.int64)
        self._at = Growing(np.int64)  # number within the chunk of the piece that completes the word

    def __len__(self) -> int:
        """How much is remembered."""
        return len(self._number) + len(self.words)

    def texts(self, texts: Sequence[str], ended: Sequence[bool] | None) -> Tokens:
        """Tokens of N texts. ended (N,): put an end token behind those that ended and have words (None: nowhere)."""
        if self._separable and texts:
            entry, chunks = self._cut(texts)
            count = self._size.data.take(entry)
            words = self._word.data.take(spread(self._first.data.take(entry), count))
            lengths = np.add.reduceat(count, np.cumsum(chunks) - chunks)
        else:
            parts = list(map(self._tokenize, texts))
            words = self._ids(list(chain.from_iterable(parts)))
            lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        words, lengths, _ = self._with_ends(words, lengths, ended)
        return lay_out(words, lengths)

    def _cut(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Entries of all that stands between blanks (U+0020), "" included, and their number per text, at least 1."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        text = b" ".join(encoded)
        stop, low, high = cut(text)
        last = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)) + 1) - 1  # the blank behind each text
        chunks = np.diff(np.searchsorted(stop, last), prepend=-1)
        entry = self._short.find(low, high)
        missed = np.flatnonzero(entry < 0)
        if len(missed):
            begin = np.append(0, stop[:-1] + 1).take(missed)
            found = [text[i:j].decode("utf-8", "surrogatepass") for i, j in zip(begin, stop.take(missed))]
            entry[missed] = self._entries(found)
            self._short.remember(low.take(missed), high.take(missed), entry.take(missed))
        return entry, chunks

    def pieces(
        self, pieces: Sequence[Sequence[str]], texts: list[str], ended: Sequence[bool] | None
    ) -> tuple[Tokens, np.ndarray]:
        """Tokens of N texts given in pieces, and per token the piece that completes it, numbered through the batch.

        texts: the joined pieces. ended: as in `texts`; an end token is completed by the last piece of its row.
        """
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        entry, start, row = self._chunks(list(chain.from_iterable(pieces)), sizes)
        count = self._size.data.take(entry)
        part = spread(self._first.data.take(entry), count)
        words, at = self._word.data.take(part), np.repeat(start, count) + self._at.data.take(part)
        lengths = np.bincount(row, count, len(sizes)).astype(np.int64)
        if not self._separable:
            words, lengths, at = self._checked(pieces, texts, words, lengths, at)
        words, lengths, tails = self._with_ends(words, lengths, ended)
        at = np.insert(at, np.cumsum(lengths)[tails] - np.arange(1, len(tails) + 1), np.cumsum(sizes)[tails] - 1)
        return lay_out(words, lengths), at

    def _with_ends(
        self, words: np.ndarray, lengths: np.ndarray, ended: Sequence[bool] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Words and lengths with end tokens, and the rows that got one."""
        if ended is None:
            return words, lengths, np.zeros(0, np.int64)
        gets = np.asarray(ended, bool) & (lengths > 0)
        tails = np.flatnonzero(gets)
        end = self.words.setdefault(EOS, len(self.words))
        return np.insert(words, np.cumsum(lengths)[tails], end), lengths + gets, tails

    def _chunks(self, flat: list[str], sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The chunks of a batch in order: entry, number of the first piece, row. Empty pieces belong to none."""
        entry = self._entries(flat)
        kind = self._kind.data.take(entry)
        row = np.repeat(np.arange(len(sizes)), sizes)
        there = np.flatnonzero(kind != _EMPTY)
        entry, kind, row = entry.take(there), kind.take(there), row.take(there)
        begins = np.ones(len(there), dtype=bool)
        begins[1:] = (kind[1:] & _OPENS > 0) | (kind[:-1] & _CLOSES > 0) | (row[1:] != row[:-1])
        first = np.flatnonzero(begins)
        stop = np.append(first[1:], len(there))
        chunk = entry.take(first)
        for i in np.flatnonzero(stop - first > 1).tolist():
            key = tuple(flat[there[first[i]] : there[stop[i] - 1] + 1])  # with empty pieces, if some lie between
            number = self._number.get(key)
            chunk[i] = self._entry(key, key) if number is None else number
        return chunk, there.take(first), row.take(first)

    def _entries(self, flat: list[str]) -> np.ndarray:
        entry = np.fromiter(map(self._number.get, flat, repeat(-1)), np.int64, len(flat))
        for i in np.flatnonzero(entry < 0).tolist():
            number = self._number.get(flat[i])  # this batch may have made it meanwhile
            entry[i] = self._entry(flat[i], (flat[i],)) if number is None else number
        return entry

    def _entry(self, key: str | tuple[str, ...], pieces: tuple[str, ...]) -> int:
        words, at = completed(self._tokenize, pieces)
        text = "".join(pieces)
        kind = _OPENS * text[:1].isspace() + _CLOSES * text[-1:].isspace() if text else _EMPTY
        self._first.append(np.array([self._at.size]))
        self._size.append(np.array([len(words)]))
        self._kind.append(np.array([kind]))
        self._word.append(self._ids(words))
        self._at.append(np.array(at, np.int64))
        return self._number.setdefault(key, len(self._number))

    def _ids(self, words: list[str]) -> np.ndarray:
        """Ids of words; new words get the next."""
        ids = np.fromiter(map(self.words.get, words, repeat(-1)), np.int64, len(words))
        for i in np.flatnonzero(ids < 0).tolist():
            ids[i] = self.words.setdefault(words[i], len(self.words))
        return ids

    def _checked(
        self,
        pieces: Sequence[Sequence[str]],
        texts: list[str],
        words: np.ndarray,
        lengths: np.ndarray,
        at: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same, with rows replaced whose words are not those of the whole text."""
        new_words, new_at, new_lengths = [], [], lengths.copy()
        stop, begin = np.cumsum(lengths), 0
        for i, text in enumerate(texts):
            part = slice(int(stop[i] - lengths[i]), int(stop[i]))
            own, own_at = self._ids(self._tokenize(text)), at[part]
            if not np.array_equal(own, words[part]):
                own_at = np.array(completed(self._tokenize, pieces[i])[1], np.int64) + begin
            new_words.append(own)
            new_at.append(own_at)
            new_lengths[i] = len(own)
            begin += len(pieces[i])
        return np.concatenate(new_words), new_lengths, np.concatenate(new_at)
