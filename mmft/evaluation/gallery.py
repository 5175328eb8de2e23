"""Held-out pictures with their captions, as cards of a page: what changed in the words, and what each word earned."""

from __future__ import annotations

import base64
import difflib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from mmft.evaluation.captioning import metric_info
from mmft.evaluation.curves import is_number
from mmft.evaluation.groups import scores_of

SHOWN_FIRST, SHOWN_EXTREME = 12, 8  # pictures in the gallery: from the start, best gains, worst losses
PICTURE_SIDE = 320  # pixels
PICTURE_BYTES = 3_000_000  # of all pictures together, before base64 adds a third
TEXT_LENGTH = 500  # characters of a caption or reference
LEVELS = 4  # of credit that can be told apart, each way
_NOT_ON_CARDS = ("length", "bad_ending", "attribute_true", "attribute_total")  # the caption shows them itself
_SCORES = 12  # lines of a card's table


@dataclass
class Word:
    """A word of a caption; or several, where there is no credit to be told of each.

    Attributes:
        changed: it is not in the caption of the other side, there.
        level: what it earned, −`LEVELS` to `LEVELS`; 0 = next to nothing.
        earned: the same in words, empty where nobody knows.
        end: it stands for the end of the caption.
    """

    text: str
    changed: bool = False
    level: int = 0
    earned: str = ""
    end: bool = False


@dataclass
class Card:
    """One held-out picture. The captions are of the model before and after, or of several runs."""

    id: str
    picture: str | None
    references: list[str]
    captions: list[Caption]
    scores: list[tuple[str, list[str]]]  # label of a metric, its value for each caption


@dataclass
class Caption:
    """What one model said: a title, and a number of the run's colour where the page has colours for runs."""

    title: str
    words: list[Word]
    colour: int | None = None


def gallery(
    folder: Path, samples: list[dict[str, Any]], name: str | None, now: str = "after"
) -> list[tuple[str, list[Card]]]:
    """Titled groups of cards: biggest gains, worst losses, and the first ones, each picture once.

    A run may save fewer pictures than it scores; then only samples with a picture are shown.

    Args:
        name: the metric that gains and losses are measured in.
        now: what the newer captions are called.
    """
    samples = [s for s in samples if picture_path(folder, s.get("picture"))] or samples
    better = (metric_info(name).better or 1) if name else 1
    gains = []
    for i, sample in enumerate(samples):
        old, new = scores_of(sample, name) if name else (None, None)
        if is_number(old) and is_number(new) and new != old:
            gains.append((better * (new - old), i))
    gains.sort(key=lambda gain: (-gain[0], gain[1]))
    best = [i for gain, i in gains[:SHOWN_EXTREME] if gain > 0]
    worst = [i for gain, i in reversed(gains[-SHOWN_EXTREME:]) if gain < 0]
    used = {*best, *worst}
    first = [i for i in range(len(samples)) if i not in used][:SHOWN_FIRST]
    groups = [
        ("Biggest gains", best),
        ("Worst losses", worst),
        ("Not chosen: the first pictures of the set", first),
    ]
    scale = credit_scale([s.get(f"credit_{side}") for s in samples for side in ("before", "after")])
    budget = [PICTURE_BYTES]
    return [
        (title, [_card(folder, samples[i], budget, scale, name, now) for i in rows]) for title, rows in groups if rows
    ]


def is_credited(groups: Sequence[tuple[str, Sequence[Card]]]) -> bool:
    """Whether any caption says what its words earned."""
    return any(word.earned for _, cards in groups for card in cards for c in card.captions for word in c.words)


def _card(folder: Path, sample: Mapping[str, Any], budget: list[int], scale: float, name: str | None, now: str) -> Card:
    sides = [("before", "before", "after"), (now, "after", "before")]
    if sample.get("after") is None:
        sides = sides[:1]
    captions = [
        Caption(title, words_of(sample.get(side), sample.get(other), sample.get(f"credit_{side}"), scale, name))
        for title, side, other in sides
    ]
    return Card(
        id=clip(sample.get("id")),
        picture=data_uri(folder, sample.get("picture"), budget),
        references=[clip(r) for r in (sample.get("references") or [])[:8]],
        captions=captions,
        scores=card_scores([sample.get(f"scores_{side}") or {} for _, side, _ in sides]),
    )


def card_scores(sides: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The lines of a card's table: metrics first, then the reward and its parts."""
    names = [n for n in dict.fromkeys(n for side in sides for n in side) if n not in _NOT_ON_CARDS]
    names.sort(key=lambda n: n.startswith("reward"))
    lines = []
    for n in names[:_SCORES]:
        info = metric_info(n)
        label = f"reward: {info.label}" if "/" in n else info.label.split(",")[0]
        lines.append((label, [info.text(side[n] if is_number(side.get(n)) else None) for side in sides]))
    return lines


def words_of(text: Any, other: Any, credit: Any, scale: float, name: str | None) -> list[Word]:
    """A caption as words: which are not in the other caption, there, and what each earned.

    Args:
        credit: [word, number] of each word, as ``samples.jsonl`` has it, or None.
        scale: the credit that is shown in full strength.
        name: the metric of the credit.
    """
    text, other = clip(text), clip(other)
    mine, changed = text.split(), []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, other.split(), mine, autojunk=False).get_opcodes():
        changed += [kind != "equal" and bool(other)] * (end - start)
    numbers = _numbers(credit)
    if numbers is None:
        return _runs(mine, changed)
    label = metric_info(name).label if name else "score"
    words = [
        Word(word, new, _level(value, scale), f"{_signed(value)} {label}")
        for word, new, value in zip(mine, changed, numbers, strict=False)
    ]
    rest = numbers[len(mine) :]
    if rest and rest[0] and len(numbers) == len(mine) + 1:
        words.append(Word("", False, _level(rest[0], scale), f"{_signed(rest[0])} for ending here", True))
    return words


def _numbers(credit: Any) -> list[float] | None:
    """The numbers of [[word, number], …]; None where that is not what it is."""
    if not isinstance(credit, list) or not credit:
        return None
    if not all(isinstance(pair, list) and len(pair) == 2 and is_number(pair[1]) for pair in credit):
        return None
    return [float(value) for _, value in credit]


def credit_scale(credits: Sequence[Any]) -> float:
    """The size that nine of ten words stay below: the strongest colour begins there, whatever the metric's unit."""
    sizes = sorted(abs(value) for credit in credits for value in _numbers(credit) or ())
    return sizes[int(0.9 * (len(sizes) - 1))] if sizes else 0.0


def _level(value: float, scale: float) -> int:
    if scale <= 0:
        return 0
    return int(math.copysign(min(LEVELS, round(LEVELS * abs(value) / scale)), value))


def _signed(value: float) -> str:
    return f"{value:+z.2f}".replace("-", "−")


def _runs(words: Sequence[str], changed: Sequence[bool]) -> list[Word]:
    """Neighbours that are alike as one."""
    found: list[Word] = []
    for word, new in zip(words, changed, strict=True):
        if found and found[-1].changed == new:
            found[-1].text += f" {word}"
        else:
            found.append(Word(word, new))
    return found


def data_uri(folder: Path, name: Any, budget: list[int]) -> str | None:
    """A picture of the run folder as a small data URI; None when it is missing, unreadable or past the byte budget.

    Always encoded anew: whatever lies in the folder, only pixels get into the page.
    """
    path = picture_path(folder, name)
    if path is None:
        return None
    status = path.stat()
    encoded = _encoded(path, status.st_mtime_ns, status.st_size)
    if encoded is None or len(encoded) > budget[0]:
        return None
    budget[0] -= len(encoded)
    return f"data:image/webp;base64,{base64.b64encode(encoded).decode()}"


@lru_cache(maxsize=256)  # a run writes its report many times, mostly of the same pictures
def _encoded(path: Path, changed: int, size: int) -> bytes | None:
    """`path`, as it was when it had that time and size, as a small WebP."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82)
    return buffer.getvalue()


def picture_path(folder: Path, name: Any) -> Path | None:
    """Where a sample's picture lies; None for none, and for paths that lead out of the run folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_file() else None


def clip(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 1] + "…"
