"""Shaping terms against numbers worked by hand, their dense credit against the plain term on every prefix."""

from __future__ import annotations

import csv
import math
import random
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from mmft.data.scenes import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, attribute_claims, scene_rows
from reward_models import DocumentFrequencies
from reward_models.terms import (
    TERMS,
    Coverage,
    Format,
    Hallucination,
    LengthWindow,
    MissingEos,
    Novelty,
    Repetition,
    Richness,
    Vocabulary,
)

ROOT = Path(__file__).resolve().parents[2]
FLICKR = ROOT.parent / "shared/real/flickr8k"
WORDS = Vocabulary(["dog", "cat", "ball"], ["red", "small"], synonyms={"dog": ["puppy"]})
TRAINING = [["a b c d"], ["x", "dog bus"], ["the dog"], ["y"]]


def scored(term, *texts, **columns):
    return term(prompts=None, completions=list(texts), **columns)


# --- coverage and hallucination ----------------------------------------------------------------------


def test_coverage_of_objects_counts_each_once():
    term = Coverage(vocabulary=WORDS)
    objects = ["dog", "balls", "tree"]  # "tree" is known through the row
    texts = ["", "a puppy", "a dog and a dog", "two dogs with a ball", "trees, a ball and a dog", "a cat"]
    assert scored(term, *texts, objects=[objects] * 6) == [0.0, 1 / 3, 1 / 3, 2 / 3, 1.0, 0.0]


def test_ground_truth_of_the_built_in_world():
    row = {
        "objects": [
            [
                {"shape": "circle", "colour": "red", "size": "large", "place": "top left"},
                {"shape": "ring", "colour": "blue", "size": "small", "place": "centre"},
            ]
        ],
        "background": ["striped grey"],
    }
    text = "a large red circle and a red ring on a grey background"
    # objects: circle, ring, background; attributes: red circle, large circle, blue ring, small ring, striped and
    # grey background, of which the text has three and claims a red ring besides
    assert scored(Coverage(), text, **row) == [1.0]
    assert scored(Coverage(of="attributes"), text, **row) == [3 / 6]
    assert scored(Coverage(of="all"), text, **row) == [6 / 9]
    assert scored(Hallucination(vocabulary=WORDS, of="attributes"), text, **row) == [-1 / 4]
    assert scored(Hallucination(vocabulary=WORDS, of="all"), text, **row) == [-1 / 7]


def test_relations_by_phrase_and_by_their_ends():
    term = Coverage(of="relations", vocabulary=WORDS)
    facts = [["left of"], [("dog", "left of", "ball")], [{"subject": "dog", "relation": "left of", "object": None}]]
    right, swapped = "a dog to the left of a ball", "a ball left of a puppy"
    assert scored(term, right, right, right, relations=facts) == [1.0, 1.0, 1.0]
    assert scored(term, swapped, swapped, swapped, relations=facts) == [1.0, 0.0, 0.0]
    judge = Hallucination(of="relations", vocabulary=WORDS)
    assert scored(judge, swapped, swapped, swapped, relations=facts) == [0.0, -1.0, -1.0]


def test_hallucination_is_a_share_of_distinct_mentions_or_a_flag():
    texts = ["a dog and a cat and a cat", "a dog, a dog, a dog and a cat", "a dog", "nothing here", ""]
    objects = [["dog"]] * 5
    assert scored(Hallucination(vocabulary=WORDS), *texts, objects=objects) == [-0.5, -0.5, 0.0, 0.0, 0.0]
    flag = Hallucination(vocabulary=WORDS, chair="s")
    assert scored(flag, *texts, objects=objects) == [-1.0, -1.0, 0.0, 0.0, 0.0]


def test_rows_without_ground_truth_have_no_opinion():
    rows = {"objects": [None, []]}
    assert scored(Coverage(vocabulary=WORDS), "a dog", "a dog", **rows) == [None, None]
    assert scored(Hallucination(vocabulary=WORDS), "a dog", "a dog", **rows) == [None, -1.0]  # an empty list is known
    assert scored(Hallucination(vocabulary=WORDS, of="relations"), "a dog", objects=[["dog"]]) == [None]
    credit = Coverage(vocabulary=WORDS).increments([["a", " dog"]], objects=[None])
    assert [row.tolist() for row in credit] == [[0.0, 0.0]]


def test_an_empty_list_of_references_is_no_ground_truth():
    assert scored(Coverage(vocabulary=WORDS), "a dog", references=[[]]) == [None]
    assert scored(Hallucination(vocabulary=WORDS), "a dog", references=[[]]) == [None]


def test_relations_of_references_leave_their_subject_open_and_parts_of_phrases_do_not_count():
    term = Coverage(of="relations", vocabulary=WORDS)
    assert scored(term, "a cat on a ball", "a ball on a dog", references=[["a dog on a ball"]] * 2) == [1.0, 0.0]
    phrases = Coverage(vocabulary=Vocabulary(["fire", "fire truck"]))
    assert scored(phrases, "a fire", "fire trucks", references=[["a fire truck"]] * 2) == [0.0, 1.0]


def test_labels_and_lists_of_attributes_are_read_and_numbers_passed_over():
    things = [{"label": "kite", "attributes": ["red", "torn"], "size": [30, 40], "box": "small"}]
    assert scored(Coverage(of="attributes"), "a torn kite", labels=[things]) == [0.5]
    assert scored(Coverage(), "kites", labels=[["kite", "Fire-Truck"]]) == [0.5]


def test_references_stand_in_and_agreement_is_asked_for():
    references = [["a red dog", "a small puppy with a ball", "a dog"]]
    text = "a red dog and a cat"
    assert scored(Coverage(vocabulary=WORDS), text, references=references) == [1 / 2]  # dog, ball
    assert scored(Coverage(vocabulary=WORDS, at_least=2), text, references=references) == [1.0]  # dog
    assert scored(Coverage(vocabulary=WORDS, at_least=2), "a dog", references=[["a dog"]]) == [1.0]  # there is but one
    assert scored(Hallucination(vocabulary=WORDS), text, references=references) == [-1 / 2]
    assert scored(Hallucination(vocabulary=WORDS), text, references=references, objects=[["cat"]]) == [
        -1 / 2
    ]  # the dog
    both = Hallucination(vocabulary=WORDS, truth="both")
    assert scored(both, text, references=references, objects=[["cat"]]) == [0.0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Coverage(of="verbs"), "of must be one of objects"),
        (lambda: Coverage(truth="x"), "truth must be"),
        (lambda: Coverage(at_least=0), "at_least"),
        (lambda: Coverage(vocabulary={"nouns": []}), "nouns"),
        (lambda: Hallucination(), "no vocabulary of objects"),
        (lambda: Hallucination(vocabulary=WORDS, chair="x"), "chair"),
        (lambda: scored(Coverage(), "a", "b", objects=[["a"], "b"], id=["p", "q"]), r"row 1 \(id 'q'\): objects"),
        (lambda: scored(Coverage(), "a", objects=[[{"colour": "red"}]]), "row 0: object .* has no name"),
        (lambda: scored(Coverage(), "a", relations=[[("a", "b")]]), "row 0: relation"),
        (lambda: scored(Coverage(truth="references"), "a"), "needs the column 'references'"),
        (lambda: scored(Coverage(), "a", references=["a dog"]), "row 0: references must be a list"),
        (lambda: scored(Coverage(), "a", references=[["a dog", None]]), "row 0: references must be a list"),
        (lambda: scored(Repetition(), "a", 3), "repetition: row 1"),
        (lambda: LengthWindow(min=4, max=3), "min=4, max=3"),
        (lambda: LengthWindow(max=3, width=0), "width"),
        (lambda: scored(LengthWindow(max=3, unit="tokens"), "a"), "completion_ids"),
        (lambda: Repetition(n=0), "n must be"),
        (lambda: Novelty(TRAINING, n=5), "n must be a whole number from 1 to 4, got 5"),
        (lambda: Novelty(TRAINING, n=True), "n must be a whole number from 1 to 4, got True"),
        (lambda: Novelty(TRAINING, cap="1"), "cap must be a number, got '1'"),
        (lambda: Richness(TRAINING, target="4"), "target must be a number"),
        (lambda: Repetition(n=2.0), "n must be a whole number of at least 1, got 2.0"),
        (
            lambda: Repetition(runs="no"),
            "runs must be true or false, got 'no' .in YAML 1.2 yes, no, on and off are text",
        ),
        (lambda: Format(tag="a", strict="no"), "strict must be true or false, got 'no'"),
        (lambda: Format(tag="a", strict=1), "strict must be true or false, got 1"),
        (lambda: Format(bad_endings=0), "bad_endings must be"),
        (lambda: Format(bad_endings="no"), "bad_endings must be true, false or a list of words, got 'no'"),
        (lambda: Format(json="no"), "json must be true"),
        (lambda: Format(tag="a", banned=3), "banned must be"),
        (lambda: Format(regex=3), "regex 3 is broken"),
        (lambda: Format(tag=3), "tag must be a name"),
        (lambda: LengthWindow(min=2.5), "min must be a whole number of at least 0, got 2.5"),
        (lambda: LengthWindow(max="9"), "max must be a whole number"),
        (lambda: LengthWindow(max=9, width="4"), "width must be a number"),
        (lambda: Coverage(attribute_keys="colour"), "attribute_keys must be a list of strings, got 'colour'"),
        (lambda: Coverage(TRAINING, min_documents=-3), "min_documents must be a whole number of at least 1, got -3"),
        (lambda: Coverage(TRAINING, min_documents="x"), "min_documents must be a whole number"),
        (lambda: Coverage(TRAINING, vocabulary=WORDS, min_documents=2), "min_documents .* but vocabulary is given"),
        (lambda: Coverage(min_documents=2), "min_documents .* but there are none"),
        (lambda: Novelty(DocumentFrequencies.from_references(TRAINING), copy=1.0), "cannot tell a copy"),
        (lambda: Novelty(None), "training captions"),
        (lambda: Richness(DocumentFrequencies.from_references(TRAINING), tokenizer="whitespace"), "counted with"),
        (lambda: Richness(TRAINING, by="x"), "by must be"),
        (lambda: Format(), "nothing to check"),
        (lambda: Format(regex="("), "regex"),
        (lambda: Format(json={"a": "float"}), "'a' has type 'float'"),
    ],
)
def test_what_is_wrong_is_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# --- wording -----------------------------------------------------------------------------------------


def test_length_window():
    texts = [" ".join("abcdefgh"[:n]) for n in range(9)]
    linear = LengthWindow(min=3, max=5, width=2)
    assert scored(linear, *texts) == [0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    gaussian = LengthWindow(min=3, max=5, width=2, fall="gaussian")
    assert scored(gaussian, texts[1], texts[4], texts[8]) == pytest.approx([math.exp(-0.5), 1.0, math.exp(-9 / 8)])
    assert scored(LengthWindow(min=3, width=2), texts[8]) == [1.0]
    tokens = LengthWindow(max=2, width=4, unit="tokens")
    assert scored(tokens, "any", "text", completion_ids=[[7, 7, 7], [1]]) == [0.75, 1.0]


def test_repetition():
    assert scored(Repetition(n=2), "a b a b a", "a b c", "", "A.") == [-0.5, 0.0, 0.0, 0.0]
    assert scored(Repetition(), "dog dog dog", "a dog dog b") == [-1.0, -1 / 3]
    assert scored(Repetition(runs=False), "dog dog dog", "a dog dog b") == [0.0, 0.0]
    assert scored(Repetition(n=2, runs=False), "a a a") == [-0.5]


def test_novelty():
    assert scored(Novelty(TRAINING, n=2), "a b d c", "a b c", "b", "", "d a") == [2 / 3, 0.0, 0.0, 0.0, 1.0]
    assert scored(Novelty(TRAINING, n=2, cap=0.5), "a b d c", "a b c") == [0.5, 0.0]
    assert scored(Novelty(TRAINING, n=2, copy=2.0), "A b, c d.", "a b c", "dog bus") == [-2.0, 0.0, -2.0]
    frequencies = DocumentFrequencies.from_references(TRAINING)
    assert scored(Novelty(frequencies, n=2), "a b d c") == [2 / 3]


def test_richness_pays_each_known_content_word_once():
    # "dog" stands in 2 of 4 documents: 1 - log 2 / log 4 = 1/2; "bus" in one: 1
    text = "the dog and a dog and a bus zzz"
    assert scored(Richness(TRAINING, target=4), text) == pytest.approx([1.5 / 4])
    assert scored(Richness(TRAINING, by="distinct", target=4), text, "the the", "") == [2 / 4, 0.0, 0.0]
    assert scored(Richness(TRAINING, target=1), text) == [1.0]


@pytest.mark.parametrize("kind", [Novelty, Richness, Coverage, Hallucination])
def test_the_tokenizer_is_that_of_the_document_frequencies(kind):
    rows = [["a dog in a park", "the dog"], ["a cat in a park", "the cat"]] * 3
    for tokenizer in ("simple", "whitespace"):
        term = kind(DocumentFrequencies.from_references(rows, tokenizer=tokenizer))
        assert f"tok:{tokenizer}|" in term.signature


def test_missing_eos():
    assert scored(MissingEos(), "a", "b", "c", ended=[True, False, None]) == [0.0, -1.0, None]
    assert scored(MissingEos(), "a") == [None]


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({"regex": r"(yes|no)\."}, [" yes.\n"], ["yes", "yes. no."]),
        ({"starts_with": ["A ", "The "]}, ["The cat"], ["cat", "the cat"]),
        ({"ends_with": "."}, ["a. "], ["a"]),
        ({"tag": "answer"}, ["so <answer> 3 </answer>"], ["3", "<answer> </answer>", "</answer>3<answer>",
                                                          "<answer>3</answer><answer>4</answer>",
                                                          "<answer>3</answer></answer>"]),
        ({"json": True}, ["[1]", "3"], ["{", "", "[" * 100_000]),
        ({"json": ["a"]}, ['{"a": null, "b": 1}'], ['["a"]', "{}"]),
        ({"json": {"a": "integer"}}, ['{"a": 1}'], ['{"a": true}', '{"a": 1.5}']),
        ({"banned": ["Picture of"]}, ["depicture of", "picture. off"], ["a picture of x", "PICTURE, of"]),
        ({"bad_endings": True}, ["a dog", "he stands up."], ["a dog with", "on the.", "", "..."]),
        ({"bad_endings": ["dog"]}, ["on the"], ["a dog"]),
    ],
)  # fmt: skip
def test_format(options, good, bad):
    term = Format(**options)
    assert scored(term, *good) == [1.0] * len(good)
    assert scored(term, *bad) == [0.0] * len(bad)


def test_format_is_a_share_unless_strict():
    checks = {"starts_with": "a", "ends_with": ".", "bad_endings": True, "banned": ["dog"]}
    assert scored(Format(**checks), "a cat", "a dog.", "a cat.") == [0.75, 0.75, 1.0]
    assert scored(Format(**checks, strict=True), "a cat", "a dog.", "a cat.") == [0.0, 0.0, 1.0]


# --- what all of them share --------------------------------------------------------------------------

SAMPLES = [
    "a small red dog on a ball", "a dog dog dog and a fire truck in front of a cat", "b c d a b c d", "the dog is red",
    "", "zzz", "a hot dog next to the red cat and small ball a b c d x y",
]  # fmt: skip
COLUMNS = {
    "references": [["a red dog on a ball", "the small cat"]] * len(SAMPLES),
    "objects": [["dog", "fire truck"], ["fire truck"], None, ["dog"], ["dog"], [], ["hot dog", "cat"]],
    "relations": [["on"], [("fire truck", "in front of", "cat")], None, [], None, None, ["next to"]],
    "ended": [True, False] * 3 + [True],
    "completion_ids": [list(range(k)) for k in range(len(SAMPLES))],
}
BIG = Vocabulary(["dog", "cat", "ball", "fire"], ["red", "small", "hot"])
ALL = [
    Coverage(vocabulary=BIG, of="all"),
    Coverage(vocabulary=BIG, of="all", truth="references", at_least=2),
    Coverage(vocabulary=BIG, of="relations"),
    Hallucination(vocabulary=BIG, of="all"),
    Hallucination(vocabulary=BIG, of="all", truth="both", chair="s"),
    LengthWindow(min=3, max=6, width=2),
    LengthWindow(min=1, max=3, fall="gaussian"),
    LengthWindow(min=2, max=3, unit="tokens"),
    Repetition(n=2),
    Repetition(n=1, runs=False),
    Novelty(TRAINING, n=2, copy=0.5, cap=0.6),
    Richness(TRAINING, target=2),
    Richness(TRAINING, by="distinct"),
    MissingEos(),
    Format(bad_endings=True, banned=["fire"]),
]
DENSE = [term for term in ALL if hasattr(term, "increments")]


def ident(term):
    return term.signature.split("|version")[0][:48]


@pytest.mark.parametrize("term", ALL, ids=ident)
def test_a_score_does_not_depend_on_its_batch_mates(term):
    together = scored(term, *SAMPLES, **COLUMNS)
    alone = [scored(term, text, **{k: [v[i]] for k, v in COLUMNS.items()})[0] for i, text in enumerate(SAMPLES)]
    backwards = scored(term, *SAMPLES[::-1], **{k: v[::-1] for k, v in COLUMNS.items()})[::-1]
    assert together == alone == backwards
    chat = [[{"role": "assistant", "content": text}] for text in SAMPLES]
    assert term(completions=chat, **COLUMNS, something_else=[0] * len(SAMPLES)) == together
    assert scored(term) == []


@pytest.mark.parametrize("term", DENSE, ids=ident)
def test_increments_add_up_to_the_plain_score_of_every_prefix(term):
    rng = random.Random(5)
    pieces = []
    for text in SAMPLES:
        cuts = sorted(rng.choices(range(len(text) + 1), k=14))
        pieces.append([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])] + [""])
    credit = term.increments(pieces, **COLUMNS)
    for i, (row, text) in enumerate(zip(pieces, SAMPLES)):
        own = {k: [v[i]] for k, v in COLUMNS.items()}
        assert credit[i].shape == (len(row),)
        for t, value in enumerate(np.cumsum(credit[i])):
            read = sum(map(len, row[: t + 1]))
            complete = text[:read] if text[read : read + 1] in ("", " ") else text[:read].rpartition(" ")[0]
            own["completion_ids"] = [list(range(t + 1))]
            assert value == pytest.approx(scored(term, complete, **own)[0] or 0.0, abs=1e-9), (t, complete)


def test_credit_falls_on_the_token_that_completes_the_word():
    term = Coverage(vocabulary=WORDS)
    credit = term.increments([["a", " d", "og", " and", " b", "all", ".", ""], []], objects=[["dog", "ball"], ["dog"]])
    assert credit[0].tolist() == [0, 0, 0.5, 0, 0, 0.5, 0, 0] and credit[1].tolist() == []
    # "fire" alone is no fire truck: what was said is taken back
    judge = Hallucination(vocabulary=BIG)
    row = judge.increments([["a", " dog", " fire", " truck"]], objects=[["dog", "fire truck"]])[0]
    assert row.tolist() == [0, 0, -0.5, 0.5]


@pytest.mark.parametrize("term", ALL, ids=ident)
def test_hostile_text(term):
    hostile = [
        "", " \n\t", "\0\x1b[31m\ud800", "😀" * 100_000, "a" * 100_000, "dog " * 25_000, "'-'" * 30_000,
        "e\u0301 \u202e\ufeff" * 10_000, "to the left of " * 5_000, "𝒟𝑜𝑔 ПРИВЕТ 狗",
    ]  # fmt: skip
    rows = {
        "references": [["a dog", "😀 \0"]] * len(hostile), "ended": [True] * len(hostile),
        "completion_ids": [[0] * len(text) for text in hostile],
    }  # fmt: skip
    begin = time.perf_counter()
    values = scored(term, *hostile, **rows)
    assert len(values) == len(hostile) and all(v is None or math.isfinite(v) for v in values)
    assert time.perf_counter() - begin < 10
    if hasattr(term, "increments") and getattr(term, "unit", "") != "tokens":
        pieces = [[text[k : k + 5000] for k in range(0, len(text), 5000)] for text in hostile]
        for value, row in zip(values, term.increments(pieces, **rows)):
            assert row.sum() == pytest.approx((value or 0.0) if len(row) else 0.0, abs=1e-9)


def test_signatures_are_one_line_and_name_every_option():
    variants = [
        [Coverage(vocabulary=BIG, **o) for o in ({}, {"of": "all"}, {"truth": "both"}, {"at_least": 2},
            {"attribute_keys": ["colour"]}, {"tokenizer": "whitespace"})] + [Coverage(vocabulary=WORDS)],
        [Hallucination(vocabulary=BIG, **o) for o in ({}, {"of": "all"}, {"chair": "s"}, {"at_least": 2})],
        [LengthWindow(**{"min": 1, "max": 3, **o}) for o in ({}, {"min": 2}, {"max": 4}, {"max": None}, {"width": 3},
            {"fall": "gaussian"}, {"unit": "tokens"}, {"tokenizer": "whitespace"})],
        [Repetition(**o) for o in ({}, {"n": 2}, {"runs": False}, {"tokenizer": "whitespace"})],
        [Novelty(TRAINING, **o) for o in ({}, {"n": 2}, {"cap": 0.5}, {"copy": 1})] + [Novelty(TRAINING[1:])],
        [Richness(TRAINING, **o) for o in ({}, {"by": "distinct"}, {"target": 3})] + [Richness(TRAINING[1:])],
        [Format(**{"regex": "a\nb", **o}) for o in ({}, {"regex": "b"}, {"starts_with": "a"}, {"ends_with": "a"},
            {"tag": "a"}, {"json": True}, {"json": ["a"]}, {"json": {"a": "string"}}, {"banned": ["a"]},
            {"bad_endings": True}, {"bad_endings": ["a"]}, {"strict": True})],
    ]  # fmt: skip
    for terms in variants:
        signatures = [term.signature for term in terms]
        assert len(set(signatures)) == len(signatures) and not any("\n" in line for line in signatures)
    assert {name: cls.__name__ for name, cls in TERMS.items()} and all(
        vars(cls)["__name__"] == name for name, cls in TERMS.items()
    )


# --- against other judges ----------------------------------------------------------------------------

WORLD = {
    "vocabulary": {
        "objects": [*SHAPES, "heart", "diamond", "background"],
        "attributes": [*COLOURS, *BACKGROUNDS, *PATTERNS, "small", "medium", "large"],
    },
    "synonyms": {
        "circle": ["disc", "round shape"], "square": ["box", "block"], "cross": ["plus sign", "plus"], "ring": ["hoop"],
        "background": ["backdrop", "surface"], "red": ["crimson"], "yellow": ["golden"], "purple": ["violet"],
        "pink": ["rosy"], "grey": ["gray"], "striped": ["stripy"], "dotted": ["spotted"], "checked": ["checkered"],
        "fading": ["shaded"], "large": ["big", "huge", "great", "bulky"], "medium": ["midsize"],
        "small": ["little", "tiny", "mini", "wee"],
    },
}  # fmt: skip


def test_corrupted_captions_of_the_built_in_world_rank_below_honest_ones():
    rows, rng = scene_rows("validation", 400), random.Random(1)
    pairs, honest_false = [], 0
    for i in range(len(rows)):
        row, scene = rows.text(i), rows.scene(i)
        for caption in row["references"][:2]:
            words = caption.split()
            spots = [k for k, word in enumerate(words) if word in COLOURS or word in SHAPES]
            if not spots:
                continue
            k = rng.choice(spots)
            stock = list(COLOURS if words[k] in COLOURS else [*SHAPES, "heart"])
            words[k] = rng.choice([word for word in stock if word != words[k]])
            corrupted = " ".join(words)
            (true, claims), (fewer, same) = attribute_claims(caption, scene), attribute_claims(corrupted, scene)
            if true == claims and fewer < same:  # the judge of the world sees the corruption
                pairs.append((row, caption, corrupted))
    assert len(pairs) > 400
    columns = {key: [row[key] for row, _, _ in pairs] for key in ("objects", "background")}
    honest, corrupted = [p[1] for p in pairs], [p[2] for p in pairs]
    judge, coverage = Hallucination(**WORLD, of="all"), Coverage(**WORLD, of="all")
    before, after = (np.array(judge(completions=texts, **columns)) for texts in (honest, corrupted))
    honest_false = (before < 0).mean()
    lower, less = (after < before).mean(), []
    less = np.array(coverage(completions=corrupted, **columns)) < np.array(coverage(completions=honest, **columns))
    print(
        f"{len(pairs)} pairs: hallucination ranks {lower:.1%} as the world's own judge, coverage {less.mean():.1%}; "
        f"{honest_false:.1%} of honest captions are blamed"
    )
    assert lower >= 0.97 and less.mean() >= 0.97 and honest_false <= 0.03


@pytest.mark.skipif(not FLICKR.is_dir(), reason="Flickr8k is not there")
def test_photos_the_right_caption_covers_more_and_invents_less_than_another_picture_s():
    captions = defaultdict(list)
    with open(FLICKR / "captions_all.csv", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            captions[line["image"]].append(line["caption"])
    held = (FLICKR / "val.txt").read_text().split()
    df = DocumentFrequencies.from_references([refs for name, refs in captions.items() if name not in set(held)])
    right, wrong, references = [], [], []
    for k in range(5):
        own = [captions[name][k] for name in held]
        for shift in (7, 23, 31, 40):
            right += own
            wrong += own[shift:] + own[:shift]
            references += [captions[name][:k] + captions[name][k + 1 :] for name in held]
    shares = []
    for term in (Coverage(df, of="all"), Hallucination(df, of="all")):
        good, bad = (np.array(term(completions=texts, references=references), float) for texts in (right, wrong))
        shares.append((good > bad).mean())
        print(
            f"{term.__name__}: right {good.mean():.3f}, another picture's {bad.mean():.3f}; "
            f"higher {shares[-1]:.1%}, equal {(good == bad).mean():.1%} of {len(good)}"
        )
    assert shares[0] >= 0.9 and shares[1] >= 0.9
