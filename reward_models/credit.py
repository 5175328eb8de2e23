"""From scores to tokens: which part of a response earned its score.

The increments of a reward are the score of the prefix up to a token minus the score of the prefix before it; their sum
is the score. As token rewards (`dense`) they replace the score on the last token. As potentials (`shaping`; Ng, Harada
and Russell 1999, section 3: F = gamma * phi(s') - phi(s)) they are added to it without moving the best policy.

That holds while phi depends on the prefix alone. A factor that knows how the response went on (the deviation of its
group or batch, a weight by a column such as `ended`) breaks it; the first is refused, the second cannot be seen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from reward_models.parts import RewardPart
from reward_models.returned import row_name

_TOLERANCE = 1e-6  # between the sum of increments and the score; far above rounding, far below a word


class PartScores(NamedTuple):
    """One part's scores on the way to its tokens, each (N,): weighted = weight * clip((raw - shift) * scale)."""

    raw: np.ndarray  # NaN = no opinion
    bad: np.ndarray  # was not finite
    shift: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    weighted: np.ndarray


class TokenScores(NamedTuple):
    """See the fields of the same names in `reward_models.rewards.RewardScores`."""

    last: np.ndarray
    dense: list[np.ndarray] | None
    potentials: list[np.ndarray] | None


def per_token(
    parts: Sequence[RewardPart],
    scores: Mapping[str, PartScores],
    pieces: Sequence[Sequence[str]],
    samples: Mapping[str, Any],
) -> TokenScores:
    """Spreads N scores over their T_i tokens.

    A dense part gives its increments times weight * scale, and to the last token what normalisation subtracts, so that
    its tokens sum to what it adds to the total. A shaping part gives potentials: the running sum of the same
    increments, without the constant. A response without tokens keeps its score in `last`.
    Raises ValueError for increments of a wrong shape or with another sum than the score, naming reward and row.
    """
    kinds = {part.credit for part in parts}
    lengths = np.array([len(row) for row in pieces], dtype=int)
    dense = [np.zeros(length) for length in lengths]
    potentials = [np.zeros(length) for length in lengths]
    last = np.zeros(len(lengths))
    for part in parts:
        score = scores[part.name]
        if part.credit != "dense":
            last += score.weighted
        if part.credit == "last":
            continue
        factor = np.where(np.isnan(score.raw), 0.0, score.weight * score.scale)
        rows = _increments(part, score, factor, pieces, samples)
        if part.credit == "shaping":
            for i, row in enumerate(rows):
                potentials[i] += factor[i] * np.cumsum(row)
            continue
        for i, row in enumerate(rows):
            if len(row):
                dense[i] += factor[i] * row
                dense[i][-1] -= factor[i] * score.shift[i]
            else:
                last[i] += score.weighted[i]
    return TokenScores(last, dense if "dense" in kinds else None, potentials if "shaping" in kinds else None)


def _increments(
    part: RewardPart,
    score: PartScores,
    factor: np.ndarray,
    pieces: Sequence[Sequence[str]],
    samples: Mapping[str, Any],
) -> list[np.ndarray]:
    """What each token adds to the raw score; zeros where the part adds nothing or had no finite score."""
    counts = (factor != 0) & ~score.bad
    if not counts.any():
        return [np.zeros(len(row)) for row in pieces]
    columns = {key: column for key, column in samples.items() if key not in ("prompts", "completions")}
    rows = part.function.increments(pieces, **columns)  # type: ignore[attr-defined]
    if len(rows) != len(pieces):
        raise ValueError(f"reward {part.name!r}: {len(rows)} rows of increments for {len(pieces)} completions")
    out = []
    for i, tokens in enumerate(pieces):
        row = np.asarray(rows[i], dtype=float) if counts[i] else np.zeros(len(tokens))
        raw, total = float(score.raw[i]), float(row.sum())
        wrong = ""
        if row.shape != (len(tokens),):
            wrong = f"increments of shape {row.shape}, expected ({len(tokens)},), one per token"
        elif counts[i] and len(tokens) and not abs(total - raw) <= _TOLERANCE * max(1.0, abs(raw)):
            wrong = f"increments sum to {total:g} but the score is {raw:g}; pieces must spell the completion"
        if wrong:
            raise ValueError(f"reward {part.name!r}, {row_name(samples, i)}: {wrong}")
        out.append(row)
    return out
