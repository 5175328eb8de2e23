"""One RL iteration of mmft's PPOTrainer against one of TRL's GRPOTrainer: samples per second and peak memory.

    python benchmarks/vs_trl.py [--shape bundled|smolvlm256m|all] [--repetitions 3] [--steps 2] [--json FILE]

Equal on both sides: the checkpoint, the pictures and prompts (every picture new, so that nothing is remembered from
an earlier iteration), group size, response length, fp32, LoRA adapters, AdamW, the KL term against the model with
adapters off, the reward function, one optimizer step per iteration. mmft trains a critic besides. Every response is
exactly as long as the shape says, because neither side may sample the end-of-sequence token.

Each measurement is a process of its own, the two systems in turns. TRL runs without gradient checkpointing and with
the batch size that was fastest in a trial of all of `Shape.trl_batches`. The first iteration is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._models import SHAPES, Shape, build, rows  # noqa: E402

BETA, LEARNING_RATE, SEED = 0.02, 1e-5, 0
TARGETS = {"bundled": 6.0, "smolvlm256m": 8.0}  # samples per second, times TRL's
MEMORY_TARGET = 0.6  # peak memory of the process, times TRL's


def reward(text: str) -> float:
    """A cheap score that differs between responses: how many different characters."""
    return len(set(text.strip())) / 64


# --- one measurement, in a process of its own --------------------------------------------------------


def measure(system: str, shape: Shape, folder: Path, dataset: Path, steps: int, batch: int | None) -> dict:
    """One warm-up iteration and ``steps`` counted ones of "mmft" or "trl".

    Args:
        batch: TRL's per-device batch size, in samples; mmft's prompts per forward pass of the update.

    Returns:
        seconds of each counted iteration, phases (mean seconds), memory in MiB, and what both sides must agree on.
    """
    from datasets import load_from_disk

    from mmft.vlm.load import load_model, lora_config

    seen: list[tuple[str, float]] = []

    def score(completions, **columns) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        scores = [reward(text) for text in texts]
        seen.extend(zip(texts, scores))
        return scores

    model, processor = load_model(str(folder), dtype="float32")
    arguments = (model, processor, lora_config(model), score, load_from_disk(str(dataset)))
    run = _run_mmft if system == "mmft" else _run_trl
    with tempfile.TemporaryDirectory() as scratch:
        result = run(shape, steps, batch, *arguments, scratch)
    samples = (steps + 1) * shape.samples
    if len(seen) != samples or {result.pop("length")} != {float(shape.length)}:
        raise RuntimeError(f"{system}: {len(seen)} responses scored, {samples} expected of {shape.length} tokens each")
    # What the trainer says it learned from is what the function gave it.
    given = sum(score for _, score in seen) / samples
    if abs(given - result["reward"]) > 1e-5:
        raise RuntimeError(f"{system}: the trainer's mean reward is {result['reward']}, the given one {given}")
    return result | {"system": system, "shape": shape.name, "batch": batch, "seen": seen[:4]}


def _run_mmft(shape, steps, batch, model, processor, adapters, score, dataset, scratch) -> dict:
    from mmft.training.config import PPOConfig
    from mmft.training.trainer import PPOTrainer

    config = PPOConfig(
        output_dir=scratch,
        seed=SEED,
        max_steps=steps + 1,
        prompts_per_step=shape.prompts,
        num_generations=shape.group,
        max_completion_length=shape.length,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        num_ppo_epochs=1,
        num_mini_batches=1,
        micro_prompts=batch,
        kl_coef=BETA,
        report_to=(),
    )
    trainer = PPOTrainer(model, score, config, dataset, None, processor, adapters)
    trainer.policy.ban(trainer.policy.end_ids)  # never sampled: every response runs to its full length
    base = _reset_peak()
    logs, seconds = [], []
    for step in range(1, steps + 2):
        start = time.perf_counter()
        logs.append(trainer.step(step))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds[1:],
        "phases": {k: sum(m[k] for m in logs[1:]) / steps for k in logs[0] if k.startswith("time/")},
        "reward": sum(m["reward"] for m in logs) / len(logs),
        "length": sum(m["response_length"] for m in logs) / len(logs),
        **_peak(base),
    }


def _run_trl(shape, steps, batch, model, processor, adapters, score, dataset, scratch) -> dict:
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            ends.append(time.perf_counter())

    micro_batches = shape.samples // batch
    banned = [model.config.image_token_id, processor.tokenizer.eos_token_id]
    config = GRPOConfig(
        output_dir=scratch,
        seed=SEED,
        max_steps=steps + 1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=micro_batches,
        steps_per_generation=micro_batches,
        num_generations=shape.group,
        num_iterations=1,
        max_completion_length=shape.length,
        generation_kwargs={"suppress_tokens": banned},  # the same two that mmft bans
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=BETA,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=score,
        args=config,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=adapters,
        callbacks=[Clock()],
    )
    if getattr(trainer.model, "is_activation_checkpointing", False):
        raise RuntimeError("TRL's model recomputes activations; the comparison wants it at its fastest")
    base = _reset_peak()
    trainer.train()
    logs = trainer.state.log_history[-1]  # written once, at the end: means over all iterations
    return {
        "seconds": [b - a for a, b in zip(ends, ends[1:])],
        "phases": {},
        "reward": logs["reward"],
        "length": logs["completions/mean_length"],
        **_peak(base),
    }


def _memory(key: str) -> float:
    """A line of Linux's account of this process, in MiB: "VmRSS" now, "VmHWM" the highest since the last reset.

    Not `ru_maxrss`: that of a child starts at what its parent held.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} in /proc/self/status: memory can be measured on Linux alone")


def _reset_peak() -> float:
    """MiB held now, with libraries, model and trainer loaded; the high-water mark starts again from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then loading counts too, on both sides
    return _memory("VmRSS")


def _peak(base: float) -> dict[str, float]:
    peak = _memory("VmHWM")
    return {"peak_mib": peak, "increase_mib": peak - base}


# --- the comparison ----------------------------------------------------------------------------------


def compare(shape: Shape, cache: Path, repetitions: int, steps: int, trl_batch: int | None, threads: int) -> dict:
    """Measures both systems in turns and returns every measurement, with the medians and ranges of the ratios."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()

    folder = build(shape, cache / shape.name)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = Path(scratch) / "rows"
        Dataset.from_list(rows(shape, shape.prompts * (steps + 1))).save_to_disk(str(dataset))

        def once(system: str, batch: int | None, counted: int = steps) -> dict:
            result = _in_process(system, shape, folder, dataset, counted, batch, threads)
            seconds, name = median(result["seconds"]), f"{shape.name:12} {system:5} batch {batch or 'all':>4}"
            print(f"  {name}: {seconds:8.3f} s/iteration, peak {result['peak_mib']:.0f} MiB", flush=True)
            return result

        batches = [trl_batch] if trl_batch else shape.trl_batches
        trials = [once("trl", batch, 1) for batch in batches] if len(batches) > 1 else []
        fastest = min(trials, key=lambda t: t["seconds"][0])["batch"] if trials else batches[0]
        pairs = []
        for i in range(repetitions):
            pair = {}
            for system in ("mmft", "trl") if i % 2 == 0 else ("trl", "mmft"):
                pair[system] = once(system, fastest if system == "trl" else shape.micro_prompts)
            pairs.append(pair)
    for system in ("mmft", "trl"):
        for text, score in pairs[0][system]["seen"]:
            if score != reward(text):
                raise RuntimeError(f"{system} was given {score} for {text!r}, not {reward(text)}")
    ratios = {
        "speed": [median(p["trl"]["seconds"]) / median(p["mmft"]["seconds"]) for p in pairs],
        "peak": [p["mmft"]["peak_mib"] / p["trl"]["peak_mib"] for p in pairs],
        "increase": [p["mmft"]["increase_mib"] / p["trl"]["increase_mib"] for p in pairs],
    }
    return {
        "shape": vars(shape),
        "trl_batch": fastest,
        "trials": trials,
        "pairs": pairs,
        "ratios": {k: {"median": median(v), "low": min(v), "high": max(v)} for k, v in ratios.items()},
        "targets": {"speed": TARGETS.get(shape.name), "peak": MEMORY_TARGET},
    }


def _in_process(system, shape, folder, dataset, steps, batch, threads) -> dict:
    order = {**vars(shape), "system": system, "folder": str(folder), "dataset": str(dataset)}
    order |= {"steps": steps, "batch": batch, "threads": threads}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [sys.executable, __file__, "--worker", json.dumps(order), "--json", answer.name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{system} at {shape.name}, batch {batch}, failed:\n{done.stderr[-4000:]}")
        return json.loads(Path(answer.name).read_text())


def _worker(order: dict) -> dict:
    import torch

    torch.set_num_threads(order.pop("threads"))
    own = {key: order.pop(key) for key in ("system", "folder", "dataset", "steps", "batch")}
    return measure(own["system"], Shape(**order), Path(own["folder"]), Path(own["dataset"]), own["steps"], own["batch"])


# --- what is printed ---------------------------------------------------------------------------------


def table(result: dict) -> str:
    """The table of one shape, and its ratios against the targets."""
    shape = result["shape"]
    samples, length = shape["prompts"] * shape["group"], shape["length"]
    lines = [
        f"{shape['name']}: {shape['prompts']} prompts x {shape['group']} responses x {length} tokens, "
        f"{shape['side']}-px pictures; TRL's batch: {result['trl_batch']} of {samples} samples",
        f"{'':6}{'s/iteration':>12}{'samples/s':>11}{'tokens/s':>10}{'peak MiB':>10}{'increase':>10}",
    ]
    for system in ("mmft", "trl"):
        runs = [pair[system] for pair in result["pairs"]]
        seconds = median(s for run in runs for s in run["seconds"])
        peak, increase = (median(run[k] for run in runs) for k in ("peak_mib", "increase_mib"))
        lines.append(
            f"{system:6}{seconds:12.3f}{samples / seconds:11.2f}{samples * length / seconds:10.1f}"
            f"{peak:10.0f}{increase:10.0f}"
        )
    phases = [pair["mmft"]["phases"] for pair in result["pairs"]]
    lines.append("mmft: " + ", ".join(f"{k[5:]} {median(p[k] for p in phases):.3f} s" for k in phases[0]))
    texts = {
        "speed": "samples/s, times TRL's",
        "peak": "peak memory, times TRL's",
        "increase": "peak above the loaded model, times TRL's",
    }
    for name, text in texts.items():
        ratio, target = result["ratios"][name], result["targets"].get(name)
        verdict = ""
        if target is not None:
            met = ratio["median"] >= target if name == "speed" else ratio["median"] <= target
            sign = ">=" if name == "speed" else "<="
            verdict = f"   target {sign} {target:g}: {'met' if met else 'NOT met'}"
        lines.append(f"{text:42}{ratio['median']:7.2f}  ({ratio['low']:.2f} to {ratio['high']:.2f}){verdict}")
    return "\n".join(lines)


def environment(threads: int) -> dict:
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
    parser.add_argument("--repetitions", type=int, default=3, help="pairs of processes")
    parser.add_argument("--steps", type=int, default=2, help="counted iterations per process, after one warm-up")
    parser.add_argument("--trl-batch", type=int, help="TRL's batch size in samples, instead of trying several")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "mmft-benchmarks")
    parser.add_argument("--json", type=Path, help="where all measurements are written")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.json.write_text(json.dumps(_worker(json.loads(args.worker))))
        return
    about = environment(args.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    names = ["bundled", "smolvlm256m"] if args.shape == "all" else [args.shape]
    results = []
    for name in names:
        results.append(compare(SHAPES[name], args.cache, args.repetitions, args.steps, args.trl_batch, args.threads))
        print(f"\n{table(results[-1])}\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
