"""The results table of captioning on the built-in world: PPO and A2C over seeds, beside honest baselines.

    python benchmarks/caption_table.py [--seeds 0,1,2] [--rows 1000] [--json FILE] [--out runs/table]

Each RL row is one run of its recipe as shipped, on the bundled model. Two rows ask whether the gain is RL's: the
supervised pretraining gone on with for half as many steps again (the warm start's plateau), and for as many seconds
as a PPO run took. All rows are greedy captions of the same test scenes; intervals are 95 % paired bootstrap.
Runs that are already in ``--out`` are read, not run again.
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
WEIGHTS = ROOT / "mmft" / "assets" / "scenes_vlm"
COLUMNS = ("cider_d", "corpus_bleu_4", "attribute_accuracy", "bad_ending", "length")


def rl(algorithm: str, seed: int, rows: int, out: Path) -> dict[str, Any]:
    """One run of a recipe as a user starts it; its summary, with the seconds of the 60 steps alone."""
    folder = out / f"{algorithm}-{seed}"
    if not (folder / "summary.json").is_file():
        recipe = ROOT / "recipes" / f"caption_{algorithm}.py"
        options = [f"seed={seed}", f"eval.rows={rows}", "eval.every=0", f"output.dir={folder}"]
        subprocess.run([sys.executable, str(recipe), *options], check=True, cwd=ROOT)
    summary = json.loads((folder / "summary.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return summary | {"training_seconds": sum(s["seconds"] for s in steps)}


def supervised(name: str, steps: int, rows: int, out: Path) -> dict[str, Any]:
    """The pretraining gone on with from the bundled weights; compared with them like an RL run."""
    folder = out / name
    began = time.time()
    if not (folder / "model.safetensors").is_file():
        command = [sys.executable, str(ROOT / "recipes" / "pretrain_scenes.py"), "--resume-from", str(WEIGHTS)]
        options = ["--steps", str(steps), "--evals", "1", "--eval-rows", "8", "--out", str(folder)]
        subprocess.run([*command, *options], check=True, cwd=ROOT)
        (folder / "seconds").write_text(str(time.time() - began))

    from mmft.evaluation.captioning import compare, summarise

    old, new = scores(str(WEIGHTS), rows), scores(str(folder), rows)
    seconds = float((folder / "seconds").read_text())
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    seconds = max((line["seconds"] for line in log if "seconds" in line), default=seconds)
    return {
        "before": summarise(old),
        "after": summarise(new),
        "difference": compare(old, new),
        "training_seconds": seconds,
    }


def scores(model: str, rows: int):
    """Per-scene scores of a model's greedy captions."""
    from mmft.data import load_rows
    from mmft.training.evaluate import evaluate
    from mmft.training.run import caption_metrics
    from mmft.vlm.load import build_policy, load_model
    from reward_models import DocumentFrequencies

    held_out = load_rows("scenes", "test", rows)
    frequencies = DocumentFrequencies.from_references(load_rows("scenes", "train").references())
    policy = build_policy(*load_model(model), critic="none", needs_reference=False)
    return evaluate(policy, held_out, caption_metrics(frequencies, held_out), rows, 24).metrics


def line(name: str, result: dict[str, Any]) -> str:
    gain = result["difference"]["cider_d"]
    after = [f"{result['after'][c]['mean']:.3f}" for c in COLUMNS]
    interval = f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
    relative = f"{100 * gain['relative']:+.1f} %"
    return f"| {name} | {' | '.join(after)} | {interval} | {relative} | {result['training_seconds']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--more-steps", type=int, default=None, help="half of the pretraining's steps")
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    results: dict[str, dict[str, Any]] = {}
    for algorithm in ("ppo", "a2c"):
        for seed in map(int, args.seeds.split(",")):
            results[f"{algorithm.upper()}, seed {seed}"] = rl(algorithm, seed, args.rows, args.out)
    log = (WEIGHTS / "training_log.jsonl").read_text().splitlines()
    steps = max(entry.get("step", 0) for entry in map(json.loads, log))
    more = supervised("supervised-half-more", args.more_steps or steps // 2, args.rows, args.out)
    results["supervised, half as many steps again"] = more
    rate = more["training_seconds"] / (args.more_steps or steps // 2)
    budget = max(r["training_seconds"] for name, r in results.items() if name.startswith("PPO"))
    results["supervised, for PPO's seconds"] = supervised(
        "supervised-same-seconds", max(1, round(budget / rate)), args.rows, args.out
    )

    before = results[next(iter(results))]["before"]
    labels = ("CIDEr-D", "BLEU-4", "true claims", "bad endings", "words")
    print(f"\n| | {' | '.join(labels)} | CIDEr-D gained (95 %) | relative | seconds |")
    print("|---|" + "---|" * (len(labels) + 3))
    print(f"| bundled model | {' | '.join(f'''{before[c]['mean']:.3f}''' for c in COLUMNS)} | | | |")
    for name, result in results.items():
        print(line(name, result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
