"""Dense CIDEr-D credit against the score on the last token: samples that PPO needs for the same held-out CIDEr-D.

    python benchmarks/dense_credit.py [--seeds 0,1,2] [--steps 16] [--jobs 1] [--json FILE] [--out runs/dense_credit]

Ways to train the recipe `caption_ppo`, all else equal: the score on the last token, the same score paid word by word
(`rewards.0.credit=dense`), each with a critic that starts at zero and with one that starts fitted
(`algorithm.critic_start`), and leave-one-out without a critic. Held-out greedy captions of 256 scenes are scored after
every step. The level to reach is 95 % of what the first row gains by its last step (the mean of its last three
evaluations, by seed); samples are read off the straight line between two evaluations.
Runs that are already in ``--out`` are read, not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "score on the last token, critic from zero": ["algorithm.critic_start=zero"],
    "dense, critic from zero": ["rewards.0.credit=dense", "algorithm.critic_start=zero"],
    "dense, critic from zero, lam 0.8": [
        "rewards.0.credit=dense",
        "algorithm.critic_start=zero",
        "algorithm.lam=0.8",
    ],
    "score on the last token, critic fitted": [],
    "dense, critic fitted": ["rewards.0.credit=dense"],
    "dense, critic fitted, lam 0.8": ["rewards.0.credit=dense", "algorithm.lam=0.8"],
    "leave-one-out, no critic": ["model.critic=none"],
}
SHARE = 0.95


def curve(way: str, seed: int, steps: int, out: Path) -> dict:
    """Samples seen and held-out CIDEr-D, from before training on, of one run."""
    folder = out / f"{way.replace(', ', '-').replace(' ', '_')}-{seed}"
    if not (folder / "summary.json").is_file():
        recipe = ROOT / "recipes" / "caption_ppo.py"
        options = [f"seed={seed}", f"train.steps={steps}", "train.save_every=0", "data.eval=validation"]
        options += ["train.lr_schedule=constant"]  # a rate that falls would favour whoever is early
        options += ["eval.every=1", "eval.rows=256", "output.trackers=[]", f"output.dir={folder}", *WAYS[way]]
        done = subprocess.run([sys.executable, str(recipe), *options], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{way}, seed {seed}: {done.stderr[-2000:]}")
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [summary["before"]["cider_d"]["mean"], *[m["eval/cider_d"] for m in lines if "eval/cider_d" in m]]
    per_step = round(lines[0]["samples_per_second"] * lines[0]["seconds"])
    return {
        "samples": [per_step * i for i in range(len(scores) + 1)],
        "cider_d": [*scores, summary["after"]["cider_d"]["mean"]],
        "explained_variance": [m["explained_variance"] for m in lines if "explained_variance" in m],
    }


def samples_to(level: float, run: dict) -> float:
    """Samples at which the curve first crosses the level; infinity if it never does."""
    scores, samples = run["cider_d"], run["samples"]
    for i, score in enumerate(scores):
        if score >= level:
            before = scores[i - 1]
            return samples[i - 1] + (samples[i] - samples[i - 1]) * (level - before) / (score - before)
    return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; give each one thread (OMP_NUM_THREADS=1)")
    parser.add_argument("--out", type=Path, default=Path("runs/dense_credit"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    seeds = [int(seed) for seed in args.seeds.split(",")]
    todo = [(way, seed) for seed in seeds for way in WAYS]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = dict(zip(todo, pool.map(lambda job: curve(*job, args.steps, args.out.resolve()), todo), strict=True))

    levels, table = {}, {way: [] for way in WAYS}
    baseline = next(iter(WAYS))
    for seed in seeds:
        start, end = runs[baseline, seed]["cider_d"][0], float(np.mean(runs[baseline, seed]["cider_d"][-3:]))
        levels[seed] = start + SHARE * (end - start)
        for way in WAYS:
            table[way].append(samples_to(levels[seed], runs[way, seed]))
    print(
        "\n| | "
        + " | ".join(f"samples, seed {seed}" for seed in seeds)
        + " | of the first row's | CIDEr-D at the end |"
    )
    print("|---|" + "---:|" * (len(seeds) + 2))
    ratios = {}
    for way, needed in table.items():
        ratios[way] = float(np.mean(np.array(needed) / np.array(table[baseline])))
        ends = [runs[way, seed]["cider_d"][-1] for seed in seeds]
        cells = [f"{n:.0f}" for n in needed] + [f"{ratios[way]:.2f}", f"{np.mean(ends):.3f}"]
        print(f"| {way} | {' | '.join(cells)} |")
    print("level: " + ", ".join(f"{levels[seed]:.3f} (seed {seed})" for seed in seeds))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        runs_by_name = {f"{way}, seed {seed}": run for (way, seed), run in runs.items()}
        result = {"levels": levels, "samples": table, "ratios": ratios, "runs": runs_by_name}
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
