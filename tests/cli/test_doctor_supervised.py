"""`mmft doctor` of recipes without reinforcement learning, and of rates that are too high for all weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import get_peft_model

from mmft.cli import main
from mmft.recipe import load_recipe
from mmft.training.doctor import supervised
from mmft.training.doctor.page import Section
from mmft.training.doctor.recipe import look_at_recipe
from mmft.vlm.load import load_model, lora_config

ROOT = Path(__file__).parents[2]
SFT, PPO = (str(ROOT / "recipes" / f"caption_{name}.yaml") for name in ("sft", "ppo"))
SMALL = ["data.train_rows=16", "eval.rows=2", "warm_start.batch_size=30", "warm_start.epochs=2.5"]


def texts(section: dict) -> str:
    return "\n".join(finding["text"] + " -> " + finding["todo"] for finding in section["findings"])


def test_a_supervised_recipe_is_told_as_what_it_is(tmp_path, capsys):
    file = tmp_path / "doctor.json"
    assert main(["doctor", SFT, *SMALL, f"output.dir={tmp_path / 'run'}", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    page = {section["title"]: section for section in json.loads(file.read_text())["sections"]}
    assert list(page) == ["Machine", "Recipe", "Data", "Memory", "Model"]
    assert "PPO" not in said.split("Machine")[1] and "critic beside" not in said and "responses:" not in said
    assert "supervised training of scenes-vlm on all captions, 2.5 times, training every weight" in said
    # 16 pictures with 5 captions: 80 pairs, 3 steps of 30, two and a half times
    assert page["Model"]["numbers"]["steps"] == 8 and "8 steps of 30 of the 80" in texts(page["Model"])
    assert "the model sees its pictures" in said and "a midsize yellow hoop" in said
    assert f"caption_sft.py {SFT}" in said.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_least_memory_is_weights_gradients_and_moments(tune, monkeypatch):
    monkeypatch.setattr(supervised, "without_model", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    section = Section("Memory")
    recipe = load_recipe(SFT, [f"warm_start.tune={tune}", "model.tune=frozen"])  # the latter is not read
    assert supervised.least_memory(section, recipe)
    model, _ = load_model("scenes-vlm")
    whole = sum(p.numel() for p in model.parameters())
    adapted = get_peft_model(model, lora_config(model))
    adapters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    least = 16 * whole if tune == "full" else 4 * whole + 16 * adapters  # numbers of 4 bytes, four of each trained one
    assert section.numbers["least"] == least
    monkeypatch.setattr(supervised, "ram", lambda: least - 1)
    assert not supervised.least_memory(section, recipe) and section.findings[-1].kind == "wrong"


def test_the_adapter_that_a_run_goes_on_from_is_named(tmp_path):
    section = Section("Recipe")
    look_at_recipe(section, load_recipe(PPO, ["model.adapter=runs/first", f"output.dir={tmp_path / 'run'}"]))
    assert "LoRA adapters of rank 16, going on from runs/first;" in "\n".join(f.text for f in section.findings)


@pytest.mark.parametrize("verb", ["memory", "rewards"])
def test_what_is_of_reinforcement_learning_alone_says_so(verb, capsys):
    assert main(["doctor", verb, SFT]) == 2
    assert f"mmft doctor {SFT}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words", "script"),
    [
        ("warm_start: {epochs: 1}\n", [], "caption_sft.py"),
        ("warm_start: {epochs: 1}\n", ["train.steps=5"], "caption_ppo.py"),
        ("warm_start: {epochs: 1}\nalgorithm: {name: a2c}\n", [], "caption_a2c.py"),
        ("model: {name: scenes-vlm}\n", [], "caption_ppo.py"),
        (f"extends: {SFT}\n", [], "caption_sft.py"),
    ],
)
def test_a_recipe_of_ones_own_goes_to_the_script_of_its_sections(text, words, script, tmp_path):
    from mmft.cli.doctor import _script

    file = tmp_path / "own.yaml"
    file.write_text(text)
    assert _script(file, load_recipe(file, words)) == Path("recipes") / script


@pytest.mark.parametrize(
    ("tune", "rate", "warned"),
    [("full", "1e-4", True), ("full", "1e-3", True), ("full", "5e-5", False), ("lora", "1e-3", False)],
)
def test_rates_of_adapters_for_all_weights_are_warned_of(tune, rate, warned, tmp_path):
    section = Section("Recipe")
    words = [f"model.tune={tune}", f"train.learning_rate={rate}", f"output.dir={tmp_path / 'run'}"]
    look_at_recipe(section, load_recipe(PPO, words))
    found = [finding for finding in section.findings if finding.kind == "warning"]
    assert bool(found) == warned
    assert not warned or ("1e-7 to 1e-5" in found[0].text and "train.learning_rate=" in found[0].todo)
