"""What it costs two processes to be one: a step of twice the prompts on two, against two runs that share nothing.

    python benchmarks/weak_scaling.py [--shape bundled] [--steps 6] [--json FILE]

Four processes of one thread each take turns: the two of a DDP run over gloo, then the two of independent runs, and
again. Each process has the shape's prompts in a step, in either pair. The efficiency is the time of a step of the
independent pair (of the slower one, for the pair as for DDP) over that of the DDP step of the same turn; the median of
the turns after the first. What a process of either pair does not compute it waits: for the disk, for the machine's
other work and, in DDP, for the other process and what the two exchange. The difference of the two shares is the price
of the latter.

Target: an efficiency of at least 0.85.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._iteration import trainer  # noqa: E402
from benchmarks._models import SHAPES, build  # noqa: E402
from benchmarks._turns import Process, Turn, serve  # noqa: E402

TARGET = 0.85


def measure(order: dict[str, Any], turn: Turn) -> dict[str, Any]:
    """A worker: a step per turn, with its seconds and the share of them in which it did not compute."""
    os.environ.update(order["environment"])
    shape, world = SHAPES[order["shape"]], int(order["environment"].get("WORLD_SIZE", 1))
    with tempfile.TemporaryDirectory() as scratch:
        whole = replace(shape, prompts=shape.prompts * world)
        made = trainer(Path(order["folder"]), whole, scratch, order["steps"], guards={})
        found: dict[str, Any] = {"ready": True}
        for step in range(1, order["steps"] + 1):
            if not turn(found):
                break
            began, busy = time.perf_counter(), time.process_time()
            log = made.step(step)
            seconds, busy = time.perf_counter() - began, time.process_time() - busy
            found = {"seconds": seconds, "idle": max(0.0, 1 - busy / seconds), "length": log["response_length"]}
    return found


def pairs(shape: str, folder: Path, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Turns of either pair: per step, the numbers of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = {
        "ddp": [together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)],
        "alone": [{}, {}],
    }
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in environments}
    order = {"shape": shape, "folder": str(folder), "steps": steps}
    running = {
        name: [Process(__file__, order | {"environment": one}, threads=1) for one in both]
        for name, both in environments.items()
    }
    try:
        for both in running.values():
            for process in both:
                process.read()  # ready
        for step in range(1, steps + 1):
            for name, both in running.items():
                for process in both:
                    process.process.stdin.write("go\n")
                    process.process.stdin.flush()
                found[name].append([process.read() for process in both])
                slower = max(one["seconds"] for one in found[name][-1])
                print(f"step {step}, {name}: {slower:.2f} s", file=sys.stderr, flush=True)
    finally:
        for both in running.values():
            for process in both:
                process.__exit__()
    return found


def summed_up(found: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """Efficiency, and the share of a step in which a process waits, without the first turn."""
    slower = {name: [max(one["seconds"] for one in both) for both in turns[1:]] for name, turns in found.items()}
    idle = {name: median(one["idle"] for both in turns[1:] for one in both) for name, turns in found.items()}
    seconds = {name: median(values) for name, values in slower.items()}
    return {
        "efficiency": median(one / both for one, both in zip(slower["alone"], slower["ddp"], strict=True)),
        "target": TARGET,
        "seconds": seconds,
        "idle_share": idle,
        "communication_share": idle["ddp"] - idle["alone"],
        "turns": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="bundled")
    parser.add_argument("--steps", type=int, default=6, help="turns of each pair; the first is not counted")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(lambda turn: measure(json.loads(args.worker), turn))
        sys.stdout.flush()
        os._exit(0)  # a thread of gloo may outlive the interpreter's farewell
    if args.steps < 2:
        parser.error("--steps: at least 2, for the first is not counted")
    with tempfile.TemporaryDirectory() as scratch:
        result = summed_up(pairs(args.shape, build(SHAPES[args.shape], Path(scratch) / "model"), args.steps))
    seconds = result["seconds"]
    for name, label in (("alone", "two independent runs"), ("ddp", "two processes (DDP) ")):
        print(f"step of {label}   {seconds[name]:.2f} s, {result['idle_share'][name]:.1%} of it waiting")
    print(f"communication and waiting      {result['communication_share']:.1%} of a DDP step")
    print(f"efficiency                     {result['efficiency']:.3f} (target {TARGET})")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
