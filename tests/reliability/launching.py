"""Two processes of one run, as a launcher starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_MARK = "STARTED_BY_TEST"  # in the environment of all processes of a launch


def start(folder: Path, script: Path, *arguments: str, config: str | None = None) -> subprocess.Popen:
    """Two processes by ``torchrun``, or by ``accelerate launch`` with a file of ``accelerate_configs``.

    The output is in ``folder/out`` and ``folder/err``.
    """
    paths = os.pathsep.join(str(path) for path in (HERE, HERE.parent / "training", HERE.parent, ROOT))
    variables = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    variables[_MARK] = str(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if config is not None:
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--mixed_precision", "no"]
        command += ["--num_processes", "2", "--main_process_port", "0"]
        command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    folder.mkdir(exist_ok=True)
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        return subprocess.Popen(
            [*command, str(script), *arguments],
            env=variables,
            cwd=ROOT,
            stdout=out,
            stderr=err,
        )


def launch(folder: Path, script: Path, *arguments: str, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    """The same, waited for; nothing of it is left when the time is over."""
    process = start(folder, script, *arguments, **options)
    try:
        code = process.wait(timeout)
    finally:
        end(folder)
        process.wait()
    return subprocess.CompletedProcess(process.args, code, (folder / "out").read_text(), (folder / "err").read_text())


def end(folder: Path) -> list[int]:
    """Kills what is left of a launch; returns the ids of those processes."""
    left = running(folder)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def running(folder: Path) -> list[int]:
    """The processes of a launch that live, the launcher and children of children among them."""
    mark, found = f"{_MARK}={folder}".encode(), []
    for place in Path("/proc").iterdir():
        with suppress(OSError):  # gone meanwhile, or a zombie, which holds nothing
            if place.name.isdigit() and mark in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found
