"""Recipes from the command line inwards: what a user's mistake looks like, and one short run of every recipe."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmft.recipe import load_recipe
from mmft.training.run import prepare_folder, run, run_supervised

ROOT = Path(__file__).parents[2]
SHORT = ["train.steps=1", "eval.rows=4", "rollout.prompts_per_step=2", "rollout.num_generations=2"]
SHORT += ["train.micro_prompts=null", "train.save_every=0", "eval.every=0", "output.trackers=[]"]


def photos(folder: Path, pictures: int = 12) -> Path:
    """A folder of pictures with two captions each, in the plain layout."""
    (folder / "images").mkdir(parents=True)
    stream = np.random.default_rng(0)
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i in range(pictures):
            pixels = stream.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{i}.jpg")
            writer.writerows([[f"{i}.jpg", f"a dog number {i}"], [f"{i}.jpg", f"one dog called {i} on the grass"]])
    return folder


def recipe_of(tmp_path: Path, name: str = "caption_ppo", *overrides: str):
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", [*SHORT, f"output.dir={tmp_path / 'run'}", *overrides])


def message(capsys, recipe, **options) -> str:
    """What a user reads when the recipe cannot be run."""
    with pytest.raises(SystemExit) as stopped:
        run(recipe, **options)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    return text[text.index("error: ") :]


def test_wrong_data_model_and_checkpoint_end_in_one_line_before_training(tmp_path, capsys):
    folder = photos(tmp_path / "photos")
    everything = [f"data.name={folder}", "data.train=all", "data.eval=all"]
    (folder / "images" / "3.jpg").write_bytes(b"<html>no picture</html>")
    assert "3.jpg" in message(capsys, recipe_of(tmp_path, "caption_ppo", *everything))
    (folder / "images" / "3.jpg").unlink()
    assert "3.jpg" in message(capsys, recipe_of(tmp_path, "caption_ppo", *everything))
    (folder / "captions.csv").write_text("file,text\n1.jpg,a dog\n")
    assert re.search("captions.csv.*image", message(capsys, recipe_of(tmp_path, "caption_ppo", *everything)))
    assert "nowhere" in message(capsys, recipe_of(tmp_path, "caption_ppo", "data.name=nowhere"))
    assert "model.name: cannot load 'no/model'" in message(
        capsys, recipe_of(tmp_path, "caption_ppo", "model.name=no/model")
    )
    assert "model.lora.target" in message(capsys, recipe_of(tmp_path, "caption_ppo", "model.lora.target=no_such_layer"))
    assert "holds no checkpoint" in message(capsys, recipe_of(tmp_path), resume="latest")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_folder_that_cannot_be_written_to_is_named_with_its_key(tmp_path):
    (tmp_path / "run").write_text("a file stands where the folder is to be")
    with pytest.raises(ValueError, match=r"output\.dir: .*run cannot be written to \(File exists\)"):
        prepare_folder(recipe_of(tmp_path, "caption_ppo"), None)


def test_empty_references_are_named(tmp_path, capsys):
    folder = photos(tmp_path / "photos")
    text = (folder / "captions.csv").read_text()
    (folder / "captions.csv").write_text(
        text.replace("a dog number 5", " ").replace("one dog called 5 on the grass", "")
    )
    recipe = recipe_of(tmp_path, "caption_ppo", f"data.name={folder}", "data.train=all", "data.eval=all")
    assert "5.jpg" in message(capsys, recipe)


def test_a_mistyped_key_ends_before_torch_is_loaded():
    command = [sys.executable, "-X", "importtime", str(ROOT / "recipes" / "caption_ppo.py"), "train.stepz=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "train.stepz" in done.stderr and "train.steps" in done.stderr
    assert not re.search(r"\|\s+(torch|transformers)$", done.stderr, re.MULTILINE)


def test_photos_go_from_warm_start_to_report(tmp_path):
    folder = photos(tmp_path / "photos")
    recipe = recipe_of(
        tmp_path,
        "caption_photos",
        f"data.name={folder}",
        "data.train=all",
        "data.eval=all",
        "warm_start.max_steps=2",
        "warm_start.batch_size=4",
    )
    summary = run(recipe)
    assert summary["rows"] == 4 and "cider_d" in summary["after"]
    assert "CIDEr-D|" in summary["signatures"]["reward cider_d"]
    for name in ("report.html", "warm_start/config.json", "adapter/adapter_model.safetensors", "recipe.yaml"):
        assert (tmp_path / "run" / name).is_file(), name


def test_a2c_and_supervised_recipes_run(tmp_path):
    assert run(recipe_of(tmp_path / "a", "caption_a2c", "data.train_rows=8"))["rows"] == 4
    options = ["data.train_rows=8", "warm_start.max_steps=1", "warm_start.batch_size=4", "warm_start.tune=lora"]
    summary = run_supervised(recipe_of(tmp_path / "s", "caption_sft", *options))
    assert summary["rows"] == 4
    saved = json.loads((tmp_path / "s" / "run" / "summary.json").read_text())
    assert saved["after"]["cider_d"] == summary["after"]["cider_d"]
