"""Starts trainings over and over, kills them, starts them again: what the tests of resuming share.

A server process imports torch and transformers once and forks a child per run, so that a kill costs the run's own
seconds and not ten more of imports. The child is a real process under a real SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TIMES = ("seconds", "tokens_per_second", "samples_per_second")

# About a million weights, 64 pictures, checkpoints every five steps; a ledger of every response.
PPO = [
    "data.train_rows=64",
    "rollout.prompts_per_step=4",
    "rollout.num_generations=4",
    "rollout.max_completion_length=8",
    "train.micro_prompts=2",
    "train.steps=60",
    "train.save_every=5",
    "eval.every=20",
    "eval.rows=8",
    "output.trackers=[ledger]",
]
# The same in eight steps, for every commit.
PPO_SHORT = ["data.train_rows=12", "train.steps=8", "train.save_every=2", "eval.every=4", "eval.rows=4"]
PREFERENCE = [
    "backbone.tune=lora",
    "backbone.lora.r=4",
    "pairs.train_rows=32",
    "pairs.held_out_rows=8",
    "pairs.pictures=16",
    "train.steps=24",
    "train.batch_size=4",
    "train.save_every=4",
]
SUPERVISED = [
    "data.train_rows=16",
    "warm_start.batch_size=8",
    "warm_start.epochs=2",
    "warm_start.save_every=4",
    "eval.rows=4",
]


class Runner:
    """``run`` starts one training in a process of its own and waits for its end."""

    def __init__(self):
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(HERE)])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, job: str, timeout: float = 300.0, **options: Any) -> tuple[int, str]:
        """Exit code (negative: the signal that killed it) and what was printed.

        Args:
            job: name of a function of this file, called with what of ``options`` is not named below.
            env: variables of the child alone.
            signals: [(seconds, signal)] sent so long after the start, or after ``once`` exists.
            once: a path.
        """
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps({"job": job, "timeout": timeout} | options) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        return answer["code"], answer["output"]

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(timeout=30)


# ---------------------------------------------------------------- what a child does


def ppo(folder: str, overrides: list[str], name: str = "caption_ppo", resume: Any = None, allow: Any = ()) -> None:
    from mmft.recipe import load_recipe
    from mmft.training.run import run

    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [*PPO, f"output.dir={folder}", *overrides])
    run(recipe, resume, allow)


def a2c(folder: str, overrides: list[str], resume: Any = None) -> None:
    ppo(folder, ["train.steps=20", *overrides], "caption_a2c", resume)


def preference(folder: str, overrides: list[str], resume: Any = None) -> None:
    from mmft.recipe.preference import load_preference_recipe
    from mmft.training.preference import run_preference

    recipe = load_preference_recipe(
        ROOT / "recipes" / "train_preference.yaml", [*PREFERENCE, f"output.dir={folder}", *overrides]
    )
    run_preference(recipe, resume is not None)


def supervised(folder: str, overrides: list[str], resume: Any = None) -> None:
    from mmft.recipe import load_recipe
    from mmft.training.run import run_supervised

    recipe = load_recipe(ROOT / "recipes" / "caption_sft.yaml", [*SUPERVISED, f"output.dir={folder}", *overrides])
    run_supervised(recipe, resume is not None)


def rotate(folder: str, start: int, stop: int) -> None:
    """Saves and deletes as fast as it can; nothing of a training."""
    from mmft.training.transaction import Checkpoints

    def write(place: Path) -> None:
        for name in ("one", "two", "three"):
            (place / name).write_text(name * 1000)

    checkpoints = Checkpoints(Path(folder), keep_last=2)
    for step in range(start, stop):
        checkpoints.save(step, write)


# ---------------------------------------------------------------- what a run leaves behind


def lines(path: Path, without: tuple[str, ...] = TIMES) -> list[dict[str, Any]]:
    """The lines of a JSONL file, times left out."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in without and not k.startswith("time/")} for line in found]


def result(folder: Path, last: str = "step-000060") -> dict[str, Any]:
    """Everything of a finished run that has to be equal in another: hashes, and files but for times."""
    from mmft.training.transaction import sha256, verify

    checkpoint = folder / "checkpoints" / last
    verify(checkpoint)
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "adapter": sha256(folder / "adapter" / "adapter_model.safetensors"),
        "value head": sha256(folder / "value_head.safetensors"),
        "optimizer": sha256(checkpoint / "optimizer.safetensors"),
        "random numbers": sha256(checkpoint / "rank-00000.safetensors"),
        "metrics": lines(folder / "metrics.jsonl"),
        "alarms": lines(folder / "alarms.jsonl"),
        "samples": lines(folder / "samples.jsonl"),
        "ledger": lines(folder / "ledger.jsonl"),
        "summary": {k: v for k, v in summary.items() if k != "seconds"},
    }


def hashes(folder: Path) -> dict[str, str]:
    """Of every file of tensors: the results, and the checkpoints that are left."""
    from mmft.training.transaction import sha256

    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*.safetensors"))}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in one if one[name] != other[name]]


# ---------------------------------------------------------------- the server


def serve() -> None:
    import torchvision_shim

    torchvision_shim.install()
    import torch

    import mmft.training.preference
    import mmft.training.run
    import mmft.training.warm_start  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(_child(**json.loads(line))), flush=True)


def _child(
    job: str,
    timeout: float,
    env: dict[str, str] | None = None,
    signals: list[tuple[float, int]] | None = None,
    once: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    log = Path(f"/tmp/mmft-kill-{os.getpid()}.log")
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _work(job, log, env or {}, limit, options)
    began, start = time.monotonic(), None if once else time.monotonic()
    waiting = [tuple(pair) for pair in signals or []]
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        now = time.monotonic()
        if start is None and Path(str(once)).exists():
            start = now
        if start is not None and waiting and now - start >= waiting[0][0]:
            os.kill(child, int(waiting.pop(0)[1]))
        if now - began > timeout:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.003)
    output = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    return {"code": os.waitstatus_to_exitcode(status), "output": output}


def _work(job: str, log: Path, env: dict[str, str], limit: int | None, options: dict[str, Any]) -> None:
    code = 1
    try:
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(number, stream)
        os.close(0)
        os.environ.update(env)
        if limit is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        globals()[job](**options)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
