"""The recipe of a preference head, from its YAML to its report. Each test names the mistake it is there to catch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from mmft.data.preferences import scene_pairs
from mmft.recipe.preference import PreferenceRecipe, load_preference_recipe
from mmft.recipe.strict_yaml import RecipeError
from mmft.training.preference import report, run_preference, text_only
from mmft.training.preference_pairs import as_ratings, demonstrations, gather
from reward_models.preference.pairs import Pair, Rating

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "train_preference.yaml"
SHORT = ["train.steps=2", "train.batch_size=4", "pairs.train_rows=12", "pairs.held_out_rows=8"]


def recipe_of(*overrides: str) -> PreferenceRecipe:
    return load_preference_recipe(RECIPE, [*SHORT, *overrides])


def problems(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe_of(*overrides)
    return "\n".join(caught.value.problems)


# --- the YAML --------------------------------------------------------------------------------------


def test_the_shipped_recipe_shows_and_explains_every_key():
    def keys(data, before=""):
        for key, value in data.items():
            yield before + key
            if isinstance(value, dict):
                yield from keys(value, f"{before}{key}.")

    recipe = load_preference_recipe(RECIPE)
    assert set(keys(YAML(typ="safe").load(RECIPE))) == set(keys(recipe.model_dump()))
    for line in RECIPE.read_text().splitlines():
        key = line.split("#")[0].rstrip()
        assert not key or key.endswith(":") or "#" in line, f"no comment beside {line!r}"


def test_the_resolved_copy_is_the_same_recipe(tmp_path):
    recipe = recipe_of("pairs.kinds=[colour, size]", "train.learning_rate=1e-5")
    recipe.dump(tmp_path / "copy.yaml")
    assert load_preference_recipe(tmp_path / "copy.yaml") == recipe


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["head.fusion=atention"], ["head.fusion", "did you mean cross_attention?"]),
        (["train.stepz=3"], ["train.stepz: got an unknown key", "did you mean train.steps?"]),
        (["pairs.source=rows"], ["pairs.name: got null, expected a .jsonl file"]),
        (["pairs.test=null"], ["pairs.test: got null"]),
        (["pairs.images=photos"], ["pairs.images: expected null", "it belongs to rows"]),
        (["pairs.source=demonstrations", "pairs.kinds=[colour]"], ["pairs.kinds: expected null"]),
        (["head.width=30"], ["head.width: got 30, expected a multiple of 4"]),
        (["loss.name=mse", "loss.label_smoothing=0.1"], ["loss.label_smoothing: got 0.1"]),
        (["pairs.validation=train"], ['pairs.validation: got "train", expected another split than pairs.train']),
        (["pairs.validation=test"], ['pairs.test: got "test", expected another split than pairs.validation']),
        (["loss.label_smoothing=0.5", "seed=-1"], ["loss.label_smoothing: got 0.5", "seed: got -1"]),
    ],
)
def test_mistakes_are_named_with_their_place(overrides, said):
    found = problems(*overrides)
    for part in said:
        assert part in found
    assert found.startswith("command line: ")


def test_a_mistake_in_the_file_has_its_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("seed: 0\npairs:\n  source: rows\n  name: null\n")
    with pytest.raises(RecipeError, match=r"r.yaml:4: pairs.name: got null"):
        load_preference_recipe(path)


def test_a_wrong_recipe_ends_before_torch_is_loaded():
    command = [sys.executable, "-X", "importtime", "recipes/train_preference.py", "head.heads=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "command line: head.heads: got 0, expected a whole number >= 1" in done.stderr
    assert not re.search(r"\|\s+(torch|transformers|PIL)$", done.stderr, re.M)


# --- where pairs come from -------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path) -> Path:
    """A file of 60 pairs about 30 pictures."""
    stream = np.random.default_rng(0)
    for i in range(30):
        Image.fromarray(stream.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    lines = [
        {"image": f"{i % 30}.png", "chosen": f"dog {i}", "rejected": f"cat {i}", "ratings": None} for i in range(60)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


DEMONSTRATED = ["pairs.source=demonstrations", "pairs.policy.max_completion_length=6"]
OPEN = ["pairs.source=rows", "pairs.validation=null", "pairs.test=null", "pairs.train_rows=null"]


def test_one_file_is_split_by_picture(rows):
    """Split by row, the same picture would be trained on and tested with."""
    data = gather(recipe_of(*OPEN, f"pairs.name={rows}", "pairs.held_out_rows=null"))
    pictures = {split: {pair.images for pair in data[split]} for split in ("train", "validation", "test")}
    assert sum(map(len, data.values())) == 60 and all(pictures.values())
    assert not pictures["train"] & pictures["validation"] and not pictures["test"] & pictures["train"]
    assert not pictures["test"] & pictures["validation"]
    named = gather(recipe_of(*OPEN, f"pairs.name={rows}", "pairs.prompt=Which animal?"))
    assert {pair.prompt for pair in named["train"]} == {"Which animal?"} and len(named["test"]) <= 8


def written(path: Path, pictures: list, start: int = 0) -> Path:
    """A file of pairs, one for each entry: a name, or a list of names."""
    lines = []
    for i, shown in enumerate(pictures, start):
        key = "images" if isinstance(shown, list) else "image"
        lines.append(json.dumps({key: shown, "chosen": f"dog {i}", "rejected": f"cat {i}"}))
    path.write_text("\n".join(lines))
    return path


def test_one_picture_under_several_names_is_in_one_split(rows, tmp_path):
    """Names compared as they are written: ./a.png, ../here/a.png, links; and only the first of a list of pictures."""
    for i in range(30):
        (tmp_path / f"link{i}.png").symlink_to(tmp_path / f"{i}.png")
    ways = ("{}.png", "./{}.png", f"../{tmp_path.name}/{{}}.png", "link{}.png")
    listed = [[f"{i}.png", f"{i + 1}.png"] for i in (3, 4, 5, *range(8, 30, 2))]
    path = written(tmp_path / "names.jsonl", [*(way.format(i) for way in ways for i in range(30)), *listed])
    data = gather(recipe_of(*OPEN, f"pairs.name={path}", "pairs.held_out_rows=null"))
    shown = {s: {f.resolve().name for pair in data[s] for f in pair.images} for s in data}
    assert sum(map(len, data.values())) == 134 and all(shown.values())
    for one, two in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not shown[one] & shown[two]
    where = {f.resolve().name: split for split in data for pair in data[split] for f in pair.images}
    assert where["3.png"] == where["4.png"] == where["5.png"] == where["6.png"]


def test_more_rows_and_another_place_move_no_picture(rows, tmp_path):
    """A hash of the whole path, or of the row's number, would deal the same pictures anew elsewhere."""
    import shutil

    def dealt(folder: Path) -> dict[str, set[str]]:
        path = folder / "pairs.jsonl"
        data = gather(recipe_of(*OPEN, f"pairs.name={path}", "pairs.held_out_rows=null"))
        return {split: {pair.images[0].name for pair in data[split]} for split in data}

    before = dealt(tmp_path)
    moved = shutil.copytree(tmp_path, tmp_path / "moved" / "further")
    assert dealt(moved) == before
    Image.new("RGB", (8, 8)).save(moved / "new.png")
    (moved / "pairs.jsonl").write_text(
        json.dumps({"image": "new.png", "chosen": "a", "rejected": "b"}) + "\n" + rows.read_text()
    )
    assert {split: names - {"new.png"} for split, names in dealt(moved).items()} == before


@pytest.mark.parametrize(("split", "shown"), [("validation", "./7.png"), ("test", ["29.png", "8.png"])])
def test_named_splits_that_share_a_picture_are_refused(split, shown, rows, tmp_path):
    """Nothing compared: a judge would be calibrated, or praised, on pictures that it was trained with."""
    written(tmp_path / "train.jsonl", [f"{i}.png" for i in range(20)])
    written(tmp_path / "validation.jsonl", [f"{i}.png" for i in range(20, 24)])
    written(tmp_path / "test.jsonl", [f"{i}.png" for i in range(24, 29)])
    named = ["pairs.source=rows", f"pairs.name={tmp_path}"]
    assert [len(pairs) for pairs in gather(recipe_of(*named)).values()] == [12, 4, 5]
    path = tmp_path / f"{split}.jsonl"
    path.write_text(path.read_text() + "\n" + written(tmp_path / "more", [shown]).read_text())
    row = {"validation": 4, "test": 5}[split]
    with pytest.raises(
        ValueError, match=rf"pairs.{split}: row {row} of '{split}' shows .*[78].png of row [78] of pairs.tr"
    ):
        gather(recipe_of(*named))


def test_a_folder_of_files_and_a_saved_data_set(rows, tmp_path):
    import datasets

    (tmp_path / "train.jsonl").write_text(rows.read_text())
    Image.new("RGB", (8, 8)).save(tmp_path / "new.png")
    (tmp_path / "val.jsonl").write_text('{"image": "new.png", "chosen": "a", "rejected": "b"}\n')
    data = gather(recipe_of(*OPEN, f"pairs.name={tmp_path}", "pairs.validation=val", "pairs.held_out_rows=null"))
    assert [pair.chosen for pair in data["validation"]] == ["a"]
    assert len(data["train"]) + len(data["test"]) == 60 and data["test"]
    images = [{"path": None, "bytes": (tmp_path / f"{i}.png").read_bytes()} for i in range(30)]
    saved = datasets.Dataset.from_dict({"image": images, "chosen": ["a"] * 30, "rejected": ["b"] * 30})
    saved.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    data = gather(recipe_of(*OPEN, f"pairs.name={tmp_path / 'saved'}", "pairs.held_out_rows=null"))
    assert sum(map(len, data.values())) == 30 and isinstance(data["train"][0].images[0], bytes)


def test_wrong_files_end_in_one_line(rows, capsys):
    def message(*overrides: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_preference(recipe_of(*OPEN, f"output.dir={rows.parent / 'head'}", *overrides))
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "no .jsonl file" in message("pairs.name=/no/such/folder")
    assert "one file without splits" in message(f"pairs.name={rows}", "pairs.test=test")
    broken = rows.read_text().replace('"rejected": "cat 7"', '"rejectd": "cat 7"')
    rows.write_text(broken)
    assert "row 7: rejected: missing" in message(f"pairs.name={rows}")
    rows.write_text('{"chosen": "a", "rejected": "b"}\n{oops\n')
    assert f"{rows}:2: not valid JSON" in message(f"pairs.name={rows}")
    rows.write_text('{"prompt": "p", "completion": "c", "rating": 1}\n' * 20)
    assert "no pairs are left in this split" in message(f"pairs.name={rows}")


def test_demonstrations_put_references_above_the_policys_own_samples():
    """The wrong way round, the reward would learn to like the policy's mistakes."""
    recipe = recipe_of(*DEMONSTRATED, "pairs.train_rows=6", "pairs.policy.samples=2")
    pairs = demonstrations(recipe, "train")
    from mmft.data import load_rows

    references = {row["id"]: row["references"] for row in load_rows("scenes", "train", 6)}
    assert 6 < len(pairs) <= 12
    for pair in pairs:
        own = references[pair.id.rsplit("-", 1)[0]]
        assert pair.chosen in own and pair.rejected not in own and pair.images[0]().size == (96, 96)
    split = gather(recipe_of(*DEMONSTRATED, "pairs.validation=null", "pairs.train_rows=24", "pairs.held_out_rows=2"))
    assert [(p.chosen, p.rejected) for p in pairs] == [(p.chosen, p.rejected) for p in demonstrations(recipe, "train")]
    pictures = {name: {pair.images[0].name for pair in split[name]} for name in ("train", "validation", "test")}
    assert pictures["validation"] and not pictures["validation"] & pictures["train"] and len(pictures["test"]) <= 2


# --- training and report ---------------------------------------------------------------------------


def test_another_runs_folder_is_refused_before_pairs_are_made(tmp_path, capsys, monkeypatch):
    """Kills the loss of a policy's adapter in a folder that was named by mistake."""
    import mmft.training.preference as module

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("hours of work")
    monkeypatch.setattr(module, "gather", lambda recipe: pytest.fail("pairs were made first"))
    with pytest.raises(SystemExit) as stopped:
        run_preference(recipe_of(f"output.dir={tmp_path}"))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"error: {tmp_path} holds other files (adapter) and no preference.json" in said
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["hours of work"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_several_processes_are_refused(rank, tmp_path, capsys, monkeypatch):
    """Each would train the head into the same folder, over the others' files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stopped:
        run_preference(recipe_of(f"output.dir={tmp_path}/head"))
    assert stopped.value.code == 2 and not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert said == (
        ""
        if rank == "1"
        else "error: WORLD_SIZE is 2, expected 1: one process trains a preference head; start it with python\n"
    )


@pytest.mark.parametrize("how", [["backbone.tune=lora", "head.heads=2"], ["loss.name=mse"]])
def test_a_short_run_leaves_a_reward_and_its_report(how, tmp_path):
    from mmft.vlm.load import resolve
    from reward_models.preference import PreferenceReward, backbone_name

    summary = run_preference(recipe_of(*how, f"output.dir={tmp_path}"))
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    for name in ("accuracy", "ece", "ece_before", "blank", "text_only"):
        assert 0 <= summary[name] <= 1
    assert summary["examples"] == {"train": 12, "validation": 8, "test": 8} and summary["other_picture"]["pairs"] == 4
    assert load_preference_recipe(tmp_path / "recipe.yaml").head.heads == summary["heads"]
    assert backbone_name(tmp_path) == "scenes-vlm"
    reward = PreferenceReward.load(tmp_path, backbone=resolve("scenes-vlm"))
    picture = scene_pairs("test", 1)[0].images[0]()
    assert len(reward(prompts=["Describe the picture."], completions=["a red circle"], image=[picture])[0]) == 1


class Judged:
    """A reward that knows the answers to some pairs, and guesses on blank pictures."""

    facts = {"temperature": 1.0}

    def __init__(self, right: dict[str, float], blank: float):
        self.right, self.blank = right, blank

    @property
    def judge(self):
        return self

    def differences(self, pairs, blank=False):
        return np.array([self.blank if blank else self.right[pair.id] for pair in pairs])


def test_the_report_by_hand():
    """Blank and seen mixed up, the swapped rate counted from the wrong side, kinds thrown together."""
    pictures = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(4)]
    kinds = ["colour", "colour", "wording", "wording"]
    pairs = [Pair("p", (pictures[i],), f"good {i}", f"bad {i}", kind=kinds[i], id=str(i)) for i in range(4)]
    found = report(Judged({"0": 3.0, "1": -3.0, "2": 2.0, "3": 2.0}, blank=-1.0), pairs[:1], pairs)
    assert found["accuracy"] == 0.75 and found["blank"] == 0.0
    assert found["by_kind"]["colour"]["accuracy"] == 0.5 and found["by_kind"]["wording"]["accuracy"] == 1.0
    assert found["picture_kinds"] == {"pairs": 2, "accuracy": 0.5, "blank": 0.0, "text_only": 1.0}
    # The swapped pairs keep the ids: the judge prefers the other picture's text in one of four.
    assert found["other_picture"]["preferred"] == 0.25 and found["other_picture"]["pairs"] == 4
    others = [Pair("p", (pictures[0],), "a", "b", id="1")]
    assert report(Judged({"0": 3.0, "1": -3.0, "2": 2.0, "3": 2.0}, 1.0), [], pairs, others)["other_picture"][
        "preferred"
    ] == pytest.approx(1.0)


def test_text_only_learns_words_and_nothing_else():
    good = [Pair("p", (), f"a fine {w}", f"a bad {w}") for w in ("cat", "dog", "cow", "hen")]
    assert (text_only(good[:3], good[3:]) > 0).all()
    assert text_only(good[:3], [Pair("p", (), "x", "y")]) == 0  # unknown words weigh nothing
    assert text_only([], good) is None


def test_pairs_as_ratings():
    pair, rating = Pair("p", (), "good", "bad", id="7"), Rating("p", (), "fair", 0.4)
    assert as_ratings([pair, rating]) == [Rating("p", (), "good", 1.0, "7"), Rating("p", (), "bad", 0.0, "7"), rating]
