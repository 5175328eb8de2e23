"""Where rows come from: the built-in world, a data card (YAML), or a plain folder of files with captions.

The files are pictures, clips or sounds. Whatever does not fit together is an error; nothing is dropped unasked.

Left out: data sets on the Hub (pass a ``datasets.Dataset`` to the trainer instead).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmft.data.audio import Sounds
from mmft.data.captions import Captions, read_captions, read_list
from mmft.data.rows import PICTURES, FileRows, Prompted, Reader, Rows, UsableRows, check_rows, listed
from mmft.data.video import Clips
from mmft.recipe.messages import describe
from mmft.recipe.strict_yaml import load_document

PROMPTS = {"image": "Describe the picture.", "video": "Describe the clip.", "audio": "Describe the sound."}
Media = Literal["image", "video", "audio"]
BUNDLED = ("scenes",)
CARDS = Path(__file__).resolve().parents[2] / "data"  # the cards of a checkout
DATA_DIR = "MMFT_DATA_DIR"
FOLDERS: dict[Media, str] = {"image": "images", "video": "videos", "audio": "sounds"}
_SAME_SPLIT = {"validation": "val", "val": "validation"}
_T = TypeVar("_T")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Columns(_Part):
    """Names of the CSV columns that are read."""

    image: str | None = Field(None, min_length=1)  # the file; null = image, video or audio, as the card's media
    caption: str = Field("caption", min_length=1)


class Split(_Part):
    """One split. A plain text ending in .txt means ``list``, another one ``part``."""

    list: str | None = None  # a text file with one picture name per line
    part: str | None = None  # the splits of a Karpathy file, joined by +: train+restval
    captions: str | None = None  # a captions file of its own
    images: str | None = None  # a folder of its own

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"list" if value.endswith(".txt") else "part": value}
        return value


class Card(_Part):
    """A data set: where its files are and how they are to be read. Paths are relative to ``root``."""

    name: str = Field(min_length=1)
    title: str = ""
    drawn: Literal["scenes"] | None = None  # made by the program; such a card needs no files
    root: str | None = Field(None, min_length=1)  # relative to the card's own folder
    media: Media = "image"
    images: str | None = Field(None, min_length=1)  # folder of the files; null = images, videos or sounds
    captions: str | None = "captions.csv"
    columns: Columns = Columns()
    splits: dict[str, Split] = {}
    prompt: str | None = Field(None, min_length=1)  # null = "Describe the picture." (the clip, the sound)
    licence: str = ""
    source: str = ""
    citation: str = ""

    @property
    def folder(self) -> str:
        return self.images or FOLDERS[self.media]


def load_rows(
    name: str,
    split: str,
    limit: int | None = None,
    prompt: str | None = None,
    clips: Clips | None = None,
    sounds: Sounds | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    decode: int | None = None,
) -> Rows:
    """Rows of one split.

    Args:
        name: "scenes"; a card (path of a YAML file, or its stem, looked up in ``data/`` here and in the checkout);
            or a folder with ``images/`` (or ``videos/``, ``sounds/``) and ``captions.csv`` (or one of the JSON
            layouts of `mmft.data.captions`), and ``train.txt`` etc. or, without any such list, split 80/10/10 by a
            hash of each file's name.
        split: a split of that data set.
        limit: the first so many rows only.
        prompt: replaces every row's prompt.
        clips, sounds: how the files of a data set of clips or sounds are read.
        bad_rows: whether files that cannot be used are an error, or their rows left out (`UsableRows`).
        decode: with "skip", how many files are decoded to find that out; None = as `check_rows` does.

    Raises:
        ValueError: naming the file, line, row or column that is missing or wrong, before any training. Every
            file of the split is looked at: see `check_rows`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit of rows is {limit}; expected at least 1, or none")
    rows = _rows(name, split, limit, prompt, clips, sounds, bad_rows, decode)
    rows.origin = name, split  # by which a run in Python can say what it was trained on
    return rows


def _rows(name, split, limit, prompt, clips, sounds, bad_rows, decode) -> Any:
    if name in BUNDLED:
        return _prompted(_drawn(name, split, limit), prompt)
    card, root, called = _find(name)
    if card.drawn is not None:
        return _prompted(_drawn(card.drawn, split, limit), prompt or card.prompt)
    reader = {"image": PICTURES, "video": (clips or Clips()).reader, "audio": (sounds or Sounds()).reader}[card.media]
    rows = _prompted(_card_rows(card, root, called, split, limit, reader), prompt)
    if bad_rows == "skip":
        return UsableRows(rows, decode)
    check_rows(rows, decode=0)
    return rows


def _drawn(name: str, split: str, limit: int | None) -> Rows:
    assert name == "scenes"
    from mmft.data.scenes import scene_rows  # photos do not need the world

    return scene_rows(split, limit)


def _prompted(rows: Rows, prompt: str | None) -> Rows:
    return rows if prompt is None else Prompted(rows, prompt)


def card_of(name: str) -> Card | None:
    """The card of a data set; None for the built-in world, and where there is none or a wrong one."""
    try:
        return None if name in BUNDLED else _find(name)[0]
    except ValueError:
        return None


def load_card(path: str | Path) -> Card:
    """Reads a card. Raises RecipeError (a ValueError) with every problem of the file and its line."""
    document = load_document(path)
    card = None
    try:
        card = Card.model_validate(document.data)
    except ValidationError as error:
        describe(Card, document, error)
    if card is not None and card.root is None and card.drawn is None:
        document.problem(("root",), "missing, expected the folder of the data set")
    document.raise_if_any()
    assert card is not None
    return card


def _find(name: str) -> tuple[Card, Path, str]:
    """The card for a name, its root folder, and what to call it in messages."""
    given = Path(os.path.expanduser(name or "?"))  # Path's raises for a user that is not there
    if given.is_dir():
        return _folder_card(given), given, str(given)
    places = [given, Path("data") / f"{name}.yaml", CARDS / f"{name}.yaml", CARDS.parent / name, CARDS / name]
    for path in places:
        if path.suffix in (".yaml", ".yml") and path.is_file():
            card = load_card(path)
            return card, _root(card, path), str(path)
    cards = sorted({path.stem for folder in (Path("data"), CARDS) for path in folder.glob("*.yaml")})
    looked = ", ".join(dict.fromkeys(str(path.parent) for path in places))
    raise ValueError(
        f"data set {name!r} was not found (looked in {looked}); expected a bundled name ({', '.join(BUNDLED)}), "
        f"a card ({', '.join(cards) or 'none here'}), the path of a card, or a folder of pictures"
    )


def _root(card: Card, path: Path) -> Path:
    if card.root is None:
        return path.parent
    elsewhere = os.environ.get(DATA_DIR)
    if elsewhere and (Path(elsewhere) / card.name).is_dir():
        return Path(elsewhere) / card.name
    root = path.parent / os.path.expanduser(card.root)
    if not root.is_dir():
        tried = f" nor {Path(elsewhere) / card.name} ({DATA_DIR})" if elsewhere else ""
        raise ValueError(
            f"{path}: root: there is no folder {root}{tried}; put the data set there, change root, or set {DATA_DIR} "
            f"to a folder that holds {card.name}/"
        )
    return root


def _folder_card(folder: Path) -> Card:
    """A plain folder described as a card."""
    names = ["captions.csv", "captions.tsv", "captions.json"]
    names += sorted(path.name for path in folder.glob("dataset*.json"))
    captions = next((name for name in names if (folder / name).is_file()), None)
    if captions is None:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise ValueError(f"{folder}: no captions file; expected one of {', '.join(names)}; found {found}")
    lists = {path.stem: Split(list=path.name) for path in sorted(folder.glob("*.txt"))}
    known: tuple[str, ...] = ("train", "val", "validation", "test")
    splits = {name: lists[name] for name in known if name in lists}
    media = next((kind for kind, below in FOLDERS.items() if (folder / below).is_dir()), None)
    return Card(
        name=folder.name or "folder",
        root=str(folder),
        media=media or "image",
        images=FOLDERS[media] if media else ".",
        captions=captions,
        splits=splits,
    )


def _card_rows(card: Card, root: Path, called: str, split: str, limit: int | None, reader: Reader) -> FileRows:
    chosen: Split | None = None
    if card.splits:
        chosen = _pick(card.splits, split, called)
    images = root / ((chosen and chosen.images) or card.folder)
    if not images.is_dir():
        raise ValueError(
            f"{called}: there is no folder of {FOLDERS[card.media].replace('images', 'pictures')} {images}; expected "
            "it there, or change 'images'"
        )
    file = (chosen and chosen.captions) or card.captions
    if file is None:
        raise ValueError(f"{called}: split {split!r} has no captions file; give 'captions' for it or for the card")
    captions = read_captions(root / file, card.columns.image or card.media, card.columns.caption)
    names = _names(captions, card, chosen, root, split, called)
    without = [f"{name} ({captions.path})" for name in names if not captions.texts.get(name)]
    if without:
        raise ValueError(listed(f"{called}: {len(without)} pictures of split {split!r} have no captions", without))
    prompt = card.prompt or PROMPTS[card.media]
    records = [
        {"id": name, "prompt": prompt, "picture": name, "references": captions.texts[name]}
        | ({"columns": captions.columns[name]} if name in captions.columns else {})
        for name in names[:limit]
    ]
    if not records:
        raise ValueError(f"{called}: split {split!r} is empty; expected at least one picture")
    return FileRows(records, images, reader)


def _pick(splits: dict[str, _T], split: str, called: str) -> _T:
    if split not in splits:
        split = _SAME_SPLIT.get(split, split)
    if split not in splits:
        raise ValueError(f"{called}: no split {split!r}; choose one of: {', '.join(splits)}")
    return splits[split]


def _names(captions: Captions, card: Card, chosen: Split | None, root: Path, split: str, called: str) -> list[str]:
    """The pictures of a split, in the order of its list or else of the captions file."""
    if chosen is not None and chosen.list is not None:
        return read_list(root / chosen.list)
    if chosen is not None and chosen.part is None:
        return list(captions.texts)  # a captions file of its own
    if captions.parts:
        own: dict[str, list[str]] = {}
        for name, part in captions.parts.items():
            own.setdefault(part, []).append(name)
        wanted = chosen.part.split("+") if chosen is not None and chosen.part else [split]
        return [name for part in wanted for name in _pick(own, part.strip(), str(captions.path))]
    if chosen is not None:
        raise ValueError(
            f"{called}: splits.{split}: {captions.path} names no splits of its own; expected the name of a .txt "
            f"file with one picture per line, not {chosen.part!r}"
        )
    hashed: dict[str, list[str]] = {"train": [], "validation": [], "test": [], "all": list(captions.texts)}
    for name in captions.texts:
        # By name, so that pictures which are added later move no other picture between the splits.
        tenth = _hashed(name) % 10
        hashed["test" if tenth == 0 else "validation" if tenth == 1 else "train"].append(name)
    for empty in ("test", "validation"):  # of a small folder: it gets one picture nevertheless
        if not hashed[empty] and len(hashed["train"]) > 1:
            hashed[empty] = [min(hashed["train"], key=_hashed)]
            hashed["train"].remove(hashed[empty][0])
    return _pick(hashed, split, called)


def _hashed(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)
