"""What do checkpoints cost? The share of a run's wall time that goes into saving every 20 steps.

    python benchmarks/checkpoint_overhead.py [recipes/caption_ppo.yaml] [key.sub=value ...] [--every 20] [--json FILE]

The recipe itself from its first step to its last, evaluations included, with everything that a checkpoint takes: state
gathered, tensors and JSON written, every file hashed and forced to the disk, renamed, an older one deleted. The clock
is around `save_checkpoint` as the trainer calls it. The start (model, data, self-test) counts for neither side: it
would only make the share smaller.

Printed: seconds and megabytes per checkpoint, and the share. Exits with 1 where it is more than 2 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

LIMIT = 0.02


def run(recipe) -> dict[str, float]:
    """Trains a recipe; seconds of all of it and of each save, and the size of the last checkpoint."""
    import mmft.training.trainer as training
    from mmft.training.run import assemble

    saves: list[float] = []
    plain = training.save_checkpoint

    def timed(trainer, step: int) -> Path:
        start = time.perf_counter()
        folder = plain(trainer, step)
        saves.append(time.perf_counter() - start)
        return folder

    training.save_checkpoint = timed
    try:
        trainer = assemble(recipe)
        trainer.begin()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    finally:
        training.save_checkpoint = plain
    files = [path for path in trainer.checkpoints.latest().rglob("*") if path.is_file()]
    return {
        "seconds": seconds,
        "checkpoints": len(saves),
        "seconds_each": median(saves),
        "megabytes_each": sum(path.stat().st_size for path in files) / 1e6,
        "share": sum(saves) / seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="recipe.yaml | key.sub=value")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_intermixed_args()
    files = [word for word in args.words if "=" not in word]
    if len(files) > 1:
        parser.error(f"got {' and '.join(files)}, expected one recipe file")

    from mmft.recipe import load_recipe

    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk that runs are on: /tmp may be memory
        overrides = [word for word in args.words if "=" in word]
        overrides += [f"train.save_every={args.every}", f"output.dir={folder}/run"]
        result = run(load_recipe(files[0] if files else ROOT / "recipes" / "caption_ppo.yaml", overrides))
    print(
        f"{result['checkpoints']} checkpoints in {result['seconds']:.1f} s, one every {args.every} steps: "
        f"{1000 * result['seconds_each']:.0f} ms and {result['megabytes_each']:.1f} MB each, "
        f"{result['share']:.2%} of the wall time   target at most {LIMIT:.0%}: "
        f"{'met' if result['share'] <= LIMIT else 'NOT met'}"
    )
    if args.json:
        args.json.write_text(json.dumps({"every": args.every, "result": result}, indent=1) + "\n")
    return int(result["share"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
