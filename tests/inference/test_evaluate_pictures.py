"""What an evaluation knows of its pictures: numbers for COCO, columns to slice by, and similarity by CLIP."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from mmft.data import load_rows
from mmft.data.rows import Prompted, UsableRows, columns_of
from mmft.evaluation.scores import Captioned
from mmft.evaluation.suite import score
from mmft.inference.evaluate import evaluate, read_objects
from mmft.inference.evaluation_pictures import from_rows, rows_for
from mmft.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["a.png", "b.png", "c.png", "d.png"]
COLOURS = ["red", "blue", "lime", "white"]


@pytest.fixture
def photos(tmp_path):
    """A folder with a CSV that has further columns; every picture is in the split "all"."""
    (tmp_path / "photos" / "images").mkdir(parents=True)
    lines = ["image,caption,place,people"]
    for i, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
        Image.new("RGB", (20, 20), colour).save(tmp_path / "photos" / "images" / name)
        lines += [f"{name},it is {colour},{'in' if i < 2 else 'out'},{i}", f"{name},all {colour},never,9"]
    (tmp_path / "photos" / "captions.csv").write_text("\n".join(lines))
    return tmp_path / "photos"


def test_columns_of_a_csv_are_there_to_slice_by(photos, tmp_path):
    """The first line of a picture counts; rewards do not see them."""
    rows = load_rows(str(photos), "all")
    assert [columns_of(rows, i) for i in (0, 3)] == [{"place": "in", "people": "0"}, {"place": "out", "people": "3"}]
    for wrapped in (Prompted(rows, "What?"), UsableRows(rows), rows[:4]):
        assert columns_of(wrapped, 3) == {"place": "out", "people": "3"}
    assert set(rows[0]) == {"id", "prompt", "image", "references"} and "columns" not in rows.text(0)
    captions = [{"image_id": name, "caption": f"it is {colour}"} for name, colour in zip(NAMES, COLOURS, strict=True)]
    (tmp_path / "p.json").write_text(json.dumps(captions))
    found = evaluate(tmp_path / "p.json", str(photos), split="all", metrics=["form"], slice_by=["place"])
    assert {label: group["rows"] for label, group in found.slices["place"].items()} == {"in": 2, "out": 2}
    with pytest.raises(ValueError, match="no column 'kind' to slice by; the data have id, .*place, people"):
        evaluate(tmp_path / "p.json", str(photos), split="all", metrics=["form"], slice_by=["kind"])


@pytest.mark.parametrize("layout", ["coco", "karpathy"])
def test_numbers_of_coco_files_reach_the_predictions(photos, tmp_path, layout):
    (photos / "captions.csv").unlink()
    if layout == "coco":
        images = [{"id": 100 + i, "file_name": name, "width": i} for i, name in enumerate(NAMES)]
        annotations = [{"image_id": image["id"], "caption": "a colour"} for image in images]
        (photos / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        split = "all"
    else:
        images = [
            {"filename": name, "cocoid": 100 + i, "width": i, "split": "test", "sentences": [{"raw": "a colour"}]}
            for i, name in enumerate(NAMES)
        ]
        (photos / "dataset_coco.json").write_text(json.dumps({"images": images}))
        split = "test"
    pictures = from_rows(load_rows(str(photos), split), "photos")
    assert pictures.ids == [100, 101, 102, 103] and pictures.own_ids == NAMES
    assert pictures.columns(["width"]) == {"width": [0, 1, 2, 3]}
    (tmp_path / "p.json").write_text(json.dumps([{"image_id": i, "caption": f"no {i}"} for i in (101, 100, 103, 102)]))
    assert pictures.predictions(tmp_path / "p.json", False) == ["no 100", "no 101", "no 102", "no 103"]


def test_rows_without_references_are_refused():
    with pytest.raises(ValueError, match="row 7: no references"):
        from_rows([{"id": 7, "image": None, "references": []}], "mine")


def test_which_rows_are_meant():
    """The run's own split and number of rows, but for other data or another split all rows of it."""
    recipe = Recipe.model_validate({"data": {"eval": "validation"}, "eval": {"rows": 7}})
    assert [
        (len(rows), name) for rows, name in [rows_for(recipe, None, None, None), rows_for(recipe, None, None, 3)]
    ] == [
        (7, "scenes, validation"),
        (3, "scenes, validation"),
    ]
    assert rows_for(recipe, None, "test", 5)[1] == "scenes, test"
    assert rows_for(None, None, None, 5)[1] == "scenes, test"
    rows, name = rows_for(recipe, "scenes", None, None)
    assert (len(rows), name) == (2000, "scenes, validation")


def test_data_of_a_run_that_are_elsewhere_now():
    recipe = Recipe.model_validate({"data": {"name": "gone/away"}})
    with pytest.raises(ValueError, match="if it lies elsewhere now, name it with --data"):
        rows_for(recipe, None, None, None)


def test_the_objects_of_coco():
    """Eighty, no word in two of them; plurals and words of several parts are found."""
    objects = read_objects(ROOT / "data" / "coco_objects.txt")
    words = [word for name, more in objects.items() for word in (name, *more)]
    assert len(objects) == 80 and len(set(words)) == len(words)
    given = Captioned([0], ["two puppies and a hot dog"], [["a dog near a fire truck"]], objects=objects)
    scores = score(given, ["objects"])
    assert scores.rows["chair_i"].tolist() == [0.5] and scores.rows["object_recall"].tolist() == [0.5]


# --- CLIP ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny random CLIP."""
    words = ["<pad>", "<unk>", "<eos>", "a", "photo", "depicts", "it", "is", "all", *COLOURS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=12
    )
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**tiny, "vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": 2},
        vision_config={**tiny, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    CLIPProcessor(image_processor=images, tokenizer=fast).save_pretrained(folder)
    return folder


def test_clip_score_is_that_of_the_models_own_forward(photos, clip, tmp_path):
    """Pair by pair, unbatched, by CLIP's logits: captions of the wrong picture, a missing prefix, or padding that
    counts give other numbers."""
    captions = ["it is red", "all blue it is", "lime", "it is all white it is all white it is all white"]
    (tmp_path / "p.json").write_text(
        json.dumps([{"image_id": name, "caption": text} for name, text in zip(NAMES, captions, strict=True)])
    )
    found = evaluate(tmp_path / "p.json", str(photos), split="all", metrics=["clip"], clip=clip)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)

    def logit(picture, text) -> float:
        inputs = processor(text=[text], images=[picture], return_tensors="pt", truncation=True, max_length=12)
        with torch.no_grad():
            return float(model(**inputs).logits_per_image / model.logit_scale.exp())

    rows = load_rows(str(photos), "all")
    expected = [2.5 * max(0.0, logit(rows[i]["image"], f"A photo depicts {text}")) for i, text in enumerate(captions)]
    assert found.side.scores.rows["clip_score"] == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) == 4  # they are told apart
    # the first caption is one of its references, so that its text similarity is 1
    first = found.side.scores.rows["ref_clip_score"][0]
    assert first == pytest.approx(2 * expected[0] / (expected[0] + 1), abs=1e-5)
    mean = found.side.scores.rows["ref_clip_score"].mean()
    assert found.scores["ref_clip_score"] == {"mean": pytest.approx(mean), "low": None, "high": None}  # four pictures


def test_what_is_no_clip_is_said(photos, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([{"image_id": name, "caption": "x"} for name in NAMES]))
    with pytest.raises(ValueError, match="nowhere is no CLIP model that transformers can load"):
        evaluate(tmp_path / "p.json", str(photos), split="all", clip=str(tmp_path / "nowhere"))
