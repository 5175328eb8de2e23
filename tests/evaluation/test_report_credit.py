"""What each word added to a caption's score."""

from __future__ import annotations

import pytest

from mmft.evaluation.captioning import score_captions
from mmft.evaluation.word_credit import word_credit
from reward_models import CiderD, DocumentFrequencies

REFERENCES = [["a red dog runs on the grass", "the dog runs"], ["a blue cat", "one cat sits on the mat"]]
FREQUENCIES = DocumentFrequencies.from_references([*REFERENCES, ["a man"], ["two birds fly"]])


@pytest.mark.parametrize(
    "text", ["a red dog runs", "  the dog's   dog—runs, ", "dog", "", "x", "the mat the mat", "t-shirt, on it!"]
)
def test_the_words_sum_to_the_score(text):
    scores = score_captions([text], REFERENCES[:1], FREQUENCIES)
    for name in ("cider_d", "bleu_4"):
        score = float(scores[name][0])
        found = word_credit(scores.increments[name], text, REFERENCES[0], score)
        assert [word for word, _ in found] == text.split()  # no end: these metrics count none
        assert sum(value for _, value in found) == pytest.approx(score, abs=1e-5)


def test_a_word_earns_what_its_prefix_scores_more():
    scores = score_captions(["a red dog"], REFERENCES[:1], FREQUENCIES)
    found = word_credit(scores.increments["cider_d"], "a red dog", REFERENCES[0], float(scores["cider_d"][0]))
    prefixes = [0.0, *score_captions(["a", "a red", "a red dog"], REFERENCES[:1] * 3, FREQUENCIES)["cider_d"]]
    assert [value for _, value in found] == pytest.approx([b - a for a, b in zip(prefixes, prefixes[1:])], abs=1e-6)


def test_what_the_end_earns_comes_last():
    metric = CiderD(FREQUENCIES, eos=True)
    text = "a red dog runs on the grass"
    score = float(metric.score([text], REFERENCES[:1])[0])
    found = word_credit(metric.increments, text, REFERENCES[0], score)
    assert found[-1][0] == "" and found[-1][1] > 0
    assert sum(value for _, value in found) == pytest.approx(score, abs=1e-4)


def test_nothing_to_compare_with():
    assert word_credit(CiderD(FREQUENCIES).increments, "a dog", [], 0.0) is None
    assert word_credit(CiderD(FREQUENCIES).increments, "a dog", [""], 0.0) is None
