"""The two pictures of the README, from a finished run.

    python benchmarks/_readme_pictures.py [runs/caption_ppo] [--out docs/images]

`before_after.png`: held-out pictures with their captions before and after; `curves.png`: reward, KL and held-out
CIDEr-D of the run.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def before_after(run: Path, out: Path, count: int = 4) -> None:
    """The first pictures whose caption changed; not the best ones."""
    changed = [s for s in lines(run / "samples.jsonl") if s["picture"] and s["before"] != s["after"]][:count]
    figure, axes = plt.subplots(1, count, figsize=(3.1 * count, 4.3))
    for axis, sample in zip(axes, changed, strict=False):
        axis.imshow(Image.open(run / sample["picture"]))
        axis.axis("off")
        text = "\n".join(
            f"{side}  (CIDEr-D {sample[f'scores_{side}']['cider_d']:.2f})\n" + textwrap.fill(sample[side], 38) + "\n"
            for side in ("before", "after")
        )
        axis.text(0, 1.04, text, transform=axis.transAxes, va="top", fontsize=8.5, linespacing=1.25).set_y(-0.04)
    figure.tight_layout()
    figure.savefig(out / "before_after.png", dpi=110, bbox_inches="tight")


def curves(run: Path, out: Path) -> None:
    steps = lines(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9))
    x = [s["step"] for s in steps]
    left.plot(x, [s["reward"] for s in steps], color="#2a6f97")
    left.set(title="reward of samples (CIDEr-D)", xlabel="step")
    evals = [(0, summary["before"]["cider_d"]["mean"])]
    evals += [(s["step"], s["eval/cider_d"]) for s in steps if s.get("eval/cider_d") is not None]
    evals += [(x[-1], summary["after"]["cider_d"]["mean"])]
    right.plot(*zip(*evals, strict=True), marker="o", color="#c1121f")
    right.set(title="held-out CIDEr-D (greedy)", xlabel="step")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/caption_ppo"))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    before_after(args.run, args.out)
    curves(args.run, args.out)


if __name__ == "__main__":
    main()
