"""The metric suite of `mmft evaluate`: names that a user asks for, and what each of them computes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmft.evaluation import diversity, official, statistics
from mmft.evaluation.captioning import FUNCTION_WORDS
from mmft.evaluation.clip import clip_score
from mmft.evaluation.scores import Captioned, Scores
from reward_models import CiderD, DocumentFrequencies
from reward_models.metrics.text import simple
from reward_models.terms import TERMS
from reward_models.terms.vocabulary import Vocabulary

_WITHOUT_REFERENCES = ("claims", "clip", "diversity", "form")
_OBJECTS = 20  # a vocabulary of fewer objects says too little


def score(
    given: Captioned, metrics: Sequence[str] | None = None, advance: Callable[[int], Any] = lambda n: None
) -> Scores:
    """Scores captions against their references.

    Args:
        metrics: names in `SUITE`; None = all that can be computed here, the others in ``left_out`` with the reason.
        advance: is told after each metric.

    Raises:
        ValueError: no captions, unequal lengths, an unknown metric, or one asked for by name, or by what it alone needs
            (a CLIP, objects), that cannot be computed.
    """
    chosen = list(SUITE) if metrics is None else known(metrics)
    if not len(given.captions):
        raise ValueError("no captions to score")
    if not len(given.captions) == len(given.references) == len(given.ids):
        raise ValueError(
            f"{len(given.captions)} captions, {len(given.references)} lists of references and {len(given.ids)} ids; "
            "expected as many of each"
        )
    scores, asked = Scores(), {name for name in ("clip", "objects") if getattr(given, name) is not None}
    for name in chosen:
        try:
            if name not in _WITHOUT_REFERENCES and not all(given.references):
                raise ValueError("needs references, and there are none")
            SUITE[name](given, scores)
        except ValueError as reason:
            if metrics is not None or name in asked:
                raise ValueError(f"metric {name}: {reason}") from reason
            scores.left_out[name] = str(reason)
        advance(1)
    return scores


def known(metrics: Sequence[str]) -> list[str]:
    """The names, each once; ValueError for one that is not in `SUITE`."""
    if not metrics:
        raise ValueError(f"no metric was named; there are {', '.join(SUITE)}")
    for name in metrics:
        if name not in SUITE:
            near = difflib.get_close_matches(name.lower(), SUITE, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown metric {name!r}; {hint}There are {', '.join(SUITE)}")
    return list(dict.fromkeys(metrics))


def _training_cider(given: Captioned, scores: Scores) -> None:
    """CIDEr-D as in training and in ``summary.json``."""
    if given.training is None:
        raise ValueError("needs the document frequencies of a run's training captions")
    scorer = CiderD(given.training, eos=False)
    scores.rows["cider_d"] = scorer.score(given.captions, given.references)
    scores.sums["cider_d"] = statistics.mean(scores.rows["cider_d"])
    scores.signatures["cider_d"] = scorer.signature


def _form(given: Captioned, scores: Scores) -> None:
    """Length in words, captions that break off, repetition."""
    words = [simple(caption) for caption in given.captions]
    repetition = TERMS["repetition"]()
    found = {
        "length": [len(row) for row in words],
        "bad_ending": [not row or row[-1] in FUNCTION_WORDS for row in words],
        "repetition": [-value for value in repetition(completions=given.captions)],
    }
    if given.ended is not None:
        found["unfinished"] = [not done for done in given.ended]
    for name, values in found.items():
        scores.rows[name] = np.array(values, dtype=np.float64)
        scores.sums[name] = statistics.mean(scores.rows[name])
    scores.signatures["repetition"] = repetition.signature


def _claims(given: Captioned, scores: Scores) -> None:
    """The share of a caption's claims that are true, in a world that is known exactly."""
    if given.claims is None:
        raise ValueError("only the built-in world is known well enough")
    true, total = np.array([given.claims(text, i) for i, text in enumerate(given.captions)], dtype=np.float64).T
    with np.errstate(invalid="ignore"):
        scores.rows["attribute_accuracy"], scores.rows["attribute_claims"] = true / total, total
    scores.sums["attribute_accuracy"] = statistics.ratio(true, total)
    scores.sums["attribute_claims"] = statistics.mean(total)


def _objects(given: Captioned, scores: Scores) -> None:
    """CHAIR_i and CHAIR_s (Rohrbach et al. 2018, arXiv 1809.02156), and how many of the objects are named.

    An object is there if a reference names it. Each object counts once per caption; the original counts mentions.
    """
    if given.claims is not None and given.objects is None:
        raise ValueError("of the built-in world every claim can be checked: see the metric claims")
    vocabulary = _vocabulary(given)
    counts = []
    for caption, references in zip(given.captions, given.references, strict=True):
        said, there = _named(vocabulary, caption), set().union(*(_named(vocabulary, text) for text in references))
        counts.append((len(said - there), len(said), len(said & there), len(there)))
    false, said, found, there = np.array(counts, dtype=np.float64).T
    with np.errstate(invalid="ignore"):
        scores.rows |= {"chair_i": false / said, "chair_s": (false > 0) * 1.0, "object_recall": found / there}
    scores.sums["chair_i"] = statistics.ratio(false, said)
    scores.sums["chair_s"] = statistics.mean(scores.rows["chair_s"])
    scores.sums["object_recall"] = statistics.ratio(found, there)
    for name in ("chair_i", "chair_s", "object_recall"):
        scores.signatures[name] = f"{name}|truth:references|vocabulary:{vocabulary.signature}|tok:simple|version:1"


def _vocabulary(given: Captioned) -> Vocabulary:
    if given.objects is not None:
        return Vocabulary(objects=given.objects, synonyms={word: list(more) for word, more in given.objects.items()})
    frequencies = given.training or DocumentFrequencies.from_references(given.references)
    if frequencies.tokenizer != "simple":
        raise ValueError(f"the frequencies of training were counted with tokenizer {frequencies.tokenizer!r}")
    vocabulary = Vocabulary.from_frequencies(frequencies)
    known = sum(kind == "objects" for kind in vocabulary.kinds.values())
    if known < _OBJECTS:
        raise ValueError(f"too few captions to find out which words are objects ({known} found); give --objects FILE")
    return vocabulary


def _named(vocabulary: Vocabulary, text: str) -> set[Any]:
    words = simple(text)
    return {m.fact for m in vocabulary.mentions(words) if m.kind == "objects" and m.until == len(words)}


SUITE: dict[str, Callable[[Captioned, Scores], None]] = {
    "bleu": official.bleu,
    "meteor": official.meteor,
    "rouge_l": official.rouge_l,
    "cider": official.cider,
    "spice": official.spice,
    "cider_d": _training_cider,
    "claims": _claims,
    "objects": _objects,
    "clip": clip_score,
    "diversity": diversity.distinct_words,
    "self_cider": diversity.self_cider,
    "form": _form,
}
