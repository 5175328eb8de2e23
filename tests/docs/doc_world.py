"""The folder in which the commands of the documentation are run: what a reader has at that place, made small."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from doc_blocks import ROOT
from PIL import Image

from mmft.data import load_rows
from reward_models import DocumentFrequencies

COPIED = ("recipes", "accelerate_configs", "data")  # a command may write there
LINKED = ("benchmarks", "tests", "Makefile", "mmft/assets")
KEPT = {"runs", "photos", "coco", "sets", "mmft", "docs", *COPIED, *LINKED}
PHOTOS = 24
# What the documentation calls by a hub id -> the family of the tiny model that stands in.
MODELS = {"HuggingFaceTB/SmolVLM-256M-Instruct": "smolvlm"}

JUDGE = """
class Judge:
    def __call__(self, completions, **columns):
        return [float(len(text)) for text in completions]
"""


def make_world(folder: Path, tiny_model) -> Path:
    """Fills an empty folder. Pictures are scenes of the built-in world, saved as photos would be."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name)
    for name in ("mmft", "docs"):
        (folder / name).mkdir()
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    photos(folder / "photos")
    small_files(folder)
    flickr8k(folder / "sets" / "flickr8k", folder / "photos")
    for name, family in MODELS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(tiny_model(family))
    return folder


def tidy(folder: Path) -> None:
    """Takes away what the pages before have left, but for runs, and writes anew what they may have written over."""
    for path in folder.iterdir():
        if path.name not in KEPT and not any(name.startswith(f"{path.name}/") for name in MODELS):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    small_files(folder)


def small_files(folder: Path) -> None:
    coco_files(folder)
    (folder / "my.yaml").write_text((ROOT / "recipes" / "caption_ppo.yaml").read_text())
    (folder / "judge.py").write_text(JUDGE)
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs()))


def pairs() -> list[dict[str, str]]:
    """Preferences in the plain format, enough pictures that each split gets some."""
    image = [f"photos/images/{i}.jpg" for i in range(PHOTOS)]
    return [{"image": path, "chosen": f"shape number {i}", "rejected": "a cat"} for i, path in enumerate(image)]


def coco_files(folder: Path) -> None:
    """COCO captions under two names, a caption for each of their pictures, and the document frequencies of them all."""
    references = json.loads((folder / "coco" / "captions.json").read_text())
    first = {item["image_id"]: item["caption"] for item in references["annotations"]}
    for name in ("references.json", "captions.json"):
        (folder / name).write_text(json.dumps(references))
    found = [{"image_id": i, "caption": text} for i, text in first.items()]
    (folder / "predictions.json").write_text(json.dumps(found))
    texts = [[item["caption"] for item in references["annotations"] if item["image_id"] == i] for i in first]
    DocumentFrequencies.from_references(texts).save(folder / "frequencies.df")


def photos(folder: Path) -> None:
    """A folder of pictures with captions.csv, and the same as COCO JSON beside it (`coco/`)."""
    (folder / "images").mkdir(parents=True)
    rows = load_rows("scenes", "train", limit=PHOTOS)
    images, annotations = [], []
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i in range(PHOTOS):
            row, name = rows[i], f"{i}.jpg"
            row["image"].convert("RGB").resize((96, 72), Image.Resampling.BICUBIC).save(folder / "images" / name)
            writer.writerows([name, text] for text in row["references"])
            images.append({"id": i, "file_name": name})
            annotations += [{"id": 10 * i + k, "image_id": i, "caption": t} for k, t in enumerate(row["references"])]
    coco = folder.parent / "coco"
    shutil.copytree(folder / "images", coco / "images")
    (coco / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def flickr8k(folder: Path, source: Path) -> None:
    """The layout of data/flickr8k.yaml."""
    shutil.copytree(source, folder)
    names = [f"{i}.jpg\n" for i in range(PHOTOS)]
    (folder / "train.txt").write_text("".join(names[:-8]))
    (folder / "val.txt").write_text("".join(names[-8:]))
