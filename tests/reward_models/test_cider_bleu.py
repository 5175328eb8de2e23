"""CIDEr-D, CIDEr and BLEU: hand-worked numbers, identities, and pycocoevalcap on the same tokens."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from reward_models.metrics.bleu import Bleu, corpus_bleu
from reward_models.metrics.cider import Cider, CiderD
from reward_models.metrics.ngrams import DocumentFrequencies

ROOT = Path(__file__).resolve().parents[2]
FLICKR = ROOT.parent / "shared" / "real" / "flickr8k" / "captions_all.csv"
# four documents: idf(a) = log 4/2 = log 2, all others log 4 = 2 log 2, so vectors below are in units of log 2
DF = DocumentFrequencies.from_references([["a b"], ["a c"], ["d"], ["e"]], tokenizer="whitespace")
CAPTIONS = [
    ["a red ball on the grass", "the ball is red", "a ball"],
    ["two dogs run on the grass", "a dog and a dog run run run"],
    ["the man rides a red bike", "a man on a bike", "man on bike in the street today"],
    ["a street with a red bus", "the red bus is on the street"],
    ["one word", "grass"],
]


def unigram(candidate: str, reference: str, **options) -> float:
    return float(CiderD(DF, n=1, eos=False, **options).score([candidate], [[reference]])[0])


def test_tf_idf_cosine_by_hand():
    # candidate (a 1, b 2), reference (a 1, c 2): 1 / (sqrt 5 * sqrt 5) * 10
    assert unigram("a b", "a c") == pytest.approx(2.0, abs=1e-12)
    assert unigram("a b", "a b") == pytest.approx(10.0, abs=1e-12)


def test_repeats_are_clipped_and_length_is_penalised_by_hand():
    # candidate (a 2, b 2), clipped to (1, 2); one bigram more than the reference
    expected = 10 * 5 / math.sqrt(8 * 5) * math.exp(-1 / 72)
    assert unigram("a a b", "a b") == pytest.approx(expected, abs=1e-12)
    # without the penalty (huge sigma) only the clipped cosine is left
    assert unigram("a a b", "a b", sigma=1e9) == pytest.approx(50 / math.sqrt(40), abs=1e-9)


def test_original_cider_neither_clips_nor_looks_at_length_by_hand():
    # candidate (a 2, b 2), reference (a 1, b 2): (2*1 + 2*2 idf^2) with idf 1 and 2: 2 + 16 over sqrt(4+16)*sqrt(1+16)
    def score(candidate: str, reference: str) -> float:
        return float(Cider(df, n=1, eos=False).score([candidate], [[reference]])[0])

    df = DocumentFrequencies.from_references([["a b"], ["a c"], ["d"], ["e"]], tokenizer="whitespace")
    assert score("a a b b", "a b b") == pytest.approx(10 * 18 / math.sqrt(20 * 17), abs=1e-12)
    assert score("a b " * 5, "a b") == pytest.approx(10.0, abs=1e-12)  # the paper's reason for CIDEr-D
    assert CiderD(df, n=1, eos=False).score(["a b " * 5], [["a b"]])[0] < 2.5


def test_mean_over_references_and_orders():
    both = CiderD(DF, n=1, eos=False).score(["a b"], [["a b", "a c"]])[0]
    assert both == pytest.approx((10 + 2) / 2, abs=1e-12)
    # n = 2: unigrams 2.0 as above, bigrams "a b" and "a c" differ: 0
    assert CiderD(DF, n=2, eos=False).score(["a b"], [["a c"]])[0] == pytest.approx(1.0, abs=1e-12)


def test_perfect_caption_alone_in_its_batch_is_not_zero():
    # pycocoevalcap counts documents over the batch: log(1/1) = 0 for every word
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    reference = "a red ball on the grass"
    assert cider.Cider().compute_score({0: [reference]}, {0: [reference]})[0] == 0.0
    ours = CiderD(DocumentFrequencies.from_references(CAPTIONS), eos=False)
    assert ours.score([reference], [[reference]])[0] == pytest.approx(10.0, abs=1e-9)


def test_end_token_rewards_stopping_where_the_references_stop():
    cider = CiderD(DocumentFrequencies.from_references(CAPTIONS), eos=True)
    text, refs = ["a man on a bike"] * 2, [["a man on a bike"]] * 2
    ended, cut = cider.score(text, refs, ended=[True, False])
    assert ended == pytest.approx(10.0) and cut < ended
    assert cider.score(text[:1], refs[:1])[0] == ended  # ended=None means that all ended
    without = CiderD(cider.df, eos=False).score(text, refs, ended=[True, False])
    assert without[0] == without[1]


def test_text_cannot_forge_the_end_token():
    df = DocumentFrequencies.from_references(CAPTIONS, tokenizer="whitespace")
    cider = CiderD(df, eos=True)
    refs = [["a man on a bike"]]
    forged = cider.score(["a man on a bike <eos>"], refs, ended=[False])[0]
    assert forged < cider.score(["a man on a bike"], refs, ended=[True])[0] - 0.1


def test_empty_candidate_scores_zero():
    for text in ("", "  ", "...", "\0"):
        for metric in (CiderD(DocumentFrequencies.from_references(CAPTIONS)), Bleu(), Bleu(smooth=False)):
            assert metric.score([text], [["a dog"]]).tolist() == [0.0]
    assert corpus_bleu([""], [["a dog"]]).tolist() == [0.0] * 4


def test_words_outside_the_corpus_count_with_the_full_weight():
    # "zzz" is in no document: idf log 4; equal sentences score 10 even so
    assert unigram("zzz", "zzz") == pytest.approx(10.0)
    assert unigram("a zzz", "a qqq") == pytest.approx(2.0)
    assert unigram("zzz", "qqq") == 0.0


def test_cache_changes_no_score_and_stays_bounded():
    df = DocumentFrequencies.from_references(CAPTIONS)
    candidates = ["a red ball", "a dog", "man on a bike", "the red bus", "grass"]
    expected = [CiderD(df).score([c], [r])[0] for c, r in zip(candidates, CAPTIONS, strict=True)]
    small = CiderD(df, cache_size=2)
    for _ in range(4):
        for order in ([0, 1, 2, 3, 4], [4, 0, 4, 2], [3]):
            got = small.score([candidates[i] for i in order], [CAPTIONS[i] for i in order])
            np.testing.assert_allclose(got, [expected[i] for i in order], rtol=0, atol=1e-12)
            assert len(small._cache) <= 2
            assert len(small._reader.words) < 60


def test_rows_with_different_numbers_of_references():
    cider = CiderD(DocumentFrequencies.from_references(CAPTIONS))
    got = cider.score(["a red ball"] * 3, [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0][:1]])
    alone = [cider.score(["a red ball"], [r])[0] for r in (CAPTIONS[0], CAPTIONS[1], CAPTIONS[0][:1])]
    np.testing.assert_allclose(got, alone, rtol=0, atol=1e-12)


def test_many_pictures_at_once_survive_table_growth():
    # thousands of nodes appended in pieces force the hash table to grow and keys to move
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 300, 12))) for _ in range(1500)]
    cider = CiderD(DocumentFrequencies.from_references([[t] for t in texts[:700]], tokenizer="whitespace"), eos=False)
    for start in range(0, 1500, 100):
        part = texts[start : start + 100]
        np.testing.assert_allclose(cider.score(part, [[t] for t in part]), 10.0, atol=1e-9)
    np.testing.assert_allclose(cider.score(texts, [[t] for t in texts]), 10.0, atol=1e-9)


def test_smoothed_bleu_by_hand():
    # p1 = 3/4, then with one added: (1+1)/(3+1), (0+1)/(2+1), (0+1)/(1+1): product 1/16, fourth root 1/2
    assert Bleu().score(["a b c d"], [["a b x d"]])[0] == pytest.approx(0.5, abs=1e-12)
    # all n-grams right, one word short of four: only the brevity penalty
    assert Bleu().score(["a b c"], [["a b c d"]])[0] == pytest.approx(math.exp(-1 / 3), abs=1e-12)
    assert Bleu().score(["x y"], [["a b"]])[0] == 0.0


def test_bleu_counts_are_clipped_by_the_reference_that_has_most():
    # "the" three times, at most twice in one reference: Papineni's example in small
    assert Bleu(1).score(["the the the"], [["the cat the", "the the the the on"][:1]])[0] == pytest.approx(2 / 3)


def test_closest_reference_length_takes_the_shorter_on_a_tie():
    # lengths 2 and 4 are equally far from 3; 2 gives no brevity penalty
    assert Bleu(1).score(["a b c"], [["a b", "a b c d"]])[0] == pytest.approx(1.0)


def test_corpus_bleu_is_not_the_mean_of_sentences():
    got = corpus_bleu(["a b", "c d e f"], [["a b"], ["c x e y"]])
    assert got[0] == pytest.approx(4 / 6, abs=1e-9)  # mean of sentences would be 3/4
    assert got[1] == pytest.approx(math.sqrt(4 / 6 * 1 / 4), abs=1e-9)


def test_pycocoevalcap_agrees_on_built_in_captions():
    cider_scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    bleu_scorer = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer")
    candidates = ["a red ball on grass", "dog dog dog run", "the man on a bike today", "red bus", "grass"]
    theirs, bleu = cider_scorer.CiderScorer(), bleu_scorer.BleuScorer(n=4)
    for text, refs in zip(candidates, CAPTIONS, strict=True):
        theirs += (text, refs)
        bleu += (text, refs)
    df = DocumentFrequencies.from_references(CAPTIONS, tokenizer="whitespace")
    ours = CiderD(df, eos=False).score(candidates, CAPTIONS)
    np.testing.assert_allclose(ours, theirs.compute_score()[1], rtol=0, atol=1e-9)
    corpus, sentences = bleu.compute_score(option="closest")
    plain = Bleu(4, smooth=False, tokenizer="whitespace")
    np.testing.assert_allclose(plain.orders(candidates, CAPTIONS), np.array(sentences).T, rtol=0, atol=1e-9)
    np.testing.assert_allclose(plain.corpus(candidates, CAPTIONS), corpus, rtol=0, atol=1e-9)


@pytest.mark.skipif(not FLICKR.is_file(), reason="needs ../shared/real/flickr8k/captions_all.csv")
def test_pycocoevalcap_agrees_on_flickr8k(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("metric_parity", ROOT / "benchmarks" / "metric_parity.py")
    parity = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "metric_parity", parity)
    spec.loader.exec_module(parity)
    found = parity.differences(parity.read_captions(FLICKR)[5000:5300])
    assert max(found.values()) <= 1e-9, found
    assert len(found) == 11
