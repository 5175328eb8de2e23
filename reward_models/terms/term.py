"""What the word-based terms share: one score per prefix of the words, read as a reward or as dense credit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reward_models.metrics.ngrams import DocumentFrequencies
from reward_models.metrics.pieces import Reader, joined
from reward_models.metrics.text import completion_text, row_name, tokenizer_named

_REMEMBERED = 1 << 17  # words and pieces whose ids are kept
Scores = Sequence[float] | np.ndarray | None  # of the first 0, 1, ... W words; None: no opinion on the row


class Term:
    """A reward that is a function of the words so far.

    A child gives `__name__` and `_scores(words, i, columns)`: the scores of the first w words for w = 0..W. The plain
    reward is the last of them; `increments` are their differences, so both come from one definition.
    """

    __name__ = "term"
    needs_training = False

    def __init__(self, tokenizer: str | None = "simple", training: Any = None) -> None:
        """tokenizer None: that of the document frequencies `training`, else "simple"."""
        self.tokenizer = tokenizer or (training.tokenizer if isinstance(training, DocumentFrequencies) else "simple")
        self._tokenize = tokenizer_named(self.tokenizer)
        self._reader = Reader(self.tokenizer, {})

    def __call__(self, prompts: Any = None, completions: Sequence[Any] = (), **columns: Any) -> list[float | None]:
        words = [self._tokenize(text) for text in texts(self.__name__, completions, columns.get("id"))]
        return [None if found is None else float(found[-1]) for found in self._batch(words, columns)]

    def increments(self, pieces: Sequence[Sequence[str]], **columns: Any) -> list[np.ndarray]:
        """Per response an array (T_i,) float64: score after each token minus the score before it.

        `pieces` (N lists of strings) are the texts of the tokens; a word counts from the token that completes it, and
        before the first token the score is 0, so the sum is the plain score. Zeros where the term has no opinion.
        """
        if len(self._reader) > _REMEMBERED:
            self._reader = Reader(self.tokenizer, {})
        tokens, at = self._reader.pieces(pieces, joined(self.__name__, pieces), None)
        flat = list(map(list(self._reader.words).__getitem__, tokens.words.tolist()))
        stops = np.cumsum(tokens.lengths).tolist()
        words = [flat[stop - size : stop] for stop, size in zip(stops, tokens.lengths.tolist(), strict=True)]
        # number of complete words of the row after each of its pieces
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        ends = np.cumsum(sizes)
        done = np.cumsum(np.bincount(at, minlength=int(sizes.sum())))
        out = []
        for row, its_words, scores in zip(range(len(words)), words, self._batch(words, columns), strict=True):
            if scores is None or not sizes[row]:
                out.append(np.zeros(sizes[row]))
                continue
            so_far = done[ends[row] - sizes[row] : ends[row]] - (stops[row] - len(its_words))
            out.append(np.diff(np.asarray(scores, dtype=np.float64)[so_far], prepend=0.0))
        return out

    def _batch(self, words: list[list[str]], columns: dict[str, Any]) -> list[Scores]:
        return [self._scores(row, i, columns) for i, row in enumerate(words)]

    def _scores(self, words: list[str], i: int, columns: dict[str, Any]) -> Scores:
        raise NotImplementedError


def texts(name: str, completions: Sequence[Any], ids: Any = None) -> list[str]:
    """The plain texts of N completions; ValueError naming reward and row for what is neither text nor chat."""
    out = []
    for i, completion in enumerate(completions):
        try:
            out.append(completion_text(completion))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{row_name(name, i, ids)}: {error}") from None
    return out


def value_of(columns: dict[str, Any], key: str, i: int) -> Any:
    """Row i of a column, None if there is no such column."""
    column = columns.get(key)
    if column is None:
        return None
    if isinstance(column, str) or i >= len(column):
        raise ValueError(f"column {key!r} has no row {i}: expected one value per completion")
    return column[i]


def frequencies(name: str, training: Any, tokenizer: str) -> DocumentFrequencies:
    """`training` as document frequencies: taken as they are, or counted from one list of captions per picture."""
    if isinstance(training, DocumentFrequencies):
        if training.tokenizer != tokenizer:
            raise ValueError(
                f"{name}: tokenizer is {tokenizer!r} but the document frequencies were counted with "
                f"{training.tokenizer!r}; use the same"
            )
        return training
    if training is None or isinstance(training, str):
        raise ValueError(f"{name}: needs the training captions (DocumentFrequencies, or one list per picture)")
    return DocumentFrequencies.from_references(training, tokenizer=tokenizer)
