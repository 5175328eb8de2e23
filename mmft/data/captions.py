"""Files of captions. Four layouts are read, told apart by the file itself.

A CSV or TSV with one caption per line; COCO's JSON (``images`` and ``annotations``); Karpathy's (``images`` with
``sentences`` and ``split``); MSR-VTT's (``videos`` and ``sentences``). Captions are grouped per file they describe.

Left out: further CSV columns.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmft.data.rows import listed
from reward_models.picture_files import refuse_outward


@dataclass
class Captions:
    """One captions file: name (path below the folder of files) -> captions, and -> its own split, if it has one.

    columns: name -> whatever else the file says of it; ``image_id`` is COCO's number of the picture. Of several lines
    of a CSV the first one counts.
    """

    path: Path
    texts: dict[str, list[str]] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)  # while it is read: all are told at once


def _read_text(path: Path) -> str:
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe is waited for, a device read for ever
        raise ValueError(f"{path} is a special file; expected a file of captions or names")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; expected a file of captions or names") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def read_list(path: Path) -> list[str]:
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


def read_captions(path: Path, file: str, caption: str) -> Captions:
    """Reads a captions file; ``file`` and ``caption`` are the columns of a CSV.

    Raises:
        ValueError: names file and place; of several mistakes the first ten, and how many there are.
    """
    captions = Captions(path)
    try:
        if path.suffix.lower() == ".json":
            _read_json(captions)
        else:
            _read_csv(captions, file, caption)
    except ValueError as error:  # nothing after it can be read
        captions.mistakes.append(str(error))
    found = list(dict.fromkeys(captions.mistakes))  # a name that several captions share is refused with each
    if found:
        raise ValueError(found[0] if len(found) == 1 else listed(f"{path}: {len(found)} mistakes", found))
    return captions


def _add(captions: Captions, name: Any, text: Any, where: str) -> None:
    if not isinstance(name, str) or not name.strip():
        captions.mistakes.append(f"{where}: no picture name; expected one per caption")
        return
    if name not in captions.texts:
        try:
            refuse_outward(name, where)
        except ValueError as error:
            captions.mistakes.append(str(error))
            return
    if not isinstance(text, str) or not text.strip():
        captions.mistakes.append(f"{where}: the caption of {name} is empty; expected words, or take it out")
        return
    captions.texts.setdefault(name, []).append(text.strip())


def _read_csv(captions: Captions, file: str, caption: str) -> None:
    path = captions.path
    # Strict: an open quote would otherwise swallow the lines after it. StringIO: str.splitlines would also break
    # captions at odd separators such as U+2028.
    lines = io.StringIO(_read_text(path), newline="")
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        for wanted in (file, caption):
            if wanted not in header:
                found = ", ".join(header) or "nothing (the file is empty)"
                raise ValueError(f"{path}:1: no column {wanted!r}; found {found}")
        name, text = header.index(file), header.index(caption)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                captions.mistakes.append(
                    f"{path}:{reader.line_num}: got {len(cells)} columns, expected {len(header)} as in the header "
                    "(put quotes around a caption that holds a comma)"
                )
                continue
            _add(captions, cells[name].strip(), cells[text], f"{path}:{reader.line_num}")
            others = {
                key: cell for i, (key, cell) in enumerate(zip(header, cells, strict=True)) if i not in (name, text)
            }
            if others:
                captions.columns.setdefault(cells[name].strip(), others)
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _read_json(captions: Captions) -> None:
    path = captions.path
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; expected captions as COCO, Karpathy or MSR-VTT") from None
    if isinstance(data, dict) and isinstance(data.get("videos"), list) and isinstance(data.get("sentences"), list):
        _read_msrvtt(captions, data["videos"], data["sentences"])
        return
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list):
        raise ValueError(f"{path}: no list 'images'; expected captions as COCO, Karpathy or MSR-VTT")
    if isinstance(data.get("annotations"), list):
        _read_coco(captions, images, data["annotations"])
    else:
        _read_karpathy(captions, images)


def _get(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        found = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{where}: no {key!r}; found {found}")
    return entry[key]


def _plain(entry: dict[str, Any], *known: str) -> dict[str, Any]:
    """What an entry says in numbers, texts and flags, except for what is known already."""
    return {key: value for key, value in entry.items() if isinstance(value, str | int | float) and key not in known}


def _read_coco(captions: Captions, images: list[Any], annotations: list[Any]) -> None:
    path = captions.path
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
        captions.columns[name] = {"image_id": number} | _plain(entry, "id", "file_name")
    for index, entry in enumerate(annotations):
        where = f"{path}: annotations[{index}]"
        number, text = _get(entry, "image_id", where), _get(entry, "caption", where)
        if not isinstance(number, int | str) or number not in names:
            raise ValueError(f"{where}: image_id {number!r} is not among the images of the file")
        _add(captions, names[number], text, where)


def _read_karpathy(captions: Captions, images: list[Any]) -> None:
    path = captions.path
    for index, entry in enumerate(images):
        where = f"{path}: images[{index}]"
        name, sentences = str(_get(entry, "filename", where)), _get(entry, "sentences", where)
        if isinstance(entry.get("filepath"), str) and entry["filepath"]:
            name = f"{entry['filepath']}/{name}"  # COCO's pictures lie in two folders
        if name in captions.texts:
            raise ValueError(f"{where}: {name} was given before; expected each picture once")
        if not isinstance(sentences, list) or not sentences:
            raise ValueError(f"{where}: {name} has no sentences; expected a list with at least one")
        for sentence in sentences:
            _add(captions, name, _get(sentence, "raw", where), where)
        captions.parts[name] = str(_get(entry, "split", where))
        captions.columns[name] = {key.replace("cocoid", "image_id"): value for key, value in _plain(entry).items()}


def _read_msrvtt(captions: Captions, videos: list[Any], sentences: list[Any]) -> None:
    path = captions.path
    for index, entry in enumerate(videos):
        where = f"{path}: videos[{index}]"
        name = f"{_get(entry, 'video_id', where)}.mp4"
        if name in captions.texts:
            raise ValueError(f"{where}: {name} was given before; expected each clip once")
        refuse_outward(name, where)
        captions.texts[name] = []
        if "split" in entry:
            captions.parts[name] = str(entry["split"])
    for index, entry in enumerate(sentences):
        where = f"{path}: sentences[{index}]"
        name = f"{_get(entry, 'video_id', where)}.mp4"
        if name not in captions.texts:
            raise ValueError(f"{where}: video_id {entry['video_id']!r} is not among the videos of the file")
        _add(captions, name, _get(entry, "caption", where), where)
