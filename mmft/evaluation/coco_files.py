"""Predictions and references in COCO's files: what the official evaluation server and `pycocoevalcap` read.

Predictions: ``[{"image_id": 42, "caption": "..."}]``, one entry for each picture.
References: ``{"images": [{"id": 42}], "annotations": [{"image_id": 42, "id": 0, "caption": "..."}]}``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_models.metrics.coco import read_references, read_results

_NAMED = re.compile(r"(?:.*/)?(?:COCO_\w+_)?(\d{12})\.\w+")  # COCO's own file names end in the picture's number


def image_ids(ids: Sequence[Any], numbers: Sequence[Any]) -> list[Any]:
    """What the pictures are called in COCO's files: whole numbers where the data have them, else the ids as they are.

    Args:
        ids: of the rows.
        numbers: the column ``image_id`` of the rows; None where a row has none.

    Raises:
        ValueError: two pictures would have the same.
    """
    named = [_NAMED.fullmatch(str(name)) for name in ids]
    if all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        out = list(numbers)
    elif all(re.fullmatch("0|[1-9][0-9]{0,17}", str(name)) for name in ids):
        out = [int(name) for name in ids]
    elif all(named):
        out = [int(match[1]) for match in named if match]
    else:
        out = [str(name) for name in ids]
    twice = [name for name, times in Counter(out).items() if times > 1]
    if twice:
        raise ValueError(f"{len(twice)} pictures occur more than once, first: {twice[0]!r}; expected one row for each")
    return out


def read_ground(path: str | Path) -> tuple[dict[Any, list[str]], dict[Any, dict[str, Any]]]:
    """A references file: picture id -> captions, and picture id -> what else ``images`` says of it."""
    references = read_references(str(path))
    listed = json.loads(Path(path).read_text(encoding="utf-8-sig")).get("images") or []
    return references, {image["id"]: image for image in listed if isinstance(image, dict)}


def read_predictions(
    path: str | Path,
    pictures: Sequence[Sequence[Any]],
    others: Sequence[Sequence[Any]] = ((),),
    allow_missing: bool = False,
) -> list[str | None]:
    """The caption of each picture, in their order; None for one that is missing.

    Args:
        pictures: (N,) what the pictures are called, once for each way in which they may be.
        others: in the same ways, pictures of the same data that are not asked for; the file may speak of them.
        allow_missing: pictures without a caption are no error.

    Raises:
        ValueError: no such file, no list of captions, ids that are unknown, missing or there twice.
    """
    first: ValueError | None = None
    for names, rest in zip(pictures, [*others, *[()] * len(pictures)], strict=False):
        try:
            found = read_results(str(path), {name: [] for name in (*names, *rest)}, allow_missing=True)
        except ValueError as error:
            first = first or error
            continue
        missing = [name for name in names if name not in found]
        if len(missing) == len(names):
            raise ValueError(f"{path}: none of the {len(names)} pictures has a caption here")
        if missing and not allow_missing:
            raise ValueError(
                f"{path}: {len(missing)} of {len(names)} pictures have no caption, first: "
                f"{', '.join(map(repr, missing[:5]))}; --allow-missing scores the others"
            )
        return [found.get(name) for name in names]
    assert first is not None
    raise first


def write_predictions(path: Path, ids: Sequence[Any], captions: Sequence[str]) -> None:
    _write(path, [{"image_id": name, "caption": text} for name, text in zip(ids, captions, strict=True)])


def write_references(path: Path, ids: Sequence[Any], references: Sequence[Sequence[str]]) -> None:
    """The references in the same order, so that the official code can be run on both files."""
    pairs = [(name, text) for name, texts in zip(ids, references, strict=True) for text in texts]
    annotations = [{"image_id": name, "id": i, "caption": text} for i, (name, text) in enumerate(pairs)]
    # loadRes of pycocotools wants the keys info and licenses as well
    whole = {"info": {}, "licenses": [], "type": "captions", "images": [{"id": name} for name in ids]}
    _write(path, whole | {"annotations": annotations})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
