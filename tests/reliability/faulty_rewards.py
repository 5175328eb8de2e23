"""Rewards for `test_distributed_faults.py`: sound in the first step, and on rank 1 of no use from the second on."""

import ctypes
import os
import time
from pathlib import Path

calls, colourless = 0, None


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
        ctypes.PyDLL(None).sleep(600)  # keeps the lock that every Python thread needs
    return [float(len(text)) for text in completions]


def waits_to_be_killed(completions, folder, **columns):
    if _fault(folder):
        time.sleep(600)
    return [float(len(text)) for text in completions]
