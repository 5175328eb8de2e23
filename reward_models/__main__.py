"""`python -m reward_models score REFERENCES.json RESULTS.json`: caption metrics on COCO files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from reward_models.metrics.coco import DEFAULT_METRICS, METRICS, score_files
from reward_models.metrics.text import TOKENIZERS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if it worked, 2 with a message on stderr if the input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m reward_models", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    score = verbs.add_parser("score", help="score COCO results against COCO captions: means and per picture")
    score.add_argument("references", metavar="REFERENCES.json", help="COCO captions: images and annotations")
    score.add_argument("results", metavar="RESULTS.json", help="COCO results: a list of image_id and caption")
    score.add_argument(
        "--metrics",
        default=",".join(DEFAULT_METRICS),
        help=f"comma separated, of: {', '.join(METRICS)} (meteor and spice need Java; default: %(default)s)",
    )
    score.add_argument("--tokenizer", help=f"{', '.join(TOKENIZERS)} (default: simple, or that of --df)")
    score.add_argument("--df", metavar="FILE", help="saved document frequencies (default: from the references)")
    score.add_argument("--json", metavar="FILE", help="write means and per-picture scores there ('-' = stdout)")
    options = parser.parse_args(arguments)
    metrics = [name.strip() for name in options.metrics.split(",") if name.strip()]
    try:
        if not metrics:
            raise ValueError(f"--metrics names none; there are: {', '.join(METRICS)}")
        report = score_files(options.references, options.results, metrics, options.df, options.tokenizer)
        text = json.dumps(report, indent=1, ensure_ascii=False)
        if options.json and options.json != "-":
            Path(options.json).write_text(text + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json == "-":
        print(text)
        return 0
    names = list(report["means"])
    width = max(7, *(len(image_id) for image_id in report["images"]))
    print(" ".join([f"{'picture':<{width}}", *(f"{name:>8}" for name in names)]))
    for image_id, row in report["images"].items():
        print(" ".join([f"{image_id:<{width}}", *(f"{row[name]:8.4f}" for name in names)]))
    print(" ".join([f"{'mean':<{width}}", *(f"{report['means'][name]:8.4f}" for name in names)]))
    for signature in report["signatures"].values():
        print(signature)
    return 0


if __name__ == "__main__":
    sys.exit(main())
