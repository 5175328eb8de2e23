"""`mmft.evaluate` and `mmft evaluate`: captions of the bundled model, files, comparisons, and what is refused."""

import json
import shutil

import numpy as np
import pytest

from mmft.cli import main
from mmft.data import load_rows
from mmft.inference.captioner import Captioner
from mmft.inference.evaluate import evaluate
from mmft.recipe import Recipe
from mmft.vlm.load import BUNDLED
from reward_models import CiderD, DocumentFrequencies

QUICK = ["bleu", "rouge_l", "cider", "cider_d", "claims", "diversity", "form"]
COMMAND = ["--metrics", ",".join(name for name in QUICK if name != "cider_d")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, as far as an evaluation looks at it: recipe, document frequencies, the whole model."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    shutil.copytree(BUNDLED["scenes-vlm"], folder / "model")
    Recipe.model_validate(
        {"data": {"prompt": "Describe the picture."}, "eval": {"rows": 10}, "output": {"dir": str(folder)}}
    ).dump(folder / "recipe.yaml")
    train = load_rows("scenes", "train", limit=200)
    DocumentFrequencies.from_references(train.references()).save(folder / "document_frequencies.npz")
    return folder


@pytest.fixture(scope="module")
def found(run):
    return evaluate(run, metrics=QUICK, slice_by=["background"], output=run / "out")


def test_a_run_is_evaluated_on_its_own_held_out_rows(run, found):
    rows = load_rows("scenes", "test", limit=10)
    assert found.settings == {"source": str(run), "data": "scenes, test", "method": "greedy"}
    assert found.side.given.ids == [rows.text(i)["id"] for i in range(10)]
    captions = Captioner(run).write(rows).texts
    assert found.side.given.captions == captions
    training = DocumentFrequencies.load(run / "document_frequencies.npz")
    scores = CiderD(training, eos=False).score(captions, rows.references())
    assert found.scores["cider_d"]["mean"] == pytest.approx(scores.mean())


def test_claims_reach_through_a_prompt_of_the_recipe(found):
    assert 0.5 < found.scores["attribute_accuracy"]["mean"] <= 1.0


def test_files_in_the_folder(run, found):
    predictions = json.loads((run / "out" / "predictions.json").read_text("utf-8"))
    given = found.side.given
    assert predictions == [{"image_id": i, "caption": c} for i, c in zip(given.ids, given.captions, strict=True)]
    lines = [json.loads(line) for line in (run / "out" / "per_image.jsonl").read_text("utf-8").splitlines()]
    assert [line["scores"]["CIDEr"] for line in lines] == found.side.scores.rows["CIDEr"].tolist()
    assert lines[0]["columns"]["background"] and lines[0]["references"] == given.references[0]
    scores = json.loads((run / "out" / "scores.json").read_text("utf-8"))
    assert scores["scores"] == found.scores and scores["rows"] == 10
    assert scores["signatures"]["CIDEr"].startswith("CIDEr-D|") and scores["versions"]["mmft"]


def test_predictions_score_as_the_model_that_wrote_them(run, found, tmp_path, capsys):
    """The written pair of files alone, by the command line: nothing of a score comes from anywhere else."""
    out, file = run / "out", tmp_path / "scores.json"
    arguments = ["evaluate", str(out / "predictions.json"), "--references", str(out / "references.json")]
    assert main([*arguments, "--metrics", "bleu,rouge_l,cider,diversity", "--json", str(file)]) == 0
    again = json.loads(file.read_text("utf-8"))["scores"]
    assert again == {name: found.scores[name] for name in again} and len(again) == 9
    printed = capsys.readouterr().out
    assert "CIDEr-D, official" in printed and "written to" not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.json"]  # nothing else anywhere


def test_predictions_with_the_rows_they_are_of(run, found):
    again = evaluate(run / "out" / "predictions.json", "scenes", rows=10, metrics=["claims", "cider"])
    assert again.scores["attribute_accuracy"] == found.scores["attribute_accuracy"]


def test_a_model_against_predictions(run, found, tmp_path, capsys):
    """First minus second, of the same pictures; the table says who is better."""
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps([{"image_id": i, "caption": "a red"} for i in found.side.given.ids]))
    arguments = ["evaluate", str(run), *COMMAND, "--against", str(worse), "--slice", "background"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text("utf-8"))
    for name, difference in scores["against"]["difference"].items():
        expected = scores["scores"][name]["mean"] - scores["against"]["scores"][name]["mean"]
        assert difference["mean"] == pytest.approx(expected), name
    assert scores["against"]["difference"]["CIDEr"]["p"] == 2 / 2**10  # 10 rows: exact, better in all
    assert "the first is better by" in capsys.readouterr().out
    for group in scores["slices"]["background"].values():
        assert group["against"]["CIDEr"]["mean"] > 0
    assert (tmp_path / "out" / "predictions_against.json").is_file()


def test_several_draws(found):
    """The first draw is scored, all of them make self-CIDEr, and the seed decides."""
    rows = load_rows("scenes", "test", limit=4)
    captioner = Captioner("scenes-vlm")
    options = {"method": "sample", "num": 3, "temperature": 1.5, "metrics": ["self_cider", "form"]}
    one, two = (captioner.evaluate(rows, seed=seed, **options) for seed in (1, 2))
    texts = captioner.write(rows, method="sample", num=3, temperature=1.5, seed=1).texts
    assert one.side.given.samples == [texts[i : i + 3] for i in range(0, 12, 3)]
    assert one.side.given.captions == texts[::3] != two.side.given.captions
    assert 0 < one.scores["self_cider"]["mean"] < 1
    assert "the first one is scored" in one.table()


def test_other_data_are_captioned_with_the_prompt_of_training(run, monkeypatch):
    asked = []
    monkeypatch.setattr(Captioner, "write", lambda self, rows, **o: asked.append(o.get("prompt")) or _written(rows))
    rows = [{"id": "a", "image": None, "prompt": "Another?", "references": ["x"]}] * 1
    evaluate(run, rows, metrics=["form"])
    evaluate("scenes-vlm", rows, metrics=["form"])
    evaluate(run, rows, metrics=["form"], prompt="Mine?")
    assert asked == ["Describe the picture.", None, "Mine?"]


def _written(rows):
    from mmft.inference.captioner import Written

    return Written(["x"] * len(rows), [[1]] * len(rows), [True] * len(rows))


def test_the_first_pictures_of_a_file(tmp_path):
    """What the file says of the others is neither scored nor an error; nor is a file that knows no others."""
    entries = [{"image_id": i, "caption": "a dog " * (i + 1)} for i in range(6)]
    (tmp_path / "r.json").write_text(json.dumps({"annotations": entries}))
    for known in (6, 4):
        (tmp_path / "p.json").write_text(json.dumps(entries[:known]))
        found = evaluate(tmp_path / "p.json", references=tmp_path / "r.json", rows=3, metrics=["bleu", "form"])
        assert found.side.scores.rows["length"].tolist() == [2, 4, 6]
        assert found.side.scores.rows["Bleu_1"] == pytest.approx(1, abs=1e-6)  # each is its own reference


def test_slices_are_checked_before_anything_is_captioned(monkeypatch):
    monkeypatch.setattr(Captioner, "write", lambda *a, **o: pytest.fail("captioned first"))
    with pytest.raises(ValueError, match="makes no groups"):
        evaluate("scenes-vlm", rows=30, metrics=["form"], slice_by=["id"])


def test_pictures_without_references(tmp_path, capsys):
    """COCO's numbers from its file names; only what needs no references is scored; no empty references.json."""
    rows, numbers = load_rows("scenes", "test", limit=3), (391895, 5, 42)
    for i, number in enumerate(numbers):
        rows[i]["image"].save(tmp_path / f"COCO_test2014_{number:012}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert main(["evaluate", "scenes-vlm", "--pictures", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text("utf-8"))
    assert [entry["image_id"] for entry in predictions] == sorted(numbers)
    captions = dict(zip(numbers, Captioner("scenes-vlm").write(rows).texts, strict=True))
    assert {entry["image_id"]: entry["caption"] for entry in predictions} == captions
    scores = json.loads((tmp_path / "out" / "scores.json").read_text("utf-8"))
    assert {"length", "distinct_1"} <= scores["scores"].keys() and not {"CIDEr", "METEOR"} & scores["scores"].keys()
    assert not (tmp_path / "out" / "references.json").exists()
    assert "left out" not in capsys.readouterr().out
    arguments = ["evaluate", "scenes-vlm", "--pictures", str(tmp_path), "--output", str(tmp_path / "no")]
    assert main([*arguments, "--metrics", "cider"]) == 2
    assert "metric cider: needs references" in capsys.readouterr().err


def test_captions_outlive_a_metric_that_fails(tmp_path, capsys):
    """What took hours to write is there, though a metric asked for by name cannot be computed."""
    arguments = ["evaluate", "scenes-vlm", "--rows", "3", "--metrics", "form,clip", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "metric clip: needs a CLIP model" in error and "The captions are kept in" in error
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text("utf-8"))) == 3
    assert not (tmp_path / "out" / "scores.json").exists()


@pytest.mark.parametrize("against", ["nowhere/at/all", "nowhere.json"])
def test_the_other_side_is_looked_for_before_anything_is_captioned(monkeypatch, against):
    monkeypatch.setattr(Captioner, "write", lambda *a, **o: pytest.fail("captioned first"))
    with pytest.raises(ValueError, match="nowhere"):
        evaluate("scenes-vlm", rows=3, metrics=["form"], against=against)


def test_each_method_has_its_folder_in_the_run(run, monkeypatch, capsys):
    """A second evaluation by another method, or a look at a few rows, takes nothing of the first."""
    for more in ([], ["--rows", "2"], ["--rows", "2", "--method", "sample", "--num", "2"]):
        assert main(["evaluate", str(run), "--metrics", "form", *more]) == 0
    found = sorted(path.name for path in (run / "evaluation").iterdir())
    assert found == ["scenes-test-first2-greedy", "scenes-test-first2-sample-2", "scenes-test-greedy"]
    assert str(run / "evaluation" / "scenes-test-first2-sample-2") in capsys.readouterr().out


def test_a_second_evaluation_leaves_nothing_of_the_first(tmp_path):
    """Files of another comparison beside new scores would pass for theirs."""
    entries = [{"image_id": i, "caption": "a dog"} for i in range(6)]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    (tmp_path / "r.json").write_text(json.dumps({"annotations": entries}))
    files = {"source": tmp_path / "p.json", "references": tmp_path / "r.json", "output": tmp_path / "out"}
    evaluate(**files, metrics=["form"], against=tmp_path / "p.json")
    assert (tmp_path / "out" / "predictions_against.json").is_file()
    evaluate(**files, metrics=["form"])
    names = ["per_image.jsonl", "predictions.json", "references.json", "scores.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_what_is_read_is_not_written_over(tmp_path):
    entries = [{"image_id": i, "caption": "a dog"} for i in range(6)]
    for name, content in (("predictions", entries), ("references", {"annotations": entries})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = {"source": tmp_path / "predictions.json", "references": tmp_path / "references.json"}
    with pytest.raises(ValueError, match="predictions.json would be written over"):
        evaluate(**files, rows=2, metrics=["form"], output=str(tmp_path))
    assert len(json.loads((tmp_path / "predictions.json").read_text("utf-8"))) == 6


def test_a_comparison_asks_each_run_what_it_was_trained_on(run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("evaluation", "out"))
    recipe = (other / "recipe.yaml").read_text("utf-8")
    (other / "recipe.yaml").write_text(recipe.replace("Describe the picture.", "What is it?"), "utf-8")
    asked = []

    def write(self, rows, **options):
        asked.append(options.get("prompt") or rows[0]["prompt"])
        return _written(rows)

    monkeypatch.setattr(Captioner, "write", write)
    evaluate(run, against=other, metrics=["form"])
    assert asked == ["Describe the picture.", "What is it?"]


def test_both_sides_of_a_comparison_may_write_as_much(run, monkeypatch):
    """Else a run, whose recipe ends its captions, would lose their last words against a model without a recipe."""
    lengths = []
    monkeypatch.setattr(
        Captioner, "write", lambda self, rows, **o: lengths.append(o.get("max_new_tokens")) or _written(rows)
    )
    found = evaluate(run, against="scenes-vlm", metrics=["form"])
    assert lengths == [Captioner(run).max_new_tokens] * 2 and found.settings["max_new_tokens"] == lengths[0]
    evaluate(run, against="scenes-vlm", metrics=["form"], max_new_tokens=7)
    assert lengths[2:] == [7, 7]


def test_both_sides_are_chosen_by_the_rewards_of_the_first(run, monkeypatch):
    """A model that is no run has none of its own."""
    used = []
    monkeypatch.setattr(Captioner, "write", lambda self, rows, **o: used.append(o["reward"]) or _written(rows))
    evaluate(run, against="scenes-vlm", metrics=["form"], method="best-of", num=2, reward="run")
    assert used[0] is used[1] and hasattr(used[0], "parts")
    with pytest.raises(ValueError, match="scenes-vlm is no run folder"):
        evaluate("scenes-vlm", against=run, metrics=["form"], method="best-of", reward="run")
    assert len(used) == 2  # said before anything was captioned


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["p.json"], "what are these predictions held against? Give --references FILE, or --data NAME"),
        (["p.json", "--references", "r.json", "--data", "scenes"], "--data and --references were both given"),
        (["p.json", "--references", "r.json", "--method", "beam"], "method: of no use for captions that are written"),
        (["p.json", "--references", "r.json", "--slice", "kind"], "no column 'kind' to slice by"),
        (["p.json", "--references", "r.json", "--metrics", "cidr"], "unknown metric 'cidr'; did you mean cider"),
        (["p.json", "--references", "r.json", "--objects", "none.txt"], "none.txt cannot be read"),
        (["p.json", "--references", "none.json"], "none.json: no such file"),
        (["none.json", "--references", "r.json"], "none.json: no such file"),
        (["short.json", "--references", "r.json"], "--allow-missing scores the others"),
        (["nowhere/at/all"], "nowhere/at/all"),
        (["scenes-vlm", "--pictures", "."], "is no folder with pictures"),
        (
            ["scenes-vlm", "--temperature", "0.5", "--seed", "1"],
            "temperature, seed: nothing is drawn by method 'greedy'",
        ),
        (["scenes-vlm", "--clip", "nowhere"], "nowhere is no CLIP model"),
        (
            ["p.json", "--references", "r.json", "--clip", "x", "--metrics", "bleu"],
            "--clip: only the metric clip reads",
        ),
        (["p.json", "--references", "r.json", "--objects", "o.txt", "--metrics", "bleu"], "--objects: only the metric"),
        (["p.json", "--references", "r.json", "--split", "test"], "--split: only a data set has splits"),
        (["scenes-vlm", "--split", "tset"], "scenes have no split 'tset'"),
        (["p.json", "--references", "five.json"], 'five.json: "images" is no list'),
        (["p.json", "--references", "odd.json"], "odd.json"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    entries = [{"image_id": i, "caption": "a dog"} for i in range(3)]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    (tmp_path / "short.json").write_text(json.dumps(entries[:1]))
    for name, more in (("r", {}), ("five", {"images": 5}), ("odd", {"images": [{"id": [1]}]})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"annotations": entries} | more))
    (tmp_path / "o.txt").write_text("dog, puppy")
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_missing_predictions_are_left_out_on_both_sides(tmp_path):
    entries = [{"image_id": i, "caption": "a dog" + " x" * i} for i in range(6)]
    images = [{"id": i, "kind": "few" if i < 3 else "many"} for i in range(6)]
    for name, part in (("a", entries[:5]), ("b", entries[1:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    (tmp_path / "r.json").write_text(json.dumps({"images": images, "annotations": entries}))
    files = {"source": tmp_path / "a.json", "against": tmp_path / "b.json", "references": tmp_path / "r.json"}
    found = evaluate(**files, allow_missing=True, metrics=["bleu", "form"], slice_by=["kind"])
    assert found.side.given.ids == found.other.given.ids == [1, 2, 3, 4]
    assert found.side.given.captions == found.other.given.captions
    assert np.allclose([d["mean"] for d in found.difference.values()], 0)
    assert found.scores["Bleu_1"]["mean"] == pytest.approx(1, abs=1e-6)  # each caption is its own reference
    lengths = {label: (by["rows"], by["scores"]["length"]["mean"]) for label, by in found.slices["kind"].items()}
    assert lengths == {"few": (2, 3.5), "many": (2, 5.5)}
