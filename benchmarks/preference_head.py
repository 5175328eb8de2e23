"""The preference head on held-out pairs of the built-in world, against what it has to reach.

    python benchmarks/preference_head.py [--head FOLDER] [--pairs 1000] [--out runs/preference_head] [--json FILE]

Without --head, a head is trained first, by recipes/train_preference.yaml as shipped. The pairs it is then measured on
show pictures of the test split and are drawn with a seed of their own: neither training nor calibration saw them.

- accuracy: how often the better text gets the higher reward; 95 % Wilson interval
- ECE: expected calibration error in 15 bins, with the temperature that was fitted on validation pairs
- blank pictures: the same pairs with every picture made grey; text only: a linear judge of words, pairs of words and
  length. Of the kinds that need the picture, both should get about half
- right caption of another picture: how often it gets a higher reward than a right caption of this one
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SEED = 20_000


def train(folder: Path) -> None:
    """A head by the recipe, as a user starts it; one that is there already is used again."""
    if not (folder / "summary.json").is_file():
        command = [sys.executable, str(ROOT / "recipes" / "train_preference.py"), f"output.dir={folder}"]
        subprocess.run(command, check=True, cwd=ROOT)


def measure(folder: Path, pairs: int) -> dict[str, Any]:
    from mmft.data.preferences import scene_pairs
    from mmft.recipe.preference import load_preference_recipe
    from mmft.training.preference import report
    from mmft.vlm.load import resolve
    from reward_models.preference import PreferenceReward, backbone_name

    recipe = load_preference_recipe(folder / "recipe.yaml").pairs
    seen = list(scene_pairs(recipe.train, min(recipe.train_rows or 4000, 4000), kinds=recipe.kinds))
    began = time.time()
    reward = PreferenceReward.load(folder, backbone=resolve(backbone_name(folder)))
    held_out = list(scene_pairs("test", pairs, SEED))
    others = list(scene_pairs("test", pairs // 2, SEED + 1, ["other picture"]))
    found = report(reward, seen, held_out, others)
    return found | {"signature": reward.signature, "seconds": round(time.time() - began, 1)}


def targets(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, measured, wanted, reached)."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"

    pictured, other = found["picture_kinds"], found["other_picture"]
    span = f" ({100 * found['accuracy_low']:.1f} to {100 * found['accuracy_high']:.1f})"
    away = abs(pictured["blank"] - pictured["text_only"])
    return [
        ("accuracy", percent(found["accuracy"]) + span, ">= 95 %", found["accuracy"] >= 0.95),
        ("ECE after calibration", f"{found['ece']:.3f}", "<= 0.05", found["ece"] <= 0.05),
        ("ECE before", f"{found['ece_before']:.3f}", "", True),
        ("kinds that need the picture", percent(pictured["accuracy"]), "", True),
        ("- with blank pictures", percent(pictured["blank"]), "within 5 points of text only", away <= 0.05),
        ("- text only", percent(pictured["text_only"]), "", True),
        ("all kinds with blank pictures", percent(found["blank"]), "", True),
        ("all kinds, text only", percent(found["text_only"]), "", True),
        ("right caption of another picture", percent(other["preferred"]), "<= 5 %", other["preferred"] <= 0.05),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", type=Path, help="a folder of recipes/train_preference.py; none = train one first")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/preference_head"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.head is None:
        train(args.out)
    found = measure(args.head or args.out, args.pairs)

    from mmft.training.preference import print_table

    print_table(found)
    print("\n| | measured | wanted | |\n|---|---|---|---|")
    rows = targets(found)
    for what, measured, wanted, reached in rows:
        print(f"| {what} | {measured} | {wanted} | {'' if not wanted else 'yes' if reached else 'NO'} |")
    print(f"\n{found['signature']}\n{found['seconds']} s for {args.pairs} pairs")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1))
    if not all(reached for *_, reached in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
