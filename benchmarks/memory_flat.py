"""Does memory stay flat? The bundled model through 500 PPO steps, resident memory sampled in each.

    python benchmarks/memory_flat.py [--steps 500] [--prompts 2] [--group 4] [--length 12] [--json FILE] [--plot FILE]

`PPOTrainer.train` itself, with the bundled checkpoint, LoRA, critic, reference, guards and log; responses end where
they end, so that shapes vary from step to step as in real training; every picture is new. The cache of picture
features is made so small (`--cache-mib`) that it is full before counting begins: growing up to its budget (1 GiB by
default) is what it is for, and is no leak. Memory is read in the reward function, so once a step, at the same place.

Printed: the median of the tenth of the run after the first tenth against that of the last tenth (at 500 steps: 51-100
against 451-500). Exits with 1 where they differ by more than 2 %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._iteration import MIB, NewPictures, resident, variety  # noqa: E402

LIMIT = 0.02
SIDE = 96  # of the bundled model's pictures


def run(folder: Path, steps: int, prompts: int, group: int, length: int, cache_mib: float) -> list[float]:
    """Trains for ``steps``; resident MiB of each."""
    from mmft.training.config import PPOConfig
    from mmft.training.trainer import PPOTrainer
    from mmft.vlm.load import load_model, lora_config

    samples: list[float] = []

    def reward(completions, **columns) -> list[float]:
        samples.append(resident())
        return variety(completions)

    # The trainer's line per step would bury the result; it lies in the run folder as well.
    with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        config = PPOConfig(
            output_dir=scratch,
            max_steps=steps,
            prompts_per_step=prompts,
            num_generations=group,
            max_completion_length=length,
            learning_rate=1e-5,
            cache_bytes=int(cache_mib * MIB),
            report_to=(),
        )
        model, processor = load_model(str(folder))
        rows = NewPictures(steps * prompts, SIDE)
        PPOTrainer(model, reward, config, rows, None, processor, lora_config(model)).train()
    if len(samples) != steps:
        raise RuntimeError(f"{len(samples)} of {steps} steps ran; a guard stopped the training")
    return samples


def drift(samples: list[float]) -> tuple[float, float, float]:
    """Medians of the second and of the last tenth of the run, and how much more the last is, as a share."""
    tenth = max(len(samples) // 10, 1)
    early, late = median(samples[tenth : 2 * tenth]), median(samples[-tenth:])
    return early, late, late / early - 1


def plot(samples: list[float], file: Path) -> None:
    from benchmarks._plots import figure

    with figure(file) as (axes,):
        axes.plot(range(1, len(samples) + 1), samples)
        axes.set(xlabel="PPO step", ylabel="resident MiB", ylim=(0, max(samples) * 1.15))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--length", type=int, default=12)
    parser.add_argument("--cache-mib", type=float, default=1.0, help="budget of the cache of picture features")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="where the curve is drawn")
    args = parser.parse_args()
    if args.steps < 20:
        parser.error("--steps: at least 20, for a second and a last tenth of the run")

    from mmft.vlm.load import BUNDLED

    began = time.time()
    samples = run(BUNDLED["scenes-vlm"], args.steps, args.prompts, args.group, args.length, args.cache_mib)
    early, late, change = drift(samples)
    tenth = args.steps // 10
    print(
        f"{args.steps} PPO steps of {args.prompts} prompts x {args.group} responses in {time.time() - began:.0f} s\n"
        f"resident memory, median: steps {tenth + 1}-{2 * tenth} {early:.1f} MiB, "
        f"steps {args.steps - tenth + 1}-{args.steps} {late:.1f} MiB, drift {change:+.2%}   "
        f"target within {LIMIT:.0%}: {'met' if abs(change) <= LIMIT else 'NOT met'}"
    )
    if args.json:
        result = {"early_mib": early, "late_mib": late, "drift": change, "resident_mib": [round(s, 2) for s in samples]}
        options = {k: v for k, v in vars(args).items() if k not in ("json", "plot")}
        args.json.write_text(json.dumps({"options": options, "result": result}, indent=1) + "\n")
    if args.plot:
        plot(samples, args.plot)
    return int(abs(change) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
