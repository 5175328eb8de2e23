"""CIDEr-D, BLEU and ROUGE-L next to pycocoevalcap: every caption of a data set against the others of its picture.

Same tokens (lower case, words only, split at blanks) and same document frequencies (all captions, one document per
picture). The original CIDEr, which pycocoevalcap does not have, is compared with its definition, written out below
with dictionaries. Prints the largest absolute difference per metric; exits with 1 if one is above 1e-9.

    python benchmarks/metric_parity.py [--captions CSV] [--limit PICTURES] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from scoring_speed import FLICKR, read_captions  # noqa: E402

from reward_models.metrics.bleu import Bleu, corpus_bleu  # noqa: E402
from reward_models.metrics.cider import Cider, CiderD  # noqa: E402
from reward_models.metrics.ngrams import DocumentFrequencies  # noqa: E402
from reward_models.metrics.rouge import RougeL  # noqa: E402

TOLERANCE = 1e-9


def pycocoevalcap_cider(candidates: list[str], references: list[list[str]], corpus: list[list[str]]) -> np.ndarray:
    """pycocoevalcap's CIDEr-D with the document frequencies of `corpus`, which its interface does not offer.

    It takes log(number of documents) from the number of rows it scores, so that one logarithm is replaced.
    """
    from pycocoevalcap.cider import cider_scorer

    counter = cider_scorer.CiderScorer()
    counter.crefs = [cider_scorer.cook_refs(refs) for refs in corpus]
    counter.compute_doc_freq()
    scorer = cider_scorer.CiderScorer()
    for text, refs in zip(candidates, references, strict=True):
        scorer += (text, refs)
    scorer.document_frequency = counter.document_frequency
    rows, documents = len(candidates), len(corpus)
    if documents in counter.document_frequency.values() or rows in counter.document_frequency.values():
        raise ValueError("an n-gram has as many documents as there are rows: the logarithm cannot be replaced safely")

    class Numpy:
        def __getattr__(self, name: str) -> object:
            return getattr(np, name)

        @staticmethod
        def log(x: float) -> float:
            return np.log(float(documents)) if x == float(rows) else np.log(x)

    with mock.patch.object(cider_scorer, "np", Numpy()):
        return np.array(scorer.compute_cider())


def defined_cider(candidates: list[str], references: list[list[str]], corpus: list[list[str]]) -> np.ndarray:
    """The original CIDEr, word by word as the paper has it (equations 1 to 3), times 10."""

    def counts(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    held = [Counter(g for refs in corpus for g in set().union(*(counts(ref, n) for ref in refs))) for n in range(1, 5)]
    kept: dict[tuple[str, int], tuple[dict[tuple[str, ...], float], float]] = {}

    def vector(text: str, n: int) -> tuple[dict[tuple[str, ...], float], float]:
        if (text, n) not in kept:
            found = counts(text, n)
            of = {g: t / found.total() * math.log(len(corpus) / max(1, held[n - 1][g])) for g, t in found.items()}
            kept[text, n] = of, math.sqrt(sum(x * x for x in of.values()))
        return kept[text, n]

    out = []
    for text, refs in zip(candidates, references, strict=True):
        total = 0.0
        for n in range(1, 5):
            own, own_norm = vector(text, n)
            for ref in refs:
                other, norm = vector(ref, n)
                if own_norm and norm:
                    total += sum(x * other.get(g, 0.0) for g, x in own.items()) / (own_norm * norm) / len(refs) / 4
        out.append(10 * total)
    return np.array(out)


def differences(corpus: list[list[str]]) -> dict[str, float]:
    """Largest absolute difference per metric, over every caption against the others of its picture."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.rouge.rouge import Rouge

    candidates = [caption for refs in corpus for caption in refs]
    references = [refs[:i] + refs[i + 1 :] for refs in corpus for i in range(len(refs))]
    df = DocumentFrequencies.from_references(corpus, tokenizer="whitespace")
    theirs = pycocoevalcap_cider(candidates, references, corpus)
    ours = CiderD(df, eos=False).score(candidates, references)
    out = {"cider_d": float(np.abs(theirs - ours).max())}

    theirs = defined_cider(candidates, references, corpus)
    ours = Cider(df, eos=False).score(candidates, references)
    out["cider"] = float(np.abs(theirs - ours).max())
    theirs = Rouge().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)})[1]
    ours = RougeL(tokenizer="whitespace").score(candidates, references)
    out["rouge_l"] = float(np.abs(theirs - ours).max())

    scorer = BleuScorer(n=4)
    for text, refs in zip(candidates, references, strict=True):
        scorer += (text, refs)
    corpus_scores, sentence_scores = scorer.compute_score(option="closest")
    sentences = Bleu(4, smooth=False, tokenizer="whitespace").orders(candidates, references)
    whole = corpus_bleu(candidates, references, tokenizer="whitespace")
    for n in range(4):
        out[f"bleu_{n + 1} sentence"] = float(np.abs(np.array(sentence_scores[n]) - sentences[:, n]).max())
        out[f"bleu_{n + 1} corpus"] = float(abs(corpus_scores[n] - whole[n]))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, default=FLICKR, help="CSV with image, caption")
    parser.add_argument("--limit", type=int, help="only the first PICTURES pictures")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    if not options.captions.is_file():
        sys.exit(f"{options.captions.name}: no such file; give --captions CSV (columns image, caption)")
    corpus = read_captions(options.captions)[: options.limit]
    found = differences(corpus)
    print(f"{sum(map(len, corpus))} captions of {len(corpus)} pictures; largest absolute difference:")
    for name, value in found.items():
        print(f"  {name:<16} {value:.2e}")
    if options.json:
        report = {"captions": sum(map(len, corpus)), "pictures": len(corpus), "max_abs_difference": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(max(found.values()) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
