"""`python -m reward_models score` on COCO files."""

from __future__ import annotations

import json

import pytest

from reward_models import DocumentFrequencies
from reward_models.__main__ import main

REFERENCES = {
    "images": [{"id": 1}, {"id": 2}],
    "annotations": [
        {"image_id": 1, "caption": "A dog runs on the grass."},
        {"image_id": 2, "caption": "A cat."},
        {"image_id": 1, "caption": "A brown dog runs."},
    ],
}
RESULTS = [{"image_id": 2, "caption": "a red bus"}, {"image_id": 1, "caption": "A dog runs on the grass"}]


@pytest.fixture
def run(tmp_path, capsys):
    def go(references=REFERENCES, results=RESULTS, *options):
        paths = [tmp_path / "references.json", tmp_path / "results.json"]
        for path, data in zip(paths, (references, results), strict=True):
            path.write_text(data if isinstance(data, str) else json.dumps(data))
        code = main(["score", *map(str, paths), *map(str, options)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return go


def test_rows_are_matched_by_id_and_not_by_order(run, tmp_path):
    code, out, _ = run(REFERENCES, RESULTS, "--json", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and "cider_d" in out and "CIDEr-D|" in out
    assert report["images"]["1"]["bleu_4"] == pytest.approx(1.0, abs=1e-6)
    assert report["images"]["2"]["cider_d"] < 1 < report["images"]["1"]["cider_d"]
    mean = (report["images"]["1"]["cider_d"] + report["images"]["2"]["cider_d"]) / 2
    assert report["means"]["cider_d"] == pytest.approx(mean)
    # corpus BLEU-1: 6 of 6 and 1 of 3 words
    assert report["means"]["bleu_1"] == pytest.approx(7 / 9, abs=1e-6)


def test_frequencies_from_a_file(run, tmp_path):
    DocumentFrequencies.from_references([["a dog"], ["a cat"], ["grass"]]).save(tmp_path / "f.df")
    code, out, _ = run(REFERENCES, RESULTS, "--df", tmp_path / "f.df", "--metrics", "cider_d")
    assert code == 0 and "docs:3" in out and "bleu" not in out
    code, out, err = run(REFERENCES, RESULTS, "--df", tmp_path / "f.df", "--tokenizer", "whitespace")
    assert code == 2 and out == "" and "counted with tokenizer 'simple', not 'whitespace'" in err


def test_metrics_and_tokenizer_by_option(run, tmp_path):
    code, out, _ = run(REFERENCES, RESULTS, "--json", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and list(report["signatures"]) == ["cider_d", "bleu", "rouge_l"]
    assert report["images"]["1"]["rouge_l"] == pytest.approx(1)
    assert report["means"]["rouge_l"] == pytest.approx((1 + report["images"]["2"]["rouge_l"]) / 2)
    for signature in report["signatures"].values():
        assert "tok:simple" in signature and signature in out

    code, out, _ = run(REFERENCES, RESULTS, "--metrics", "rouge_l,cider", "--tokenizer", "whitespace", "--json", "-")
    report = json.loads(out)
    assert code == 0 and list(report["means"]) == ["rouge_l", "cider"]
    # "grass" is not "grass." now: 5 of 6 words in common, on both sides
    assert report["images"]["1"]["rouge_l"] == pytest.approx(5 / 6)
    assert all("tok:whitespace" in line for line in report["signatures"].values())


def test_a_metric_without_java_says_so(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, out, err = run(REFERENCES, RESULTS, "--metrics", "meteor")
    assert code == 2 and out == "" and err.startswith("error: meteor needs")


@pytest.mark.parametrize(
    ("references", "results", "options", "message"),
    [
        (REFERENCES, RESULTS[:1], [], "1 of 2 pictures have no result, first: 1"),
        (REFERENCES, [*RESULTS, RESULTS[0]], [], "more than once, first: 2"),
        (REFERENCES, [*RESULTS, {"image_id": 7, "caption": "x"}], [], "not in the references, first: 7"),
        (REFERENCES, "[{", [], "results.json: not JSON: line 1"),
        (REFERENCES, {"a": 1}, [], "results.json: expected COCO results"),
        (RESULTS, RESULTS, [], "references.json: expected COCO captions"),
        (REFERENCES, [{"image_id": 1}], [], "entry 0"),
        (REFERENCES, [{"image_id": 1, "caption": None}], [], "caption must be a string"),
        (
            {**REFERENCES, "images": [{"id": 1}, {"id": 2}, {"id": 3}]},
            RESULTS,
            [],
            "no caption, first ids: 3",
        ),
        (REFERENCES, RESULTS, ["--metrics", "chrf"], "'chrf'; There are: cider_d, bleu, rouge_l, cider, meteor"),
        (REFERENCES, RESULTS, ["--metrics", "cider_r"], "did you mean 'cider"),
        (REFERENCES, RESULTS, ["--tokenizer", "moses"], "unknown tokenizer 'moses'"),
        (REFERENCES, RESULTS, ["--df", "nowhere.df"], "nowhere.df: no such file"),
    ],
)
def test_wrong_input_is_named(run, references, results, options, message):
    code, out, err = run(references, results, *options)
    assert code == 2 and out == "" and message in err
