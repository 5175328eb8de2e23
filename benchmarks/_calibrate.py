"""What `cluster_plan.py --calibrate` measures here: rates of this machine, and the steps that a plan made from them is
held against.

Rates come from small pieces (products, array passes, an all-reduce, a decoder so narrow that only the CPU's issuing of
it takes time), never from a step of the shapes that are predicted. Everything runs with one thread a process: alone,
and in two processes at once, because two processes share the machine's memory.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._cluster import Job, Lengths, Link, Machine
from benchmarks._iteration import trainer
from benchmarks._models import SHAPES, Shape

ROWS = (1, 4, 16, 64, 256, 1024)
NARROW = replace(SHAPES["tiny"], name="narrow", prompts=2, group=2, length=12, micro_prompts=1)
LAYERS = 12  # of the narrow decoder
SIZES = (4, 1 << 16, 1 << 20, 1 << 22, 1 << 24)  # bytes of an all-reduce
SHAPE_NAMES = ("bundled", "smolvlm256m")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


# ---------------------------------------------------------------- in a worker


def _shortest(function, clock: str, least: float = 0.5) -> float:
    """Seconds of the shortest of several calls."""
    best, now = float("inf"), CLOCKS[clock]
    began = now()
    while now() - began < least:
        start = now()
        function()
        best = min(best, now() - start)
    return best


def rates(clock: str) -> dict[str, Any]:
    """Products by their smallest side, memory, element-wise passes."""
    weights = [torch.randn(1024, 1024).t() for _ in range(64)]  # 256 MiB: no cache keeps them
    found: dict[str, Any] = {"rates": []}
    for rows in ROWS:
        x, turn = torch.randn(rows, 1024), iter(range(10**9))
        spent = _shortest(lambda: torch.mm(x, weights[next(turn) % 64]), clock)  # noqa: B023
        found["rates"].append((rows, 2.0 * rows * 1024 * 1024 / spent))
    matrix, vector = torch.ones(1 << 16, 1024), torch.ones(1024)  # 256 MiB
    found["bandwidth"] = matrix.nbytes / _shortest(lambda: torch.mv(matrix, vector), clock)
    a, b, scale = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.ones(1024)

    def layer() -> torch.Tensor:  # what a decoder layer does between its products: 15 numbers moved for each of x
        normal = scale * (a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6))
        return torch.nn.functional.silu(normal) * b + a

    found["stream"] = 15 * a.nbytes / _shortest(layer, clock)
    return found


def all_reduces() -> dict[str, Any]:
    """Bytes -> the shortest seconds of an all-reduce of that many by two processes."""
    dist.init_process_group("gloo")
    spent = {}
    for size in SIZES:
        x = torch.zeros(max(size // 4, 1))
        times = []
        for _ in range(30 if size < 1 << 20 else 10):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(x)
            times.append(time.perf_counter() - began)
        spent[size] = median(times[2:])
    return {"all_reduce": list(spent.items())}


def steps(shape: Shape, folder: Path, count: int, clock: str) -> dict[str, Any]:
    """Part of a step -> median seconds, after one step that does not count."""
    from benchmarks.roofline import PARTS, divided

    with tempfile.TemporaryDirectory() as scratch:
        made = trainer(folder, shape, scratch, count + 2, guards={}, timeout=None)
        made.step(1)
        began = CLOCKS[clock]()
        batch = made.prompts(count + 2)  # pictures that no step has seen or will see
        prepared = (CLOCKS[clock]() - began) / len(batch)
        seconds, whole = [], []
        for step in range(2, count + 2):
            with divided(made, CLOCKS[clock]) as spent:
                logged = made.step(step)
            if logged["response_length"] != shape.length:
                raise RuntimeError(f"responses of {logged['response_length']} tokens, expected {shape.length}")
            seconds.append(dict(spent))
            whole.append(sum(spent[part] for part in PARTS))
    parts = {part: median(s[part] for s in seconds) for part in PARTS}
    return {
        "seconds": parts | {"step": median(whole)},
        "prepared": prepared,
        "text": int(batch.prompt_mask.sum(-1).max()),
    }


def narrow(folder: Path) -> Path:
    """A decoder of many layers whose arithmetic is nothing."""
    from transformers import LlavaForConditionalGeneration

    from benchmarks._models import _llava

    _, processor = _llava(tiny=True)
    config = _llava(tiny=True)[0].config
    config.text_config.num_hidden_layers = LAYERS
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = ["full_attention"] * LAYERS
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def issuing(folder: Path, dtype: str, clock: str) -> dict[str, Any]:
    """Seconds in which the CPU issues one layer: in decoding, and in an update (forward and backward)."""
    from benchmarks.roofline import divided

    with tempfile.TemporaryDirectory() as scratch:
        made = trainer(folder, NARROW, scratch, 6, dtype, guards={}, timeout=None)
        decode, update = [], []
        for step in range(1, 7):
            with divided(made, CLOCKS[clock]) as spent:
                made.step(step)
            decode.append(spent["decode"] / ((NARROW.length - 1) * (LAYERS + 1)))
            update.append(spent["update"] / (NARROW.prompts * (LAYERS + 1)))
    return {"decode": median(decode[1:]), "update": median(update[1:])}


def worker(order: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    task = order["task"]
    if task == "rates":
        return rates(order["clock"])
    if task == "all_reduces":
        return all_reduces()
    if task == "issuing":
        return issuing(Path(order["folder"]), order["dtype"], order["clock"])
    return steps(SHAPES[order["shape"]], Path(order["folder"]), order["count"], order["clock"])


# ---------------------------------------------------------------- processes


def in_processes(script: str, order: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What ``count`` processes at once answer to ``script --worker ORDER --json FILE``; more than one are a group."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"LOCAL_WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{rank}.json" for rank in range(count)]
        started = []
        for rank, file in enumerate(files):
            command = [sys.executable, script, "--worker", json.dumps(order), "--json", str(file)]
            own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {})
            with (Path(scratch) / f"{rank}.log").open("w") as log:
                started.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
        codes = [process.wait() for process in started]
        if any(codes):
            bad = next(rank for rank, code in enumerate(codes) if code)
            text = (Path(scratch) / f"{bad}.log").read_text()
            raise RuntimeError(f"the measurement {order} failed in process {bad}:\n{text[-4000:]}")
        return [json.loads(file.read_text()) for file in files]


def measure(script: str, folders: dict[str, Path], count: dict[str, int], clock: str, say=print) -> dict[str, Any]:
    """Everything: rates alone and together, links, and steps of the shapes by one process and by two."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(narrow(Path(scratch)))
        for ranks in (1, 2):
            began = time.time()
            of: dict[str, Any] = {"rates": _mean(in_processes(script, {"task": "rates", "clock": clock}, ranks))}
            order = {"task": "issuing", "folder": folder, "dtype": "float32", "clock": clock}
            of["issuing"] = _mean(in_processes(script, order, ranks))
            if ranks == 1:
                of["issuing_bf16"] = in_processes(script, order | {"dtype": "bfloat16"}, 1)[0]
            else:
                of |= _mean(in_processes(script, {"task": "all_reduces"}, ranks))
            for name in SHAPE_NAMES:
                order = {"task": "steps", "shape": name, "folder": str(folders[name]), "count": count[name]}
                order["clock"] = clock
                of[name] = _mean(in_processes(script, order, ranks))
            found[str(ranks)] = of
            say(f"measured with {ranks} process{'es' if ranks > 1 else ''} ({time.time() - began:.0f} s)", flush=True)
    return found


def _mean(answers: list[Any]) -> Any:
    """The same structure, numbers averaged over processes."""
    first = answers[0]
    if isinstance(first, dict):
        return {key: _mean([a[key] for a in answers]) for key in first}
    if isinstance(first, list | tuple):
        return [_mean(list(parts)) for parts in zip(*answers, strict=True)]
    return sum(answers) / len(answers)


# ---------------------------------------------------------------- to a machine and a job


def machine(found: dict[str, Any], ranks: int) -> Machine:
    """This machine, as one of ``ranks`` processes sees it."""
    of = found[str(ranks)]
    reduces = found["2"]["all_reduce"]
    latency = reduces[0][1] / 2
    size, spent = reduces[-1]
    return Machine(
        name=f"this machine, {ranks} process{'es' if ranks > 1 else ''}",
        memory=0.0,
        rates=tuple((int(rows), rate) for rows, rate in of["rates"]["rates"]),
        bandwidth=of["rates"]["bandwidth"],
        stream=of["rates"]["stream"],
        host=of["issuing"]["decode"],
        host_update=of["issuing"]["update"],
        asynchronous=False,
        per_node=2,
        inside=Link(size / (spent - 2 * latency), latency),  # two processes: all of the bytes pass once
        across=Link(1.0, 0.0),
    )


def job(shape: Shape, ranks: int, text: int) -> Job:
    """The benchmark's step: one pass, fp32, every response of full length, no reward that takes time."""
    return Job(
        gpus=ranks,
        prompts=shape.prompts,
        group=shape.group,
        micro=min(shape.micro_prompts or shape.prompts, shape.prompts / ranks),
        epochs=1,
        text=text,
        lengths=Lengths(shape.length, shape.length, 0.0),
        reward=0.0,
        itemsize=4,
        folds=True,
    )
