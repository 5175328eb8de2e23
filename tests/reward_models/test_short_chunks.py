"""Texts read as bytes, sixteen at a time, give the words that the tokeniser gives for each text alone."""

from __future__ import annotations

import random

import numpy as np
import pytest

from reward_models.metrics import pieces
from reward_models.metrics.pieces import Reader
from reward_models.metrics.text import EOS, tokenizer_named

# lengths around 8 and 16 bytes, pairs that differ in one half only, NUL against nothing, blanks that are not U+0020,
# characters of two to four bytes, half a surrogate pair
CHUNKS = ["a", "b", "\0", "a\0", "\0a", "", "a" * 7, "a" * 8, "a" * 9, "a" * 15, "a" * 16, "a" * 17, "a" * 40]
CHUNKS += ["a" * 8 + "b", "b" + "a" * 8, "a" * 15 + "b", "a" * 16 + "b", "aaaaaaaa\0", "\t", "a\tb\nc", "a\u00a0b"]
CHUNKS += ["Dog's", "t-shirt,", "...", "\u4e2d\u6587" * 3, "\U0001f415\u200d\U0001f9ba", "caf\u00e9", "\ud800", "\x21 "]


def texts(rng: random.Random, rows: int) -> list[str]:
    return [" ".join(rng.choices(CHUNKS, k=rng.randint(0, 8))) for _ in range(rows)]


def words_of(reader: Reader, batch: list[str], ended: list[bool] | None) -> list[list[str]]:
    tokens = reader.texts(batch, ended)
    names = list(reader.words)
    flat = [names[i] for i in tokens.words.tolist()]
    stops = np.cumsum(tokens.lengths).tolist()
    return [flat[stop - size : stop] for stop, size in zip(stops, tokens.lengths.tolist(), strict=True)]


@pytest.mark.parametrize("tokenizer", ["simple", "whitespace"])
@pytest.mark.parametrize("mixing", ["as it is", "all chunks to one key", "without the last bytes"])
def test_words_are_those_of_the_tokenizer(tokenizer, mixing, monkeypatch):
    if mixing == "all chunks to one key":  # the key proves nothing: the bytes themselves have to be compared
        monkeypatch.setattr(pieces, "_mixed", lambda low, high: np.zeros(len(low), np.int64))
    elif mixing == "without the last bytes":
        monkeypatch.setattr(pieces, "_mixed", lambda low, high: (low >> np.uint64(1)).view(np.int64))
    rng, tokenize = random.Random(0), tokenizer_named(tokenizer)
    reader = Reader(tokenizer, {})
    for rows in (1, 40, 300, 2):  # later batches find what earlier ones left
        batch = texts(rng, rows)
        ended = [rng.random() < 0.5 for _ in batch]
        expected = [tokenize(text) for text in batch]
        assert words_of(reader, batch, None) == expected
        assert words_of(reader, batch, ended) == [
            row + [EOS] * (end and len(row) > 0) for row, end in zip(expected, ended, strict=True)
        ]


def test_chunks_of_up_to_16_bytes_are_found_without_being_decoded(monkeypatch):
    reader = Reader("simple", {})
    short = ["a man", "a  black-and-white dog", "", "caf\u00e9 \u4e2d\u6587"]
    expected = words_of(reader, short, None)
    monkeypatch.setattr(Reader, "_entries", lambda self, chunks: pytest.fail(f"looked up one by one: {chunks}"))
    assert (
        words_of(reader, short, None)
        == expected
        == [["a", "man"], ["a", "black-and-white", "dog"], [], ["caf\u00e9", "\u4e2d\u6587"]]
    )
