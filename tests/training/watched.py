"""Run by `test_watchdog.py`: a process, or one of two, that fails in the way it is told."""

import ctypes
import sys
import time

import torch
from torch import distributed

from mmft.training import watchdog
from mmft.training.watchdog import Watchdog

case, limit = sys.argv[1], float(sys.argv[2])
watchdog._GRACE = 1.0
if case == "c":
    watchdog._FALLBACK = 2.0


def hang_here() -> None:
    time.sleep(60)


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(12)  # PyDLL keeps the lock that every Python thread needs


if "two" not in case:
    watched = Watchdog(limit)
    with watched.phase("step", 3):
        if case == "patient":
            for _ in range(3):
                with watched.phase("reward"):
                    time.sleep(0.7 * limit)
            time.sleep(0.8 * limit)  # and of the time between phases none is of theirs
        with watched.phase("reward"):
            {"python": hang_here, "c": hold_the_interpreter, "patient": time.monotonic}[case]()
    print("done")
    sys.exit()

distributed.init_process_group("gloo")
rank = distributed.get_rank()
# The one that hangs is given longer: the line of the one that waits is looked at, and the first of both ends the other.
watched = Watchdog(limit + 30 * rank, rank, 2)
distributed.barrier()
with watched.phase("step", 3):
    with watched.phase("reward"):
        if rank == 1:
            if case in ("two_hang", "two_together"):
                hang_here()
            if case == "two_hold":
                hold_the_interpreter()
            if case == "two_raise":
                try:
                    with watched.phase("scores"):
                        raise KeyError("colour")
                except KeyError:
                    pass
                hang_here()  # its farewell takes long
        if case == "two_together":
            distributed.all_reduce(torch.zeros(1))
    with watched.phase("update"):
        if case == "two_raise":
            hang_here()  # as a collective of a library that does not notice
        distributed.all_reduce(torch.zeros(1))
