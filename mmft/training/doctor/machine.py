"""What a machine has: Python, libraries, devices, room on the disk, the launcher's settings, the way to the Hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

import mmft
from mmft.training.doctor.page import Section

GIB = 1 << 30
CHECKOUT = Path(mmft.__file__).resolve().parents[1]
SHOWN = ("torch", "transformers", "peft", "accelerate", "trl")
# What each extra of pyproject.toml is for; those for developers alone are left out.
EXTRAS = {
    "gpu": "Qwen-VL and SmolVLM models",
    "video": "clips and sounds",
    "quant": "model.quantize and train.optimizer adamw_8bit",
    "deepspeed": "ZeRO on several GPUs",
    "official-metrics": "METEOR, SPICE and the official caption metrics, with Java",
    "serve": "rewards over HTTP",
    "evaluate": "the metrics as modules of Hugging Face's evaluate",
}
LEAST_ROOM = GIB // 2


def look_at_machine(section: Section, output: Path) -> None:
    """Looks at the machine; ``output`` is where results will go."""
    for look in (_libraries, _processors, lambda section: _disk(section, output), _launcher, _hub):
        try:
            look(section)
        except ImportError as error:  # of a library that is missing, or does not fit the others
            section.wrong(f"{error}", f"{sys.executable} -m pip install -U mmft")


# ---------------------------------------------------------------- libraries


def requirements() -> dict[str, list[Requirement]]:
    """Extra -> what it asks for; "" for what is always needed. Of the checkout, else as installed."""
    project = CHECKOUT / "pyproject.toml"
    if project.is_file():  # newer than what an editable install once wrote down
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        lists = {"": table["dependencies"], **table["optional-dependencies"]}
        return {extra: [Requirement(text) for text in texts] for extra, texts in lists.items()}
    found: dict[str, list[Requirement]] = {}
    for text in importlib.metadata.requires("mmft") or []:
        requirement = Requirement(text)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker or ""))
        found.setdefault(extra[1] if extra else "", []).append(requirement)
    return found


def unmet(wanted: list[Requirement]) -> list[str]:
    """Those that are missing or too old, in words."""
    said = []
    for requirement in wanted:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            said.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(Version(version).public, prereleases=True):
            said.append(f"{requirement.name} {version} is not {requirement.specifier}")
    return said


def _libraries(section: Section) -> None:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN if _there(name))
    section.fine(f"mmft {mmft.__version__}, Python {platform.python_version()}, {versions}")
    needed = requirements()
    for said in unmet(needed[""]):
        name = said.split()[0]
        section.wrong(said, f"{sys.executable} -m pip install -U '{next(r for r in needed[''] if r.name == name)}'")
    missing = [
        f"{extra} ({purpose})" for extra, purpose in EXTRAS.items() if unmet(needed.get(extra, [])) and extra in needed
    ]
    if missing:
        section.note(
            f"extras that are not installed: {', '.join(missing)}", "where you need one: pip install 'mmft[…]'"
        )
    if others := _not_as_tested():
        section.note(f"other versions than the tests ran with: {', '.join(others)}")
    if _there("torchvision"):
        try:
            importlib.import_module("torchvision")
        except Exception as error:  # of any kind: a library built for another torch fails in its own ways
            section.warn(
                f"torchvision does not fit torch ({str(error).splitlines()[0]}); models that need it will not load",
                "install the torchvision of your torch: https://pytorch.org/get-started/previous-versions",
            )


def _there(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _not_as_tested() -> list[str]:
    """Libraries that a checkout's constraints name with another version."""
    file = CHECKOUT / "constraints.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    tested = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    main = {requirement.name for requirement in requirements()[""]}
    return [
        f"{name} {importlib.metadata.version(name)} ({version})"
        for name, version in tested.items()
        if name in main and _there(name) and Version(importlib.metadata.version(name)).public != version
    ]


# ---------------------------------------------------------------- devices


def _processors(section: Section) -> None:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = launched_threads()
    capable = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    half = "computes in bfloat16" if capable.get("avx512_bf16") or capable.get("amx_bf16") else "no bfloat16 of its own"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    section.numbers |= {"cores": cores, "threads": threads, "gpus": [gpu.name for gpu in gpus]}
    section.fine(f"{cores} processor core{'s' * (cores != 1)}; {half}{_memory(section)}")
    if not gpus and threads < cores:
        why = "OMP_NUM_THREADS says so" if os.environ.get("OMP_NUM_THREADS") else "unless it is told"
        section.note(
            f"accelerate launch lets torch use {threads} of {cores} cores, {why}",
            f"export OMP_NUM_THREADS={cores}; it helps large models, hardly the bundled one",
        )
    for i, gpu in enumerate(gpus):
        free, total = torch.cuda.mem_get_info(i)
        text = f"GPU {i}: {gpu.name}, {total / GIB:.1f} GiB, {free / GIB:.1f} free"
        if free < 0.8 * total:
            section.warn(text, "another program holds memory there: nvidia-smi shows which")
        else:
            section.fine(text)
    if not gpus and _nvidia() and torch.version.cuda is None:
        section.wrong(
            "there is an NVIDIA GPU, and this torch cannot use it: it was built for the CPU",
            "install torch with CUDA: https://pytorch.org/get-started",
        )
    elif not gpus and _nvidia():
        section.wrong("there is an NVIDIA GPU that torch does not see", "nvidia-smi shows whether its driver works")
    elif not gpus and torch.accelerator.is_available():
        section.fine(f"device: {torch.accelerator.current_accelerator()}; nothing was tried on one of this kind")
    elif not gpus:
        section.note(
            "no GPU: small models (the bundled one, up to some 300 million parameters) are all that is quick here"
        )


def launched_threads() -> int:
    """Threads that `accelerate launch` leaves to torch in a process: one, unless the environment says otherwise, or
    its settings are for a CPU; then the cores are shared out."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(os.environ["OMP_NUM_THREADS"])
    config = _launch_config()
    if config is None or not config.use_cpu:
        return 1
    import psutil

    return max((psutil.cpu_count(logical=False) or 1) // config.num_processes, 1)


def _memory(section: Section) -> str:
    """Memory in words. Linux tells; elsewhere nothing is said."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return ""
    held = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    section.numbers |= {"memory": held["MemTotal"], "memory_free": held["MemAvailable"]}
    return f"; {held['MemTotal'] / GIB:.1f} GiB of memory, {held['MemAvailable'] / GIB:.1f} free"


def _nvidia() -> bool:
    """Whether a driver shows a GPU. A variable may hide it from torch on purpose."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or shutil.which("nvidia-smi") is None:
        return False
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return done.returncode == 0 and "GPU 0" in done.stdout


# ---------------------------------------------------------------- disk, launcher, Hub


def _disk(section: Section, output: Path) -> None:
    there = next(folder for folder in [output, *output.absolute().parents] if folder.is_dir())
    free = shutil.disk_usage(there).free
    section.numbers["disk_free"] = free
    if not os.access(there, os.W_OK):
        section.wrong(f"{there} cannot be written to", "take another output.dir")
    elif free < LEAST_ROOM:
        section.wrong(f"{free / GIB:.2f} GiB of disk are free at {there}", "make room, or take another output.dir")
    else:
        section.fine(f"{free / GIB:.1f} GiB of disk are free at {there}")


def _launch_config() -> Any:
    """What `accelerate config` once wrote; None where nobody did."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    return load_config_from_file(None) if os.path.isfile(default_config_file) else None


def _launcher(section: Section) -> None:
    config = _launch_config()
    if config is None:
        section.note(
            "accelerate launch has no settings of its own: it takes one process, on the first device; "
            "accelerate_configs/ holds a file for each other way to run"
        )
        return
    kind = getattr(config.distributed_type, "value", config.distributed_type)
    section.note(
        f"accelerate launch takes the settings of accelerate config: {kind}, {config.num_processes} process"
        f"{'es' * (config.num_processes != 1)}, mixed precision {config.mixed_precision}"
    )


def _hub(section: Section) -> None:
    from huggingface_hub import constants, get_token

    login = "logged in" if get_token() else "not logged in (only needed for push and for gated models: hf auth login)"
    if constants.HF_HUB_OFFLINE:
        section.note(f"Hugging Face Hub: {login}; HF_HUB_OFFLINE is set, so only models that are here already load")
    else:
        section.note(f"Hugging Face Hub: {login}")
