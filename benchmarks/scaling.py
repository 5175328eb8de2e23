"""How the cost of a PPO iteration grows: with G, picture tokens, response length, prompts, and the size of the model.

    python benchmarks/scaling.py [--axes group,pictures,length,prompts,model,group256m] [--steps 3] [--json FILE]
                                 [--plot FILE]

From the bundled shape (32 prompts x 8 responses x 16 tokens) one number changes at a time; `pictures` are further ones
in the prompt, 64 tokens each; `model` widens the bundled architecture, with random weights, to 8 prompts. `group256m`
is G at SmolVLM-256M's dimensions, 2 prompts. Each point is a process of its own: seconds by phase are medians of
`--steps` iterations of `PPOTrainer.step` after one that is not counted, memory is the high-water mark above the loaded
trainer. Every picture is new and every response has the full length.

The exponent k is that of the power law cost ~ x^k that fits best (least squares of logarithms): 1 is linear, below 1
is less. Targets: G from 8 to 32 costs at most 3 times as much; prompts at most linearly (k <= 1.05).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._iteration import in_process, peak, reset_peak, trainer  # noqa: E402
from benchmarks._models import SHAPES, Shape, build  # noqa: E402

PHASES = ("rollout", "reference", "reward", "update")
AXES: dict[str, tuple[int, ...]] = {
    "group": (4, 8, 16, 32),
    "pictures": (1, 2, 4),
    "length": (8, 16, 32, 64),
    "prompts": (8, 16, 32, 64),
    "model": (1, 2, 4, 6),  # times the width of the bundled model
    "group256m": (4, 8, 16, 32),
}
LABELS = {
    "group": "responses per prompt (G)",
    "pictures": "picture tokens per prompt",
    "length": "tokens per response",
    "prompts": "prompts",
    "model": "parameters, millions",
    "group256m": "G at SmolVLM-256M's shape",
}
GROUP_TARGET = 3.0  # times the seconds at G = 8, at G = 32
LINEAR = 1.05  # exponent of a growth that counts as linear


# --- one point, in a process of its own --------------------------------------------------------------


def place(axis: str, value: int) -> tuple[Shape, int]:
    """The shape of a point and the pictures in each of its prompts."""
    base = SHAPES["smolvlm256m" if axis == "group256m" else "bundled"]
    changes: dict[str, Any] = {
        "group": {"group": value},
        "group256m": {"group": value},
        "length": {"length": value},
        "prompts": {"prompts": value},
        "model": {"prompts": 8},
    }.get(axis, {})
    return replace(base, **changes), value if axis == "pictures" else 1


def widened(source: Path, times: int, folder: Path) -> Path:
    """The bundled architecture with ``times`` its width (hidden, heads, MLP; tower and decoder) and random weights."""
    if times == 1:
        return source
    if not (folder / "done").is_file():
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

        config = AutoConfig.from_pretrained(source)
        for part in (config.text_config, config.vision_config):
            for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
                setattr(part, name, getattr(part, name) * times)
        config.text_config.num_key_value_heads *= times
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        model.generation_config = GenerationConfig.from_pretrained(source)
        model.save_pretrained(folder)
        AutoProcessor.from_pretrained(source).save_pretrained(folder)
        (folder / "done").touch()
    return folder


def measure(shape: Shape, folder: Path, pictures: int, steps: int) -> dict[str, Any]:
    """Seconds per iteration and phase (medians), memory in MiB, and what the point is: tokens and parameters."""
    with tempfile.TemporaryDirectory() as scratch:
        made = trainer(folder, shape, scratch, steps + 1, pictures=pictures, guards={})
        prompts = made.prompts(1)
        image = made.policy.model.config
        image_id = getattr(image, "image_token_id", None) or image.image_token_index
        tokens = int((prompts.prompt_ids[0] == image_id).sum())
        base = reset_peak()
        logs = [made.step(step) for step in range(1, steps + 2)][1:]
        highest = peak()
    if any(log["response_length"] != shape.length for log in logs):
        raise RuntimeError(f"responses shorter than {shape.length} tokens")
    return {
        "seconds": median(log["seconds"] for log in logs),
        "phases": {phase: median(log[f"time/{phase}"] for log in logs) for phase in PHASES},
        "peak_mib": highest,
        "increase_mib": highest - base,
        "picture_tokens": tokens,
        "parameters": sum(p.numel() for p in made.policy.model.parameters() if not p.requires_grad),
    }


# --- growth ------------------------------------------------------------------------------------------


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """k of the power law y ~ x^k with the least squared error of logarithms."""
    return linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def sizes_of(axis: str, points: list[dict[str, Any]]) -> list[float]:
    """What stands on the axis: for pictures their tokens, for models millions of parameters."""
    if axis == "pictures":
        return [point["picture_tokens"] for point in points]
    if axis == "model":
        return [point["parameters"] / 1e6 for point in points]
    return [point["value"] for point in points]


def table(axis: str, points: list[dict[str, Any]]) -> str:
    """A line per point, the exponents, and the target where the axis has one."""
    x = sizes_of(axis, points)
    lines = [f"{LABELS[axis]:28}{'seconds':>9}" + "".join(f"{p:>11}" for p in PHASES) + f"{'peak MiB':>10}{'above':>8}"]
    for size, point in zip(x, points, strict=True):
        lines.append(
            f"{size:<28.4g}{point['seconds']:9.3f}"
            + "".join(f"{point['phases'][p]:11.3f}" for p in PHASES)
            + f"{point['peak_mib']:10.0f}{point['increase_mib']:8.0f}"
        )
    k = {"seconds": exponent(x, [p["seconds"] for p in points])}
    k |= {p: exponent(x, [point["phases"][p] for point in points]) for p in PHASES}
    lines.append(
        f"{'exponent':28}{k['seconds']:9.2f}"
        + "".join(f"{k[p]:11.2f}" for p in PHASES)
        + f"{exponent(x, [p['peak_mib'] for p in points]):10.2f}{exponent(x, [p['increase_mib'] for p in points]):8.2f}"
    )
    return "\n".join([*lines, *verdict(axis, points, k["seconds"])])


def verdict(axis: str, points: list[dict[str, Any]], k: float) -> list[str]:
    """The axis' target and whether it is met."""
    by_value = {point["value"]: point["seconds"] for point in points}
    if axis.startswith("group") and {8, 32} <= by_value.keys():
        times = by_value[32] / by_value[8]
        return [f"G 8 -> 32: {times:.2f} times the seconds   target <= {GROUP_TARGET:g}: {_met(times <= GROUP_TARGET)}"]
    if axis == "prompts":
        return [f"prompts: exponent {k:.2f}   target linear, <= {LINEAR:g}: {_met(k <= LINEAR)}"]
    return []


def _met(good: bool) -> str:
    return "met" if good else "NOT met"


def plot(found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Seconds by phase over each axis, and memory above the loaded trainer."""
    from benchmarks._plots import figure

    with figure(file, len(found), (3.2, 2.8)) as panels:
        for axes, (axis, points) in zip(panels, found.items(), strict=True):
            x = sizes_of(axis, points)
            axes.plot(x, [p["seconds"] for p in points], "o-", label="iteration")
            for phase in ("rollout", "reference", "update"):
                axes.plot(x, [p["phases"][phase] for p in points], ".--", label=phase)
            axes.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel="seconds")
            axes.set_xticks(x, [f"{size:.3g}" for size in x])
            axes.minorticks_off()
        panels[0].legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(AXES), help="of " + ", ".join(AXES))
    parser.add_argument("--steps", type=int, default=3, help="counted iterations of a point (group256m: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "mmft-benchmarks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        order = json.loads(args.worker)
        shape, pictures = place(order["axis"], order["value"])
        args.json.write_text(json.dumps(measure(shape, Path(order["folder"]), pictures, order["steps"])))
        return
    from benchmarks.vs_trl import environment

    axes = args.axes.split(",")
    if unknown := set(axes) - AXES.keys():
        parser.error(f"--axes: unknown {', '.join(sorted(unknown))}; there are {', '.join(AXES)}")
    about, began = environment(args.threads), time.time()
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    found: dict[str, list[dict[str, Any]]] = {}
    known: dict[tuple, dict[str, Any]] = {}  # the axes cross: a point on several is measured once
    for axis in axes:
        found[axis] = []
        for value in AXES[axis]:
            shape, pictures = place(axis, value)
            folder = build(shape, args.cache / shape.name)
            if axis == "model":
                folder = widened(folder, value, args.cache / f"bundled-x{value}")
            point = (shape, pictures, folder)
            if point not in known:
                steps = 1 if axis == "group256m" else args.steps
                order = {"axis": axis, "value": value, "folder": str(folder), "steps": steps}
                known[point] = in_process(__file__, order, args.threads)
            found[axis].append({"value": value} | known[point])
        print(f"\n{table(axis, found[axis])}\n({time.time() - began:.0f} s so far)", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"environment": about, "results": found}, indent=1) + "\n")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
