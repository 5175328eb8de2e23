"""How fast CIDEr-D scores one step of reinforcement learning, next to pycocoevalcap, in one run.

One step: 256 responses against 5 references each. Both sides get the same text, tokenised already (both only split at
blanks; pycocoevalcap's Java tokeniser is left out of its time, and so is starting it). A response is the first half of
one of its picture's captions and the second half of a caption of another picture: about as much in common with the
references as a model's output has, and all different, so that nothing is gained from repeats.

Processor time is measured (both sides use one thread), so that a busy machine does not favour the shorter run.
Measured, alternating, `--repeats` times, each time with new pictures; medians are printed:

    pycocoevalcap          Cider().compute_score(gts, res): it vectorises the references again for every response,
                           and counts document frequencies over the batch
    pycocoevalcap, corpus  the same scorer with a corpus' document frequencies put in by hand: the score that is wanted
    ours, cold             CiderD.score on pictures never seen (references are vectorised, then cached)
    ours, warm             the same batch again, as when pictures return in a later epoch

in two shapes: 32 pictures with 8 responses each, and 256 pictures with one.

    python benchmarks/scoring_speed.py [--captions CSV] [--json FILE]

CSV has the columns image, caption; without it (and without ../shared/real) captions are drawn from a small grammar.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
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
RESPONSES, GROUP = 256, 8


def read_captions(path: Path) -> list[list[str]]:
    """Captions per picture, lower case, words joined by single blanks."""
    pictures: dict[str, list[str]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            pictures[row["image"]].append(" ".join(re.findall(r"\w+", row["caption"].lower())))
    return list(pictures.values())


def made_up_captions(rng: random.Random, pictures: int = 4000) -> list[list[str]]:
    """Five captions of about eleven words per picture over a vocabulary of 2,000 with a natural frequency fall-off."""
    words = [f"w{i}" for i in range(2000)]
    weights = [1 / (i + 3) for i in range(2000)]
    topics = [rng.choices(words, weights, k=14) for _ in range(pictures)]
    return [[" ".join(rng.sample(topic, rng.randint(8, 14))) for _ in range(5)] for topic in topics]


def make_batch(rng: random.Random, corpus: list[list[str]], per_picture: int) -> tuple[list[str], list[list[str]]]:
    pictures = rng.sample(range(len(corpus)), RESPONSES // per_picture)
    responses, references = [], []
    for i in range(RESPONSES):
        own = corpus[pictures[i // per_picture]]
        head, tail = own[i % 5].split(), rng.choice(corpus)[0].split()
        responses.append(" ".join(head[: len(head) // 2] + tail[len(tail) // 2 :]))
        references.append(list(own))
    return responses, references


def timed(function: Callable[..., object], *arguments: object) -> float:
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def score_by_hand(scorer: Any, responses: list[str], references: list[list[str]]) -> None:
    """pycocoevalcap's scorer without its own counting of document frequencies."""
    for text, refs in zip(responses, references, strict=True):
        scorer += (text, refs)
    scorer.compute_cider()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="CSV with image, caption")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    try:
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.cider.cider_scorer import CiderScorer, precook
    except ImportError:
        sys.exit("this benchmark compares with pycocoevalcap: pip install 'mmft[official-metrics]'")
    from reward_models import CiderD, DocumentFrequencies

    rng = random.Random(0)
    path = options.captions or (FLICKR if FLICKR.is_file() else None)
    corpus = read_captions(path) if path else made_up_captions(rng)
    df = DocumentFrequencies.from_references(corpus, tokenizer="whitespace")
    frequencies: dict[tuple[str, ...], float] = defaultdict(float)
    for references in corpus:
        for gram in {gram for caption in references for gram in precook(caption)}:
            frequencies[gram] += 1

    report: dict[str, object] = {
        "captions": path.name if path else "made up",
        "pictures": len(corpus),
        "df": repr(df),
    }
    print(f"{len(corpus)} pictures ({report['captions']}), {df!r}")
    for per_picture in (GROUP, 1):
        scorer = CiderD(df, eos=False)
        scorer.score(*make_batch(rng, corpus, per_picture))
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(options.repeats):
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
        print(f"\n{shape}, 5 references each, processor milliseconds (median of {options.repeats}):")
        for name, value in median.items():
            print(f"  {name:<22} {value * 1e3:9.2f}")
        ratios = {
            "warm": median["pycocoevalcap"] / median["ours, warm"],
            "warm, corpus": median["pycocoevalcap, corpus"] / median["ours, warm"],
            "cold": median["pycocoevalcap"] / median["ours, cold"],
        }
        print("  ratio to pycocoevalcap:", ", ".join(f"{name} {value:.0f}x" for name, value in ratios.items()))
        report[shape] = {"seconds": median, "ratio": ratios}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
