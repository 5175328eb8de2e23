"""The metrics as local modules of Hugging Face's `evaluate`, without network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("evaluate", reason="evaluate is not installed")

from reward_models import Bleu, CiderD, DocumentFrequencies
from reward_models.evaluate_modules import MODULES, path
from reward_models.metrics.coco import METRICS

PREDICTIONS = ["a dog runs on the grass", "a cat", "two men play"]
REFERENCES = [
    ["a dog is running on the grass", "a brown dog runs"],
    ["the cat sits on a mat"],
    ["two men play football in a park", "men play"],
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """evaluate takes its folders from the environment when it is first imported."""
    import evaluate

    home = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(home / "metrics"))
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def load():
    import evaluate

    return lambda name, **options: evaluate.load(path(name), **options)


def test_there_is_one_for_every_metric():
    assert set(MODULES) == set(METRICS)
    for name in MODULES:
        assert Path(path(name), f"{name}.py").is_file()
    with pytest.raises(ValueError, match="no evaluate module 'ciderd'; there are: cider_d, bleu"):
        path("ciderd")


def test_cider_d_equals_the_class(load):
    metric = load("cider_d")
    metric.add(prediction=PREDICTIONS[0], reference=REFERENCES[0])
    metric.add_batch(predictions=PREDICTIONS[1:], references=REFERENCES[1:])
    result = metric.compute()
    scorer = CiderD(DocumentFrequencies.from_references(REFERENCES), eos=False)
    assert result["cider_d_scores"] == scorer.score(PREDICTIONS, REFERENCES).tolist()
    assert result["cider_d"] == pytest.approx(sum(result["cider_d_scores"]) / 3)
    assert result["cider_d_signature"] == scorer.signature
    assert result["cider_d_document_frequencies"] == "references"
    # a second round starts empty
    assert len(metric.compute(predictions=PREDICTIONS[:2], references=REFERENCES[:2])["cider_d_scores"]) == 2


def test_options_at_load_and_at_compute(load, tmp_path):
    df = DocumentFrequencies.from_references([["a dog"], ["a cat"], ["grass on"]], tokenizer="whitespace")
    df.save(tmp_path / "f.df")
    expected = CiderD(df, eos=True).score(PREDICTIONS[:1], REFERENCES[:1]).tolist()
    rows = {"predictions": PREDICTIONS[:1], "references": REFERENCES[:1]}
    options = {"document_frequencies": str(tmp_path / "f.df"), "eos": True}
    at_load, at_compute = load("cider_d", **options).compute(**rows), load("cider_d").compute(**rows, **options)
    assert at_load == at_compute and at_load["cider_d_scores"] == expected
    assert at_load["cider_d_document_frequencies"] == str(tmp_path / "f.df")
    assert load("cider_d", **options).compute(**rows, eos=False)["cider_d_scores"] != expected

    smooth = load("bleu").compute(**rows, n=2, smooth=True)
    assert smooth["bleu_2_scores"] == Bleu(2).score(PREDICTIONS[:1], REFERENCES[:1]).tolist()
    assert "bleu_3" not in smooth


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cider_d", {}, "cider_d: only one row"),
        ("bleu", {"eso": True}, "bleu: .*'eso'"),
        ("bleu", {"tokenizer": "moses"}, "unknown tokenizer 'moses'"),
        ("meteor", {"java": "no-such-java"}, "meteor needs"),
        ("spice", {"java": "no-such-java"}, "spice needs"),
        ("cider", {"document_frequencies": "nowhere.df"}, "nowhere.df: no such file"),
    ],
)
def test_wrong_options_are_named(load, name, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(name).compute(predictions=PREDICTIONS[:1], references=REFERENCES[:1], **options)


def test_combined_results_do_not_clash(load):
    import evaluate

    names = ["cider_d", "cider", "bleu", "rouge_l"]
    combined = evaluate.combine([load(name) for name in names])
    combined.add_batch(predictions=PREDICTIONS, references=REFERENCES)
    result = combined.compute()
    alone = [load(name).compute(predictions=PREDICTIONS, references=REFERENCES) for name in names]
    assert result == {key: value for one in alone for key, value in one.items()}
    assert len(result) == sum(map(len, alone))
    assert [f"{name}_signature" in result for name in names] == [True] * 4


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java here")
@pytest.mark.slow
def test_meteor_through_evaluate(load):
    pytest.importorskip("pycocoevalcap", reason="no pycocoevalcap here")
    result = load("meteor").compute(predictions=["a b c d"], references=[["a b c d"]])
    assert result["meteor_scores"] == [1.0] and result["meteor"] == 1.0


def test_works_elsewhere_and_offline(tmp_path):
    """From another folder, with an empty cache of its own and the hub switched off, as a user meets it."""
    code = (
        "import evaluate; from reward_models.evaluate_modules import path\n"
        "print(evaluate.load(path('rouge_l')).compute(predictions=['a b'], references=[['a b']])['rouge_l'])"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and float(done.stdout) == 1, done.stderr


ROOT = Path(__file__).resolve().parents[2]
