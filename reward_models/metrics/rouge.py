"""ROUGE-L (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3), as captioning uses it.

With L_j the length of the longest common subsequence of candidate c and reference s_j, in words:

    P = max_j L_j / |c|,   R = max_j L_j / |s_j|,   ROUGE-L = (1 + beta^2) P R / (R + beta^2 P),   beta = 1.2

The maxima are taken separately, so P and R may come from different references: that is what pycocoevalcap computes.

L is found for all rows at once, 64 words of a reference in one machine word (Hyyro 2004, "Bit-parallel LCS-length
computation revisited"): bit i of V is 0 where the subsequence grows at word i of the reference, and a candidate's word
with match mask M makes V = (V + (V & M)) | (V & ~M). After each word L is the number of zeros: prefixes come for free.
"""

from __future__ import annotations

import numpy as np

from reward_models.metrics.ngrams import Growing, Tokens
from reward_models.metrics.reference_metric import Level, ReferenceMetric, Slots
from reward_models.metrics.text import flag, real

_VERSION = 1
_BITS = 64


class RougeL(ReferenceMetric):
    """ROUGE-L as a reward in [0, 1]: `RougeL()(prompts=..., completions=..., references=...) -> list[float]`.

    beta: weight of recall against precision. eos: put an end token behind every reference and every candidate that
    ended (off by default: ROUGE is defined without). tokenizer: see `reward_models.metrics.text`. cache_size: pictures
    whose references are kept.
    """

    __name__ = "rouge_l"
    n = 1  # only words are looked up
    _scores_by_word = True

    def __init__(
        self, *, beta: float = 1.2, eos: bool = False, tokenizer: str = "simple", cache_size: int = 8192
    ) -> None:
        if not real("rouge_l", "beta", beta) > 0:
            raise ValueError(f"rouge_l: beta must be above 0, got {beta!r}")
        self.beta, self.eos, self.tokenizer = float(beta), flag("rouge_l", "eos", eos), tokenizer
        self._set_up(tokenizer, {}, cache_size)

    @property
    def signature(self) -> str:
        """Everything a score depends on, in one line: scores with equal signatures can be compared."""
        return (
            f"ROUGE-L|beta:{self.beta:g}|refs:max-p-max-r|eos:{'yes' if self.eos else 'no'}"
            f"|tok:{self.tokenizer}|version:{_VERSION}"
        )

    def _start(self) -> None:
        self._mask = Growing(np.uint64)  # per posting: bit i set where word i of the reference is this word (i < 64)
        self._long: dict[int, list[dict[int, int]]] = {}  # pictures with longer references: word -> mask, per reference

    def _keep(self, tokens: Tokens, columns: np.ndarray, levels: list[Level], roots: int) -> None:
        (level,) = levels
        places = tokens.places.take(level.at)
        short = places < _BITS
        masks = np.zeros(len(level.node), np.uint64)
        np.bitwise_or.at(masks, level.posting[short], np.uint64(1) << places[short].astype(np.uint64))
        self._mask.append(masks)

        picture_of_list = np.cumsum(columns == 0) - 1
        starts = np.cumsum(tokens.lengths) - tokens.lengths
        for new in np.unique(picture_of_list[tokens.lengths > _BITS]).tolist():
            references = []
            for i in np.flatnonzero(picture_of_list == new).tolist():
                mask: dict[int, int] = {}
                for place, word in enumerate(tokens.words[starts[i] : starts[i] + tokens.lengths[i]].tolist()):
                    mask[word] = mask.get(word, 0) | 1 << place
                references.append(mask)
            self._long[len(self._cache) + new] = references

    def _scores(self, tokens: Tokens, picture: np.ndarray) -> np.ndarray:
        slots = self._slots(picture)
        *_, common = self._subsequences(tokens, picture, slots)
        for row in self._long_rows(picture):
            common[: slots.size[row], row] = self._by_hand(tokens, picture, row)[-1]
        return self._combine(common, tokens.lengths, slots)

    def _paths(self, tokens: Tokens, picture: np.ndarray) -> np.ndarray:
        slots = self._slots(picture)
        common = np.stack(list(self._subsequences(tokens, picture, slots)))
        for row in self._long_rows(picture):
            common[: tokens.lengths[row] + 1, : slots.size[row], row] = self._by_hand(tokens, picture, row)
        return self._combine(common, np.arange(len(common))[:, None], slots)

    def _subsequences(self, tokens: Tokens, picture: np.ndarray, slots: Slots):
        """Yields for the first 0, 1, 2, ... words the LCS with each reference, (R, N) int64 (of its first 64 words)."""
        ((at, node),) = self._matches(tokens, picture)
        number, posting = self._postings(node)
        at = np.repeat(at, number)
        masks = np.zeros((int(tokens.lengths.max()), *slots.length.shape), np.uint64)
        slot = self._pool.column.data.take(posting) * len(picture) + tokens.rows.take(at)
        masks.reshape(-1)[tokens.places.take(at) * slots.length.size + slot] = self._mask.data.take(posting)
        v = np.full(slots.length.shape, ~np.uint64(0))
        yield np.zeros(v.shape, np.int64)
        for mask in masks:
            u = v & mask
            v = (v + u) | (v - u)  # u is part of v, so v - u takes its bits away; the sum may run over, as it should
            yield np.bitwise_count(~v).astype(np.int64)

    def _long_rows(self, picture: np.ndarray) -> list[int]:
        return [row for row, number in enumerate(picture.tolist()) if number in self._long] if self._long else []

    def _by_hand(self, tokens: Tokens, picture: np.ndarray, row: int) -> np.ndarray:
        """The same for one row with integers of any length: (1 + words, references)."""
        words = tokens.words[tokens.rows == row].tolist()
        out = []
        for masks in self._long[int(picture[row])]:
            all_ones = (1 << sum(mask.bit_count() for mask in masks.values())) - 1
            v, path = all_ones, [0]
            for word in words:
                u = v & masks.get(word, 0)
                v = ((v + u) | (v - u)) & all_ones
                path.append((v ^ all_ones).bit_count())
            out.append(path)
        return np.array(out).T

    def _combine(self, common: np.ndarray, lengths: np.ndarray, slots: Slots) -> np.ndarray:
        """Scores (..., N) from the LCS (..., R, N) and the candidates' lengths; 0 without a common word."""
        precision = common.max(-2) / np.maximum(lengths, 1)
        recall = (common / np.maximum(slots.length, 1)).max(-2)
        square = self.beta**2
        below = recall + square * precision
        return np.divide((1 + square) * precision * recall, below, out=np.zeros_like(below), where=below > 0)
