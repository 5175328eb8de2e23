"""One RL iteration of mmft's PPOTrainer against TRL's GRPOTrainer and RLOOTrainer: time by phase, and memory.

    python benchmarks/vs_trl.py [--shape bundled|smolvlm256m|qwen250m|all] [--systems ppo,loo,grpo,rloo] [--pairs 5]
                                [--trl batch=16,cache=static] [--json FILE] [--plot FILE]

Systems: `ppo` (mmft with a critic), `loo` (mmft, leave-one-out baseline), `grpo` and `rloo` (TRL). Equal for all: the
checkpoint, the pictures and prompts (every picture new, so that nothing is remembered from an earlier iteration),
group size, response length, fp32, LoRA adapters, AdamW, the KL term against the model with adapters off, the reward
function, one optimizer step per iteration. Every response is exactly as long as the shape says, because no side may
sample the end-of-sequence token.

Each system is one process. They take turns, an iteration at a time, in an order that rotates, while the others wait;
the n-th iterations of two systems are a pair. Before the first one each scores the same response by its own code, and
the log-probs must agree to 1e-3. TRL runs without gradient checkpointing and with the setting that was fastest in a
trial of batch sizes, generation batches, a static cache and `torch_compile`; mmft with the fastest `micro_prompts`.
Where an iteration of TRL's takes more than a minute, each runs all of its iterations in a row (`_models.Shape`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import _trl  # noqa: E402
from benchmarks._models import SHAPES, Shape, build, rows  # noqa: E402
from benchmarks._systems import OURS, PHASES, THEIRS, reward, work  # noqa: E402
from benchmarks._turns import Process, serve  # noqa: E402

TARGETS = {"bundled": 10.0, "smolvlm256m": 12.0, "qwen250m": 12.0}  # samples per second, times GRPO's
MEMORY_TARGET = 0.5  # peak memory of the process, times GRPO's
SAME_LOGPROBS = 1e-3  # nats between two ways of computing one fp32 log-prob

# --- the comparison ----------------------------------------------------------------------------------


def compare(
    shape: Shape, cache: Path, systems: list[str], pairs: int, trl: str | None, threads: int, sweep: bool = True
) -> dict[str, Any]:
    """Measures the systems in turns; returns every measurement, with the medians and ranges of the ratios.

    Args:
        trl: TRL's setting, instead of trying several.
        sweep: False takes the first settings untried, on both sides.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    folder = build(shape, cache / shape.name)
    with tempfile.TemporaryDirectory() as scratch:

        def saved(steps: int) -> Path:
            path = Path(scratch) / f"rows-{steps}"
            if not path.exists():
                Dataset.from_list(rows(shape, shape.prompts * steps + 1)).save_to_disk(str(path))
            return path

        def process_of(system: str, setting: str | int | None, steps: int) -> Process:
            order = {"system": system, "shape": shape.name, "folder": str(folder), "dataset": str(saved(steps))}
            return Process(__file__, order | {"setting": setting, "threads": threads}, threads)

        def trial(system: str, setting: str | int | None) -> dict[str, Any]:
            found: dict[str, Any] = {"system": system, "setting": setting}
            try:
                tried = 1 if shape.stretch else 2  # the last counts
                with process_of(system, setting, tried) as process:
                    process.read()
                    found |= [process.go() for _ in range(tried)][-1]
            except RuntimeError as error:
                found["failed"] = str(error).strip().splitlines()[-1]
            print(_line(shape, found), flush=True)
            return found

        trials, settings = _settings(shape, systems, trial if sweep else None, trl)
        with ExitStack() as stack:
            waiting = {}
            for system in systems:  # one after the other: loading takes memory too
                process = stack.enter_context(
                    process_of(system, settings[system], pairs + 1 if shape.stretch else 2 * pairs)
                )
                waiting[system] = (process, process.read())
            gap = _same_logprobs({system: first["logprobs"] for system, (_, first) in waiting.items()})
            found: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
            # A turn begins with an iteration that does not count: a process that has waited starts with cold caches.
            for system, counted in _turns(systems, pairs, shape.stretch):
                waiting[system][0].go()
                for _ in range(counted):
                    found[system].append(waiting[system][0].go())
                    last = found[system][-1] | {"system": system, "setting": settings[system]}
                    print(_line(shape, last), flush=True)
            ends = {system: process.go() for system, (process, _) in waiting.items()}
    for system, end in ends.items():
        for text, score in end["seen"]:
            if score != reward(text):
                raise RuntimeError(f"{system} was given {score} for {text!r}, not {reward(text)}")
    return {
        "shape": vars(shape),
        "settings": settings,
        "trials": trials,
        "iterations": found,
        "ends": ends,
        "logprob_gap": gap,
        "ratios": _ratios(found),
        "targets": {"speed": TARGETS.get(shape.name), "peak": MEMORY_TARGET},
    }


def _turns(systems: list[str], pairs: int, stretch: bool) -> list[tuple[str, int]]:
    """Whose turn it is, and for how many counted iterations: one at a time in rotating order, or all in a stretch."""
    if stretch:
        return [(system, pairs) for system in systems]
    rotated = [systems[i % len(systems) :] + systems[: i % len(systems)] for i in range(pairs)]
    return [(system, 1) for order in rotated for system in order]


def _settings(
    shape: Shape, systems: list[str], trial: Callable | None, trl: str | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The trials, and each system's setting: the fastest. TRL's trials are GRPO's (RLOO where that is not asked for).

    First the batch, then with the fastest of them how many samples are generated together and in what cache; then
    with all that compiled, where the shape asks for it.
    """
    trials: list[dict[str, Any]] = []

    def best(system: str, candidates: list) -> Any:
        """The fastest of the candidates and of this system's earlier trials."""
        if trial is None or (len(candidates) == 1 and not any(t["system"] == system for t in trials)):
            return candidates[0]
        trials.extend(trial(system, candidate) for candidate in candidates)
        worked = [t for t in trials if t["system"] == system and "failed" not in t]
        if not worked:
            raise RuntimeError(f"{system} at {shape.name}: no setting works; the last one: {trials[-1]['failed']}")
        return min(worked, key=lambda t: t["seconds"])["setting"]

    settings: dict[str, Any] = {}
    theirs = [system for system in systems if system in THEIRS]
    if theirs and trl is None:
        first = "grpo" if "grpo" in theirs else theirs[0]
        trl = best(first, [str(_trl.Setting(batch)) for batch in shape.trl_batches])
        if trial is not None:
            chosen = _trl.Setting.parse(trl)
            more = [replace(chosen, generation=n) for n in shape.trl_generation if n >= chosen.batch]
            trl = best(first, [str(setting) for setting in [*more, replace(chosen, cache="static")]])
            if shape.trl_compile:
                trl = best(first, [str(replace(_trl.Setting.parse(trl), compile=True))])
    ours = [system for system in systems if system in OURS]
    if ours:
        micro = best(ours[0], list(shape.micro_trials or (shape.micro_prompts,)) if trial else [shape.micro_prompts])
        settings |= dict.fromkeys(ours, micro)
    return trials, settings | dict.fromkeys(theirs, trl)


def _same_logprobs(found: dict[str, list[float]]) -> float:
    """The largest difference between any two systems' log-probs. RuntimeError where it is not rounding."""
    gap = max(max(column) - min(column) for column in zip(*found.values(), strict=True))
    if gap > SAME_LOGPROBS:
        raise RuntimeError(f"log-probs of one response differ by up to {gap:.2e} nats between systems: {found}")
    return gap


def _ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """ "ppo/grpo" and so on -> speed, peak, increase -> median, low and high over the pairs."""
    ratios = {}
    for ours in (s for s in found if s in OURS):
        for theirs in (s for s in found if s in THEIRS):
            pairs = list(zip(found[ours], found[theirs], strict=True))
            values = {
                "speed": [b["seconds"] / a["seconds"] for a, b in pairs],
                "peak": [a["peak_mib"] / b["peak_mib"] for a, b in pairs],
                "increase": [a["increase_mib"] / b["increase_mib"] for a, b in pairs],
            }
            ratios[f"{ours}/{theirs}"] = {
                name: {"median": median(v), "low": min(v), "high": max(v)} for name, v in values.items()
            }
    return ratios


# --- what is printed ---------------------------------------------------------------------------------


def _line(shape: Shape, found: dict[str, Any]) -> str:
    start = f"  {shape.name:12} {found['system']:5} {found['setting'] or 'all'!s:28}"
    if "failed" in found:
        return f"{start} failed: {found['failed']}"
    phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in found["phases"].items())
    return f"{start} {found['seconds']:8.3f} s ({phases}), peak {found['peak_mib']:.0f} MiB"


def table(result: dict[str, Any]) -> str:
    """The table of one shape: medians per system, and the ratios against the targets."""
    shape = result["shape"]
    samples, length = shape["prompts"] * shape["group"], shape["length"]
    lines = [
        f"{shape['name']}: {shape['prompts']} prompts x {shape['group']} responses x {length} tokens, "
        f"{shape['side']}-px pictures; log-probs of one response agree to {result['logprob_gap']:.1e}",
        "settings: " + "; ".join(f"{k} {v or 'all prompts at once'}" for k, v in result["settings"].items()),
        f"{'':6}{'s/iteration':>12}{'samples/s':>11}{'tokens/s':>10}{'peak MiB':>10}{'increase':>10}"
        + "".join(f"{phase:>11}" for phase in PHASES),
    ]
    for system, runs in result["iterations"].items():
        seconds, peak, increase = (median(run[k] for run in runs) for k in ("seconds", "peak_mib", "increase_mib"))
        lines.append(
            f"{system:6}{seconds:12.3f}{samples / seconds:11.2f}{samples * length / seconds:10.1f}"
            f"{peak:10.0f}{increase:10.0f}"
            + "".join(f"{median(run['phases'][phase] for run in runs):11.3f}" for phase in PHASES)
        )
    texts = {"speed": "samples/s", "peak": "peak memory", "increase": "peak above the loaded model"}
    for pair, ratios in result["ratios"].items():
        ours, theirs = pair.split("/")
        for name, text in texts.items():
            ratio, target = ratios[name], result["targets"].get(name) if theirs == "grpo" else None
            verdict = ""
            if target is not None:
                met = ratio["median"] >= target if name == "speed" else ratio["median"] <= target
                sign = ">=" if name == "speed" else "<="
                verdict = f"   target {sign} {target:g}: {'met' if met else 'NOT met'}"
            what = f"{ours}: {text}, times {theirs}'s"
            lines.append(f"{what:46}{ratio['median']:7.2f}  ({ratio['low']:.2f} to {ratio['high']:.2f}){verdict}")
    theirs = [t for t in result.get("trials", []) if t["system"] in ("grpo", "rloo") and "failed" not in t]
    if theirs:
        least = min(theirs, key=lambda t: t["peak_mib"])
        lines.append(
            f"TRL's smallest peak among its settings: {least['peak_mib']:.0f} MiB at {least['setting']}, "
            f"{median(least['seconds']) if isinstance(least['seconds'], list) else least['seconds']:.3f} s"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Seconds per iteration by phase, a bar per system and a panel per shape."""
    from benchmarks._plots import figure, stacked

    with figure(file, len(results), (5.6, 2.6)) as panels:
        for axes, result in zip(panels, results):
            bars = {
                system: {phase: median(run["phases"][phase] for run in runs) for phase in PHASES}
                for system, runs in result["iterations"].items()
            }
            stacked(axes, bars, f"seconds per iteration, {result['shape']['name']}")


def environment(threads: int) -> dict[str, Any]:
    """Versions, processor and threads of a measurement."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    libraries = ("torch", "transformers", "trl", "peft", "accelerate")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--systems", default="ppo,loo,grpo,rloo", help="of ppo, loo, grpo, rloo")
    parser.add_argument("--pairs", type=int, default=5, help="counted iterations of each system")
    parser.add_argument("--trl", help="TRL's setting (batch=N[,generation=N][,cache=static][,compile=yes]), untried")
    parser.add_argument("--no-sweep", action="store_true", help="take the first setting of each side untried")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "mmft-benchmarks")
    parser.add_argument("--json", type=Path, help="where all measurements are written")
    parser.add_argument("--plot", type=Path, help="where seconds by phase are drawn")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        order = json.loads(args.worker)
        serve(lambda turn: work(order, turn))
        return
    systems = args.systems.split(",")
    if unknown := set(systems) - {*OURS, *THEIRS}:
        parser.error(f"--systems: unknown {', '.join(sorted(unknown))}; there are {', '.join((*OURS, *THEIRS))}")
    if args.trl:
        _trl.Setting.parse(args.trl)
    about, began = environment(args.threads), time.time()
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    results = []
    for name in [n for n in SHAPES if n != "tiny"] if args.shape == "all" else [args.shape]:
        results.append(
            compare(SHAPES[name], args.cache, systems, args.pairs, args.trl, args.threads, not args.no_sweep)
        )
        print(f"\n{table(results[-1])}\n({time.time() - began:.0f} s so far)\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
