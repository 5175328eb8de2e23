"""Rows from cards, folders and JSON, and pictures of every awkward kind."""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmft.data import Rows, check_rows, load_rows
from mmft.data.rows import FileRows, open_picture
from mmft.recipe import RecipeError

ROOT = Path(__file__).parents[2]
FLICKR = ROOT.parent / "shared" / "real" / "flickr8k"
RED, GREEN = (255, 0, 0), (0, 255, 0)


def save(path: Path, colour=RED, size=(4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three pictures with two captions each, a list for training and one for testing."""
    root = tmp_path / "photos"
    for name in "abc":
        save(root / "images" / f"{name}.png")
    lines = ["image,caption", *(f'{name}.png,"{name}, text {k}"' for k in range(2) for name in "abc")]
    (root / "captions.csv").write_text("\n".join(lines) + "\n")
    (root / "train.txt").write_text("c.png\na.png\n\n")
    (root / "test.txt").write_text("b.png\n")
    return root


def error(name, split="train", **options) -> str:
    with pytest.raises(ValueError) as caught:
        load_rows(str(name), split, **options)
    return str(caught.value)


# --- the three layouts -----------------------------------------------------------------------------


def test_folder_groups_captions_in_the_order_of_the_list(folder):
    rows = load_rows(str(folder), "train")
    assert isinstance(rows, Rows) and len(rows) == 2
    assert rows.references() == [["c, text 0", "c, text 1"], ["a, text 0", "a, text 1"]]
    row = rows[0]
    assert set(row) == set(rows.column_names) == {"id", "prompt", "image", "references"}
    assert row["id"] == "c.png" and row["prompt"] == "Describe the picture."
    assert row["image"].mode == "RGB" and row["image"].size == (4, 3)
    text = rows.text(1)
    assert "image" not in text and text["picture"] == "a.png" and text["references"] == ["a, text 0", "a, text 1"]
    assert [row["id"] for row in rows[1:]] == ["a.png"] and rows[-1]["id"] == "a.png"
    assert [row["id"] for row in rows] == ["c.png", "a.png"]


def test_limit_and_prompt(folder):
    rows = load_rows(str(folder), "train", limit=1, prompt="What is it?")
    assert len(rows) == 1 and rows[0]["prompt"] == rows.text(0)["prompt"] == rows[:1][0]["prompt"] == "What is it?"
    assert rows.references() == [["c, text 0", "c, text 1"]]
    assert "at least 1" in error(folder, limit=0)


def test_pictures_are_opened_only_when_asked_for(folder):
    rows = load_rows(str(folder), "train")
    (folder / "images" / "c.png").unlink()
    assert rows.text(0)["id"] == "c.png" and len(rows.references()) == 2
    with pytest.raises(ValueError, match=r"row c\.png: .*does not exist"):
        rows[0]


def test_a_folder_without_lists_is_split_by_name(folder):
    (folder / "train.txt").unlink(), (folder / "test.txt").unlink()
    lines = ["image,caption"]
    for index in range(60):
        save(folder / "images" / f"{index}.png")
        lines.append(f"{index}.png,picture {index}")
    (folder / "captions.csv").write_text("\n".join(lines))
    before = {split: {row["id"] for row in load_rows(str(folder), split)} for split in ("train", "validation", "test")}
    assert sum(map(len, before.values())) == 60 and len(set.union(*before.values())) == 60
    assert len(before["train"]) > 36 and before["validation"] and before["test"]
    save(folder / "images" / "new.png")
    (folder / "captions.csv").write_text("\n".join([lines[0], "new.png,one more", *lines[:0:-1]]))
    for split, ids in before.items():  # one more picture, another order: nobody changes sides
        assert {row["id"] for row in load_rows(str(folder), split)} - {"new.png"} == ids


def test_a_small_folder_without_lists_holds_out_a_picture_nevertheless(folder):
    """By their names' hashes none of a, b and c is in the test split; what is held out is in no other split."""
    for name in ("train", "test"):
        (folder / f"{name}.txt").unlink()
    splits = [[row["id"] for row in load_rows(str(folder), name)] for name in ("train", "validation", "test")]
    assert [len(names) for names in splits] == [1, 1, 1]
    assert sorted(sum(splits, [])) == ["a.png", "b.png", "c.png"]


def test_coco_json(folder):
    (folder / "captions.csv").unlink()
    images = [
        {"id": 7, "file_name": "a.png"},
        {"id": 3, "file_name": "b.png"},
        {"id": 5, "file_name": "c.png"},
    ]
    notes = [{"image_id": i, "caption": f" of {i} #{k}\n"} for k in range(2) for i in (3, 7, 5)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    assert load_rows(str(folder), "train").references() == [["of 5 #0", "of 5 #1"], ["of 7 #0", "of 7 #1"]]


def karpathy(folder: Path) -> Path:
    (folder / "captions.csv").unlink(), (folder / "train.txt").unlink(), (folder / "test.txt").unlink()
    entries = [
        {"filename": f"{name}.png", "split": split, "sentences": [{"raw": f"{name} {k}"} for k in range(2)]}
        for name, split in (("a", "train"), ("b", "restval"), ("c", "val"))
    ]
    entries[1]["filepath"] = "val2014"
    save(folder / "images" / "val2014" / "b.png", GREEN)
    (folder / "images" / "b.png").unlink()
    (folder / "dataset_x.json").write_text(json.dumps({"images": entries}))
    return folder


def test_karpathy_json_brings_its_own_splits(folder):
    karpathy(folder)
    assert load_rows(str(folder), "train").references() == [["a 0", "a 1"]]
    assert load_rows(str(folder), "validation").references() == [["c 0", "c 1"]]  # called val in the file
    row = load_rows(str(folder), "restval")[0]
    assert row["id"] == "val2014/b.png" and row["image"].getpixel((0, 0)) == GREEN
    assert "choose one of: train, restval, val" in error(folder, "test")


# --- cards -----------------------------------------------------------------------------------------


def card(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return path


def test_a_card_with_columns_prompt_and_restval(folder, tmp_path):
    (folder / "captions.csv").write_text("file,note,text\na.png,x,one\na.png,,two\nb.png,x,three\n")
    path = card(
        tmp_path,
        "name: mine\nroot: photos\ncolumns: {image: file, caption: text}\n"
        "splits: {train: {list: l.txt}}\nprompt: Say it.\n",
    )
    (folder / "l.txt").write_text("a.png\n")
    rows = load_rows(str(path), "train")
    assert rows.references() == [["one", "two"]] and rows[0]["prompt"] == "Say it."
    assert load_rows(str(path), "train", prompt="No.")[0]["prompt"] == "No."


def test_a_card_joins_karpathy_splits(folder, tmp_path):
    karpathy(folder)
    path = card(
        tmp_path,
        "name: k\nroot: photos\ncaptions: dataset_x.json\nsplits: {train: train+restval, test: val}\n",
    )
    assert [row["id"] for row in load_rows(str(path), "train")] == ["a.png", "val2014/b.png"]
    assert [row["id"] for row in load_rows(str(path), "test")] == ["c.png"]


def test_a_card_with_files_per_split(folder, tmp_path):
    (folder / "two.csv").write_text("image,caption\nz.png,of z\n")
    save(folder / "others" / "z.png")
    path = card(
        tmp_path,
        "name: k\nroot: photos\ncaptions: null\nsplits:\n"
        "  train: {captions: captions.csv}\n  test: {captions: two.csv, images: others}\n",
    )
    assert len(load_rows(str(path), "train")) == 3
    assert load_rows(str(path), "test")[0]["references"] == ["of z"]


def test_cards_are_found_by_stem_beside_the_work(folder, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("name: mine\nroot: ../photos\n")
    monkeypatch.chdir(tmp_path)
    assert len(load_rows("mine", "all")) == len(load_rows("data/mine.yaml", "all")) == 3


def test_the_environment_moves_the_root(folder, tmp_path, monkeypatch):
    path = card(tmp_path, "name: photos\nroot: nowhere\n")
    assert "my.yaml: root: there is no folder" in error(path)
    monkeypatch.setenv("MMFT_DATA_DIR", str(tmp_path))
    assert len(load_rows(str(path), "all")) == 3


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: x\nroot: photos\nimage: pics\n", "my.yaml:3: image: got an unknown key"),
        ("name: x\nroot: photos\ncolumns: {img: a}\n", "my.yaml:3: columns.img: got an unknown key"),
        ("name: x\nroot: photos\nsplits: {train: {lst: a}}\n", "did you mean splits.train.list?"),
        ("name: x\nroot: photos\nsplits: {train: 3}\n", "my.yaml:3: splits.train: got 3"),
        ("name: x\n", "root: missing"),
        ("root: x\n", "name: missing"),
    ],
)
def test_mistakes_in_cards_have_lines(folder, tmp_path, text, part):
    with pytest.raises(RecipeError) as caught:
        load_rows(str(card(tmp_path, text)), "train")
    assert len(caught.value.problems) == 1 and part in caught.value.problems[0], caught.value.problems


# --- what is wrong with the files ------------------------------------------------------------------


def test_missing_things_are_named(folder, tmp_path):
    assert "'nothing' was not found" in error("nothing") and "scenes" in error("nothing")
    assert "no split 'trian'; choose one of: train, test" in error(folder, "trian")
    (tmp_path / "empty").mkdir()
    assert "no captions file; expected one of captions.csv" in error(tmp_path / "empty")
    (folder / "train.txt").write_text("a.png\nq.png\n")
    assert "q.png" in error(folder) and "have no captions" in error(folder) and "captions.csv" in error(folder)
    (folder / "train.txt").write_text("\n")
    assert "split 'train' is empty" in error(folder)


def test_pictures_that_captions_name_must_exist(folder):
    (folder / "images" / "a.png").unlink()
    message = error(folder)
    assert message.startswith("1 of 2 rows cannot be used") and "row a.png" in message and "does not exist" in message
    assert len(load_rows(str(folder), "test")) == 1  # the other split is whole


def test_no_more_than_ten_bad_rows_are_listed(folder):
    names = [f"{index}.png" for index in range(25)]
    (folder / "captions.csv").write_text("image,caption\n" + "".join(f"{name},words\n" for name in names))
    (folder / "train.txt").write_text("\n".join(names))
    message = error(folder)
    assert message.startswith("25 of 25") and message.count("does not exist") == 10 and "and 15 more" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("picture,caption\na.png,x\n", "captions.csv:1: no column 'image'; found picture, caption"),
        ("", "captions.csv:1: no column 'image'; found nothing"),
        ("image,caption\na.png,x\nc.png,  \n", "captions.csv:3: the caption of c.png is empty"),
        ("image,caption\na.png,x\n,y\n", "captions.csv:3: no picture name"),
        ("image,caption\na.png,x, y\n", "captions.csv:2: got 3 columns, expected 2"),
        ("image,caption\na.png\n", "captions.csv:2: got 1 columns, expected 2"),
        ('image,caption\na.png,"x\nc.png,y\n', "not valid CSV"),
        (b"image,caption\na.png,caf\xe9\n", "captions.csv is not UTF-8"),
        ("image,caption\n../a.png,x\n", "captions.csv:2: picture '../a.png' is refused"),
        ("image,caption\n/etc/a.png,x\n", "captions.csv:2: picture '/etc/a.png' is refused"),
        ("image,caption\nfile:///a.png,x\n", "captions.csv:2: picture 'file:///a.png' is refused"),
        ("image,caption\nC:\\a.png,x\n", "captions.csv:2: picture 'C:\\\\a.png' is refused"),
    ],
)
def test_mistakes_in_csv_have_lines(folder, text, part):
    (folder / "captions.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert part in error(folder)


def test_an_empty_caption_hides_no_later_mistake(folder):
    (folder / "captions.csv").write_text('image,caption\na.png,\nb.png,x, y\n../c.png,x\n,y\nc.png,z\nc.png,"x\n')
    message = error(folder)
    assert message.startswith(f"{folder / 'captions.csv'}: 5 mistakes:\n")
    for part in ("2: the caption of a.png is empty", "3: got 3", "4: picture '../c.png' is refused", "5: no picture"):
        assert f"captions.csv:{part}" in message
    assert "not valid CSV" in message.splitlines()[-1]
    (folder / "captions.csv").write_text("image,caption\n" + "a.png,\n" * 25)
    message = error(folder)
    assert message.count("is empty") == 10 and message.endswith("... and 15 more")


def test_captions_may_hold_odd_separators_and_a_bom(folder):
    odd = "a\u2028b\x0bc\x85d, \u00e9"
    (folder / "captions.csv").write_bytes(f'\ufeffimage,caption\r\nb.png,"{odd}"\r\n'.encode())
    assert load_rows(str(folder), "test").references() == [[odd]]


IMAGE, NOTE = {"id": 1, "file_name": "a.png"}, {"image_id": 1, "caption": "x"}


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ("{", "captions.json:1: not valid JSON"),
        ([], "no list 'images'"),
        ({"images": [{"id": 1}], "annotations": []}, "images[0]: no 'file_name'; found id"),
        ({"images": [IMAGE, IMAGE], "annotations": []}, "images[1]: the id 1"),
        (
            {"images": [IMAGE], "annotations": [NOTE, {"image_id": 2, "caption": "y"}]},
            "annotations[1]: image_id 2",
        ),
        (
            {"images": [IMAGE], "annotations": [{"image_id": 1}]},
            "annotations[0]: no 'caption'; found image_id",
        ),
        (
            {"images": [IMAGE], "annotations": [{"image_id": 1, "caption": " "}]},
            "the caption of a.png is empty",
        ),
        ({"images": [{"id": 1, "file_name": "../a.png"}], "annotations": []}, "is refused"),
        ({"images": [{"filename": "a.png", "split": "train", "sentences": []}]}, "a.png has no sentences"),
        ({"images": [{"filename": "a.png", "sentences": [{"raw": "x"}]}]}, "images[0]: no 'split'"),
    ],
)
def test_mistakes_in_json_name_the_entry(folder, data, part):
    (folder / "captions.csv").unlink()
    (folder / "captions.json").write_text(data if isinstance(data, str) else json.dumps(data))
    assert part in error(folder)


def test_mistakes_in_lists_have_lines(folder):
    (folder / "train.txt").write_text("a.png\nb.png\na.png\n")
    assert "train.txt:3: a.png is listed twice (first on line 1)" in error(folder)
    (folder / "train.txt").write_text("a.png\n../b.png\n")
    assert "train.txt:2: picture '../b.png' is refused" in error(folder)


# --- pictures --------------------------------------------------------------------------------------


def pixel(path: Path) -> tuple[int, ...]:
    image = open_picture(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_modes(tmp_path):
    def made(image: Image.Image, name: str, **options) -> Path:
        image.save(tmp_path / name, **options)
        return tmp_path / name

    assert pixel(made(Image.new("L", (2, 2), 77), "grey.png")) == (77, 77, 77)
    assert pixel(made(Image.new("1", (2, 2), 1), "bit.png")) == (255, 255, 255)
    # 25700 / 257 = 100; Pillow's own conversion would clip it to 255
    sixteen = Image.fromarray(np.full((2, 2), 25700, np.uint16))
    assert pixel(made(sixteen, "sixteen.png")) == pixel(made(sixteen, "sixteen.tif")) == (100, 100, 100)
    # half transparent black on white is middle grey, fully transparent red is white
    assert pixel(made(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "half.png")) == (127, 127, 127)
    assert pixel(made(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "clear.png")) == (255, 255, 255)
    assert pixel(made(Image.new("LA", (2, 2), (0, 0)), "la.png")) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert pixel(made(palette, "palette.png")) == (10, 20, 30)
    assert pixel(made(palette, "see-through.png", transparency=0)) == (255, 255, 255)
    assert pixel(made(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "cmyk.tif")) == RED
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, GREEN)]
    assert pixel(made(frames[0], "moving.gif", save_all=True, append_images=frames[1:])) == RED
    assert open_picture(made(Image.new("RGB", (1, 2000), RED), "thin.png")).size == (1, 2000)


def test_exif_rotation(tmp_path):
    image = Image.new("RGB", (40, 16), RED)
    image.paste(GREEN, (0, 0, 20, 16))  # green left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = open_picture(tmp_path / "turned.jpg")
    assert upright.size == (16, 40)
    assert upright.getpixel((8, 5))[1] > 200 and upright.getpixel((8, 35))[0] > 200  # green above red


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels, written by hand."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def noisy(path: Path) -> bytes:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    return path.read_bytes()


def test_broken_pictures_are_errors_with_row_path_and_reason(tmp_path):
    jpeg, png = noisy(tmp_path / "good.jpg"), noisy(tmp_path / "good.png")
    broken = {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "damaged"),
        "cut.png": (png[: len(png) // 2], "damaged"),
        "crc.png": (png[:60] + bytes([png[60] ^ 255]) + png[61:], "damaged"),
        "zero.jpg": (b"", "is empty"),
        "page.jpg": (b"<html>404 not found</html>", "not a picture"),
        "bomb.png": (png_header(12_000, 12_000), "12000 x 12000 pixels"),
        "huge.png": (png_header(20_000, 20_000), "too large"),
    }
    names = ["good.jpg", *broken, "folder.png", "missing.png", "pipe.png"]
    for name, (content, _) in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"row 12: picture .*" + name) as caught:
            open_picture(tmp_path / name, row="12")
        assert broken[name][1] in str(caught.value), caught.value
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    records = [{"id": name, "prompt": "p", "picture": name, "references": ["x"]} for name in names]
    with pytest.raises(ValueError) as caught:
        check_rows(FileRows(records, tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{len(names) - 1} of {len(names)} rows") and "good.jpg" not in message
    assert "is a folder" in message and "special file" in message and "does not exist" in message


def test_loading_finds_a_jpeg_that_was_cut_off(folder):
    whole = noisy(folder / "whole.jpg")
    (folder / "captions.csv").write_text("image,caption\na.jpg,x\n")
    (folder / "train.txt").write_text("a.jpg\n")
    (folder / "images" / "a.jpg").write_bytes(whole[:-200])
    assert "1 of 1 rows" in error(folder) and "a.jpg is damaged" in error(folder)
    (folder / "images" / "a.jpg").write_bytes(whole + b"\0" * 500)  # some cameras add bytes: no damage
    assert len(load_rows(str(folder), "train")) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_paths_out_of_the_folder_are_refused(folder, tmp_path):
    save(tmp_path / "secret.png")
    (folder / "images" / "a.png").unlink()
    (folder / "images" / "a.png").symlink_to(tmp_path / "secret.png")
    assert "row a.png" in error(folder) and "outside of" in error(folder)
    for name in ("../../secret.png", str(tmp_path / "secret.png"), "/dev/zero", "file:///x.png", "a\0b", ""):
        with pytest.raises(ValueError, match="is refused"):
            FileRows([{"id": "1", "prompt": "", "picture": name, "references": ["x"]}], folder / "images")[0]


def test_a_link_that_stays_inside_is_fine(folder):
    (folder / "images" / "a.png").unlink()
    (folder / "images" / "a.png").symlink_to("b.png")
    assert len(load_rows(str(folder), "train")) == 2


def test_check_rows_wants_references(folder):
    record = {"id": "1", "prompt": "", "picture": "a.png", "references": [" "]}
    with pytest.raises(ValueError, match="row 1: no references"):
        check_rows(FileRows([record], folder / "images"))
    with pytest.raises(ValueError, match="no rows"):
        check_rows(FileRows([], folder / "images"))


# --- the shipped cards -----------------------------------------------------------------------------


def test_scenes_by_name_and_by_card():
    direct, carded = load_rows("scenes", "test", 3), load_rows("data/scenes.yaml", "test", 3, prompt="Look.")
    assert isinstance(direct, Rows) and isinstance(carded, Rows) and len(direct) == len(carded) == 3
    assert direct.references() == carded.references() and carded[0]["prompt"] == "Look."
    check_rows(carded)


@pytest.mark.skipif(not FLICKR.is_dir(), reason="the real photos are not here")
def test_flickr8k():
    train, held_out = load_rows("data/flickr8k.yaml", "train"), load_rows("flickr8k", "test")
    assert len(train) == 640 and len(held_out) == 80
    assert {len(texts) for rows in (train, held_out) for texts in rows.references()} == {5}
    assert not {row["id"] for row in train.records} & {row["id"] for row in held_out.records}
    assert train.references()[0][1] == "A girl going into a wooden building ."
    check_rows(held_out)
    assert held_out[79]["image"].mode == "RGB" and max(held_out[79]["image"].size) == 320
