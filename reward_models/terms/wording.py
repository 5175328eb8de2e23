"""Terms on the wording alone: length, repetition, novelty, richness. Formulas: docs/rewards/."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, chain, repeat
from typing import Any

import numpy as np

from reward_models.metrics.ngrams import MAX_ORDER, DocumentFrequencies, lay_out
from reward_models.metrics.text import flag, real, row_name, whole
from reward_models.terms.term import Scores, Term, frequencies, value_of
from reward_models.terms.words import FUNCTION_WORDS


class LengthWindow(Term):
    """1 inside a window of lengths, falling off outside of it; in [0, 1].

    Let d be the distance from the window [min, max]. linear: max(0, 1 - d / width); gaussian: exp(-d^2 / (2 width^2)).
    unit "words", or "tokens": the length of the column `completion_ids` (of the pieces in `increments`), the end
    token included where it is there.
    """

    __name__ = "length"

    def __init__(
        self,
        *,
        min: int = 0,
        max: int | None = None,
        width: float = 4.0,
        fall: str = "linear",
        unit: str = "words",
        tokenizer: str = "simple",
    ) -> None:
        super().__init__(tokenizer)
        for option, value in (("min", min), ("max", 0 if max is None else max)):
            whole("length", option, value, least=0)
        if (max is not None and max < min) or (min == 0 and max is None):
            raise ValueError(f"length: expected 0 <= min <= max and one of them set, got min={min!r}, max={max!r}")
        if not 0 < real("length", "width", width) < math.inf:
            raise ValueError(f"length: width must be a finite number above 0, got {width!r}")
        if fall not in ("linear", "gaussian"):
            raise ValueError(f"length: fall must be 'linear' or 'gaussian', got {fall!r}")
        if unit not in ("words", "tokens"):
            raise ValueError(f"length: unit must be 'words' or 'tokens', got {unit!r}")
        self.min, self.max, self.width, self.fall, self.unit = min, max, float(width), fall, unit

    @property
    def signature(self) -> str:
        high = "inf" if self.max is None else self.max
        tail = f"|tok:{self.tokenizer}" if self.unit == "words" else ""
        return f"length|{self.unit}:{self.min}..{high}|fall:{self.fall}|width:{self.width:g}{tail}|version:1"

    def __call__(self, prompts: Any = None, completions: Sequence[Any] = (), **columns: Any) -> list[float | None]:
        if self.unit == "words":
            return super().__call__(prompts, completions, **columns)
        lengths = []
        for i in range(len(completions)):
            ids = value_of(columns, "completion_ids", i)
            if ids is None:
                raise ValueError(f"{row_name('length', i)}: unit 'tokens' needs the column 'completion_ids'")
            lengths.append(len(ids))
        return [float(value) for value in self._window(np.array(lengths))]

    def increments(self, pieces: Sequence[Sequence[str]], **columns: Any) -> list[np.ndarray]:
        if self.unit == "words":
            return super().increments(pieces, **columns)
        return [np.diff(self._window(np.arange(1, len(row) + 1)), prepend=0.0) for row in pieces]

    def _scores(self, words: list[str], i: int, columns: dict[str, Any]) -> Scores:
        return self._window(np.arange(len(words) + 1))

    def _window(self, lengths: np.ndarray) -> np.ndarray:
        high = math.inf if self.max is None else self.max
        d = np.maximum(np.maximum(self.min - lengths, lengths - high), 0.0)
        if self.fall == "linear":
            return np.maximum(0.0, 1.0 - d / self.width)
        return np.exp(-d * d / (2 * self.width**2))


class Repetition(Term):
    """Minus the share of repeated n-grams or of words that repeat the word before, whichever is larger; in [-1, 0].

    Repeated n-grams: 1 - distinct / all (seq-rep-n, Welleck et al. 2020, arXiv 1908.04319). Words in a
    row: words equal to their left neighbour over words that have one.
    """

    __name__ = "repetition"

    def __init__(self, *, n: int = 3, runs: bool = True, tokenizer: str = "simple") -> None:
        super().__init__(tokenizer)
        self.n, self.runs = whole("repetition", "n", n), flag("repetition", "runs", runs)

    @property
    def signature(self) -> str:
        return f"repetition|n:{self.n}|runs:{'yes' if self.runs else 'no'}|tok:{self.tokenizer}|version:1"

    def _scores(self, words: list[str], i: int, columns: dict[str, Any]) -> Scores:
        n, seen = self.n, set()
        again = same = 0
        out = [0.0]
        for end in range(1, len(words) + 1):
            share = 0.0
            if end >= n:
                gram = tuple(words[end - n : end])
                again += gram in seen
                seen.add(gram)
                share = again / (end - n + 1)
            if self.runs and end > 1:
                same += words[end - 1] == words[end - 2]
                share = max(share, same / (end - 1))
            out.append(0.0 - share)  # no -0.0
        return out


class Novelty(Term):
    """Share of n-grams that no training caption holds, at most `cap`, minus `copy` for a word-by-word copy.

    In [-copy, cap]. Fewer than n words: nothing new. `copy` above 0 needs the captions themselves, not their document
    frequencies, which know no n-gram beyond n = 4.
    """

    __name__ = "novelty"
    needs_training = True

    def __init__(
        self, training: Any, *, n: int = 4, cap: float = 1.0, copy: float = 0.0, tokenizer: str | None = None
    ) -> None:
        super().__init__(tokenizer, training)
        self.n = whole("novelty", "n", n, most=MAX_ORDER)
        self.cap, self.copy = real("novelty", "cap", cap), real("novelty", "copy", copy)
        if not 0 < cap <= 1 or not 0 <= copy < math.inf:
            raise ValueError(f"novelty: expected 0 < cap <= 1 and a finite copy >= 0, got cap={cap!r}, copy={copy!r}")
        if copy and isinstance(training, DocumentFrequencies):
            raise ValueError(
                "novelty: copy needs the training captions (one list of strings per picture); document frequencies "
                "cannot tell a copy. Leave copy at 0 or build the term from the captions"
            )
        self.df = frequencies("novelty", training, self.tokenizer)
        self._captions = {tuple(self._tokenize(text)) for refs in training for text in refs} if copy else set()
        self._longest = max(map(len, self._captions), default=0)

    @property
    def signature(self) -> str:
        return (
            f"novelty|n:{self.n}|cap:{self.cap:g}|copy:{self.copy:g}|df:{self.df.hash}|tok:{self.tokenizer}|version:1"
        )

    def _batch(self, words: list[list[str]], columns: dict[str, Any]) -> list[Scores]:
        flat = list(chain.from_iterable(words))
        ids = np.fromiter(map(self.df.ids.get, flat, repeat(len(self.df.ids))), np.int64, len(flat))
        tokens = lay_out(ids, np.fromiter(map(len, words), np.int64, len(words)))
        at = np.arange(len(tokens.words))
        new = np.ones(len(at))
        if len(at):
            *_, (known, _) = self.df._trie.descend(tokens, at, np.zeros(len(at), dtype=np.int64), 1, self.n)
            new[known] = 0.0
        out: list[Scores] = []
        start = 0
        for row in words:
            scores = np.zeros(len(row) + 1)
            grams = len(row) - self.n + 1
            if grams > 0:
                share = np.cumsum(new[start : start + grams]) / np.arange(1, grams + 1)
                scores[self.n :] = np.minimum(share, self.cap)
            if self.copy:
                for w in range(1, min(len(row), self._longest) + 1):
                    scores[w] -= self.copy * (tuple(row[:w]) in self._captions)
            out.append(scores)
            start += len(row)
        return out


class Richness(Term):
    """How many different content words, each at its worth, as a share of `target`; in [0, 1].

    min(1, sum over the distinct content words of v(w) / target). by "idf": v = 1 - log(df) / log(documents), 1 for a
    word of one training document, 0 for a word of all. by "distinct": v = 1. A word that the training captions never
    hold is worth nothing, so gibberish is not rich.
    """

    __name__ = "richness"
    needs_training = True

    def __init__(
        self, training: Any, *, by: str = "idf", target: float | None = None, tokenizer: str | None = None
    ) -> None:
        super().__init__(tokenizer, training)
        if by not in ("idf", "distinct"):
            raise ValueError(f"richness: by must be 'idf' or 'distinct', got {by!r}")
        self.by = by
        self.target = {"idf": 4.0, "distinct": 8.0}[by] if target is None else real("richness", "target", target)
        if not 0 < self.target < math.inf:
            raise ValueError(f"richness: target must be a finite number above 0, got {target!r}")
        self.df = frequencies("richness", training, self.tokenizer)
        counts = self.df.counts[1 : len(self.df.words) + 1]
        worth = 1 - np.log(counts) / math.log(self.df.documents) if by == "idf" else np.ones(len(counts))
        self._worth = dict(zip(self.df.words, worth.tolist(), strict=True))
        for word in FUNCTION_WORDS:
            self._worth.pop(word, None)

    @property
    def signature(self) -> str:
        return f"richness|by:{self.by}|target:{self.target:g}|df:{self.df.hash}|tok:{self.tokenizer}|version:1"

    def _scores(self, words: list[str], i: int, columns: dict[str, Any]) -> Scores:
        seen: set[str] = set()
        worth = [0.0]
        for word in words:
            worth.append(0.0 if word in seen else self._worth.get(word, 0.0))
            seen.add(word)
        return [min(1.0, total / self.target) for total in accumulate(worth)]
