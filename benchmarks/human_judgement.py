"""How far the metrics agree with people: Kendall's tau on Flickr8k-Expert, next to the published values.

The set: 5,822 pairs of a photo and a caption, mostly of another photo, each rated by three experts from 1 (does not
describe the photo) to 4. The protocol is that of the SPICE and CLIPScore papers: references are the photo's five
captions, pairs whose caption is one of them are left out, every rating is a pair (score, rating) of its own, and tau-c
is taken over all of them. Tokens are those of the Penn Treebank, BLEU is not smoothed, there is no end token, and
document frequencies are counted over the rows that are scored, a photo as often as it has ratings: that is what
pycocoevalcap does when it is handed these rows (it calls CIDEr-D "CIDEr").

Published: Hessel et al. 2021 (CLIPScore, arXiv 2104.08718), table 1, over all 5,664 pairs that the protocol leaves.
Pairs whose texts are not in the CSV cannot be scored and are counted. `spread` says how much that may matter: twice
the standard deviation of tau when as many pairs again are lost the same way, photo by photo and caption by caption.

    python benchmarks/human_judgement.py [--captions CSV] [--ratings FILE] [--tokenizer ptb] [--no-java] [--json FILE]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FLICKR = ROOT.parent / "shared" / "real" / "flickr8k"

# Hessel et al. 2021, table 1, tau-c in hundredths
PUBLISHED = {"bleu_1": 32.3, "bleu_4": 30.8, "rouge_l": 32.3, "meteor": 41.8, "cider_d": 43.9, "spice": 44.9}
ALL_PAIRS, EXPERTS = 5664, 3


class Pair(NamedTuple):
    photo: str
    caption: str
    ratings: tuple[int, ...]


def read_captions(path: Path) -> dict[str, list[str]]:
    """Photo -> its captions, as they stand."""
    captions: dict[str, list[str]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions[row["image"]].append(row["caption"])
    return captions


def read_pairs(path: Path, captions: dict[str, list[str]]) -> tuple[list[Pair], dict[str, int]]:
    """The pairs that can be scored, and how many could not, by reason."""
    pairs, lost = [], {"own caption": 0, "photo or caption not at hand": 0}
    for line in path.read_text(encoding="utf-8").splitlines():
        photo, caption_id, *ratings = line.split("\t")
        source, _, k = caption_id.rpartition("#")
        if photo not in captions or source not in captions:
            lost["photo or caption not at hand"] += 1
        elif (text := captions[source][int(k)]) in captions[photo]:
            lost["own caption"] += 1
        else:
            pairs.append(Pair(photo, text, tuple(map(int, ratings))))
    return pairs, lost


def score(pairs: list[Pair], captions: dict[str, list[str]], tokenizer: str, java: bool) -> dict[str, np.ndarray]:
    """Metric -> one score per pair."""
    from reward_models import DocumentFrequencies
    from reward_models.metrics.coco import score_rows

    candidates, references = [pair.caption for pair in pairs], [captions[pair.photo] for pair in pairs]
    rated = [refs for refs in references for _ in range(EXPERTS)]
    by_row = DocumentFrequencies.from_references(rated, tokenizer=tokenizer)
    by_photo = DocumentFrequencies.from_references(list(captions.values()), tokenizer=tokenizer)
    out = {}
    for metric in ("bleu", "rouge_l", "cider_d", "cider", "meteor", "spice"):
        if metric in ("meteor", "spice") and not java:
            continue
        df = by_row if metric in ("cider_d", "cider") else None
        try:
            rows = score_rows(metric, candidates, references, df=df, tokenizer=tokenizer).rows
        except (ValueError, OSError) as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        out |= {name: rows[name] for name in rows if name not in ("bleu_2", "bleu_3")}
    out["cider_d, df of all captions"] = score_rows("cider_d", candidates, references, df=by_photo).rows["cider_d"]
    return out


def tau(scores: np.ndarray, pairs: list[Pair], variant: str, kept: list[int] | None = None) -> float:
    """Kendall's tau in hundredths, every rating a pair of its own."""
    from scipy.stats import kendalltau

    kept = list(range(len(pairs))) if kept is None else kept
    ratings = [rating for i in kept for rating in pairs[i].ratings]
    return 100 * float(kendalltau(np.repeat(scores[kept], EXPERTS), ratings, variant=variant)[0])


def losses(pairs: list[Pair], share: float, rng: random.Random, times: int) -> list[list[int]]:
    """Which pairs stay if about `share` of them go, because photos and captions do, `times` drawn anew."""
    photos, texts = sorted({pair.photo for pair in pairs}), sorted({pair.caption for pair in pairs})
    each = 1 - (1 - share) ** 0.5  # half of the loss from either side
    drawn = []
    for _ in range(times):
        gone = set(rng.sample(photos, round(each * len(photos)))) | set(rng.sample(texts, round(each * len(texts))))
        drawn.append([i for i, pair in enumerate(pairs) if pair.photo not in gone and pair.caption not in gone])
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, default=FLICKR / "captions_all.csv", help="CSV with image, caption")
    parser.add_argument("--ratings", type=Path, default=FLICKR / "ExpertAnnotations.txt", help="of Flickr8k-Expert")
    parser.add_argument("--tokenizer", default="ptb")
    parser.add_argument("--no-java", action="store_true", help="leave out METEOR and SPICE")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    for path in (options.captions, options.ratings):
        if not path.is_file():
            sys.exit(f"{path.name}: no such file; give --captions and --ratings of Flickr8k")
    captions = read_captions(options.captions)
    pairs, lost = read_pairs(options.ratings, captions)
    unlisted = ALL_PAIRS - len(pairs) - lost["photo or caption not at hand"]
    print(f"{len(pairs)} pairs of {ALL_PAIRS}; left out: " + ", ".join(f"{n} {why}" for why, n in lost.items()))
    print(f"(and about {unlisted} that the file does not list); tokenizer {options.tokenizer}\n")

    scores = score(pairs, captions, options.tokenizer, not options.no_java)
    drawn = losses(pairs, 1 - len(pairs) / ALL_PAIRS, random.Random(0), 40)
    table = {}
    print(f"{'Kendall tau x 100':<28} {'tau-c':>6} {'spread':>6} {'published':>9} {'difference':>10} {'tau-b':>6}")
    for name, values in scores.items():
        row = {variant: tau(values, pairs, variant[-1]) for variant in ("tau_c", "tau_b")}
        row["spread"] = 2 * float(np.std([tau(values, pairs, "c", kept) for kept in drawn]))
        known = PUBLISHED.get(name)
        gap = "" if known is None else f"{row['tau_c'] - known:+.2f}"
        print(f"{name:<28} {row['tau_c']:6.2f} {row['spread']:6.2f} {known or '':>9} {gap:>10} {row['tau_b']:6.2f}")
        table[name] = row | ({} if known is None else {"published": known})
    if options.json:
        report = {"pairs": len(pairs), "lost": lost, "tokenizer": options.tokenizer, "metrics": table}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
