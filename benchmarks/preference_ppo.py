"""PPO with a learned preference head: as the only reward, and with CIDEr-D and shaping; and a reward with a hole.

    python benchmarks/preference_ppo.py --head runs/preference [--seeds 0,1,2] [--steps 60] [--jobs 1] [--rows 1000]
                                        [--json FILE] [--out runs/preference_ppo]

The head is trained by `recipes/train_preference.py` on pairs of the built-in world. Rows are greedy captions of the
same held-out test scenes before and after; intervals are 95 % paired bootstrap. The last row trains on
`benchmarks/_hackable.py`, a reward that more words always raise, with the guards as they are by default but told to
stop: the step at which the first one speaks is what it is about. Runs already in ``--out`` are read, not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("cider_d", "attribute_accuracy", "attribute_claims", "length", "bad_ending")


def options_of(way: str, head: Path) -> list[str]:
    """What a row changes of its recipe."""
    if way == "head alone":
        reward = f'{{name: preference, weight: 1.0, normalize: running, options: {{path: "{head}"}}}}'
        return [f"rewards=[{reward}]", "algorithm.kl_coef=0.05"]
    if way == "CIDEr-D + head + shaping":
        return [f"rewards.1.options.path={head}"]
    stop = [f"guards.{guard}.action=stop" for guard in ("bad_endings", "length_drift", "repetition", "held_out")]
    hole = f"{ROOT / 'benchmarks' / '_hackable.py'}:named"
    return [f'rewards=[{{name: "{hole}", weight: 1.0}}]', "eval.every=4", "guards.held_out.patience=2", *stop]


def run(way: str, seed: int, head: Path, steps: int, rows: int, out: Path) -> dict:
    """One run of a recipe as a user starts it; its summary."""
    judge = hashlib.sha256((head / "preference.json").read_bytes()).hexdigest()[:8]
    folder = out / f"{way.replace(' ', '_').replace('+', 'and')}-{seed}-{steps}x{rows}-{judge}"
    if not (folder / "summary.json").is_file():
        mixed = [str(ROOT / "recipes" / "caption_preference.yaml")] if way.startswith("CIDEr") else []
        options = [f"seed={seed}", f"train.steps={steps}", "train.save_every=0", "eval.every=0", f"eval.rows={rows}"]
        options += ["output.trackers=[]", f"output.dir={folder}", *options_of(way, head)]
        command = [sys.executable, str(ROOT / "recipes" / "caption_ppo.py"), *mixed, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{way}, seed {seed}: {done.stderr[-2000:]}")
    summary = json.loads((folder / "summary.json").read_text())
    return summary | {"steps": len((folder / "metrics.jsonl").read_text().splitlines())}


def line(way: str, seed: int, result: dict) -> str:
    after = [f"{result['after'][c]['mean']:.3f}" for c in COLUMNS]
    gains = []
    for name in ("cider_d", "attribute_accuracy"):
        gain = result["difference"][name]
        gains.append(f"{gain['mean']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})")
    alarms = ", ".join(f"{a['guard']} at step {a['step']}" for a in result["alarms"]) or "–"
    return f"| {way}, seed {seed} | {' | '.join(after + gains)} | {result['steps']} | {alarms} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; give each one thread (OMP_NUM_THREADS=1)")
    parser.add_argument("--out", type=Path, default=Path("runs/preference_ppo"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    ways = ("head alone", "CIDEr-D + head + shaping", "a reward with a hole")
    todo = [(way, seed) for way in ways for seed in map(int, args.seeds.split(","))]
    with ThreadPoolExecutor(args.jobs) as pool:
        work = pool.map(lambda j: run(*j, args.head.resolve(), args.steps, args.rows, args.out.resolve()), todo)
        results = dict(zip(todo, work, strict=True))
    before = next(iter(results.values()))["before"]
    print("\n| | " + " | ".join(COLUMNS) + " | CIDEr-D gained (95 %) | true claims gained (95 %) | steps | alarms |")
    print("|---|" + "---|" * (len(COLUMNS) + 4))
    print(f"| bundled model | {' | '.join(f'''{before[c]['mean']:.3f}''' for c in COLUMNS)} | | | | |")
    for (way, seed), result in results.items():
        print(line(way, seed, result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({f"{way}, seed {seed}": r for (way, seed), r in results.items()}, indent=1))


if __name__ == "__main__":
    main()
