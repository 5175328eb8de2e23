"""QLoRA against LoRA: peak memory of the same PPO iteration, and what is learned on the built-in world.

    python benchmarks/qlora.py [--only memory|lift] [--steps 60] [--seeds 0,1] [--json FILE]

Memory: recipes/caption_ppo.yaml at the SmolVLM-256M shape, two steps and an evaluation, each way in a process of its
own, loading included. A peak is Linux's high-water mark of resident memory. It is given as a whole, and above what the
process holds with all libraries, rows and rewards but without a model; ratios are to fp32 LoRA. The plan of `mmft
doctor memory` stands beside it. Lift: the same recipe on the bundled model, held-out CIDEr-D after minus before.

Exits with 1 where nf4 takes more than 0.55 of fp32 LoRA's memory, the plan misses by more than 15 %, or nf4 lifts
less than 0.9 of what LoRA does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks.memory_plan import MIB, SMOL, TARGET, _in_process, environment  # noqa: E402

MOST_MEMORY, LEAST_LIFT = 0.55, 0.9
LORA, QLORA = "fp32 LoRA", "nf4"
_CHECKPOINTING, _8BIT = "train.gradient_checkpointing=true", "train.optimizer=adamw_8bit"
# name -> overrides, environment
WAYS = {
    LORA: ([], {}),
    "fp32 LoRA, blocks above 256 KiB mapped": ([], {"MALLOC_MMAP_THRESHOLD_": str(256 << 10)}),
    "fp32 LoRA, gradient checkpointing": ([_CHECKPOINTING], {}),
    "int8": (["model.quantize=int8"], {}),
    QLORA: (["model.quantize=nf4"], {}),
    "nf4, 8-bit AdamW": (["model.quantize=nf4", _8BIT], {}),
    "nf4, 8-bit AdamW, gradient checkpointing": (["model.quantize=nf4", _8BIT, _CHECKPOINTING], {}),
}
_ITERATION = [*SMOL, "train.steps=2", "data.train_rows=200", "eval.rows=4", "output.trackers=[]"]


def memory(cache: Path, only: list[str] | None = None) -> dict[str, dict]:
    """Way -> peaks in bytes, foretold and measured, by phase and at most."""
    from benchmarks._models import SHAPES, build
    from mmft.recipe import load_recipe
    from mmft.training.memory import measured_base

    model = str(build(SHAPES["smolvlm256m"], cache / "smolvlm256m"))
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        common = [f"model.name={model}", f"output.dir={scratch}", *_ITERATION]
        base = measured_base(load_recipe(ROOT / "recipes" / "caption_ppo.yaml", common))
        for name, (changes, setting) in WAYS.items():
            if only is not None and name not in only:
                continue
            plan, phases = (_in_process(task, [*common, *changes], setting) for task in ("plan", "measure"))
            found[name] = {"peak": max(phases.values()), "base": base, "foretold": plan["peak"], "phases": phases}
            print(line(name, found), flush=True)
    return found


def line(name: str, found: dict[str, dict]) -> str:
    way, lora = found[name], found.get(LORA)
    total, above = way["peak"] / MIB, (way["peak"] - way["base"]) / MIB
    text = f"{name:42}{total:7.0f} MiB, {above:6.0f} above the libraries; plan {way['foretold'] / way['peak'] - 1:+.0%}"
    if lora is None or name == LORA:
        return text
    ratios = way["peak"] / lora["peak"], (way["peak"] - way["base"]) / (lora["peak"] - lora["base"])
    return f"{text}; {ratios[0]:.2f} x, {ratios[1]:.2f} x"


def lift(steps: int, seeds: list[int]) -> dict[str, dict]:
    """Way -> held-out CIDEr-D before and after, means of the seeds."""
    found = {}
    for name, change in ((LORA, "model.quantize=null"), (QLORA, "model.quantize=nf4")):
        runs = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                words = [change, f"seed={seed}", f"train.steps={steps}", "eval.every=0", "train.save_every=0"]
                command = [sys.executable, str(ROOT / "recipes" / "caption_ppo.py"), *words, f"output.dir={folder}"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
                summary = json.loads((Path(folder) / "summary.json").read_text())
            runs.append([summary[when]["cider_d"]["mean"] for when in ("before", "after")])
        before, after = (sum(run[i] for run in runs) / len(runs) for i in (0, 1))
        found[name] = {"before": before, "after": after, "lift": after - before, "runs": runs}
        print(f"{name:12} CIDEr-D {before:.3f} -> {after:.3f}, lift {after - before:.3f}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("memory", "lift"))
    parser.add_argument("--ways", help="; between names: " + "; ".join(WAYS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "mmft-benchmarks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict = {"environment": environment(), "steps": args.steps}
    good = True
    if args.only != "lift":
        found = result["memory"] = memory(args.cache, args.ways.split(";") if args.ways else None)
        missed = [name for name, way in found.items() if abs(way["foretold"] / way["peak"] - 1) > TARGET]
        if missed:
            print(f"plan missed by more than {TARGET:.0%}: {'; '.join(missed)}")
        good = not missed
        if LORA in found and QLORA in found:
            ratio = result["memory_ratio"] = found[QLORA]["peak"] / found[LORA]["peak"]
            met = ratio <= MOST_MEMORY
            print(f"peak memory, nf4 / fp32 LoRA: {ratio:.2f}, target {MOST_MEMORY}: {'met' if met else 'NOT met'}")
            good &= met
    if args.only != "memory":
        found = result["lift"] = lift(args.steps, [int(seed) for seed in args.seeds.split(",")])
        ratio = result["lift_ratio"] = found[QLORA]["lift"] / found[LORA]["lift"]
        met = ratio >= LEAST_LIFT
        print(f"lift, nf4 / LoRA: {ratio:.2f}, target {LEAST_LIFT}: {'met' if met else 'NOT met'}")
        good &= met
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
