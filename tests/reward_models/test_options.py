"""The options that a reward object was made with can be read off it, and make it again."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from reward_models.metrics import java
from reward_models.named import BUILT_IN, built_in
from reward_models.options import options_of
from reward_models.own import parameters

CAPTIONS = [["a dog runs", "a brown dog"], ["a cat sits", "the cat"], ["a dog and a cat"]]
FACTS = {"of": "all", "truth": "references", "at_least": 2, "attribute_keys": ["colour"], "tokenizer": "ptb"}
FACTS |= {"vocabulary": {"objects": ["dog"]}, "synonyms": {"dog": ["hound"]}}
JAVA = {"tokenizer": "simple", "timeout": 9.0, "memory": "1G", "java": "java17"}
TEXTS = {"regex": "a.*", "starts_with": "a", "ends_with": [".", "!"], "tag": "b", "json": {"x": "string"}}
SERVED = {"url": "http://here:1", "token_env": "T", "timeout": 9.0, "retries": 1, "batch_size": 2, "columns": ["x"]}
ODD = [  # none of them the default
    ("cider_d", {"eos": False, "sigma": 3.0, "n": 3, "cache_size": 16}),
    ("cider", {"eos": False, "n": 3, "cache_size": 16}),
    ("bleu", {"n": 2, "smooth": False, "eos": True, "tokenizer": "ptb", "cache_size": 16}),
    ("rouge_l", {"beta": 2.0, "eos": True, "tokenizer": "ptb", "cache_size": 16}),
    ("meteor", JAVA),
    ("spice", JAVA),
    ("coverage", FACTS),
    ("coverage", {"min_documents": 1, "tokenizer": "ptb"}),
    ("hallucination", FACTS | {"chair": "s"}),
    ("hallucination", {"min_documents": 1, "tokenizer": "ptb"}),
    ("length", {"min": 2, "max": 9, "width": 2.0, "fall": "gaussian", "unit": "tokens", "tokenizer": "ptb"}),
    ("repetition", {"n": 2, "runs": False, "tokenizer": "ptb"}),
    ("missing_eos", {}),
    ("novelty", {"n": 2, "cap": 0.5, "copy": 0.1, "tokenizer": "ptb"}),
    ("richness", {"by": "distinct", "target": 3.0, "tokenizer": "ptb"}),
    ("format", TEXTS | {"banned": ["x y"], "bad_endings": True, "strict": True}),
    ("http", SERVED | {"send_images": True, "image_format": "jpeg", "max_images": 2, "max_body_mb": 1.0, "part": "p"}),
]


@pytest.fixture
def make(monkeypatch):
    """(name, options) -> the reward."""
    from reward_models import DocumentFrequencies

    monkeypatch.setattr(java, "_find_java", lambda name, command: command)
    monkeypatch.setattr(java, "_find_folder", lambda *_: Path())
    df = DocumentFrequencies.from_references(CAPTIONS)

    def made(name, options):
        kind = built_in(name)
        given = {"df": df} if "df" in parameters(kind) else {}
        given |= {"training": CAPTIONS} if "training" in parameters(kind) else {}
        return kind(**given, **options)

    return made


@pytest.mark.parametrize(("name", "options"), ODD, ids=[name for name, _ in ODD])
def test_every_option_comes_back_and_makes_the_same_reward(make, name, options):
    reward = make(name, options)
    found = options_of(reward)
    assert found == options
    again = make(name, found)
    assert options_of(again) == options and again.signature == reward.signature


def test_the_table_above_has_every_option_of_every_built_in_reward():
    for name in set(BUILT_IN) - {"preference"}:  # needs a trained head: test_preference_head.py
        tried = {option for other, options in ODD if other == name for option in options}
        assert set(parameters(built_in(name))) - {"df", "training"} == tried, name


def test_what_is_the_default_or_no_plain_data_is_left_out(make):
    assert options_of(make("cider_d", {})) == {}
    assert options_of(lambda completions, limit=3: completions) == {}
    assert options_of(functools.partial(print, limit=3, judge=object())) == {"limit": 3}
    unsayable = {"captions": ["a dog runs"] * 10_000, "most": float("inf")}  # in a recipe that can be read again
    assert options_of(functools.partial(print, limit=3, **unsayable)) == {"limit": 3}
    assert options_of(functools.cache(len)) == {}  # its class is written in C, and has no signature


def test_an_object_of_the_user_s_tells_what_it_keeps():
    class Own:
        def __init__(self, limit, *, words=("a",), judge=None, forgotten=1):
            self._limit, self.words, self.judge = limit, set(words), judge

        def __call__(self, completions, **columns):
            return [0.0] * len(completions)

    assert options_of(Own(3, words=("b", "a"), judge=object(), forgotten=2)) == {"limit": 3, "words": ["a", "b"]}
