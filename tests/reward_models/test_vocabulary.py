"""What a text mentions: phrases, modifiers, relations, plurals; and vocabularies derived from captions."""

from __future__ import annotations

import random

import pytest

from mmft.data.scenes import scene_rows
from reward_models import DocumentFrequencies
from reward_models.terms import Vocabulary

THINGS = Vocabulary(
    ["dog", "ball", "fire", "fire truck", "hot dog", "house", "person", "shorts"],
    ["red", "white", "black", "small", "hot"],
    synonyms={"dog": ["puppy"], "ball": ["round thing"]},
)


def said(text, kind=None, vocabulary=THINGS):
    words = text.split()
    found = [m for m in vocabulary.mentions(words) if m.until == len(words)]
    return [m.fact for m in found if kind in (None, m.kind)]


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("two dogs and a puppy", ["dog", "dog"]),
        ("people with a dog", ["person", "dog"]),
        ("a person in shorts", ["person", "shorts"]),  # not the singular "short"
        ("a hot dog", ["hot dog"]),
        ("a fire truck", ["fire truck"]),
        ("a fire beside a truck", ["fire"]),
        ("fire trucks", ["fire truck"]),
        ("a round thing", ["ball"]),
        ("a zebra", []),
    ],
)
def test_objects(text, objects):
    assert said(text, "objects") == [(name,) for name in objects]


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("a small red ball", [("small", "ball"), ("red", "ball")]),
        ("a black and white dog", [("black", "dog"), ("white", "dog")]),
        ("a red shiny ball", [("red", "ball")]),  # an unknown word lies between
        ("a ball in red on a dog", []),  # "on" ends the phrase
        ("the dog is white", [("white", "dog")]),
        ("the dog is white and black", [("white", "dog"), ("black", "dog")]),
        ("the dog is a red ball", [("red", "ball")]),
        ("it is red", []),
        ("a hot dog", []),  # the modifier is part of the name
    ],
)
def test_attributes(text, pairs):
    assert said(text, "attributes") == pairs


@pytest.mark.parametrize(
    ("text", "triples"),
    [
        ("a dog to the left of a ball", [("dog", "left of", "ball")]),
        ("a dog in front of the house", [("dog", "in front of", "house")]),  # not "in"
        ("the dog is underneath a red ball", [("dog", "below", "ball")]),
        ("on the house a dog", [(None, "on", "house")]),
        ("a dog and a ball", []),
        ("a dog sits near and watches a ball", []),
        ("a dog on a red and white ball", [("dog", "on", "ball")]),
        ("a dog on a ball near a house", [("dog", "on", "ball"), ("ball", "next to", "house")]),
    ],
)
def test_relations(text, triples):
    assert said(text, "relations") == triples


def test_a_prefix_mentions_what_the_mentions_of_the_whole_text_say_of_it():
    rng = random.Random(3)
    stock = "a the red white dog dogs fire truck hot in front of to left on and is zebra round thing house".split()
    for _ in range(300):
        words = rng.choices(stock, k=12)
        whole = THINGS.mentions(words)
        for w in range(len(words) + 1):
            alone = [(m.at, m.kind, m.fact) for m in THINGS.mentions(words[:w]) if m.until == w]
            assert alone == [(m.at, m.kind, m.fact) for m in whole if m.at < w <= m.until], (words, w)


def test_words_of_one_row_are_known_for_that_row_alone():
    words = "a zebra by a big car".split()
    assert [m.fact for m in THINGS.mentions(words, {"zebra": "objects", "big": "attributes", "car": "objects"})] == [
        ("zebra",),
        ("car",),
        ("big", "car"),
        ("zebra", "next to", "car"),
    ]
    assert THINGS.mentions(words) == []
    assert [m.fact for m in THINGS.mentions("a sports car".split(), {"sports car": "objects"})] == [("sports car",)]


def test_a_string_in_place_of_a_list_is_refused():
    with pytest.raises(ValueError, match="objects must be a list"):
        Vocabulary("dog")
    with pytest.raises(ValueError, match="synonyms of 'dog'"):
        Vocabulary(["dog"], synonyms={"dog": "puppy"})


def test_vocabulary_of_the_built_in_world_is_found_in_its_captions():
    df = DocumentFrequencies.from_references(scene_rows("train", 1500).references())
    kinds = Vocabulary.from_frequencies(df).kinds
    nouns = "circle disc square box triangle star cross ring hoop".split()
    modifiers = "red orange yellow green blue purple pink brown large small big little white black grey striped".split()
    neither = "resting sitting including accompanied see namely drew partly".split()
    assert {word: kinds.get(word) for word in nouns} == dict.fromkeys(nouns, "objects")
    assert {word: kinds.get(word) for word in modifiers} == dict.fromkeys(modifiers, "attributes")
    assert not [word for word in neither if word in kinds]
    assert "picture" not in kinds and "shape" not in kinds  # they claim nothing


def test_verbs_are_neither_nouns_nor_plurals_and_rare_words_are_left_out():
    subjects, places = ("dog", "cat", "horse"), ("field", "street", "river")
    captions = [
        [f"a {size} {s} jumps in the {p}", f"the {s} jumps", f"a {s} on a {size} {p} near a jump", "some dogs"]
        for s in subjects
        for p in places
        for size in ("big", "small")
    ]
    captions[0].append("a unicorn in a field")
    vocabulary = Vocabulary.from_frequencies(DocumentFrequencies.from_references(captions), min_documents=3)
    kinds = vocabulary.kinds
    assert {w for w, kind in kinds.items() if kind == "objects"} == {*subjects, *places, "jump"}
    assert {w for w, kind in kinds.items() if kind == "attributes"} == {"big", "small"}
    assert [m.fact for m in vocabulary.mentions("dogs jumps".split())] == [("dog",)]  # "jumps" stays a verb


def test_signature_tells_vocabularies_apart():
    signatures = {
        Vocabulary(["dog"]).signature,
        Vocabulary(["cat"]).signature,
        Vocabulary(["dog"], ["red"]).signature,
        Vocabulary(["dog"], relations=["on"]).signature,
        Vocabulary(["dog"], synonyms={"dog": ["puppy"]}).signature,
    }
    assert len(signatures) == 5
    assert Vocabulary(["dog", "cat"]).signature == Vocabulary(["cat", "dog"]).signature
