"""Where rows come from: the built-in world, a data card (YAML), or a plain folder of pictures with captions.

Three layouts of captions are read, told apart by the file itself: a CSV or TSV with one caption per line, COCO
captions JSON (``images`` and ``annotations``), and Karpathy's JSON (``images`` with ``sentences`` and ``split``).
Captions are grouped per picture; whatever does not fit together is an error and nothing is dropped.

Left out: data sets on the Hub (pass a ``datasets.Dataset`` to the trainer instead), and further CSV columns.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmft.data.rows import PictureRows, Prompted, Rows, check_rows, listed, refuse_outward
from mmft.recipe_yaml import describe, load_document

PROMPT = "Describe the picture."
BUNDLED = ("scenes",)
CARDS = Path(__file__).resolve().parents[2] / "data"  # the cards of a checkout
DATA_DIR = "MMFT_DATA_DIR"
_SAME_SPLIT = {"validation": "val", "val": "validation"}
_T = TypeVar("_T")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Columns(_Part):
    """Names of the CSV columns that are read."""

    image: str = Field("image", min_length=1)
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
    images: str = "images"
    captions: str | None = "captions.csv"
    columns: Columns = Columns()
    splits: dict[str, Split] = {}
    prompt: str | None = Field(None, min_length=1)  # null = "Describe the picture."
    licence: str = ""
    source: str = ""
    citation: str = ""


@dataclass
class _Captions:
    """One captions file: picture (path below the images folder) -> captions, and -> its own split, if it has one."""

    path: Path
    texts: dict[str, list[str]] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)


def load_rows(name: str, split: str, limit: int | None = None, prompt: str | None = None) -> Rows:
    """Rows of one split.

    Args:
        name: "scenes"; a card (path of a YAML file, or its stem, looked up in ``data/`` here and in the checkout);
            or a folder with ``images/`` and ``captions.csv`` (or COCO or Karpathy JSON), and ``train.txt`` etc. or,
            without any such list, split 80/10/10 by a hash of each picture's name.
        split: a split of that data set.
        limit: the first so many rows only.
        prompt: replaces every row's prompt.

    Raises:
        ValueError: naming the file, line, row or column that is missing or wrong, before any training. Every
            picture of the split is looked at: see `check_rows`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit of rows is {limit}; expected at least 1, or none")
    if name in BUNDLED:
        return _prompted(_drawn(name, split, limit), prompt)
    card, root, called = _find(name)
    if card.drawn is not None:
        return _prompted(_drawn(card.drawn, split, limit), prompt or card.prompt)
    rows = _card_rows(card, root, called, split, limit)
    check_rows(rows, decode=0)
    return _prompted(rows, prompt)


def _drawn(name: str, split: str, limit: int | None) -> Rows:
    assert name == "scenes"
    from mmft.data.scenes import scene_rows  # photos do not need the world

    return scene_rows(split, limit)


def _prompted(rows: Rows, prompt: str | None) -> Rows:
    return rows if prompt is None else Prompted(rows, prompt)


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
    given = Path(name).expanduser()
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
    root = path.parent / Path(card.root).expanduser()
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
    images = "images" if (folder / "images").is_dir() else "."
    return Card(name=folder.name or "folder", root=str(folder), images=images, captions=captions, splits=splits)


def _card_rows(card: Card, root: Path, called: str, split: str, limit: int | None) -> PictureRows:
    chosen: Split | None = None
    if card.splits:
        chosen = _pick(card.splits, split, called)
    images = root / ((chosen and chosen.images) or card.images)
    if not images.is_dir():
        raise ValueError(f"{called}: there is no folder of pictures {images}; expected it there, or change 'images'")
    file = (chosen and chosen.captions) or card.captions
    if file is None:
        raise ValueError(f"{called}: split {split!r} has no captions file; give 'captions' for it or for the card")
    captions = _read_captions(root / file, card.columns)
    names = _names(captions, card, chosen, root, split, called)
    without = [f"{name} ({captions.path})" for name in names if not captions.texts.get(name)]
    if without:
        raise ValueError(listed(f"{called}: {len(without)} pictures of split {split!r} have no captions", without))
    records = [
        {"id": name, "prompt": card.prompt or PROMPT, "picture": name, "references": captions.texts[name]}
        for name in names[:limit]
    ]
    if not records:
        raise ValueError(f"{called}: split {split!r} is empty; expected at least one picture")
    return PictureRows(records, images)


def _pick(splits: dict[str, _T], split: str, called: str) -> _T:
    if split not in splits:
        split = _SAME_SPLIT.get(split, split)
    if split not in splits:
        raise ValueError(f"{called}: no split {split!r}; choose one of: {', '.join(splits)}")
    return splits[split]


def _names(captions: _Captions, card: Card, chosen: Split | None, root: Path, split: str, called: str) -> list[str]:
    """The pictures of a split, in the order of its list or else of the captions file."""
    if chosen is not None and chosen.list is not None:
        return _read_list(root / chosen.list)
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
        tenth = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
        hashed["test" if tenth == 0 else "validation" if tenth == 1 else "train"].append(name)
    return _pick(hashed, split, called)


# --- files of captions -----------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; expected a file of captions or names") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _read_list(path: Path) -> list[str]:
    names: dict[str, int] = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        name = line.strip()
        if not name:
            continue
        refuse_outward(name, f"{path}:{number}")
        if name in names:
            raise ValueError(f"{path}:{number}: {name} is listed twice (first on line {names[name]})")
        names[name] = number
    return list(names)


def _read_captions(path: Path, columns: Columns) -> _Captions:
    if path.suffix.lower() == ".json":
        return _read_json(path)
    return _read_csv(path, columns)


def _add(captions: _Captions, name: Any, text: Any, where: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: no picture name; expected one per caption")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: the caption of {name} is empty; expected words, or take it out")
    if name not in captions.texts:
        refuse_outward(name, where)
    captions.texts.setdefault(name, []).append(text.strip())


def _read_csv(path: Path, columns: Columns) -> _Captions:
    captions = _Captions(path)
    # Strict: an open quote would otherwise swallow the lines after it. StringIO: str.splitlines would also break
    # captions at odd separators such as U+2028.
    lines = io.StringIO(_read_text(path), newline="")
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        for wanted in (columns.image, columns.caption):
            if wanted not in header:
                found = ", ".join(header) or "nothing (the file is empty)"
                raise ValueError(f"{path}:1: no column {wanted!r}; found {found}")
        image, caption = header.index(columns.image), header.index(columns.caption)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}:{reader.line_num}: got {len(cells)} columns, expected {len(header)} as in the header "
                    "(put quotes around a caption that holds a comma)"
                )
            _add(captions, cells[image].strip(), cells[caption], f"{path}:{reader.line_num}")
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None
    return captions


def _read_json(path: Path) -> _Captions:
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; expected COCO or Karpathy captions") from None
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list):
        raise ValueError(f"{path}: no list 'images'; expected COCO or Karpathy captions")
    if isinstance(data.get("annotations"), list):
        return _read_coco(path, images, data["annotations"])
    return _read_karpathy(path, images)


def _get(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{where}: no {key!r}; found {found}")
    return entry[key]


def _read_coco(path: Path, images: list[Any], annotations: list[Any]) -> _Captions:
    captions = _Captions(path)
    names: dict[Any, str] = {}
    for index, entry in enumerate(images):
        where = f"{path}: images[{index}]"
        number, name = _get(entry, "id", where), _get(entry, "file_name", where)
        if not isinstance(number, int | str) or number in names:
            raise ValueError(f"{where}: the id {number!r} is no number or was given before; expected one of its own")
        if not isinstance(name, str) or name in captions.texts:
            raise ValueError(f"{where}: the file_name {name!r} is no text or was given before")
        refuse_outward(name, where)
        names[number] = name
        captions.texts[name] = []
    for index, entry in enumerate(annotations):
        where = f"{path}: annotations[{index}]"
        number, text = _get(entry, "image_id", where), _get(entry, "caption", where)
        if not isinstance(number, int | str) or number not in names:
            raise ValueError(f"{where}: image_id {number!r} is not among the images of the file")
        _add(captions, names[number], text, where)
    return captions


def _read_karpathy(path: Path, images: list[Any]) -> _Captions:
    captions = _Captions(path)
    for index, entry in enumerate(images):
        where = f"{path}: images[{index}]"
        name, sentences = _get(entry, "filename", where), _get(entry, "sentences", where)
        if isinstance(entry.get("filepath"), str) and entry["filepath"]:
            name = f"{entry['filepath']}/{name}"  # COCO's pictures lie in two folders
        if name in captions.texts:
            raise ValueError(f"{where}: {name} was given before; expected each picture once")
        if not isinstance(sentences, list) or not sentences:
            raise ValueError(f"{where}: {name} has no sentences; expected a list with at least one")
        for sentence in sentences:
            _add(captions, name, _get(sentence, "raw", where), where)
        captions.parts[name] = str(_get(entry, "split", where))
    return captions
