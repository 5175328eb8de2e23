"""What each word of a caption added to its score, for people to look at."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

# pieces, references=, ended= -> what each piece of each text adds to its score (docs/rewards/dense_credit.md)
Increments = Callable[..., Sequence[Any]]
_ROUNDED = 6  # decimals, as the scores beside them
_WORDS = re.compile(r"\s*\S+")


def word_credit(
    increments: Increments, text: str, references: Sequence[str], score: float
) -> list[tuple[str, float]] | None:
    """[(word, what it added to the score), …]; the numbers sum to the score.

    The words are those between blanks. What no word earned (of a metric that counts an end token, the end) comes last,
    with an empty word. None where there is no reference to be compared with.

    Args:
        increments: of the metric that gave the score.
    """
    if not [reference for reference in references if reference]:
        return None
    pieces = _WORDS.findall(text)
    added = increments([pieces], references=[list(references)], ended=[False])[0] if pieces else ()
    found = [(piece.strip(), round(float(value), _ROUNDED)) for piece, value in zip(pieces, added, strict=True)]
    rest = round(score - sum(value for _, value in found), _ROUNDED - 2)
    return [*found, ("", rest)] if rest else found
