"""The pictures of an evaluation, from rows of a data set or from a COCO captions file, and who captions them."""

from __future__ import annotations

import mimetypes
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmft.data import Clips, Sounds, load_rows
from mmft.data.rows import Prompted, columns_of, opened_here
from mmft.evaluation.coco_files import image_ids, read_ground, read_predictions
from mmft.recipe import Recipe


@dataclass(frozen=True)
class Pictures:
    """N pictures with their references.

    Attributes:
        name: of the data, for people.
        ids: what COCO's files call them.
        own_ids: what their rows call them.
        references: human captions of each.
        rows: the rows, or None where only a file of references is there.
        extra: what that file says of each picture.
        others: ids and own ids of further pictures of the data, which are not evaluated.
    """

    name: str
    ids: list[Any]
    own_ids: list[str]
    references: list[list[str]]
    rows: Any = None
    extra: list[Mapping[str, Any]] = field(default_factory=list)
    others: tuple[Sequence[Any], Sequence[str]] = ((), ())

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Name -> a value for each picture. ValueError for a column that no picture has."""
        said = [self._said(i) for i in range(len(self.ids) if names else 0)]
        known = list(dict.fromkeys(key for row in said for key in row))
        for name in names:
            if name not in known:
                raise ValueError(f"no column {name!r} to slice by; the data have {', '.join(known) or 'none'}")
        return {name: [row.get(name) for row in said] for name in names}

    def _said(self, i: int) -> Mapping[str, Any]:
        if self.rows is None:
            return self.extra[i]
        return {key: value for key, value in _text(self.rows, i).items() if key != "prompt"} | columns_of(self.rows, i)

    @property
    def claims(self) -> Callable[[str, int], tuple[int, int]] | None:
        """What of a caption is true, in the built-in world."""
        rows = self.rows.rows if isinstance(self.rows, Prompted) else self.rows
        if not hasattr(rows, "scene"):
            return None
        from mmft.data.scenes import attribute_claims

        return lambda caption, i: attribute_claims(caption, rows.scene(i))

    def picture(self, i: int) -> Any:
        """The opened picture; of several the middle one; None for a sound."""
        row = self.rows[i]
        several = row.get("images") or []
        return row["image"] if row.get("image") is not None else several[len(several) // 2] if several else None

    def predictions(self, path: str | Path, allow_missing: bool) -> list[str | None]:
        """The captions of a file of predictions, in order; None for a picture that it leaves out."""
        return read_predictions(path, (self.ids, self.own_ids), self.others, allow_missing)

    def first(self, limit: int | None) -> Pictures:
        """The first so many; what is said of the others is no error."""
        return replace(
            self,
            ids=self.ids[:limit],
            own_ids=self.own_ids[:limit],
            references=self.references[:limit],
            others=((), ()) if limit is None else (self.ids[limit:], self.own_ids[limit:]),
        )


def from_file(path: str | Path) -> Pictures:
    """Pictures of a COCO captions file."""
    references, images = read_ground(path)
    ids = list(references)
    extra = [{key: value for key, value in images.get(name, {}).items() if key != "id"} for name in ids]
    return Pictures(Path(path).name, ids, ids, list(references.values()), extra=extra)


def from_folder(folder: str | Path, open_rows: Callable[[list[Path]], Any], limit: int | None = None) -> Pictures:
    """The pictures of a folder, without references.

    Args:
        open_rows: `Captioner.rows`.
    """
    root = Path(folder).expanduser()
    files = sorted(root.iterdir()) if root.is_dir() else []
    files = [file for file in files if (mimetypes.guess_type(file.name)[0] or "").startswith("image/")][:limit]
    if not files:
        raise ValueError(f"{folder} is no folder with pictures; expected files such as .jpg and .png in it")
    names = [file.name for file in files]
    return Pictures(str(folder), image_ids(names, [None] * len(names)), names, [[] for _ in names], open_rows(files))


def from_rows(rows: Any, name: str) -> Pictures:
    """Pictures of rows; ValueError for a row without references."""
    texts = [_text(rows, i) for i in range(len(rows))]
    own = [str(row.get("id", i)) for i, row in enumerate(texts)]
    for row, called in zip(texts, own, strict=True):
        if not isinstance(row.get("references"), list | tuple) or not any(row["references"]):
            raise ValueError(f"row {called}: no references; captions are scored against a column 'references' of lists")
    numbers = [columns_of(rows, i).get("image_id", row.get("image_id")) for i, row in enumerate(texts)]
    return Pictures(name, image_ids(own, numbers), own, [list(row["references"]) for row in texts], rows)


def first(rows: Any, limit: int | None) -> Any:
    """The first rows, of a list, of rows of ours, or of a ``datasets.Dataset``."""
    if limit is None or limit >= len(rows):
        return opened_here(rows)
    return opened_here(rows.select(range(limit)) if hasattr(rows, "select") else rows[:limit])


def rows_for(recipe: Recipe | None, name: str | None, split: str | None, limit: int | None) -> tuple[Any, str]:
    """The rows that are meant, and what to call them.

    Args:
        recipe: of the run that is evaluated; its data, its held-out split and as many rows as it evaluated on itself
            are what is meant where nothing else is said.
    """
    data = recipe.data if recipe is not None else None
    own = data is not None and name in (None, data.name)
    called = name or (data.name if data is not None else "scenes")
    part = split or (data.eval if data is not None and own else "test")
    if limit is None and recipe is not None and name is None and split is None:
        limit = recipe.eval.rows
    options: dict[str, Any] = {}
    if data is not None:
        options = {"clips": Clips(**data.video.model_dump()), "sounds": Sounds(**data.audio.model_dump())}
    if data is not None and own:
        # All files are looked at: a row that gave its place to another would be scored by wrong references.
        options |= {"prompt": data.prompt, "bad_rows": data.bad_rows, "decode": sys.maxsize}
    try:
        return load_rows(called, part, limit, **options), f"{called}, {part}"
    except ValueError as error:
        hint = "" if name or split else "; the run was trained on it: if it lies elsewhere now, name it with --data"
        raise ValueError(f"{error}{hint}") from error


def _text(rows: Any, i: int) -> Mapping[str, Any]:
    """A row without opening its picture, where the rows can."""
    return rows.text(i) if hasattr(rows, "text") else rows[i]
