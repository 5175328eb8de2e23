"""How near to the machine's limits does a PPO iteration come? Work that must be done, against measured ceilings.

    python benchmarks/roofline.py [--shape smolvlm256m] [--steps 5] [--dtype float32|bfloat16] [--json FILE]
                                  [--plot FILE]

Ceilings: products of large squares, fp32 (MKL or oneDNN, whichever is faster) and bf16, and at the sizes of each phase;
reading and copying arrays. Work: floating-point operations and bytes that cannot be left out (`_work.py`), from the
model's layers. Time: medians of `PPOTrainer.step` in a process of its own, after one step that is not counted; the
rollout is divided by forward hooks into preparing the rows, vision tower, prefill and decoding. Per phase:

    must     GFLOP that have to be done        done   those that torch's FlopCounterMode saw, times `must`
    peak     GFLOP/s, as share of the best square product; `sizes`: as share of products of this phase's own sizes
    bound    max(must / peak rate, bytes / bandwidth); `roof`: bound / measured seconds

`done` counts masked pairs of attention, padding and recomputation, so it may exceed 1; below 1 the count of `must`
would be wrong. The target is the update's share of the matrix-product rate.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import _ceilings, _work  # noqa: E402
from benchmarks._iteration import in_process, trainer  # noqa: E402
from benchmarks._models import SHAPES, Shape, build  # noqa: E402

TARGET = 0.5  # the update's share of the measured matrix-product rate, at smolvlm256m
PARTS = ("prepare", "vision", "prefill", "decode", "reference", "update")
# torch's own counter leaves out what CPUs alone have; its formulas get shapes in place of tensors.
_CPU_OPERATORS = {
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * prod(x) * weight[0],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


# --- one step, divided -------------------------------------------------------------------------------


@contextmanager
def divided(made, read: Callable[[], float]):
    """Yields a Counter that adds up what ``read`` (a clock, or a counter of operations) grows by in each part of
    ``made.step``. What is left of the rollout beside preparing, tower and prefill is decoding."""
    from mmft.vlm.decoder import backbone, text_decoder

    policy, spent = made.policy, Counter()
    decoder = text_decoder(policy.model, policy.family)
    began, phase = [read()], ["rollout"]

    def starts(*_) -> None:
        began.append(read())

    def ends(name: str) -> Callable[..., None]:
        def hook(*_) -> None:
            spent[name] += read() - began.pop()

        return hook

    def reads_prompts(*_) -> None:
        grown = read() - began.pop()
        if phase[0] == "rollout" and "prefill" not in spent:
            spent["prefill"] = grown

    def policy_starts(module, arguments, options) -> None:
        if options.get("reference"):
            spent["rollout"] = read() - began[0]
            phase[0] = "reference"
            began.append(read())

    def policy_ends(module, arguments, options, output) -> None:
        if options.get("reference"):
            spent["reference"] = read() - began.pop()
            began[0] = read()

    def prepare(step: int, prompts=made.prompts):
        start = read()
        batch = prompts(step)
        spent["prepare"] += read() - start
        return batch

    hooks = [decoder.register_forward_pre_hook(starts), decoder.register_forward_hook(reads_prompts)]
    hooks.append(policy.register_forward_pre_hook(policy_starts, with_kwargs=True))
    hooks.append(policy.register_forward_hook(policy_ends, with_kwargs=True))
    for tower in (m for m in backbone(policy.model).children() if decoder not in m.modules()):
        hooks += [tower.register_forward_pre_hook(starts), tower.register_forward_hook(ends("vision"))]
    made.prompts = prepare
    try:
        yield spent
        spent["update"] = read() - began[0]
        spent["decode"] = spent["rollout"] - spent["prepare"] - spent["vision"] - spent["prefill"]
    finally:
        del made.prompts
        for hook in hooks:
            hook.remove()


def measure(shape: Shape, folder: Path, steps: int, dtype: str) -> dict[str, Any]:
    """One warm-up step, ``steps`` timed ones, one with operations counted; and the ceilings, before them.

    Returns:
        ``work`` (part -> flops, bytes, working_set), ``rates`` at each part's sizes, ``seconds`` (part -> one per
        step), ``phases`` (the trainer's own times), ``done`` (part -> operations counted), ``ceilings``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype)
    ceilings = {
        "bandwidth": _ceilings.bandwidths(device),
        **{str(d).removeprefix("torch."): _ceilings.square_rates(d, device) for d in (torch.float32, torch.bfloat16)},
    }
    with tempfile.TemporaryDirectory() as scratch:
        made = trainer(folder, shape, scratch, steps + 2, dtype, guards={})
        work = _work.must_do(made.policy, _batch(made, shape, kind))
        rates = {name: _ceilings.rate_at(phase.products, kind, device) for name, phase in work.items()}
        made.step(1)
        seconds, phases = [], []
        for step in range(2, steps + 2):
            with divided(made, _ceilings.synchronised(device)) as spent:
                logged = made.step(step)
            if logged["response_length"] != shape.length:
                raise RuntimeError(f"responses of {logged['response_length']} tokens, expected {shape.length}")
            seconds.append({part: spent[part] for part in PARTS})
            phases.append({key: logged[key] for key in logged if key.startswith("time/")} | {"all": logged["seconds"]})
        counter = FlopCounterMode(display=False, custom_mapping=_CPU_OPERATORS)
        with counter, divided(made, counter.get_total_flops) as done:
            made.step(steps + 2)
    return {
        "work": {k: {"flops": w.flops, "bytes": w.bytes, "working_set": w.working_set} for k, w in work.items()},
        "rates": rates,
        "seconds": {part: [s[part] for s in seconds] for part in PARTS},
        "phases": {key: [p[key] for p in phases] for key in phases[0]},
        "done": {part: done[part] for part in PARTS},
        "ceilings": ceilings,
    }


def _batch(made, shape: Shape, dtype: torch.dtype) -> _work.Batch:
    """What a step of the shape reads, by the tokens of its first prompts."""
    prompts, config = made.prompts(1), made.policy.model.config
    image = next(i for key in ("image_token_id", "image_token_index") if (i := getattr(config, key, None)) is not None)
    tokens = int((prompts.prompt_ids == image).sum())
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        patches = tokens * vision.spatial_merge_size**2
    else:
        patches = shape.prompts * (vision.image_size // vision.patch_size) ** 2
    return _work.Batch(
        prompts=shape.prompts,
        prompt_tokens=int(prompts.prompt_mask.sum(-1).max()),
        group=shape.group,
        length=shape.length,
        micro=shape.micro_prompts or shape.prompts,
        patches=patches,
        picture_tokens=tokens,
        itemsize=dtype.itemsize,
    )


# --- what is printed ---------------------------------------------------------------------------------


def lines_of(found: dict[str, Any], dtype: str) -> dict[str, dict[str, float]]:
    """Part -> its numbers; "rollout" and "iteration" are sums."""
    peak = max(found["ceilings"][dtype].values())
    lines: dict[str, dict[str, float]] = {}
    for part in PARTS:
        work = found["work"].get(part, {"flops": 0.0, "bytes": 0.0, "working_set": 0.0})
        bandwidth = _ceilings.bandwidth_for(work["working_set"], found["ceilings"]["bandwidth"])
        lines[part] = {
            "must": work["flops"],
            "done": found["done"][part],
            "bytes": work["bytes"],
            "seconds": median(found["seconds"][part]),
            "at_sizes": work["flops"] / found["rates"][part] if part in found["rates"] else 0.0,
            "bound": max(work["flops"] / peak, work["bytes"] / bandwidth),
        }
    sums = {"rollout": PARTS[:4], "iteration": PARTS}
    lines |= {name: {key: sum(lines[p][key] for p in of) for key in lines["update"]} for name, of in sums.items()}
    for line in lines.values():
        line["rate"] = line["must"] / line["seconds"]
        line["of_peak"] = line["rate"] / peak
        line["of_sizes"] = line["at_sizes"] / line["seconds"]
        line["of_roof"] = line["bound"] / line["seconds"]
    return lines


def table(found: dict[str, Any], shape: Shape, dtype: str) -> str:
    """Ceilings, then a line per part, then the target."""
    ceilings, lines = found["ceilings"], lines_of(found, dtype)
    text = [
        f"products, {kind}: " + ", ".join(f"{n} {rate / 1e9:.0f}" for n, rate in ceilings[kind].items()) + " GFLOP/s"
        for kind in ("float32", "bfloat16")
    ]
    text += [
        f"{kind}: " + ", ".join(f"{mib} MiB {rate / 1e9:.1f}" for mib, rate in rates.items()) + " GB/s"
        for kind, rates in ceilings["bandwidth"].items()
    ]
    text += [
        f"\n{shape.name}, {dtype}: {shape.prompts} prompts x {shape.group} responses x {shape.length} tokens",
        f"{'':11}{'must GFLOP':>11}{'done':>6}{'GB':>8}{'seconds':>9}{'GFLOP/s':>9}{'peak':>7}{'sizes':>7}"
        f"{'bound s':>9}{'roof':>7}",
    ]
    for part in ("prepare", "vision", "prefill", "decode", "rollout", "reference", "update", "iteration"):
        line = lines[part]
        done = f"{line['done'] / line['must']:.2f}" if line["must"] else ""
        text.append(
            f"{part:11}{line['must'] / 1e9:11.1f}{done:>6}{line['bytes'] / 1e9:8.2f}{line['seconds']:9.3f}"
            f"{line['rate'] / 1e9:9.1f}{line['of_peak']:7.0%}{line['of_sizes']:7.0%}{line['bound']:9.3f}"
            f"{line['of_roof']:7.0%}"
        )
    clocks = ", ".join(f"{key.removeprefix('time/')} {median(s):.3f}" for key, s in found["phases"].items())
    share = lines["update"]["of_peak"]
    text.append(f"by the trainer's own clock: {clocks} s")
    text.append(f"counted by FlopCounterMode in the update: {lines['update']['done'] / 1e9:.1f} GFLOP")
    verdict = ""
    if shape.name == "smolvlm256m":
        verdict = f"   target >= {TARGET:.0%}: {'met' if share >= TARGET else 'NOT met'}"
    text.append(f"update, share of the matrix-product rate: {share:.1%}{verdict}")
    return "\n".join(text)


def plot(found: dict[str, Any], shape: Shape, dtype: str, file: Path) -> None:
    """The roofline: operations per byte against operations per second, a dot per part."""
    from benchmarks._plots import figure

    peak, lines = max(found["ceilings"][dtype].values()), lines_of(found, dtype)
    bandwidth = _ceilings.bandwidth_for(float("inf"), found["ceilings"]["bandwidth"])
    with figure(file) as (axes,):
        intensity = [0.1, peak / bandwidth, 10_000]
        axes.plot(intensity, [min(peak, x * bandwidth) / 1e9 for x in intensity], color="grey", label="roof")
        for part in PARTS[1:]:
            axes.plot(lines[part]["must"] / lines[part]["bytes"], lines[part]["rate"] / 1e9, "o", label=part)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s", title=f"{shape.name}, {dtype}")
        axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="smolvlm256m")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "mmft-benchmarks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        order = json.loads(args.worker)
        found = measure(SHAPES[order["shape"]], Path(order["folder"]), order["steps"], order["dtype"])
        args.json.write_text(json.dumps(found))
        return
    from benchmarks.vs_trl import environment

    about, began, shape = environment(args.threads), time.time(), SHAPES[args.shape]
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    order = {"shape": shape.name, "folder": str(build(shape, args.cache / shape.name))}
    found = in_process(__file__, order | {"steps": args.steps, "dtype": args.dtype}, args.threads)
    print(f"{table(found, shape, args.dtype)}\n({time.time() - began:.0f} s)")
    if args.json:
        result = {"shape": vars(shape), "dtype": args.dtype, "parts": lines_of(found, args.dtype)} | found
        args.json.write_text(json.dumps({"environment": about, "result": result}, indent=1) + "\n")
    if args.plot:
        plot(found, shape, args.dtype, args.plot)


if __name__ == "__main__":
    main()
