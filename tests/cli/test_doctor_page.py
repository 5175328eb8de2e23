"""`mmft doctor`: what it finds in a sound recipe and in broken ones, and that no finding hides another."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmft.cli import main
from mmft.data.rows import FileRows
from mmft.recipe import load_recipe
from mmft.training.doctor import _rewards, examine, machine
from mmft.training.doctor.data import contents, look_at_rows
from mmft.training.doctor.page import Page, Section
from mmft.training.doctor.parts import Parts
from mmft.training.doctor.recipe import look_at_recipe
from reward_models.probes import TOTAL, Finding, RewardReport

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "caption_ppo.yaml")
SMALL = ["rollout.prompts_per_step=2", "rollout.num_generations=2", "train.micro_prompts=null", "eval.rows=8"]
LONG = " and then it sat down in the long grass and looked at the sea for a while before it ran home again"


def photos(folder: Path, train: list[int], test: list[int], tail: str = "") -> Path:
    """A folder of pictures of noise with two captions each, in two lists."""
    (folder / "images").mkdir(parents=True)
    stream = np.random.default_rng(0)
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i in sorted({*train, *test}):
            Image.fromarray(stream.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
            writer.writerows([[f"{i}.png", f"dog {i} ran{tail}"], [f"{i}.png", f"a dog called {i}{tail}"]])
    for name, numbers in (("train", train), ("test", test)):
        (folder / f"{name}.txt").write_text("".join(f"{i}.png\n" for i in numbers))
    return folder


def found(page: dict, title: str, kind: str | None = None) -> str:
    """All that a section says, of one kind."""
    section = next(section for section in page["sections"] if section["title"] == title)
    return "\n".join(f["text"] + " -> " + f["todo"] for f in section["findings"] if kind in (None, f["kind"]))


def numbers(page: dict, title: str) -> dict:
    return next(section["numbers"] for section in page["sections"] if section["title"] == title)


def doctor(tmp_path: Path, *words: str) -> tuple[int, dict]:
    file = tmp_path / "doctor.json"
    code = main(["doctor", *words, "--json", str(file)])
    return code, json.loads(file.read_text())


def test_a_sound_recipe(tmp_path, capsys):
    # At this learning rate the steps that are timed spoil the model; what it says is from before them.
    words = [*SMALL, "data.train_rows=64", "train.learning_rate=1.0", f"output.dir={tmp_path / 'run'}"]
    code, page = doctor(tmp_path, RECIPE, *words)
    said = capsys.readouterr().out
    assert code == 0 and page["fine"] and page["wrong"] == 0, said
    assert [section["title"] for section in page["sections"]] == [
        *("Machine", "Recipe", "Data", "Rewards", "Memory", "Model")
    ]
    assert "the model sees its pictures" in said and "no picture is in both splits" in said
    assert "now says: 'a midsize yellow hoop along with a big pink plus over a white backdrop'" in found(page, "Model")
    script = RECIPE.replace(".yaml", ".py")
    assert said.rstrip().endswith(f"Next: accelerate launch {script} {RECIPE} {' '.join(words)}")
    model = numbers(page, "Model")
    assert model["trained"] == 109_824 and model["step_seconds"] > 0
    # 60 steps; before, after step 20, after step 40, and after the last
    assert model["run_seconds"] == pytest.approx(60 * model["step_seconds"] + 4 * model["evaluation_seconds"])
    assert 0 < numbers(page, "Memory")["peak"] < numbers(page, "Memory")["available"]
    assert numbers(page, "Data")["train"]["captions"] == 5 * 64
    assert not (tmp_path / "run").exists()


def test_everything_wrong_is_said_at_once(tmp_path, capsys, monkeypatch):
    folder = photos(tmp_path / "photos", [0, 1, 2, 3, 4], [5, 6, 7], LONG)
    (folder / "images" / "4.png").write_bytes(b"<html>no picture</html>")
    (folder / "images" / "6.png").write_bytes((folder / "images" / "1.png").read_bytes())
    (folder / "images" / "2.png").write_bytes((folder / "images" / "3.png").read_bytes())
    monkeypatch.setattr("mmft.training.doctor.trial.PATIENCE", 0.0)  # as if the model were slow
    (tmp_path / "flat.py").write_text("def flat(completions, **_):\n    return [1.0] * len(completions)\n")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    rewards = f"rewards=[{{name: '{tmp_path}/flat.py:flat'}}]"
    words = [f"data.name={folder}", rewards, "output.push_to_hub=ann/run", f"output.dir={tmp_path / 'run'}"]
    code, page = doctor(tmp_path, RECIPE, *SMALL, *words)
    said = capsys.readouterr().out
    assert code == 1 and "Next:" not in said
    assert "hf auth login" in found(page, "Recipe", "wrong")
    broken = found(page, "Data", "wrong")
    assert "4.png" in broken and "data.bad_rows=skip" in broken
    assert "1 held-out picture is in the training set as well, such as 6.png" in broken
    improvable = found(page, "Data", "warning")
    assert "only 3 rows held out" in improvable and "1 of 4 training pictures" in improvable
    assert "100% are longer than the 24" in improvable
    assert f"max_completion_length={numbers(page, 'Data')['caption_tokens']['99%']}" in improvable
    assert "in place of" not in found(page, "Data")  # the model is tried on the rows that are good
    assert "MiB" not in found(page, "Memory", "wrong")
    assert "all responses of a step earn the same" in found(page, "Model", "wrong")
    assert "the model sees its pictures" in found(page, "Model", "fine")
    assert "measured on one, from 1 of its 2 pictures" in found(page, "Model", "fine")


def test_what_cannot_be_had_hides_nothing(tmp_path):
    folder = photos(tmp_path / "photos", [0, 1], [2])
    words = [f"data.name={folder}", "data.train=trian", "model.name=nobody/nothing"]
    recipe = load_recipe(RECIPE, [*SMALL, *words, "rewards=[{name: preference}]"])
    page = examine(recipe).as_dict()
    assert "no split 'trian'" in found(page, "Data", "wrong")
    assert "'nobody/nothing'" in found(page, "Data", "wrong")
    assert "'path' is missing" in found(page, "Rewards", "wrong")
    for title in ("Memory", "Model"):  # the same error once
        assert found(page, title, "wrong") == "" and "the reason above" in found(page, title, "note")


def test_a_reward_with_a_hole_and_a_model_that_does_not_fit(tmp_path, monkeypatch):
    (tmp_path / "wordy.py").write_text(
        "def wordy(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    monkeypatch.setattr("mmft.training.memory.ram", lambda: 1 << 20)
    rewards = f"rewards=[{{name: '{tmp_path}/wordy.py:wordy'}}]"
    page = examine(load_recipe(RECIPE, [*SMALL, "data.train_rows=16", rewards])).as_dict()
    assert "'four times as long'" in found(page, "Rewards", "wrong")
    assert "saves about" in found(page, "Memory", "wrong")
    assert "would not fit" in found(page, "Model") and not numbers(page, "Model")


@pytest.mark.parametrize(
    ("share", "more", "kind"), [(0.55, 0.01, "warning"), (0.7, 0.01, "wrong"), (0.55, 0.3, "wrong")]
)
def test_a_hole_that_hardly_pays_is_a_warning(share, more, kind, monkeypatch):
    finding = Finding(TOTAL, "words listed", share, more, 32)
    monkeypatch.setattr("reward_models.probes.probe_rewards", lambda *_: RewardReport(32, {TOTAL: 1.0}, [finding]))
    rows = [{"references": ["a dog", "a hound"]}] * 2
    section = Section("Rewards")
    _rewards(section, load_recipe(RECIPE, []), Parts(held_out=rows, references=[row["references"] for row in rows]))
    assert [f.kind for f in section.findings] == [kind]


def test_a_file_that_spoils_both_splits_is_said_once(tmp_path):
    folder = photos(tmp_path / "photos", [0, 1], [2])
    with (folder / "captions.csv").open("a") as file:
        file.write("0.png,\n")
    section = Section("Data")
    look_at_rows(section, load_recipe(RECIPE, [f"data.name={folder}"]), Parts())
    assert [f.kind for f in section.findings] == ["wrong", "note"] and "is empty" in section.findings[0].text


def test_quick_loads_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr("mmft.training.run.load_model", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("mmft.training.memory.ghost_policy", lambda *_: pytest.fail("planned"))
    folder = photos(tmp_path / "photos", [0, 1], [2, 3])
    _, page = doctor(tmp_path, RECIPE, *SMALL, f"data.name={folder}", "--quick")
    assert [s["title"] for s in page["sections"]] == ["Machine", "Recipe", "Data", "Rewards"]


def test_a_wrong_recipe_is_said_at_once(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("train: {stepz: 3}\n")
    assert main(["doctor", str(tmp_path / "r.yaml")]) == 2
    said = capsys.readouterr()
    assert "steps" in said.err and not said.out


# --- machine


def other_machine(monkeypatch, **versions: str | None) -> Section:
    """The section about a machine on which some libraries are others, or missing."""
    true = importlib.metadata.version

    def version(name: str) -> str:
        if (given := versions.get(name, "")) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return given or true(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    section = Section("Machine")
    machine.look_at_machine(section, Path("."))
    return section


def test_libraries_that_are_missing_or_too_old(monkeypatch):
    section = other_machine(monkeypatch, peft=None, trl="0.2", av=None, accelerate="99.0")
    wrong = {f.text: f.todo for f in section.findings if f.kind == "wrong"}
    assert set(wrong) == {"peft is not installed", "trl 0.2 is not >=1.0"}
    assert "'peft>=" in wrong["peft is not installed"]
    notes = "\n".join(f.text for f in section.findings if f.kind == "note")
    assert "video (clips and sounds)" in notes and "accelerate 99.0 (1.15.0)" in notes


def test_every_extra_has_a_purpose():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(machine.EXTRAS) == set(table) - {"dev", "docs"}


def test_threads_are_those_that_the_launcher_gives(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine.launched_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(machine, "_launch_config", lambda: None)
    assert machine.launched_threads() == 1  # accelerate's default


def test_the_token_of_the_hub_is_not_shown(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_" + "a" * 30)
    section = Section("Machine")
    machine._hub(section)
    assert "logged in" in section.findings[0].text and "hf_" not in str(section)


# --- recipe, pictures, page


def test_what_a_recipe_needs_and_would_write_over(tmp_path, monkeypatch):
    monkeypatch.setattr("mmft.training.doctor.recipe.unmet", lambda wanted: [f"{wanted[0].name} is not installed"])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    section = Section("Recipe")
    words = ["model.quantize=nf4", f"output.dir={tmp_path}", "rewards.0.weight=0.5"]
    look_at_recipe(section, load_recipe(RECIPE, words))
    page = {"sections": [{"title": "Recipe", "findings": [vars(f) for f in section.findings]}]}
    assert "bitsandbytes is not installed -> pip install 'mmft[quant]'" in found(page, "Recipe", "wrong")
    assert "2 steps of an earlier, unfinished run" in found(page, "Recipe", "warning")
    assert "15,360 responses" in found(page, "Recipe") and "0.5 x cider_d; bleu is only logged" in found(page, "Recipe")


def test_pictures_are_told_apart_by_contents_not_by_size_or_name(tmp_path):
    folder = photos(tmp_path / "photos", [0, 1], [2, 3])
    for name, content in (("0", b"12345678"), ("1", b"abc"), ("2", b"87654321"), ("3", b"abc")):
        (folder / "images" / f"{name}.png").write_bytes(content)
    records = [{"id": i, "prompt": "", "picture": f"{i}.png", "references": ["a"]} for i in range(4)]
    train, test = contents(FileRows(records[:2], folder / "images"), FileRows(records[2:], folder / "images"))
    assert train[0] != test[0] and train[1] == test[1]


def test_a_section_that_breaks_leaves_the_others_whole():
    page = Page("mmft go")
    with page.section("One"):
        raise KeyError("odd")
    with page.section("Two") as section:
        section.fine("all is well")
    assert [s.broken for s in page.sections] == [True, False] and not page.fine
    assert "KeyError" in page.text() and "all is well" in page.text() and "mmft go" not in page.text()
    with pytest.raises(KeyboardInterrupt), page.section("Three"):
        raise KeyboardInterrupt
    assert "✗" not in page.text(plain=True)
    page.text(plain=True).encode("ascii")
