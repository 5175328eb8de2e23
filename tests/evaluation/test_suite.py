"""The metric suite: variety, objects, form, what is left out, differences and slices."""

from itertools import product

import numpy as np
import pytest

from mmft.evaluation.diversity import spread
from mmft.evaluation.scores import Captioned, Scores, differences, slices
from mmft.evaluation.slices import groups_of
from mmft.evaluation.statistics import mean
from mmft.evaluation.suite import SUITE, score
from mmft.evaluation.tables import difference_table, headline, score_table, slice_table, verdict
from reward_models import CiderD, DocumentFrequencies

REFERENCES = [
    ["a dog runs through the grass", "the dog is running over a lawn"],
    ["a cat sleeps on a red couch", "there is a cat on the sofa"],
    ["two boys play ball", "two boys with a ball in the park"],
    ["a man rides a horse on the beach", "a rider on his horse"],
]
CAPTIONS = ["a dog runs through the grass", "a dog on a sofa", "two boys play with a", "a man rides a man"]


def given(captions=CAPTIONS, references=REFERENCES, **more) -> Captioned:
    return Captioned(list(range(len(captions))), captions, references, **more)


def test_without_names_all_that_can_be_done_is_done_and_the_rest_has_a_reason():
    quick = {name: SUITE[name] for name in SUITE if name not in ("meteor", "spice")}  # they need Java
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmft.evaluation.suite.SUITE", quick)
        found = score(given())
    assert set(found.left_out) == {"cider_d", "claims", "objects", "clip", "self_cider"}
    assert "--clip" in found.left_out["clip"] and "--num" in found.left_out["self_cider"]
    assert "too few captions" in found.left_out["objects"]
    assert {"Bleu_4", "ROUGE_L", "CIDEr", "distinct_1", "vocabulary", "length"} <= found.summary().keys()


def test_what_is_asked_for_by_name_and_cannot_be_done_is_an_error():
    with pytest.raises(ValueError, match="metric clip: needs a CLIP model"):
        score(given(), ["bleu", "clip"])
    with pytest.raises(ValueError, match="unknown metric 'blue'; did you mean bleu"):
        score(given(), ["blue"])
    with pytest.raises(ValueError, match="no captions to score"):
        score(given([], []), ["bleu"])
    with pytest.raises(ValueError, match="4 captions, 1 lists of references"):
        score(given(references=REFERENCES[:1]), ["bleu"])


def test_the_official_cider_is_not_the_one_of_training():
    """Frequencies of these references against those of the training captions: other numbers, under other names."""
    training = DocumentFrequencies.from_references([["a dog", "the grass"], ["a cat"], ["a beach"], ["a dog runs"]])
    found = score(given(training=training), ["cider", "cider_d"])
    assert found.rows["cider_d"] == pytest.approx(CiderD(training, eos=False).score(CAPTIONS, REFERENCES))
    own = CiderD(DocumentFrequencies.from_references(REFERENCES, tokenizer="ptb"), eos=False)
    assert found.rows["CIDEr"] == pytest.approx(own.score(CAPTIONS, REFERENCES))
    assert abs(found.rows["CIDEr"] - found.rows["cider_d"]).max() > 0.1
    assert found.signatures["CIDEr"] != found.signatures["cider_d"]


def test_one_picture_has_no_frequencies():
    with pytest.raises(ValueError, match="at least two pictures"):
        score(given(CAPTIONS[:1], REFERENCES[:1]), ["cider"])


def test_objects_by_hand():
    """Said: dog | dog, couch | boy, ball | man, man. Of these the second dog is in no reference (couch is the sofa):
    1 of 6. There: dog, lawn | cat, couch | boy, ball | man, horse: 5 of 8 are named."""
    objects = {"dog": [], "cat": [], "couch": ["sofa"], "boy": [], "ball": [], "man": [], "horse": [], "lawn": []}
    found = score(
        given(["a dog runs", "a dog on a sofa", "boys play ball", "a man rides a man"], objects=objects), ["objects"]
    )
    assert found.summary()["chair_i"]["mean"] == 1 / 6
    assert found.summary()["chair_s"]["mean"] == 1 / 4
    assert found.summary()["object_recall"]["mean"] == 5 / 8
    assert found.rows["chair_i"].tolist() == [0.0, 0.5, 0.0, 0.0]


def test_a_caption_without_objects_says_nothing_false():
    found = score(given(["it is", "no", "so", "oh"], objects={"dog": []}), ["objects"])
    assert np.isnan(found.rows["chair_i"]).all() and found.rows["chair_s"].tolist() == [0, 0, 0, 0]
    assert "chair_i" not in found.summary()  # 0 of 0


def test_claims_are_a_ratio_of_sums():
    claims = [(1, 1), (0, 3), (0, 0), (2, 4)]
    found = score(given(claims=lambda caption, i: claims[i]), ["claims"]).summary()
    assert found["attribute_accuracy"]["mean"] == 3 / 8 and found["attribute_claims"]["mean"] == 2.0


def test_form():
    found = score(given(["a dog", "a dog and", "a a a a", ""], ended=[True, True, False, True]), ["form"])
    assert found.rows["length"].tolist() == [2, 3, 4, 0]
    assert found.rows["bad_ending"].tolist() == [0, 1, 1, 1]
    assert found.rows["repetition"].tolist() == [0, 0, 1, 0]  # every word repeats the one before
    assert found.rows["unfinished"].tolist() == [0, 0, 1, 0]


def test_spread_by_hand():
    """All alike: 0. Nothing in common: 1. Two alike and one apart: eigenvalues 2, 1, 0."""
    assert spread(np.ones((3, 3))) == pytest.approx(0.0, abs=1e-9)
    assert spread(np.eye(4)) == pytest.approx(1.0)
    kernel = np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert spread(kernel) == pytest.approx(-np.log(np.sqrt(2) / (np.sqrt(2) + 1)) / np.log(3))
    assert np.isnan(spread(np.zeros((2, 2)))) and np.isnan(spread(np.eye(1)))


def test_self_cider_of_captions():
    same, apart = ["a dog runs"] * 3, ["a dog runs", "two boys play", "there is horse"]
    samples = [same, apart, [*same[:2], apart[1]], ["", "", ""]]
    found = score(given(samples=samples), ["self_cider"]).rows["self_cider"]
    assert found[0] == pytest.approx(0.0, abs=1e-6) and found[1] > 0.9
    assert 0.3 < found[2] < 0.7 and np.isnan(found[3])


def test_variety_by_hand():
    """a dog, a cat: 3 different of 4 words, 2 of 2 pairs."""
    found = score(given(["a dog", "a cat"], REFERENCES[:2]), ["diversity"]).summary()
    assert (found["distinct_1"]["mean"], found["distinct_2"]["mean"]) == (0.75, 1.0)
    assert found["vocabulary"] == {"mean": 3.0, "low": None, "high": None}


def test_a_share_ends_at_nothing_and_at_all():
    """One picture with many words beside five with the same one: the jackknife reaches beyond 0 and 1."""
    captions = ["a b c d e f g h i j", *["a"] * 5]
    found = score(given(captions, [["a"]] * 6), ["diversity"]).summary()
    assert found["distinct_1"]["mean"] == pytest.approx(10 / 15) and found["distinct_1"]["low"] == 0.0
    assert found["distinct_1"]["high"] == 1.0
    same = score(given(["a"] * 6, [["a"]] * 6), ["diversity"])
    change = differences(same, score(given(captions, [["a"]] * 6), ["diversity"]))["distinct_1"]
    assert change["mean"] == pytest.approx(0.5) and change["high"] == 1.0


@pytest.mark.parametrize(("pictures", "bounded"), [(1, False), (4, False), (5, True)])
def test_a_score_of_few_pictures_has_no_interval(pictures, bounded):
    """Of one picture it would have no width, as if the score were certain."""
    side, other = (
        score(given(list(texts)[:pictures], REFERENCES[:1] * pictures), ["form", "diversity"])
        for texts in (["a b", "a", "a b c", "d e", "f g"], ["a c"] * 5)
    )
    for found in (side.summary(), differences(other, side)):
        for name in ("length", "distinct_1"):
            assert (found[name]["low"] is not None, found[name]["high"] is not None) == (bounded, bounded)


def test_what_is_given_for_a_metric_must_not_be_left_out_in_silence(monkeypatch):
    monkeypatch.delitem(SUITE, "meteor")  # Java takes long
    with pytest.raises(ValueError, match="metric clip: needs the pictures"):
        score(given(clip="somewhere"), None)
    with pytest.raises(ValueError, match="metric objects: needs references"):
        score(given(references=[[]] * 4, objects={"dog": []}), None)


# --- differences -----------------------------------------------------------------------------------


def test_differences_are_first_minus_second_with_p():
    better, worse = (
        score(given(), ["bleu", "cider", "diversity"]),
        score(given(["a dog"] * 4), ["bleu", "cider", "diversity"]),
    )
    found, old, new = differences(worse, better), worse.summary(), better.summary()
    assert found.keys() == old.keys() - {"vocabulary"}
    for name, difference in found.items():
        assert difference["mean"] == pytest.approx(new[name]["mean"] - old[name]["mean"]), name
        assert difference["p_holm"] >= difference["p"] >= 2 / 2**4, name
    assert found["CIDEr"]["p"] == 2 / 2**4  # better in every picture: only all swapped and none swapped are as far


def test_a_model_against_itself():
    side = score(given(), ["bleu", "cider", "form", "diversity"])
    for name, difference in differences(side, side).items():
        assert (difference["mean"], difference["p"], difference["p_holm"]) == (0.0, 1.0, 1.0), name


def test_distinct_words_are_swapped_by_picture():
    """Against all swaps, counted anew with sets."""
    sides = ["a b", "a b c", "d d d d", "e"], ["f g h", "a", "i j k", "f f"]
    scored = [score(given(captions), ["diversity"]) for captions in sides]

    def share(texts) -> float:
        words = " ".join(texts).split()
        return len(set(words)) / len(words)

    def difference(swaps) -> float:
        pairs = [(b, a) if s else (a, b) for s, a, b in zip(swaps, *sides, strict=True)]
        return abs(share([b for _, b in pairs]) - share([a for a, _ in pairs]))

    seen = difference([False] * 4)
    slow = np.mean([difference(swaps) >= seen - 1e-12 for swaps in product([False, True], repeat=4)])
    assert 2 / 16 <= slow < 1
    assert differences(*scored)["distinct_1"]["p"] == slow


# --- slices ----------------------------------------------------------------------------------------


def test_slices_are_means_of_their_pictures_and_differ_from_all_others():
    values = np.array([1.0, 2, 3, 4, 5, 10, 20, 30, 40, 50, 60, 70])
    scores = Scores(rows={"m": values}, sums={"m": mean(values)})
    found = slices(scores, groups_of("where", ["in"] * 5 + ["out"] * 7))
    assert found["in"]["rows"] == 5 and found["in"]["scores"]["m"]["mean"] == 3.0
    assert found["in"]["to_the_rest"]["m"]["mean"] == 3.0 - 40.0
    assert found["out"]["to_the_rest"]["m"]["high"] > 37.0 > found["out"]["to_the_rest"]["m"]["low"] > 0


def test_few_pictures_get_no_interval():
    values = np.arange(9.0)
    found = slices(Scores(rows={"m": values}, sums={"m": mean(values)}), groups_of("c", ["a"] * 4 + ["b"] * 5))
    assert found["a"]["scores"]["m"] == {"mean": 1.5, "low": None, "high": None}
    assert found["b"]["to_the_rest"]["m"]["low"] is None  # the rest is as small


def test_no_metric_with_values_of_pictures_no_slices():
    with pytest.raises(ValueError, match="slices need a metric"):
        slices(score(given(), ["diversity"]), groups_of("c", [1, 1, 2, 2]))


def test_groups():
    assert {k: v.tolist() for k, v in groups_of("c", ["x", None, "y", "x"]).items()} == {
        "x": [0, 3],
        "y": [2],
        "(none)": [1],
    }
    assert list(groups_of("n", [10, 2, 2, 10])) == ["2", "10"]  # in the order of numbers
    assert {k: v.tolist() for k, v in groups_of("l", [["a"], ["a", "b"], []]).items()} == {"0": [2], "1": [0], "2": [1]}
    quarters = groups_of("n", [str(i) for i in range(1, 101)])
    assert [len(places) for places in quarters.values()] == [25, 25, 25, 25]
    assert list(quarters)[0].startswith("1 to ") and list(quarters)[-1].endswith(" to 100")
    assert np.sort(np.concatenate(list(quarters.values()))).tolist() == list(range(100))
    gaps = groups_of("n", ["", float("nan"), None, *(str(i) for i in range(1, 41))])  # as of a CSV with empty cells
    assert [len(places) for places in gaps.values()] == [10, 10, 10, 10, 3] and gaps["(none)"].tolist() == [0, 1, 2]
    assert list(groups_of("n", [float("inf"), *map(float, range(9))]))[-1] == "inf"
    many = groups_of("c", [f"v{i // 3}" for i in range(90)])
    assert len(many) == 20 and sum(map(len, many.values())) == 90 and "(11 others)" in many


def test_a_column_of_names_makes_no_groups():
    with pytest.raises(ValueError, match="makes no groups"):
        groups_of("c", [f"v{i}" for i in range(40)])


def test_a_column_that_says_the_same_of_all_has_nothing_to_compare():
    values = np.arange(6.0)
    found = slices(Scores(rows={"m": values}, sums={"m": mean(values)}), groups_of("c", ["a"] * 6))
    assert found.keys() == {"a"} and "to_the_rest" not in found["a"]
    assert found["a"]["scores"]["m"]["low"] < 2.5 < found["a"]["scores"]["m"]["high"]
    assert slice_table(found, "m").splitlines()[1].split()[:3] == ["a", "6", "2.500"]


def test_a_sure_difference_of_what_is_neither_good_nor_bad():
    """Longer captions are neither; that they are longer is no chance."""
    sure = {"mean": 2.0, "low": 1.5, "high": 2.5, "p": 0.0001, "p_holm": 0.0004}
    assert "the first is higher by 2.000 (+1.500 to +2.500); chance alone would hardly" in verdict("length", sure)
    lower = {"mean": -0.5, "low": -0.6, "high": -0.4, "p": 0.0001, "p_holm": 0.0004}
    assert "is better by 50.0 %" in verdict("chair_i", lower) and "is worse by" in verdict("CIDEr", lower)
    assert "may well be chance" in verdict("length", sure | {"p_holm": 0.2})


def test_tables():
    side = score(given(), ["bleu", "cider", "form", "diversity"])
    text = score_table(side.summary())
    assert "CIDEr-D, official" in text and "Different words used" in text
    assert len({len(line) for line in text.splitlines()}) == 1  # columns are aligned
    text = difference_table(side.summary(), side.summary(), differences(side, side))
    assert "1.000" in text and len({len(line) for line in text.splitlines()}) == 1
    name = headline(list(side.sums))
    assert name == "CIDEr"
    text = slice_table(slices(side, groups_of("c", ["a", "a", "b", "b"])), name)
    assert text.splitlines()[1].split()[:2] == ["a", "2"]
