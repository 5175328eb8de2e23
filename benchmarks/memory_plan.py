"""What `mmft doctor memory` foretells against what a run takes: peak memory of each phase, six recipes.

    python benchmarks/memory_plan.py [--only NAME,...] [--json FILE]

Each run is a process of its own: the trainer that the recipe describes, two steps and an evaluation, with the end
token banned so that responses are as long as the plan takes them to be. A phase's peak is Linux's high-water mark of
resident memory, reset before the phase. The plan is made in another process. Exits with 1 where a peak is missed by
more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

TARGET = 0.15
MIB = 1 << 20
SMOL = ["rollout.prompts_per_step=2", "train.micro_prompts=1", "rollout.max_completion_length=20"]
# name -> model shape of _models.py, overrides of recipes/caption_ppo.yaml, environment
RECIPES = {
    "bundled, LoRA": ("bundled", [], {}),
    "bundled, full, long, G = 16": (
        "bundled",
        ["model.tune=full", "rollout.num_generations=16", "rollout.max_completion_length=64", "train.micro_prompts=16"],
        {},
    ),
    "SmolVLM-256M shape, LoRA": ("smolvlm256m", SMOL, {}),
    "SmolVLM-256M shape, LoRA, no heap": ("smolvlm256m", SMOL, {"MALLOC_MMAP_THRESHOLD_": "65536"}),
    "SmolVLM-256M shape, nf4": ("smolvlm256m", [*SMOL, "model.quantize=nf4"], {}),
    "SmolVLM-256M shape, G = 16, long": (
        "smolvlm256m",
        [*SMOL[:2], "rollout.num_generations=16", "rollout.max_completion_length=40"],
        {},
    ),
}
_COMMON = ["train.steps=2", "data.train_rows=200", "eval.rows=4", "output.trackers=[]"]


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no {key} in /proc/self/status: memory can be measured on Linux alone")


def measure(recipe) -> dict[str, int]:
    """Phase -> peak bytes, over two steps and an evaluation."""
    from mmft.training import run, trainer

    peaks: dict[str, int] = {}

    @contextmanager
    def phase(name: str):
        Path("/proc/self/clear_refs").write_text("5")
        yield
        peaks[name] = max(peaks.get(name, 0), _status("VmHWM"))

    def watched(module, function: str, name: str) -> None:
        plain = getattr(module, function)

        def call(*args, **kwargs):
            with phase(name):
                return plain(*args, **kwargs)

        setattr(module, function, call)

    watched(run, "load_model", "load")
    watched(trainer, "build_policy", "load")
    watched(trainer, "fit_critic", "critic fit")
    made = run.assemble(recipe)
    made.policy.ban(made.policy.end_ids)
    timed = made._timed

    @contextmanager
    def also_timed(name: str):
        with phase(name), timed(name):
            yield

    made._timed = also_timed
    for step in (1, 2):
        made.step(step)
    with phase("evaluation"):
        made.evaluate()
    return peaks


def compare(name: str, cache: Path) -> dict:
    """One recipe: phases foretold and measured, in bytes."""
    from benchmarks._models import SHAPES, build

    shape, changes, setting = RECIPES[name]
    model = str(build(SHAPES[shape], cache / shape))
    with tempfile.TemporaryDirectory() as scratch:
        words = [f"model.name={model}", f"output.dir={scratch}", *_COMMON, *changes]
        plan, measured = (_in_process(task, words, setting) for task in ("plan", "measure"))
    foretold = {phase["name"]: phase["total"] for phase in plan["phases"]}
    # The trainer encodes pictures within its rollout.
    foretold["rollout"] = max(foretold["rollout"], foretold.pop("encode"))
    peak, truth = max(foretold.values()), max(measured.values())
    return {"name": name, "plan": plan, "foretold": foretold, "measured": measured, "error": peak / truth - 1}


def _in_process(task: str, words: list[str], setting: dict[str, str]) -> dict:
    environment = os.environ | setting | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [sys.executable, __file__, "--worker", task, "--json", answer.name, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{task} of {' '.join(words)} failed:\n{done.stderr[-4000:]}")
        return json.loads(Path(answer.name).read_text())


def _worker(task: str, words: list[str]) -> dict:
    from mmft.recipe import load_recipe

    recipe = load_recipe(ROOT / "recipes" / "caption_ppo.yaml", words)
    if task == "measure":
        return measure(recipe)
    from mmft.training.memory import plan_memory

    return plan_memory(recipe).as_dict()


def table(result: dict) -> str:
    foretold, measured = result["foretold"], result["measured"]
    lines = [result["name"], f"  {'phase':12}{'foretold':>10}{'measured':>10}   MiB"]
    for phase in foretold:
        if phase in measured:
            error = foretold[phase] / measured[phase] - 1
            lines.append(f"  {phase:12}{foretold[phase] / MIB:10.0f}{measured[phase] / MIB:10.0f}   {error:+.0%}")
    met = "met" if abs(result["error"]) <= TARGET else "NOT met"
    peaks = max(foretold.values()) / MIB, max(measured.values()) / MIB
    lines.append(f"  {'peak':12}{peaks[0]:10.0f}{peaks[1]:10.0f}   {result['error']:+.1%}   target 15 %: {met}")
    return "\n".join(lines)


def environment() -> dict[str, str]:
    """What the numbers depend on beside the code."""
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    return {"libc": " ".join(platform.libc_ver()), "threads": os.environ.get("OMP_NUM_THREADS", "default")} | {
        name: version(name) for name in libraries
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=str, help="; between names: " + "; ".join(RECIPES))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "mmft-benchmarks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.json.write_text(json.dumps(_worker(args.worker, args.words)))
        return 0
    results = []
    for name in args.only.split(";") if args.only else RECIPES:
        results.append(compare(name.strip(), args.cache))
        print(table(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    return int(any(abs(result["error"]) > TARGET for result in results))


if __name__ == "__main__":
    sys.exit(main())
