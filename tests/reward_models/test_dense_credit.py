"""Dense credit: every prefix scored by the plain scorer, any split into pieces, and independence of the batch."""

from __future__ import annotations

import random

import numpy as np
import pytest

from reward_models.metrics import reference_metric, text
from reward_models.metrics.bleu import Bleu
from reward_models.metrics.cider import Cider, CiderD
from reward_models.metrics.ngrams import DocumentFrequencies
from reward_models.metrics.pieces import completed
from reward_models.metrics.rouge import RougeL
from reward_models.metrics.text import TOKENIZERS, tokenizer_named

REFERENCES = [
    ["a red ball on the grass", "the ball is red", "a ball"],
    ["two dogs run on the grass", "a dog and a dog run run run"],
    ["the man's t-shirt is red", "a man on a skateboard", "man on a bike in the street today"],
    ["zyx zyx wvu zyx", "zyx wvu a wvu wvu"],  # words that the corpus of frequencies does not have
    ["one " * 70 + "word", "grass"],
]
RESPONSES = [
    "a red ball on the red grass",
    "a dog run run run run on a dog and a dog",
    "the man on a bike",
    "zyx zyx wvu wvu zyx a zyx",
    "one word one grass",
]
KINDS = ["cider_d", "cider", "bleu", "bleu_unsmoothed", "rouge_l"]


def build(kind: str, tokenizer: str = "simple", eos: bool = True, references=tuple(REFERENCES[:3]), **options):
    if kind in ("cider_d", "cider"):
        df = DocumentFrequencies.from_references(references, tokenizer=tokenizer)
        return (CiderD if kind == "cider_d" else Cider)(df, eos=eos, **options)
    if kind == "rouge_l":
        return RougeL(tokenizer=tokenizer, eos=eos, **options)
    return Bleu(tokenizer=tokenizer, eos=eos, smooth=kind == "bleu", **options)


def split(text: str, rng: random.Random) -> list[str]:
    """A text cut at random places, with empty pieces strewn in."""
    cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [*pieces, *[""] * rng.randint(0, 2)]


def settled(tokenize, pieces: list[str]) -> tuple[list[str], list[int]]:
    """After each piece: the words of the text with which this and all later prefixes begin. Written as it is said."""
    words = tokenize("".join(pieces))
    prefixes = [tokenize("".join(pieces[: t + 1])) for t in range(len(pieces))]
    counts = [
        max(k for k in range(len(words) + 1) if all(later[:k] == words[:k] for later in prefixes[t:]))
        for t in range(len(pieces))
    ]
    return words, counts


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_credit_of_whole_words_is_the_difference_of_plain_scores(kind, eos):
    metric = build(kind, eos=eos)
    pieces = [[w if i == 0 else f" {w}" for i, w in enumerate(t.split())] + [""] for t in RESPONSES]
    ended = [True, False, True, True, False]
    got = metric.increments(pieces, references=REFERENCES, ended=ended)
    for row, words in enumerate(pieces):
        prefixes = ["".join(words[: t + 1]) for t in range(len(words))]
        scores = [metric.score([p], [REFERENCES[row]], ended=[False])[0] for p in prefixes]
        scores[-1] = metric.score([prefixes[-1]], [REFERENCES[row]], ended=[ended[row]])[0]
        np.testing.assert_allclose(got[row], np.diff(scores, prepend=0.0), rtol=0, atol=1e-12)
        assert got[row].dtype == np.float64 and np.abs(got[row]).max() > 0


def test_word_counts_at_the_piece_that_completes_it():
    rouge = RougeL()  # every matched word raises it
    cases = [
        ([" skate", "board"], "skateboard", [0, 1]),
        (["The", " dog", "'s", " ball", "."], "the dog 's ball", [1, 1, 1, 1, 0]),
        (["dog", "'", "s"], "dog's", [1, 0, 1]),
        (["t", "-", "shirt", "s"], "t-shirts", [0, 0, 0, 1]),
        (["a ", "red", " ", "dog"], "a red dog", [1, 1, 0, 1]),
        (["caf", "e\u0301", "!"], "caf\u00e9", [0, 1, 0]),
        (["a", "", " dog", "", "gy", "", ""], "a doggy", [1, 0, 0, 0, 1, 0, 0]),
        (["a dog runs", " home"], "a dog runs home", [1, 1]),
    ]
    for pieces, reference, credited in cases:
        (got,) = rouge.increments([pieces], references=[[reference.replace(" 's", "'s")]])
        assert (got > 0).tolist() == [bool(c) for c in credited], pieces


def test_end_token_is_credited_to_the_last_piece():
    metric = build("cider_d")
    pieces, refs = [["a", " ball", ""]] * 2, [["a ball"]] * 2  # 3 tokens, so no 4-gram: at most 7.5
    ended, cut = metric.increments(pieces, references=refs, ended=[True, False])
    assert ended[:2].tolist() == cut[:2].tolist()
    assert cut[2] == 0.0 and ended[2] == pytest.approx(7.5 - cut.sum(), abs=1e-9) and ended[2] > 1
    assert metric.increments(pieces, references=refs)[1].tolist() == ended.tolist()  # None: all ended
    (merged,) = metric.increments([["a", " ball"]], references=refs[:1])  # no piece of its own
    assert merged.tolist() == pytest.approx([ended[0], ended[1] + ended[2]])


ALPHABET = "abA.,-'\u2019 \t\n\u00a0\u0301\u00c9\u200d\u03a3\u4e2d\U0001f415\u00b0_1\ud800"


@pytest.mark.parametrize("tokenizer", list(TOKENIZERS))
def test_any_split_of_any_text_agrees_with_growing_prefixes(tokenizer):
    tokenize, rng = tokenizer_named(tokenizer), random.Random(1)
    refs = ["a b ab A's b-a \u4e2d 1", "aa bb a", "a dog's t-shirt \U0001f415 in the U.S. today"]
    metric = build("rouge_l", tokenizer)
    # scores of word lists, on tokens that need no tokeniser
    plain = build("rouge_l", "whitespace")
    plain_refs = [" ".join(tokenize(ref)) for ref in refs]
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 14))) for _ in range(150)]
    texts += [
        "A dog's t-shirt... isn't \U0001f415\u200d\U0001f9ba (in the U.S. today).",
        'we cannot, b-a  a\'s "ab" 1',
    ] * 20
    pieces = [split(t, rng) for t in texts]
    ended = [rng.random() < 0.5 for _ in texts]
    got = metric.increments(pieces, references=[refs] * len(texts), ended=ended)
    whole = metric.score(texts, [refs] * len(texts), ended=ended)
    for row, credit, score, end in zip(pieces, got, whole, ended, strict=True):
        words, counts = settled(tokenize, row)
        assert completed(tokenize, row)[0] == words
        prefixes = [" ".join(words[:k]) for k in counts]
        scores = plain.score(prefixes, [plain_refs] * len(prefixes), ended=[False] * len(prefixes))
        scores[-1] = score if end else scores[-1]
        np.testing.assert_allclose(credit, np.diff(scores, prepend=0.0), rtol=0, atol=1e-12, err_msg=repr(row))
        assert abs(credit.sum() - score) <= 1e-9


def test_tokenizer_that_looks_across_blanks_falls_back_to_prefixes(monkeypatch):
    def cities(line: str) -> list[str]:
        return [word.replace("_", " ") for word in line.replace("new york", "new_york").split()]

    monkeypatch.setitem(text.TOKENIZERS, "cities", cities)
    metric = build("rouge_l", "cities", eos=False)
    pieces = [["in", " new", " york"], ["in", " new", " jersey"]]
    big, plain = metric.increments(pieces, references=[["in new york"], ["in new jersey"]])
    assert (big > 0).tolist() == [True, False, True] and (plain > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_the_batch_to_the_last_bit(kind, monkeypatch):
    rng = random.Random(2)
    texts, refs = RESPONSES * 3, REFERENCES * 3
    pieces = [split(t, rng) for t in texts]
    together = build(kind)
    scores, credits = together.score(texts, refs), together.increments(pieces, references=refs)
    monkeypatch.setattr(reference_metric, "_CELLS", 30)
    monkeypatch.setattr(reference_metric, "_REMEMBERED", 3)
    blocks = build(kind, cache_size=2)
    blocks.score(["wvu v v wvu zyx"], [["u zyx v wvu v"]])  # new words come in another order
    for _ in range(2):
        assert blocks.score(texts, refs).tolist() == scores.tolist()
        assert [c.tolist() for c in blocks.increments(pieces, references=refs)] == [c.tolist() for c in credits]
        assert len(blocks._cache) <= 2
    for i in range(len(texts)):
        alone = build(kind)
        assert alone.score([texts[i]], [refs[i]])[0] == scores[i]
        assert alone.increments([pieces[i]], references=[refs[i]])[0].tolist() == credits[i].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_responses_without_words_or_without_pieces(kind):
    metric = build(kind)
    pieces = [[], [""], [".", " ", ""], ["a", " ball", ""], []]
    got = metric.increments(pieces, references=[["a ball"]] * 5)
    assert [len(credit) for credit in got] == [0, 1, 3, 3, 0]
    assert all(not credit.any() for i, credit in enumerate(got) if i != 3)
    assert got[3].sum() == pytest.approx(metric.score(["a ball"], [["a ball"]])[0], abs=1e-9)
    assert metric.increments([], references=[]) == []
    assert metric.increments([[], []], references=[["a"], ["b"]])[1].shape == (0,)


def test_wrong_pieces_are_named():
    metric = build("cider_d")
    for pieces, references, message in (
        (["a dog"], [["a"]], "cider_d: row 0: pieces must be a list of strings"),
        ([["a"], ["a", 3]], [["a"]] * 2, "row 1: pieces must be a list of strings"),
        ([["a"]], [["a"]] * 2, "1 completions but 2 references"),
        ([["a"], ["b"]], [["a"], []], "row 1 .id 'y'. has no references"),
        ("ab", [["a"]] * 2, "one list of strings per response"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.increments(pieces, references=references, id=["x", "y"])


def test_very_long_response_beside_short_ones():
    metric = build("cider_d", eos=False)
    pieces = [["dog"] + [" dog"] * 20_000, ["a", " dog"]] + [["a", " ball"]] * 50
    refs = [REFERENCES[1]] * 52
    got = metric.increments(pieces, references=refs)
    scores = metric.score(["".join(p) for p in pieces], refs)
    assert max(abs(credit.sum() - score) for credit, score in zip(got, scores, strict=True)) <= 1e-9
    assert len(got[0]) == 20_001
