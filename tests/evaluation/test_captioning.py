"""The caption metric suite."""

import numpy as np
import pytest

from mmft.evaluation.captioning import compare, metric_info, score_captions, summarise
from reward_models import DocumentFrequencies, corpus_bleu

REFERENCES = [
    ["a red circle on a blue background", "there is a red circle"],
    ["two green stars", "a pair of green stars on white"],
    ["a small brown dog runs through tall grass", "the dog is running"],
    ["a man holds a cup", "a man with a cup in his hand"],
]
CAPTIONS = [
    "a red circle on a blue background",
    "two green stars on a",
    "a dog runs through the grass",
    "a man",
]
DF = DocumentFrequencies.from_references(REFERENCES)


def score(captions=CAPTIONS, **options):
    return score_captions(captions, REFERENCES, DF, **options)


@pytest.mark.parametrize(
    ("caption", "bad"),
    [
        ("a red circle on a", 1.0),
        ("a man standing with the.", 1.0),
        ("A dog and A", 1.0),
        ("two dogs and", 1.0),
        ("", 1.0),
        (" . ", 1.0),
        ("a man with a cup", 0.0),
        ("a boy jumping up", 0.0),
        ("a woman in a sari", 0.0),
        ("the letter panda", 0.0),
    ],
)
def test_function_word_endings(caption, bad):
    found = score_captions(["a red circle", caption], REFERENCES[:2], DF)
    assert found["bad_ending"].tolist() == [0.0, bad]


def test_per_sample_arrays():
    found = score(claims=lambda caption, i: (i, i + 1))
    assert all(values.shape == (4,) for values in found.values())
    assert found["length"].tolist() == [7, 5, 6, 2]
    assert found["attribute_true"].tolist() == [0, 1, 2, 3]
    assert found["attribute_total"].tolist() == [1, 2, 3, 4]
    assert found["cider_d"].argmax() == 0  # the only caption that is a reference


def test_length_counts_words_not_marks():
    assert score_captions(["a red, red circle ."] * 2, REFERENCES[:2], DF)["length"].tolist() == [4, 4]


def test_corpus_bleu_is_the_reward_side_s():
    """Counted on our own for the bootstrap; a wrong closest length or clipping shows here."""
    found = summarise(score())
    assert found["corpus_bleu_4"]["mean"] == pytest.approx(corpus_bleu(CAPTIONS, REFERENCES)[3], abs=1e-9)
    # Not the mean of sentences.
    assert found["corpus_bleu_4"]["mean"] != pytest.approx(found["bleu_4"]["mean"], abs=1e-3)
    assert found["corpus_bleu_4"]["low"] <= found["corpus_bleu_4"]["mean"] <= found["corpus_bleu_4"]["high"]


def test_attribute_accuracy_is_a_ratio_over_claims():
    claims = [(1, 1), (0, 3), (0, 0), (2, 4)]
    found = summarise(score(claims=lambda caption, i: claims[i]))
    assert found["attribute_accuracy"]["mean"] == 3 / 8
    assert found["attribute_claims"]["mean"] == 2.0
    assert not {"attribute_true", "attribute_total"} & found.keys()


def test_distinct_word_pairs_by_hand():
    """a b, b c | a b, b d: 3 different of 4. Without caption 1: 2 of 2, without caption 2: 2 of 2."""
    found = summarise(score_captions(["a b c", "a b d"], REFERENCES[:2], DF))["distinct_2"]
    assert found == {"mean": 0.75, "low": 0.75, "high": 0.75}  # both left-out scores are equal: no spread


def test_distinct_interval_holds_the_score():
    """A bootstrap over rows would lie wholly below it."""
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(list("abcdefghij"), 6)) for _ in range(60)]
    found = summarise(score_captions(captions, REFERENCES[:1] * 60, DF))["distinct_2"]
    assert found["low"] < found["mean"] < found["high"]


def test_compare_is_after_minus_before_in_every_metric():
    before, after = score(["a circle on a"] * 4), score()
    found, old, new = compare(before, after), summarise(before), summarise(after)
    assert found.keys() == old.keys() == new.keys()
    for name, difference in found.items():
        assert difference["mean"] == pytest.approx(new[name]["mean"] - old[name]["mean"]), name
    assert found["bad_ending"]["mean"] == -0.75


def test_plain_arrays_and_missing_values():
    """Rewards as metrics: no captions, NaN where a function had nothing to say, a metric without any value."""
    found = summarise({"reward": np.array([1.0, np.nan, 3.0]), "reward/none": np.full(3, np.nan)})
    assert found.keys() == {"reward"}
    assert found["reward"]["mean"] == 2.0


def test_empty_set_is_refused():
    with pytest.raises(ValueError, match="no captions"):
        score_captions([], [], DF)


def test_captions_of_the_built_in_world_end_well():
    """A function word that ends real references would make the measure useless."""
    from mmft.data import scenes

    texts = [text for seed in list(scenes.SPLITS["train"])[:100] for text in scenes.captions(scenes.make_scene(seed))]
    found = score_captions(texts, [[text] for text in texts], DocumentFrequencies.from_references([[t] for t in texts]))
    assert found["bad_ending"].mean() == 0.0


def test_numbers_for_people():
    assert metric_info("bad_ending").text(0.0123) == "1.2 %"
    assert metric_info("bad_ending").text(-0.0123, signed=True) == "−1.2 pp"
    assert metric_info("reward/cider_d").text(0.5, signed=True) == "+0.500"
    assert metric_info("anything").text(float("nan")) == "–"
    assert metric_info("anything").text(None) == "–"


@pytest.mark.parametrize(
    ("name", "signed", "text"),
    [("cider_d", False, "0.000"), ("cider_d", True, "+0.000"), ("bad_ending", True, "+0.0 pp")],
)
def test_what_is_rounded_to_nothing_has_no_minus(name, signed, text):
    assert metric_info(name).text(-0.0, signed) == text
    assert metric_info(name).text(-0.00004, signed) == text
