"""Memory and time of a PPO step past this machine: 256 M to 72 B parameters on 1 to 1,024 GPUs, on paper.

    python benchmarks/cluster_plan.py [--json FILE]              tables for assumed hardware; measures nothing
    python benchmarks/cluster_plan.py --calibrate [--json FILE]  rates of this machine -> foretold steps against
                                                                 measured ones, of one process and of two
    python benchmarks/cluster_plan.py --trace                    the closed formulas of memory against the planner's
                                                                 trace (`mmft doctor memory`)

Formulas, sources and limits: docs/scaling.md. `--calibrate` measures for about five minutes on two free cores;
`--clock cpu` takes processor time in place of the clock's, for a machine that has other work.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from math import isqrt
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._cluster import GB, Job, Lengths, Link, Machine  # noqa: E402
from benchmarks._cluster_memory import memory  # noqa: E402
from benchmarks._cluster_models import MEASURED, MODELS, Model  # noqa: E402
from benchmarks._cluster_search import Plan, fastest, fastest_in_turns, fastest_served  # noqa: E402
from benchmarks._cluster_time import seconds  # noqa: E402

# Peaks: NVIDIA's data sheet of the H100 SXM (dense bf16 989 TFLOP/s, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways
# together) and one 400 Gb/s InfiniBand adapter per GPU. Shares of them, latencies and what the CPU takes: assumed.
H100 = Machine(
    name="H100 SXM",
    memory=80 * GB,
    rates=((128, 0.6 * 989e12),),
    bandwidth=0.8 * 3.35e12,
    stream=0.7 * 3.35e12,
    host=1.0e-3,
    host_update=4.0e-3,
    asynchronous=True,
    per_node=8,
    inside=Link(0.8 * 450 * GB, 2e-6),
    across=Link(0.8 * 50 * GB, 5e-6),
    overlap=0.5,
)
GPUS = (1, 8, 64, 1024)
CAPTIONS, REASONS = Lengths(40, 128), Lengths(600, 2048)
MEANS = (16, 32, 64, 128, 256, 512, 1024, 2048)


# ---------------------------------------------------------------- tables


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_row(head), _row(["---"] * len(head)), *map(_row, rows)])


def memory_table(machine: Machine) -> str:
    """GB of one of 8 GPUs by kind of sharing, at the smallest step: one prompt a GPU, checkpointing."""
    rows = []
    for model in MODELS.values():
        for tune in ("lora", "full"):
            job = Job(gpus=8, tune=tune, prompts=8, checkpointing=True, lengths=CAPTIONS)
            cells = [model.name, f"{model.parameters / 1e9:.2f}", tune]
            jobs = [replace(job, zero=zero) for zero in range(4)]
            jobs.append(replace(job, quantize=True) if tune == "lora" else replace(job, zero=3, offload=True))
            for tried in jobs:
                phases = {name: sum(kinds.values()) for name, kinds in memory(model, tried).items()}
                most = max(phases, key=lambda name: phases[name])
                fits = "" if phases[most] <= machine.memory * machine.usable else " (no)"
                cells.append(f"{phases[most] / GB:.1f} {most}{fits}")
            rows.append(cells)
    return _table(["model", "10⁹", "tune", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "nf4 DDP / ZeRO-3 offload"], rows)


# Columns of the tables, and the phases that each adds up.
SHARES = {
    "rollout %": ("vision", "prefill", "decode", "waiting"),
    "reference %": ("reference", "logprobs"),
    "update %": ("forward", "backward", "optimizer"),
    "links %": ("gather", "communication"),
    "CPU %": ("prepare", "reward"),
}


def _shares(plan: Plan) -> list[str]:
    return [
        f"{100 * sum(plan.phases.get(name, 0.0) for name in names) / plan.seconds:.0f}" for names in SHARES.values()
    ]


def _number(x: float) -> str:
    """Three digits that count."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def step_table(plans: dict[tuple[str, int], Plan | None]) -> str:
    head = ["model", "GPUs", "setting", "prompts_per_step", "micro_prompts", "GB", "s/step", "responses/s"]
    head += list(SHARES)
    rows: list[list[str]] = []
    for (name, gpus), plan in plans.items():
        if plan is None:
            if rows and rows[-1][0] == name and rows[-1][2] == "does not fit":
                rows.pop()
                gpus_said = f"to {gpus:,}"
            else:
                gpus_said = f"{gpus:,}"
            rows.append([name, gpus_said, "does not fit", *[""] * (len(head) - 3)])
            continue
        job = plan.job
        cells = [name, f"{gpus:,}", plan.setting, f"{job.prompts:.0f}", f"{job.micro:.0f}", f"{plan.peak / GB:.0f}"]
        rows.append([*cells, _number(plan.seconds), _number(plan.rate), *_shares(plan)])
    return _table(head, rows)


def plans_for(job: Job, machine: Machine, gpus=GPUS) -> dict[tuple[str, int], Plan | None]:
    return {(m.name, n): fastest(m, replace(job, gpus=n), machine) for m in MODELS.values() for n in gpus}


def engine_table(machine: Machine, gpus: int) -> tuple[str, dict[str, dict[int, tuple[float, float]]]]:
    """Responses per second with a serving engine over those of the native one, by mean response length."""
    rows, found = [], {}
    for model in MODELS.values():
        ratios: dict[int, tuple[float, float]] = {}
        cells, pays, division = [], None, ""
        for mean in MEANS:
            job = Job(gpus=gpus, lengths=Lengths(mean, 3 * mean))
            native = fastest(model, job, machine)
            served, turns = fastest_served(model, job, machine), fastest_in_turns(model, job, machine)
            if native is None or served is None:
                cells.append("-")
                continue
            ratios[mean] = served.rate / native.rate, turns.rate / native.rate if turns else float("nan")
            cells.append(f"{ratios[mean][0]:.2f} ({ratios[mean][1]:.2f})")
            if ratios[mean][0] > 1 and pays is None:
                pays = mean
                division = f"{served.job.servers} of {gpus}, tensor {served.job.tensor}"
        found[model.name] = ratios
        rows.append([model.name, *cells, str(pays or "-"), division])
    return _table(["model", *map(str, MEANS), "pays from", "then"], rows), found


# ---------------------------------------------------------------- against measurement


PARTS = {
    "prepare": ("prepare",),
    "vision": ("vision",),
    "prefill": ("prefill",),
    "decode": ("decode", "waiting"),
    "reference": ("reference",),
    "update": ("forward", "backward", "communication", "optimizer"),
}


def compare(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A line per shape, number of processes and part: seconds foretold and measured."""
    from benchmarks import _calibrate
    from benchmarks._models import SHAPES

    lines = []
    for ranks in (1, 2):
        for name in _calibrate.SHAPE_NAMES:
            measured, model = found[str(ranks)][name], MEASURED[name]
            machine = replace(_calibrate.machine(found, ranks), picture=measured["prepared"])
            text = int(measured["text"]) - model.picture_tokens
            told = seconds(model, _calibrate.job(SHAPES[name], ranks, text), machine)
            parts = {part: sum(told.get(of, 0.0) for of in names) for part, names in PARTS.items()}
            parts["step"] = sum(parts.values())
            for part, value in parts.items():
                line = {"shape": name, "processes": ranks, "part": part, "foretold": value}
                lines.append(line | {"measured": measured["seconds"][part]})
    return lines


def comparison_table(lines: list[dict[str, Any]]) -> str:
    rows = [
        [x["shape"], str(x["processes"]), x["part"], f"{x['foretold']:.3f}", f"{x['measured']:.3f}"]
        + [f"{x['foretold'] / x['measured']:.2f}"]
        for x in lines
    ]
    return _table(["shape", "processes", "part", "foretold s", "measured s", "ratio"], rows)


def calibrated(cache: Path, clock: str) -> dict[str, Any]:
    """Measures, and holds the plan against it."""
    from benchmarks import _calibrate
    from benchmarks._models import SHAPES, build

    folders = {name: build(SHAPES[name], cache / name) for name in _calibrate.SHAPE_NAMES}
    found = _calibrate.measure(__file__, folders, {"bundled": 5, "smolvlm256m": 2}, clock)
    lines = compare(found)
    for ranks in ("1", "2"):
        of = found[ranks]["rates"]
        rates = ", ".join(f"{rows} {rate / 1e9:.1f}" for rows, rate in of["rates"])
        print(f"{ranks} process(es): GFLOP/s by rows: {rates}; read {of['bandwidth'] / GB:.1f} GB/s, ", end="")
        print(f"element-wise {of['stream'] / GB:.1f} GB/s, {found[ranks]['issuing']['decode'] * 1e3:.2f} ms a layer")
    print(f"bf16, adapters unfolded: {found['1']['issuing_bf16']['decode'] * 1e3:.2f} ms a layer")
    link = _calibrate.machine(found, 2).inside
    print(f"gloo: {link.latency * 1e6:.0f} us, {link.bandwidth / GB:.2f} GB/s\n")
    print(comparison_table(lines))
    return {"clock": clock, "measured": found, "lines": lines}


# ---------------------------------------------------------------- against the planner's trace

_TRACED = (
    ("bundled", Job(prompts=32, micro=8, lengths=Lengths(24, 24, 0.0), itemsize=4, folds=True)),
    ("smolvlm256m", Job(prompts=2, micro=1, lengths=Lengths(20, 20, 0.0), itemsize=4, folds=True)),
    ("smolvlm256m", Job(prompts=8, micro=2, lengths=Lengths(64, 64, 0.0))),
    ("Qwen2.5-VL-3B", Job(prompts=4, micro=2, lengths=Lengths(64, 64, 0.0))),
    ("Qwen2.5-VL-3B", Job(prompts=4, micro=2, lengths=Lengths(64, 64, 0.0), checkpointing=True)),
    ("Qwen2.5-VL-7B", Job(prompts=4, micro=2, lengths=Lengths(64, 64, 0.0))),
    ("Qwen2.5-VL-7B", Job(prompts=4, micro=2, lengths=Lengths(64, 64, 0.0), checkpointing=True)),
)


def ghost_folder(model: Model, folder: Path) -> Path:
    """Configuration and processor of a model of that shape, without weights."""
    import torch

    from benchmarks._models import _qwen2_5_vl, _smolvlm

    with torch.device("meta"):
        made, processor = (_qwen2_5_vl if model.tower.gated else _smolvlm)()
    config, text, vision, tower = made.config, made.config.text_config, made.config.vision_config, model.tower
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = model.hidden, model.intermediate, model.layers
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = model.heads, model.kv_heads, model.head
    text.vocab_size = max(model.vocabulary, text.vocab_size)
    text.tie_word_embeddings = config.tie_word_embeddings = model.tied
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * model.layers
    vision.hidden_size, vision.intermediate_size = tower.hidden, tower.intermediate
    if tower.gated:
        text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        vision.depth, vision.num_heads, vision.out_hidden_size = tower.layers, 16, model.hidden
        vision.fullatt_block_indexes = [7, 15, 23, 31]
    else:
        vision.num_hidden_layers, vision.num_attention_heads = tower.layers, 12 if tower.hidden == 768 else 16
        vision.image_size, vision.patch_size, config.scale_factor = model.side, isqrt(tower.patch // 3), tower.merge
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def traced(name: str, job: Job, folder: Path) -> tuple[float, float]:
    """Bytes of activations and logits in the update: by the closed formula, and by the planner's trace."""
    from benchmarks._iteration import NewPictures
    from mmft.recipe import load_recipe
    from mmft.training.config import from_recipe
    from mmft.training.memory_trace import ghost_policy, probe_prompt, trace_step

    model = (MODELS | MEASURED)[name]
    half = job.itemsize == 2
    words = {
        "model.name": folder,
        "model.dtype": "bfloat16" if half else "float32",
        "model.tune": job.tune,
        "rollout.prompts_per_step": job.prompts,
        "rollout.num_generations": job.group,
        "rollout.max_completion_length": job.lengths.most,
        "train.micro_prompts": job.micro,
        "train.gradient_checkpointing": str(job.checkpointing).lower(),
        "eval.rows": 1,
    }
    recipe = load_recipe(ROOT / "recipes/caption_ppo.yaml", [f"{key}={value}" for key, value in words.items()])
    policy = ghost_policy(recipe, "cuda" if half else "cpu")
    prompt = probe_prompt(policy, [NewPictures(1, model.side)[0]])
    trace = trace_step(policy, from_recipe(recipe), prompt, int(job.prompts))
    update = next(segment for segment in trace.segments if segment.phase == "update").peak
    told = memory(model, replace(job, text=prompt.prompt_ids.shape[1] - model.picture_tokens))["update"]
    return told["activations"] + told["logits"], update.get("activations", 0) + update.get("logits", 0)


def trace_table() -> list[dict[str, Any]]:
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, job in _TRACED:
            folder = Path(scratch) / name
            if name == "bundled":
                from mmft.vlm.load import BUNDLED

                folder = BUNDLED["scenes-vlm"]
            elif not folder.exists():
                ghost_folder((MODELS | MEASURED)[name], folder)
            told, seen = traced(name, job, folder)
            kind = f"{'bf16' if job.itemsize == 2 else 'fp32'}{', checkpointing' if job.checkpointing else ''}"
            lines.append({"model": name, "kind": kind, "closed": told, "traced": seen})
            print(f"{name}, {kind}: {told / 2**20:.0f} MiB closed, {seen / 2**20:.0f} traced", flush=True)
    rows = [
        [x["model"], x["kind"], f"{x['closed'] / 2**20:.0f}", f"{x['traced'] / 2**20:.0f}"]
        + [f"{x['closed'] / x['traced'] - 1:+.0%}"]
        for x in lines
    ]
    print(_table(["model", "", "closed MiB", "traced MiB", "difference"], rows))
    return lines


# ---------------------------------------------------------------- command line


def planned(machine: Machine) -> dict[str, Any]:
    """Prints the tables of docs/scaling.md."""
    result: dict[str, Any] = {"machine": asdict(machine)}
    print(f"Peak GB of one of 8 GPUs, 1 prompt each, checkpointing ({machine.name}):\n\n{memory_table(machine)}\n")
    for title, job in (
        ("LoRA, captions", Job(lengths=CAPTIONS)),
        ("all weights, captions", Job(tune="full", lengths=CAPTIONS)),
        ("LoRA, long answers", Job(lengths=REASONS)),
    ):
        plans = plans_for(job, machine)
        cut = job.lengths
        print(f"{title}: responses of {cut.mean:.0f} tokens on average, {cut.most} at most\n\n{step_table(plans)}\n")
        result[title] = [
            {"model": name, "gpus": n} | ({"job": asdict(p.job), "peak": p.peak, "phases": p.phases} if p else {})
            for (name, n), p in plans.items()
        ]
    for gpus in (8, 64):
        text, found = engine_table(machine, gpus)
        print("Responses/s with an engine on its own GPUs (in brackets: with all GPUs in turns), over native,")
        print(f"by mean response length, {gpus} GPUs\n\n{text}\n")
        result[f"engine, {gpus} GPUs"] = found
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "mmft-benchmarks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        from benchmarks import _calibrate

        args.json.write_text(json.dumps(_calibrate.worker(json.loads(args.worker))))
        sys.stdout.flush()
        os._exit(0)  # now and then a thread of gloo outlives the interpreter's farewell, and aborts the process
    began, result = time.time(), {}
    if args.calibrate:
        result["calibration"] = calibrated(args.cache, args.clock)
    if args.trace:
        result["trace"] = trace_table()
    if not (args.calibrate or args.trace):
        result["plan"] = planned(H100)
    print(f"({time.time() - began:.0f} s)")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
