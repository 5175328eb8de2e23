"""Rewards for `test_distributed_faults.py`: sound in the first step, and on rank 1 of no use from the second on."""

import os
import re
import time
from pathlib import Path

calls, colourless = -1, None  # held-out rows are scored once before the first step


def _fault(folder: str) -> bool:
    """Whether the fault is due; its time, and this process, are written down then."""
    global calls
    calls += 1
    rank = int(os.environ["RANK"])
    (Path(folder) / f"step{calls}.rank{rank}").write_text(str(os.getpid()))
    return calls >= 2 and rank == 1


def raises(completions, id, folder, **columns):
    global colourless
    if _fault(folder):
        colourless = colourless or id[-1]
        if colourless in id:
            raise KeyError(f"no colour in {colourless}")
    return [float(len(text)) for text in completions]


def hangs(completions, folder, **columns):
    if _fault(folder):
        time.sleep(600)
    return [float(len(text)) for text in completions]


def holds(completions, folder, **columns):
    if _fault(folder):
        re.match(r"(a+)+$", "a" * 64 + "b")  # for ages, in C code that lets no other Python thread run
    return [float(len(text)) for text in completions]
