"""What a preference head learns from: pairs (this text is better than that one) and ratings.

A picture is kept in the form in which it came and opened when it is looked at: a path, the bytes of a file, a PIL
image, or a function without arguments that gives a PIL image. `open_picture` opens any of them. Rows about the same
picture should share one object, so that whoever encodes pictures can do so once (`Pair.images[0]` is a usable key
for paths, bytes and functions; a PIL image is told apart by ``id``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models.metrics.text import completion_text

if TYPE_CHECKING:
    from PIL import Image

    Picture = str | Path | bytes | Image.Image | Callable[[], Image.Image]

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    """One judgement: for this prompt and these pictures, `chosen` is the better text.

    `margin` says by how much, in any unit (None: unknown). `kind` names what is wrong with the rejected text,
    where that is known; it is used in reports alone.
    """

    prompt: Prompt  # plain text, or chat messages up to the answer
    images: tuple[Picture, ...]
    chosen: str
    rejected: str
    margin: float | None = None
    kind: str = ""
    id: str = ""


@dataclass(frozen=True)
class Rating:
    """One text with a grade, in any unit."""

    prompt: Prompt
    images: tuple[Picture, ...]
    completion: str
    rating: float
    id: str = ""


def read_pairs(
    rows: Iterable[Mapping[str, Any]],
    prompt: str = "Describe the picture.",
    root: str | Path | None = None,
    source: str = "preferences",
) -> list[Pair | Rating]:
    """Pairs and ratings from dataset rows, whichever of these layouts each row has.

    - TRL's preference format: ``chosen`` and ``rejected``, plain or conversational, with ``prompt`` or with the
      prompt as their common start; ``image`` or ``images``. A plain row with a picture and without a prompt gets
      `prompt`, its texts being whole ("A boy runs" and "A boy sleeps" do not share the question "A boy").
    - RLHF-V: ``text``, JSON with ``question``, ``chosen`` and ``rejected``; ``image``. RLAIF-V: the same as columns.
    - Ratings: ``completion`` and ``rating``, with ``prompt`` and pictures as above.

    Optional columns: ``margin`` (a number; else, where ``chosen_ratings`` and ``rejected_ratings`` are there, the
    difference of their means), ``kind``, ``id`` (or ``idx``).

    Args:
        rows: dicts; a ``datasets.Dataset`` will do.
        prompt: for rows that have none.
        root: folder that picture paths start from and may not lead out of; None: the paths are the caller's own, and
            any picture file will do.
        source: name of the file or set, for errors.

    Raises:
        ValueError: naming the row, the key, what was expected and how to mend it.
    """
    folder = None if root is None else Path(root)
    found = [_read(_Row(row, f"{source}: row {i}", prompt, folder)) for i, row in enumerate(rows)]
    if not found:
        raise ValueError(f"{source}: no rows; expected at least one with 'chosen' and 'rejected'")
    return found


@dataclass(frozen=True)
class _Row:
    """A row being read, and what its errors say first."""

    data: Mapping[str, Any]
    where: str
    default_prompt: str
    root: Path | None

    def wrong(self, key: str, got: str, expected: str) -> ValueError:
        name = self.data.get("id", self.data.get("idx"))
        place = self.where if name in (None, "") else f"{self.where} (id {name!r})"
        return ValueError(f"{place}: {key}: {got}; expected {expected}")


def _read(row: _Row) -> Pair | Rating:
    data: Mapping[str, Any] = row.data
    if not isinstance(data, Mapping):
        raise ValueError(f"{row.where} is {type(data).__name__}; expected a dict of columns")
    if "chosen" not in data and isinstance(data.get("text"), str | Mapping):
        data = {**{k: v for k, v in data.items() if k != "text"}, **_rlhf_v(row)}
        row = replace(row, data=data)
    images = _images(row)
    name = str(next((data[key] for key in ("id", "idx") if data.get(key) not in (None, "")), ""))
    if data.get("rating") is not None:
        question = _prompt(row)
        completion = _answer(row, "completion")
        return Rating(question or row.default_prompt, images, completion, _number(row, "rating", data["rating"]), name)
    for key in ("chosen", "rejected"):
        if data.get(key) is None:
            kind = "'chosen' and 'rejected'; or 'completion' and 'rating'; or RLHF-V's 'text'"
            raise row.wrong(key, f"missing among the columns {', '.join(map(str, data)) or '(none)'}", f"{kind}")
    question, chosen, rejected = _texts(row, bool(images))
    if chosen == rejected:
        raise row.wrong("rejected", "the same text as chosen", "two different texts; take the row out")
    if not chosen.strip():
        raise row.wrong("chosen", "empty", "a text; only the rejected one may say nothing")
    return Pair(question, images, chosen, rejected, _margin(row), str(data.get("kind") or ""), name)


def _rlhf_v(row: _Row) -> dict[str, Any]:
    """Question, chosen and rejected of a ``text`` column."""
    text = row.data["text"]
    try:
        inner = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as error:
        raise row.wrong("text", f"not JSON ({error.msg} at character {error.pos})", f"JSON with {_RLHF_V}") from None
    if not isinstance(inner, Mapping) or not {"question", "chosen", "rejected"} <= set(inner):
        keys = ", ".join(inner) if isinstance(inner, Mapping) else type(inner).__name__
        raise row.wrong("text", f"JSON with {keys or 'nothing'}", f"JSON with {_RLHF_V}")
    return {"prompt": inner["question"], "chosen": inner["chosen"], "rejected": inner["rejected"]}


_RLHF_V = "question, chosen and rejected, as in RLHF-V"


def _texts(row: _Row, pictured: bool) -> tuple[Prompt, str, str]:
    """Prompt, chosen and rejected; a prompt that stands in both texts is taken out of them."""
    chosen, rejected, question = row.data["chosen"], row.data["rejected"], _prompt(row)
    plain = isinstance(chosen, str)
    if plain != isinstance(rejected, str):
        raise row.wrong("rejected", "one of chosen and rejected is text, the other is not", "the same form for both")
    if not plain:
        turns = [_messages(row, key) for key in ("chosen", "rejected")]
        shared = min(_common(*turns), *(len(t) - 1 for t in turns))  # each keeps an answer of its own
        start = turns[0][:shared]
        if question is None:
            question = start or row.default_prompt
        elif start and question != start and question != completion_text(start):
            raise row.wrong("prompt", "not what chosen and rejected begin with", "the same messages, or none in them")
        one, two = (_last(row, key, t[shared:]) for key, t in zip(("chosen", "rejected"), turns))
        return question, one, two
    if question is not None or pictured:
        return (row.default_prompt if question is None else question), chosen, rejected
    shared = _common(chosen, rejected)
    while shared and not chosen[shared - 1].isspace():  # whole words
        shared -= 1
    start = chosen[:shared]
    return (
        (start.rstrip(), chosen[shared:], rejected[shared:])
        if start.strip()
        else (row.default_prompt, chosen, rejected)
    )


def _common(one: Sequence[Any], two: Sequence[Any]) -> int:
    """Length of the common start."""
    return next((k for k, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))


def _prompt(row: _Row) -> Prompt | None:
    """The prompt column (``question`` in RLAIF-V); None without one."""
    key = next((key for key in ("prompt", "question") if row.data.get(key) is not None), None)
    if key is None:
        return None
    value = row.data[key]
    return value if isinstance(value, str) else _messages(row, key)


def _messages(row: _Row, key: str) -> list[dict[str, Any]]:
    value = row.data[key]
    good = isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 0
    if not good or not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value):
        shape = f"a list of {len(value)}" if isinstance(value, list | tuple) else type(value).__name__
        raise row.wrong(key, shape, "text, or a list of chat messages with 'role' and 'content'")
    return [{"role": m["role"], "content": _content(m["content"])} for m in value]


def _content(content: Any) -> Any:
    """A message's content without the empty keys that Arrow adds to parts (``{"type": "image", "text": None}``)."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return content
    return [{k: v for k, v in part.items() if v is not None} for part in content]


def _answer(row: _Row, key: str) -> str:
    value = row.data.get(key)
    if value is None:
        raise row.wrong(key, "missing", "the text that was rated")
    return value if isinstance(value, str) else _last(row, key, _messages(row, key))


def _last(row: _Row, key: str, turns: list[dict[str, Any]]) -> str:
    """The text of one answer."""
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        roles = ", ".join(str(m["role"]) for m in turns)
        raise row.wrong(key, f"messages of {roles}", "one assistant message after what chosen and rejected share")
    try:
        return completion_text(turns)
    except (TypeError, KeyError, AttributeError) as error:
        raise row.wrong(key, f"a message that cannot be read ({error})", "text, or parts of type text") from None


def _margin(row: _Row) -> float | None:
    if row.data.get("margin") is not None:
        return _number(row, "margin", row.data["margin"])
    sides = [row.data.get(f"{side}_ratings") for side in ("chosen", "rejected")]
    if any(side is None for side in sides):
        return None
    means = []
    for key, side in zip(("chosen_ratings", "rejected_ratings"), sides):
        values = side if isinstance(side, Sequence) and not isinstance(side, str) else [side]
        if not values:
            raise row.wrong(key, "an empty list", "numbers, or no such column")
        means.append(sum(_number(row, key, value) for value in values) / len(values))
    if means[0] < means[1]:
        raise row.wrong("chosen_ratings", f"mean {means[0]:g}, below the rejected text's {means[1]:g}", "a higher one")
    return means[0] - means[1]


def _number(row: _Row, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise row.wrong(key, f"got {value!r}", "a finite number")
    return float(value)


def _images(row: _Row) -> tuple[Picture, ...]:
    keys = [key for key in ("image", "images") if row.data.get(key) is not None]
    if len(keys) == 2:
        raise row.wrong("image", "both 'image' and 'images' are there", "one of the two columns")
    if not keys:
        return ()
    value = row.data[keys[0]]
    many = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return tuple(_picture(row, keys[0], one) for one in (value if many else [value]))


def _picture(row: _Row, key: str, value: Any) -> Picture:
    """A PIL image, a function, bytes, a path, or what the Hub stores: {"bytes": ..., "path": ...}."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str | Path):
        path = Path(value) if row.root is None else row.root / value
        if "\0" in str(value) or row.root is not None and not path.resolve().is_relative_to(row.root.resolve()):
            raise row.wrong(key, f"{value} lies outside of {row.root}", "a path below the folder of pictures")
        if not path.is_file():
            raise row.wrong(key, f"there is no file {path}", "a path below the folder of pictures, or its bytes")
        return path
    if isinstance(value, bytes) or callable(value) or hasattr(value, "convert"):
        return value
    kinds = 'a path, the bytes of a picture, {"bytes", "path"}, or a PIL image'
    raise row.wrong(key, f"got {type(value).__name__}", kinds)


def open_picture(picture: Picture) -> Image.Image:
    """The picture as an RGB PIL image, upright. Raises ValueError for what `picture_files` refuses."""
    from reward_models.picture_files import as_rgb, open_picture_file

    if callable(picture):
        picture = picture()
    if isinstance(picture, str | Path | bytes):
        return open_picture_file(picture, "a picture" if isinstance(picture, bytes) else f"picture {picture}")
    return as_rgb(picture, "a picture")
