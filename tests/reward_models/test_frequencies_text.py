"""Document frequencies as files, tokenisation, and odd text."""

from __future__ import annotations

import numpy as np
import pytest

from reward_models import Bleu, CiderD, DocumentFrequencies
from reward_models.metrics.text import completion_text, simple

CORPUS = [["a dog runs", "the dog's ball"], ["a cat"], ["a cat and a dog"]]
ODD = [
    "a dog runs",
    "a dog\rruns",
    "a\x0bdog\x0cruns",
    "a\x85dog\u2028runs\u2029",
    "a\0dog \0 runs",
    "a|dog||runs | |",
    "a \U0001f415\u200d\U0001f9ba runs \u2764\ufe0f",
    "dog " * 25_000,
    "\ud800 lone surrogate",
    "A DOG\u2019S caf\u00e9 cafe\u0301",
    "",
]


def test_frequency_counts_documents_not_occurrences():
    df = DocumentFrequencies.from_references(CORPUS)
    assert df.documents == 3
    assert df.count(["a"]) == 3 and df.count(["dog"]) == 2 and df.count(["a", "cat"]) == 2
    assert df.count(["dog", "'s", "ball"]) == 1 and df.count(["cat", "a"]) == 0 and df.count(["zebra"]) == 0


def test_hash_is_of_content_and_not_of_document_order():
    first, second = (
        DocumentFrequencies.from_references(CORPUS),
        DocumentFrequencies.from_references(CORPUS[::-1]),
    )
    assert first.hash == second.hash
    assert first.hash != DocumentFrequencies.from_references([*CORPUS, ["a"]]).hash
    assert first.hash != DocumentFrequencies.from_references(CORPUS, tokenizer="whitespace").hash


def test_save_and_load_give_the_same_scores(tmp_path):
    df = DocumentFrequencies.from_references([*CORPUS, ODD])
    path = tmp_path / "new folder" / "frequencies.df"
    df.save(path)
    loaded = DocumentFrequencies.load(path)
    assert (loaded.hash, loaded.documents, loaded.tokenizer) == (df.hash, df.documents, df.tokenizer)
    args = (["a dog runs home"], [CORPUS[0]])
    assert CiderD(loaded).score(*args)[0] == CiderD(df).score(*args)[0] > 0
    assert [p.name for p in path.parent.iterdir()] == ["frequencies.df"]


def test_damaged_file_is_refused_by_name(tmp_path):
    path = tmp_path / "frequencies.df"
    df = DocumentFrequencies.from_references(CORPUS)
    df.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["counts"] = arrays["counts"] + 1
    with path.open("wb") as out:
        np.savez(out, **arrays)
    with pytest.raises(ValueError, match=r"frequencies\.df.*SHA-256"):
        DocumentFrequencies.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"frequencies\.df"):
        DocumentFrequencies.load(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.df"):
        DocumentFrequencies.load(tmp_path / "nowhere.df")


def test_one_document_is_refused():
    with pytest.raises(ValueError, match="at least 2 documents"):
        DocumentFrequencies.from_references([["a dog"]])
    with pytest.raises(ValueError, match="document 1"):
        DocumentFrequencies.from_references([["a dog"], []])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A dog's T-shirt, 'new' -- and red.", ["a", "dog", "'s", "t-shirt", "new", "and", "red"]),
        ("cats|dogs<image>\\n", ["cats", "dogs", "image", "n"]),
        ("\u201cDon\u2019t\u201d \u2014 she said\u2026", ["don", "'t", "she", "said"]),
        ("5\u20ac \U0001f415!", ["5", "\u20ac", "\U0001f415"]),
        ("cafe\u0301", ["caf\u00e9"]),
        ("a\u2028b\x85c\rd\x0be\x0cf\0g", list("abcdefg")),
        ("- -a- 'b ''", ["a", "b"]),
    ],
)
def test_simple_tokens(text, tokens):
    assert simple(text) == tokens


@pytest.mark.parametrize("tokenizer", ["simple", "whitespace"])
def test_odd_text_scores_in_a_batch_as_alone(tokenizer):
    df = DocumentFrequencies.from_references(CORPUS, tokenizer=tokenizer)
    refs = [["a dog runs", "dog\u2028dog"], ODD[:10]] * 6
    for metric in (CiderD(df), Bleu(tokenizer=tokenizer), Bleu(smooth=False, tokenizer=tokenizer)):
        together = metric.score(ODD, refs[: len(ODD)])
        alone = [metric.score([text], [ref])[0] for text, ref in zip(ODD, refs, strict=False)]
        assert np.isfinite(together).all() and (together >= 0).all()
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-12)


def test_line_separators_do_not_split_rows():
    # a scorer that talks to its tokeniser in lines would shift every row behind such a text
    cider = CiderD(DocumentFrequencies.from_references(CORPUS), eos=False)
    scores = cider.score(["a\ndog\u2028runs", "a cat"], [["a dog runs"], ["a cat"]])
    np.testing.assert_allclose(scores[0], 10 * 3 / 4, atol=1e-9)  # three words: no 4-gram
    np.testing.assert_allclose(scores[1], cider.score(["a cat"], [["a cat"]])[0])


def test_signature_names_what_a_score_depends_on():
    df = DocumentFrequencies.from_references(CORPUS)
    signature = CiderD(df).signature
    for part in ("n:4", "sigma:6", df.hash, "docs:3", "eos:yes", "tok:simple", "version:"):
        assert part in signature
    assert CiderD(df, eos=False).signature != signature != CiderD(df, sigma=5).signature
    assert Bleu().signature != Bleu(smooth=False).signature != Bleu(3, smooth=False).signature


def test_completion_text_reads_the_last_message():
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a dog"}]
    assert completion_text(chat) == "a dog"
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "dog"}]}]
    assert completion_text(parts) == "a dog"
    with pytest.raises(TypeError):
        completion_text(3)
