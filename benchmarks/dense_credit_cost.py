"""What dense credit costs: `increments` next to `score`, on the same responses, warm, for every n-gram metric.

Responses of 20 words, one piece each and an end token (`--pieces words`), or cut into pieces of at most 4 characters
as a subword tokeniser would (`--pieces subwords`); 5 references each; processor time, one core, alternating, median of
`--repeats`. Printed are both times, their ratio, and the largest |sum of the credit - score| over all responses. Exits
with 1 if the ratio for CIDEr-D is above 3 or a sum is off by more than 1e-9.

    python benchmarks/dense_credit_cost.py [--captions CSV] [--responses N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from scoring_speed import FLICKR, GROUP, made_up_captions, make_batch, read_captions  # noqa: E402

from reward_models.metrics.bleu import Bleu  # noqa: E402
from reward_models.metrics.cider import Cider, CiderD  # noqa: E402
from reward_models.metrics.ngrams import DocumentFrequencies  # noqa: E402
from reward_models.metrics.rouge import RougeL  # noqa: E402
from reward_models.metrics.text import TOKENIZERS  # noqa: E402

WORDS = 20


def twenty_words(rng: random.Random, corpus: list[list[str]], rows: int) -> tuple[list[str], list[list[str]]]:
    """Responses of exactly 20 words, made of `make_batch`'s."""
    responses, references = make_batch(rng, corpus, GROUP, rows)
    out = []
    for text in responses:
        words = text.split()
        while len(words) < WORDS:
            words += rng.choice(responses).split()
        out.append(" ".join(words[:WORDS]))
    return out, references


def cut(text: str, subwords: bool) -> list[str]:
    words = [word if i == 0 else f" {word}" for i, word in enumerate(text.split(" "))]
    if subwords:
        words = [word[i : i + 4] for word in words for i in range(0, len(word), 4)]
    return [*words, ""]


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="CSV with image, caption")
    parser.add_argument("--responses", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--pieces", choices=["words", "subwords"], help="default: both")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    rng = random.Random(0)
    path = options.captions or (FLICKR if FLICKR.is_file() else None)
    corpus = read_captions(path) if path else made_up_captions(rng)
    texts, references = twenty_words(rng, corpus, options.responses)
    ended = [rng.random() < 0.8 for _ in texts]
    report: dict[str, dict[str, float]] = {}
    print(
        f"{len(texts)} responses of {WORDS} words, 5 references each; "
        f"processor milliseconds, median of {options.repeats}"
    )
    for tokenizer in [name for name in ("simple", "ptb") if name in TOKENIZERS]:
        df = DocumentFrequencies.from_references(corpus, tokenizer=tokenizer)
        metrics = [CiderD(df), Cider(df), Bleu(tokenizer=tokenizer), RougeL(tokenizer=tokenizer)]
        for kind in [options.pieces] if options.pieces else ["words", "subwords"]:
            pieces = [cut(text, kind == "subwords") for text in texts]
            for metric in metrics:
                scores = metric.score(texts, references, ended)
                credit = metric.increments(pieces, references=references, ended=ended)
                off = max(abs(float(c.sum()) - s) for c, s in zip(credit, scores.tolist(), strict=True))
                plain, dense = [], []
                for _ in range(options.repeats):
                    plain.append(seconds(lambda m=metric: m.score(texts, references, ended)))
                    dense.append(
                        seconds(lambda m=metric, p=pieces: m.increments(p, references=references, ended=ended))
                    )
                a, b = statistics.median(plain), statistics.median(dense)
                name = f"{metric.__name__}, {tokenizer}, {kind}"
                print(
                    f"  {name:<28} plain {a * 1e3:6.2f}  dense {b * 1e3:6.2f}  ratio {b / a:4.2f}"
                    f"  largest |sum - score| {off:.1e}"
                )
                report[name] = {"plain": a, "dense": b, "ratio": b / a, "max_abs_difference": off}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    slow = any(row["ratio"] > 3 for name, row in report.items() if name.startswith("cider_d,"))
    return int(slow or any(row["max_abs_difference"] > 1e-9 for row in report.values()))


if __name__ == "__main__":
    sys.exit(main())
