"""How fast captions are scored, next to pycocoevalcap, in one run. Two parts.

A response is the first half of one of its picture's captions and the second half of a caption of another picture:
about as much in common with the references as a model's output has, and all different, so that nothing is gained from
repeats. Every response has 5 references. Processor time is measured (of pycocoevalcap: its Java child's, too), so that
a busy machine does not favour the shorter run; everything is held on one core where the system allows that.

1. One step of reinforcement learning, 256 responses, CIDEr-D alone. Both sides get text tokenised already (both only
   split at blanks). Alternating, `--repeats` times, each time with new pictures; medians are printed:

       pycocoevalcap          Cider().compute_score(gts, res): it vectorises the references again for every response,
                              and counts document frequencies over the batch
       pycocoevalcap, corpus  the same scorer with a corpus' document frequencies put in by hand: what is wanted
       ours, cold             CiderD.score on pictures never seen (references are vectorised, then cached)
       ours, warm             the same batch again, as when pictures return in a later epoch

   in two shapes: 32 pictures with 8 responses each, and 256 pictures with one.

2. 4,096 responses from raw text, tokenised by both sides: pycocoevalcap's PTBTokenizer (Java) and then its metric,
   against ours with each tokeniser there is, warm; in two shapes, 512 pictures with 8 responses each and 4,096 with
   one. Alternating `--rounds` times. A ratio is (Java tokeniser + metric) / ours. Left out where there is no Java.

    python benchmarks/scoring_speed.py [--captions CSV] [--json FILE]

CSV has the columns image, caption; without it (and without ../shared/real) captions are drawn from a small grammar.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import resource
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FLICKR = ROOT.parent / "shared" / "real" / "flickr8k" / "captions_all.csv"
RESPONSES, GROUP, MANY = 256, 8, 4096


def read_captions(path: Path, raw: bool = False) -> list[list[str]]:
    """Captions per picture: as they are (`raw`), or in lower case, words joined by single blanks."""
    pictures: dict[str, list[str]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            caption = row["caption"]
            pictures[row["image"]].append(caption if raw else " ".join(re.findall(r"\w+", caption.lower())))
    return list(pictures.values())


def made_up_captions(rng: random.Random, pictures: int = 5000) -> list[list[str]]:
    """Five captions of about eleven words per picture over a vocabulary of 2,000 with a natural frequency fall-off."""
    words = [f"w{i}" for i in range(2000)]
    weights = [1 / (i + 3) for i in range(2000)]
    topics = [rng.choices(words, weights, k=14) for _ in range(pictures)]
    return [[" ".join(rng.sample(topic, rng.randint(8, 14))) for _ in range(5)] for topic in topics]


def make_batch(
    rng: random.Random, corpus: list[list[str]], per_picture: int, rows: int = RESPONSES
) -> tuple[list[str], list[list[str]]]:
    pictures = rng.sample(range(len(corpus)), rows // per_picture)
    responses, references = [], []
    for i in range(rows):
        own = corpus[pictures[i // per_picture]]
        head, tail = own[i % 5].split(), rng.choice(corpus)[0].split()
        responses.append(" ".join(head[: len(head) // 2] + tail[len(tail) // 2 :]))
        references.append(list(own))
    return responses, references


def processor_seconds() -> float:
    """Of this process and of children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def timed(function: Callable[..., object], *arguments: object) -> float:
    start = processor_seconds()
    function(*arguments)
    return processor_seconds() - start


def score_by_hand(scorer: Any, responses: list[str], references: list[list[str]]) -> None:
    """pycocoevalcap's scorer without its own counting of document frequencies."""
    for text, refs in zip(responses, references, strict=True):
        scorer += (text, refs)
    scorer.compute_cider()


def one_step(rng: random.Random, corpus: list[list[str]], repeats: int) -> dict[str, Any]:
    """Part 1."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.cider.cider_scorer import CiderScorer, precook

    from reward_models import CiderD, DocumentFrequencies

    df = DocumentFrequencies.from_references(corpus, tokenizer="whitespace")
    frequencies: dict[tuple[str, ...], float] = defaultdict(float)
    for references in corpus:
        for gram in {gram for caption in references for gram in precook(caption)}:
            frequencies[gram] += 1

    report: dict[str, Any] = {}
    print(repr(df))
    for per_picture in (GROUP, 1):
        scorer = CiderD(df, eos=False)
        scorer.score(*make_batch(rng, corpus, per_picture))
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(repeats):
            responses, references = make_batch(rng, corpus, per_picture)
            gts, res = dict(enumerate(references)), {i: [text] for i, text in enumerate(responses)}
            theirs = CiderScorer()
            theirs.document_frequency = frequencies
            seconds["pycocoevalcap"].append(timed(Cider().compute_score, gts, res))
            seconds["pycocoevalcap, corpus"].append(timed(score_by_hand, theirs, responses, references))
            seconds["ours, cold"].append(timed(scorer.score, responses, references))
            seconds["ours, warm"].extend(timed(scorer.score, responses, references) for _ in range(5))
        median = {name: statistics.median(values) for name, values in seconds.items()}
        shape = f"{RESPONSES // per_picture} pictures x {per_picture} responses"
        print(f"\n{shape}, 5 references each, processor milliseconds (median of {repeats}):")
        for name, value in median.items():
            print(f"  {name:<22} {value * 1e3:9.2f}")
        ratios = {
            "warm": median["pycocoevalcap"] / median["ours, warm"],
            "warm, corpus": median["pycocoevalcap, corpus"] / median["ours, warm"],
            "cold": median["pycocoevalcap"] / median["ours, cold"],
        }
        print("  ratio to pycocoevalcap:", ", ".join(f"{name} {value:.0f}x" for name, value in ratios.items()))
        report[shape] = {"seconds": median, "ratio": ratios}
    return report


def theirs_with_tokenizer(responses: list[str], references: list[list[str]]) -> dict[str, float]:
    """Processor seconds of the Java tokeniser and of each metric, once."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    gts = {i: [{"caption": ref} for ref in refs] for i, refs in enumerate(references)}
    res = {i: [{"caption": text}] for i, text in enumerate(responses)}
    tokenized: list[dict[int, list[str]]] = []
    tokenizer = PTBTokenizer()
    seconds = {"tokenizer": timed(lambda: tokenized.extend((tokenizer.tokenize(gts), tokenizer.tokenize(res))))}
    seconds["cider_d"] = timed(Cider().compute_score, *tokenized)
    seconds["bleu_4"] = timed(lambda: Bleu(4).compute_score(*tokenized, 0))
    seconds["rouge_l"] = timed(Rouge().compute_score, *tokenized)
    return seconds


def with_tokenizer(rng: random.Random, corpus: list[list[str]], rounds: int) -> dict[str, Any]:
    """Part 2. corpus: raw captions."""
    from reward_models.metrics.bleu import Bleu
    from reward_models.metrics.cider import CiderD
    from reward_models.metrics.ngrams import DocumentFrequencies
    from reward_models.metrics.rouge import RougeL
    from reward_models.metrics.text import TOKENIZERS

    names = [name for name in ("simple", "ptb") if name in TOKENIZERS]
    frequencies = {name: DocumentFrequencies.from_references(corpus, tokenizer=name) for name in names}
    report: dict[str, Any] = {}
    for per_picture in (GROUP, 1):
        theirs: dict[str, list[float]] = defaultdict(list)
        ours: dict[tuple[str, str], list[float]] = defaultdict(list)
        scorers = {
            (name, scorer.__name__): scorer
            for name in names
            for scorer in (CiderD(frequencies[name]), Bleu(smooth=False, tokenizer=name), RougeL(tokenizer=name))
        }
        for _ in range(rounds):
            responses, references = make_batch(rng, corpus, per_picture, MANY)
            for scorer in scorers.values():
                scorer.score(responses[::-1], references[::-1])  # references seen: warm
            for part, value in theirs_with_tokenizer(responses, references).items():
                theirs[part].append(value)
            for key, scorer in scorers.items():
                ours[key].extend(timed(scorer.score, responses, references) for _ in range(5))
        their = {part: statistics.median(values) for part, values in theirs.items()}
        shape = f"{MANY // per_picture} pictures x {per_picture} responses"
        print(f"\n{shape}, 5 references each, from raw text, processor milliseconds (median of {rounds}):")
        print("  pycocoevalcap      " + ", ".join(f"{part} {value * 1e3:.0f}" for part, value in their.items()))
        report[shape] = {"pycocoevalcap": their}
        for name in names:
            mine = {metric: statistics.median(ours[name, metric]) for metric in ("cider_d", "bleu_4", "rouge_l")}
            ratio = {metric: (their["tokenizer"] + their[metric]) / value for metric, value in mine.items()}
            ratio["all three"] = sum(their.values()) / sum(mine.values())
            print(f"  ours, {name:<12} " + ", ".join(f"{part} {value * 1e3:.1f}" for part, value in mine.items()))
            print("    ratio            " + ", ".join(f"{part} {value:.0f}x" for part, value in ratio.items()))
            report[shape][name] = {"seconds": mine, "ratio": ratio}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="CSV with image, caption")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    try:
        import pycocoevalcap.cider.cider  # noqa: F401
    except ImportError:
        sys.exit("this benchmark compares with pycocoevalcap: pip install 'mmft[official-metrics]'")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    rng = random.Random(0)
    path = options.captions or (FLICKR if FLICKR.is_file() else None)
    corpus = read_captions(path) if path else made_up_captions(rng)
    report: dict[str, object] = {"captions": path.name if path else "made up", "pictures": len(corpus)}
    print(f"{len(corpus)} pictures ({report['captions']})")
    report["one step"] = one_step(rng, corpus, options.repeats)
    if shutil.which("java") is None:
        print("\nno Java: the part with pycocoevalcap's tokenizer is left out")
    else:
        report["with tokenizer"] = with_tokenizer(
            rng, read_captions(path, raw=True) if path else corpus, options.rounds
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
