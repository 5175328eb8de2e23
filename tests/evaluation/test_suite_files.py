"""COCO's files: what is written can be read by the official code, and what is wrong with a file is said."""

import contextlib
import io
import json

import pytest

from mmft.evaluation.coco_files import image_ids, read_ground, read_predictions, write_predictions, write_references

REFERENCES = {7: ["a dog", "the dog"], 9: ["a cat"]}


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("ids", "numbers", "expected"),
    [
        (["a.jpg", "b.jpg"], [391895, 5], [391895, 5]),  # COCO's own numbers
        (["a.jpg", "b.jpg"], [391895, None], ["a.jpg", "b.jpg"]),  # all or none
        (["12", "0"], [None, None], [12, 0]),
        (["012", "12"], [None, None], ["012", "12"]),  # two names, not one number
        (["val/COCO_val2014_000000391895.jpg", "000000000005.jpg"], [None] * 2, [391895, 5]),
        (["scene-1", "scene-2"], [None, None], ["scene-1", "scene-2"]),
        (["a", "b"], [True, False], ["a", "b"]),
    ],
)
def test_ids_are_numbers_where_the_data_have_them(ids, numbers, expected):
    assert image_ids(ids, numbers) == expected


def test_a_picture_twice_is_refused():
    with pytest.raises(ValueError, match="1 pictures occur more than once, first: 'a'"):
        image_ids(["a", "a", "b"], [None] * 3)


def test_the_official_reader_takes_both_files(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    captions = ["a dog's ball", '"quoted" – ünïcode 🐕']
    write_predictions(tmp_path / "p.json", [7, 9], captions)
    write_references(tmp_path / "r.json", [7, 9], list(REFERENCES.values()))
    assert json.loads((tmp_path / "p.json").read_text("utf-8")) == [
        {"image_id": 7, "caption": captions[0]},
        {"image_id": 9, "caption": captions[1]},
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        ground = coco.COCO(str(tmp_path / "r.json"))
        found = ground.loadRes(str(tmp_path / "p.json"))
    assert ground.getImgIds() == [7, 9] and found.getImgIds() == [7, 9]
    assert [entry["caption"] for entry in found.imgToAnns[9]] == captions[1:]
    assert [entry["caption"] for entry in ground.imgToAnns[7]] == REFERENCES[7]
    assert read_ground(tmp_path / "r.json")[0] == REFERENCES


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([{"image_id": 7, "caption": "x"}], "1 of 2 pictures have no caption, first: 9; --allow-missing"),
        ([{"image_id": i, "caption": "x"} for i in (7, 9, 9)], "1 image ids occur more than once, first: 9"),
        ([{"image_id": i, "caption": "x"} for i in (7, 9, 8)], "1 image ids are not in the references, first: 8"),
        ([{"image_id": str(i), "caption": "x"} for i in (7, 9)], "not in the references, first: '7'"),
        ([{"image_id": 7, "caption": None}], "caption must be a string"),
        ([{"image_id": 7, "captoin": "x"}], "expected an object with 'image_id' and 'caption'"),
        ({"annotations": []}, "expected COCO results: a list"),
        ([7], "expected an object"),
    ],
)
def test_what_is_wrong_with_predictions_is_said(tmp_path, content, what):
    with pytest.raises(ValueError, match=what):
        read_predictions(write(tmp_path / "p.json", content), [[7, 9]])


def test_missing_pictures_may_be_allowed_unknown_ones_never(tmp_path):
    path = write(tmp_path / "p.json", [{"image_id": 9, "caption": ""}])
    assert read_predictions(path, [[7, 9]], allow_missing=True) == [None, ""]
    with pytest.raises(ValueError, match="none of the 2 pictures has a caption"):
        read_predictions(write(tmp_path / "q.json", []), [[7, 9]], allow_missing=True)
    with pytest.raises(ValueError, match="not in the references"):
        read_predictions(write(tmp_path / "s.json", [{"image_id": 8, "caption": "x"}]), [[7, 9]], allow_missing=True)


def test_pictures_that_are_not_asked_for_may_be_there_or_not(tmp_path):
    path = write(tmp_path / "p.json", [{"image_id": i, "caption": str(i)} for i in (9, 7)])
    assert read_predictions(path, [[7]], [[9, 11]]) == ["7"]


def test_pictures_may_be_called_in_two_ways(tmp_path):
    path = write(tmp_path / "p.json", [{"image_id": f"{i}.jpg", "caption": str(i)} for i in (9, 7)])
    assert read_predictions(path, [[7, 9], ["7.jpg", "9.jpg"]]) == ["7", "9"]  # in the order of the pictures
