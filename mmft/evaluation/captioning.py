"""The metric suite of captioning: one number per caption, and held-out scores with intervals.

Beside the scores that are trained on stand the ones that tell whether a gain is real: captions that break off,
length, variety, and how much of what a caption claims is true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mmft.evaluation import statistics
from mmft.evaluation.statistics import Interval, Statistic
from reward_models import Bleu, CiderD, DocumentFrequencies
from reward_models.metrics.text import simple

# Words that no whole caption ends with. Policies trained on n-gram overlap learn to end on them, because the n-grams
# before the break count and nothing after it does. Longer than the list in the self-critical captioning code
# (a an the in for at of with before after on upon near to is are am); particles that do end sentences ("up", "down",
# "behind", "around", "outside", "her") are not on it.
FUNCTION_WORDS = frozenset(
    "a an the this these some any every each "
    "of with in on at to into onto from by for near upon beside between before after against under over through "
    "toward towards along among as than "
    "and or but nor while "
    "is are am was were be being has have "
    "his its their my your our whose which".split()
)


class MetricInfo(NamedTuple):
    """How a metric is shown: `better` is +1 (more is better), -1 (less is), 0 (neither)."""

    label: str
    better: int = 0
    percent: bool = False

    def text(self, value: float | None, signed: bool = False) -> str:
        """The value for people; a dash where there is none. `signed`: it is a difference (of shares: in points)."""
        if value is None or not np.isfinite(value):
            return "–"
        sign = "+z" if signed else "z"  # z: what is rounded to 0 has no minus
        if self.percent:
            text = f"{100 * value:{sign}.1f} {'pp' if signed else '%'}"
        else:
            text = f"{value:{sign}.{_decimals(value)}f}"
        return text.replace("-", "−")


METRICS = {
    # As the official COCO code computes them on the file that is scored, under its names (`mmft.evaluation.official`).
    **{f"Bleu_{n}": MetricInfo(f"BLEU-{n}, official", 1) for n in range(1, 5)},
    "METEOR": MetricInfo("METEOR, official", 1),
    "ROUGE_L": MetricInfo("ROUGE-L, official", 1),
    "CIDEr": MetricInfo("CIDEr-D, official", 1),
    "SPICE": MetricInfo("SPICE, official", 1),
    # As in training: document frequencies of the training captions.
    "cider_d": MetricInfo("CIDEr-D", 1),
    "corpus_bleu_4": MetricInfo("BLEU-4 of the corpus", 1),
    "bleu_4": MetricInfo("BLEU-4, mean over captions", 1),
    "attribute_accuracy": MetricInfo("True claims about objects", 1, percent=True),
    "attribute_claims": MetricInfo("Claims about objects per caption"),
    "chair_i": MetricInfo("Objects named that no reference names", -1, percent=True),
    "chair_s": MetricInfo("Captions with such an object", -1, percent=True),
    "object_recall": MetricInfo("Objects of the references that are named", 1, percent=True),
    "clip_score": MetricInfo("CLIPScore", 1),
    "ref_clip_score": MetricInfo("RefCLIPScore", 1),
    "distinct_1": MetricInfo("Distinct words", percent=True),
    "distinct_2": MetricInfo("Distinct word pairs", percent=True),
    "vocabulary": MetricInfo("Different words used"),
    "self_cider": MetricInfo("Self-CIDEr, variety per picture", 1),
    "length": MetricInfo("Words per caption"),
    "bad_ending": MetricInfo("Captions ending in a function word", -1, percent=True),
    "repetition": MetricInfo("Repeated words and word triples", -1, percent=True),
    "unfinished": MetricInfo("Captions cut off at the length limit", -1, percent=True),
    "reward": MetricInfo("Reward", 1),
}


def metric_info(name: str) -> MetricInfo:
    """What is known of a metric; parts of a reward (``reward/NAME``) go by their own name."""
    short = name.removeprefix("reward/")
    return METRICS.get(short) or MetricInfo(short.replace("_", " "))


class CaptionScores(dict[str, np.ndarray]):
    """Metric -> (N,) array, plus what the corpus-level scores are made of.

    Attributes:
        bleu_counts: (N, 10), see `bleu_counts`.
        word_pairs: per caption its word pairs (bigrams).
        signatures: metric -> how exactly it is computed (tokenizer, end token, document frequencies).
        increments: metric -> its word by word form, see `mmft.evaluation.word_credit`.
    """

    signatures: dict[str, str]
    increments: dict[str, Callable[..., Sequence[np.ndarray]]]
    bleu_counts: np.ndarray
    word_pairs: list[list[tuple[str, str]]]


def score_captions(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    df: DocumentFrequencies,
    claims: Callable[[str, int], tuple[int, int]] | None = None,
) -> CaptionScores:
    """Scores N captions against their references, each a (N,) float64 array.

    cider_d (0 to 10, without end token, as published scores are), bleu_4 (sentence, smoothed, 0 to 1), length (words),
    bad_ending (1.0 = ends in a function word, or is empty), and with `claims` attribute_true and attribute_total.

    Args:
        df: document frequencies of the training split.
        claims: caption, row number -> (true claims, claims).

    Raises:
        ValueError: unequal lengths, no captions, or a row without references.
    """
    if not len(captions):
        raise ValueError("no captions to score; the held-out set is empty")
    words = [simple(caption) for caption in captions]
    cider, bleu = CiderD(df, eos=False), Bleu(4, smooth=True)
    scores = CaptionScores(
        cider_d=cider.score(list(captions), list(references)),
        bleu_4=bleu.score(list(captions), list(references)),
        length=np.array([len(w) for w in words], dtype=np.float64),
        bad_ending=np.array([not w or w[-1] in FUNCTION_WORDS for w in words], dtype=np.float64),
    )
    if claims is not None:
        counted = np.array([claims(caption, i) for i, caption in enumerate(captions)], dtype=np.float64)
        scores["attribute_true"], scores["attribute_total"] = counted[:, 0], counted[:, 1]
    scores.signatures = {"cider_d": cider.signature, "bleu_4": bleu.signature}
    scores.increments = {"cider_d": cider.increments, "bleu_4": bleu.increments}
    scores.bleu_counts = bleu_counts(words, [[simple(ref) for ref in refs] for refs in references])
    scores.word_pairs = [list(zip(w, w[1:], strict=False)) for w in words]
    return scores


def summarise(per_sample: Mapping[str, np.ndarray], **options) -> dict[str, Interval]:
    """Held-out scores: metric -> {"mean", "low", "high"}.

    Per-row metrics give their mean; attribute_true and attribute_total give attribute_accuracy (a ratio of sums) and
    attribute_claims; `CaptionScores` give corpus_bleu_4 and distinct_2 too. A metric without any value is left out.

    Args:
        options: resamples, level, seed of `mmft.evaluation.statistics.intervals`.
    """
    found = statistics.intervals(_statistics(per_sample), **options)
    if isinstance(per_sample, CaptionScores) and any(per_sample.word_pairs):
        found["distinct_2"] = distinct_interval(per_sample.word_pairs, options.get("level", 0.95))
    return _ordered({name: interval for name, interval in found.items() if np.isfinite(interval["mean"])})


def compare(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], **options) -> dict[str, Interval]:
    """Paired differences, after - before: metric -> {"mean", "low", "high", "relative"}. Row i is the same picture."""
    found = statistics.paired_intervals(_statistics(before), _statistics(after), **options)
    if isinstance(before, CaptionScores) and isinstance(after, CaptionScores):
        if any(before.word_pairs) and any(after.word_pairs):
            level = options.get("level", 0.95)
            found["distinct_2"] = distinct_difference(before.word_pairs, after.word_pairs, level)
    return _ordered({name: interval for name, interval in found.items() if np.isfinite(interval["mean"])})


def bleu_counts(captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> np.ndarray:
    """What corpus BLEU-4 sums over rows, (N, 10): clipped matches of order 1 to 4, n-grams tried of order 1 to 4,
    length, length of the closest reference (the shorter one on a tie). Takes tokens."""
    out = np.zeros((len(captions), 10))
    for row, words, refs in zip(out, captions, references, strict=True):
        for n in range(1, 5):
            grams = ngrams(words, n)
            most: Counter[tuple[str, ...]] = Counter()
            for ref in refs:
                most |= ngrams(ref, n)
            row[n - 1], row[n + 3] = (grams & most).total(), grams.total()
        row[8] = len(words)
        row[9] = min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]
    return out


def corpus_bleu(sums: np.ndarray, n: int = 4) -> np.ndarray:
    """BLEU-n from summed counts (..., 10) -> (...) (Papineni et al. 2002), as pycocoevalcap computes it.

    Its 1e-15 and 1e-9 are part of the formula: without any common n-gram it gives about 1e-4, not 0.
    """
    matched, tried, length, closest = sums[..., :n], sums[..., 4 : 4 + n], sums[..., 8], sums[..., 9]
    precision = np.prod((matched + 1e-15) / (tried + 1e-9), axis=-1) ** (1 / n)
    penalty = np.exp(1 - 1 / np.clip((length + 1e-15) / (closest + 1e-9), 1e-15, 1.0))
    return np.where(length > 0, precision * penalty, 0.0)


def _statistics(per_sample: Mapping[str, np.ndarray]) -> dict[str, Statistic]:
    """What is a function of sums over rows."""
    found = {name: statistics.mean(values) for name, values in per_sample.items() if "attribute_" not in name}
    if "attribute_total" in per_sample:
        true, total = per_sample["attribute_true"], per_sample["attribute_total"]
        found["attribute_accuracy"] = statistics.ratio(true, total)
        found["attribute_claims"] = statistics.mean(total)
    if isinstance(per_sample, CaptionScores):
        found["corpus_bleu_4"] = Statistic(per_sample.bleu_counts, corpus_bleu)
    return found


def distinct(items: Sequence[Sequence[Hashable]]) -> tuple[float, np.ndarray]:
    """Different items / items (distinct-n of Li et al. 2016, for n-grams) over all rows, and with each row left out.

    The latter, (N,), is for `statistics.jackknife_interval`.
    """
    holders = Counter(item for row in items for item in set(row))  # rows that hold an item
    total = sum(map(len, items))
    lost = np.array([sum(holders[item] == 1 for item in set(row)) for row in items])
    rest = total - np.array([len(row) for row in items])
    return len(holders) / total, (len(holders) - lost) / np.maximum(rest, 1)


def distinct_interval(items: Sequence[Sequence[Hashable]], level: float = 0.95) -> Interval:
    """The share of different items, with the jackknife's interval as far as a share can be."""
    found = statistics.jackknife_interval(*distinct(items), level)
    return found | {"low": max(0.0, found["low"]), "high": min(1.0, found["high"])}


def distinct_difference(
    before: Sequence[Sequence[Hashable]], after: Sequence[Sequence[Hashable]], level: float = 0.95
) -> Interval:
    """after - before, likewise, with "relative"; row i is the same picture."""
    (old, old_out), (new, new_out) = distinct(before), distinct(after)
    found = statistics.jackknife_interval(new - old, new_out - old_out, level)
    found |= {"low": max(-1.0, found["low"]), "high": min(1.0, found["high"])}
    return found | {"relative": (new - old) / old if old else None}


def ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n words occurs."""
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _ordered(found: dict[str, Interval]) -> dict[str, Interval]:
    """In the order of `METRICS`, unknown ones last."""
    order = {name: i for i, name in enumerate(METRICS)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0].removeprefix("reward/"), len(order))))


def _decimals(value: float) -> int:
    return 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
