"""Processes that take turns: each measures when told to, and waits while the others do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

# Called with what was measured; True = go on. The callers' clocks stand still meanwhile.
Turn = Callable[[dict[str, Any]], bool]


class Process:
    """``python script --worker ORDER`` at the other end of two pipes (see `serve`). A context: it ends with it.

    On the CPU, also where there is a GPU: memory and time are read off the process.
    """

    def __init__(self, script: str, order: dict[str, Any], threads: int):
        self.order = order
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, script, "--worker", json.dumps(order)]
        self.errors = tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def read(self) -> dict[str, Any]:
        """The next thing it says. RuntimeError with its last words where it died."""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(f"the measurement {self.order} failed:\n{self.errors.read()[-4000:]}")
        return json.loads(line)

    def go(self, on: bool = True) -> dict[str, Any]:
        """Its next turn, or its end; what it says then."""
        self.process.stdin.write("go\n" if on else "stop\n")
        self.process.stdin.flush()
        return self.read()


def serve(measure: Callable[[Turn], dict[str, Any]]) -> None:
    """The worker's side: says what ``measure`` hands to its turn and waits for an answer; then says its result."""
    pipe, sys.stdout = sys.stdout, sys.stderr  # libraries print what they like

    def say(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=pipe, flush=True)

    def turn(found: dict[str, Any]) -> bool:
        say(found)
        if not (answer := sys.stdin.readline()):
            sys.exit("whoever started this measurement is gone")
        return answer == "go\n"

    say(measure(turn))
