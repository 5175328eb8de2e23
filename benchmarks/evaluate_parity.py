"""`mmft evaluate` next to the official pipeline: pycocoevalcap's own tokenizer and scorers, on the same two files.

The first caption of each of 1,000 Flickr8k photos is the prediction, the other four are the references, as COCO JSON.
Both sides read these files: `mmft evaluate predictions.json --references references.json`, and pycocotools' COCO with
pycocoevalcap's COCOEvalCap, its Java tokenizer and its scorers (SPICE where its jars are installed). Prints every
metric of both, and the largest difference of a picture's score; exits with 1 where one is above 1e-6.

    python benchmarks/evaluate_parity.py [--captions CSV] [--limit PICTURES] [--hostile] [--json FILE]

`--hostile` puts odd captions in between: quotes, brackets, accents, emoji, other scripts. No empty ones: the official
METEOR then takes the last reference for the caption, where ours gives 0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from scoring_speed import FLICKR, read_captions  # noqa: E402

from mmft.evaluation.coco_files import write_predictions, write_references  # noqa: E402

TOLERANCE = 1e-6
METRICS = ("bleu", "meteor", "rouge_l", "cider")
ODD = (
    "A dog's ball isn't the boy's.",
    'Two men -- one in "red" , one (in blue) -- run ...',
    "café au lait, naïve señor; 3/4 of a 1,000-piece puzzle #1 @ 50 %",
    "A dog 🐕 runs ☀ in the park",
    "犬が走っている",
    "собака бежит по траве",
    "THE DOG RUNS!!! ?? !",
    "dog dog dog dog dog dog dog dog",
    "can't won't they're gonna I'm",
    "a dog\twith\u00a0a\u2009ball",
)


def write_files(folder: Path, corpus: list[list[str]], hostile: bool = False) -> tuple[Path, Path]:
    """Predictions and references; every 25th prediction an odd one where that is asked for."""
    ids, candidates = list(range(1, len(corpus) + 1)), [captions[0] for captions in corpus]
    if hostile:
        for k, place in enumerate(range(0, len(corpus), 25)):
            candidates[place] = ODD[k % len(ODD)]
    predictions, references = folder / "predictions.json", folder / "references.json"
    write_predictions(predictions, ids, candidates)
    write_references(references, ids, [captions[1:] for captions in corpus])
    return predictions, references


def official(predictions: Path, references: Path) -> dict[str, tuple[float, list[float]]]:
    """Metric -> (score, score of each picture), by COCOEvalCap itself. SPICE only where its jars are."""
    from pycocoevalcap import eval as official_eval
    from pycocotools.coco import COCO

    from reward_models import Spice

    class NoSpice:  # stands in for the scorer whose jars are not there
        def method(self) -> str:
            return "SPICE"

        def compute_score(self, gts: dict, res: dict) -> tuple[float, list[float]]:
            return float("nan"), [float("nan")] * len(gts)

    try:
        Spice()
        scorer: Any = official_eval.Spice
    except ValueError:
        scorer = NoSpice
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(official_eval, "Spice", scorer):
        coco = COCO(str(references))
        found = official_eval.COCOEvalCap(coco, coco.loadRes(str(predictions)))
        found.evaluate()
    rows = [found.imgToEval[name] for name in coco.getImgIds()]
    return {name: (value, [row[name] for row in rows]) for name, value in found.eval.items() if value == value}


def ours(predictions: Path, references: Path, metrics: list[str]) -> dict[str, tuple[float, list[float]]]:
    """The same by the command line, from the files that it writes."""
    from mmft.cli import main

    folder = predictions.parent / "evaluation"
    arguments = ["evaluate", str(predictions), "--references", str(references), "--output", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()):
        code = main([*arguments, "--metrics", ",".join(metrics)])
    if code:
        sys.exit(f"mmft evaluate ended with {code}")
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["scores"]
    rows = [
        json.loads(line)["scores"] for line in (folder / "per_image.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return {name: (score["mean"], [row[name] for row in rows]) for name, score in scores.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, default=FLICKR, help="CSV with image, caption")
    parser.add_argument("--limit", type=int, default=1000, metavar="PICTURES")
    parser.add_argument("--hostile", action="store_true")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    if not options.captions.is_file():
        sys.exit(f"{options.captions.name}: no such file; give --captions CSV (columns image, caption)")
    corpus = [captions for captions in read_captions(options.captions, raw=True) if len(captions) > 1][: options.limit]
    with tempfile.TemporaryDirectory() as folder:
        predictions, references = write_files(Path(folder), corpus, options.hostile)
        theirs = official(predictions, references)
        found = ours(predictions, references, [*METRICS, *(["spice"] if "SPICE" in theirs else [])])
    print(f"{len(corpus)} predictions, {sum(map(len, corpus)) - len(corpus)} references")
    print(f"{'':8} {'official':>20} {'mmft evaluate':>20} {'difference':>12} {'of a picture':>12}")
    report, worst = {}, 0.0
    for name, (score, rows) in theirs.items():
        own, own_rows = found[name]
        one, each = abs(score - own), max(abs(a - b) for a, b in zip(rows, own_rows, strict=True))
        worst = max(worst, one, each)
        report[name] = {"official": score, "mmft": own, "difference": one, "of_a_picture": each}
        print(f"{name:8} {score:20.16f} {own:20.16f} {one:12.1e} {each:12.1e}")
    if "SPICE" not in theirs:
        print("SPICE    not compared: the Stanford CoreNLP jars that it needs are not installed")
    if options.json:
        whole = {"pictures": len(corpus), "hostile": options.hostile, "metrics": report}
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
