"""A phase that takes too long ends its process, and the others of its run, with one line that says who it was."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmft.training.watchdog import TIMED_OUT, Watchdog

HERE = Path(__file__).parent


def run(case: str, limit: float) -> tuple[list[subprocess.CompletedProcess], float]:
    """One process, or two; what each printed, and the seconds from the first's start to the last's end."""
    several = "two" in case
    common = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    common |= {"WORLD_SIZE": "2", "MASTER_PORT": str(free_port())} if several else {}
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "watched.py"), case, str(limit)],
            env=common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if several else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2 if several else 1)
    ]
    found = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        found.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return found, time.monotonic() - began


def free_port() -> int:
    import socket

    with socket.socket() as place:
        place.bind(("localhost", 0))
        return place.getsockname()[1]


def last_line(done: subprocess.CompletedProcess) -> str:
    return done.stderr.strip().splitlines()[-1]


def test_a_hang_ends_in_one_line_below_the_stacks():
    (done,), _ = run("python", 1.0)
    assert done.returncode == TIMED_OUT and "done" not in done.stdout
    assert last_line(done).startswith("error: rank 0, in phase 'reward' of step 3, took ")
    assert "train.timeout is 1" in last_line(done)
    assert "in hang_here" in done.stderr and "most recent call first" in done.stderr


def test_c_code_that_keeps_the_interpreter_is_ended_with_stacks():
    """No Python thread can run there."""
    (done,), _ = run("c", 1.0)
    assert done.returncode == 1 and "in hold_the_interpreter" in done.stderr and "Timeout (0:00:03)!" in done.stderr


def test_the_limit_is_of_one_phase_and_not_of_all():
    (done,), _ = run("patient", 1.5)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("case", "doing"),
    [
        ("two_hang", "which is in phase 'reward' of step 3 since"),  # one still in an earlier phase
        ("two_together", "which is in phase 'reward' of step 3 since"),  # both in one; the other waits in a collective
        ("two_hold", "which is without a sign of life since phase 'reward' of step 3"),
    ],
)
def test_the_process_that_waits_names_the_one_that_hangs(case, doing):
    (waits, hangs), _ = run(case, 3.0)
    assert waits.returncode == TIMED_OUT, waits.stderr
    assert f"for rank 1, {doing}" in last_line(waits) and "error: rank 0, in phase" in last_line(waits)
    assert hangs.returncode != 0


def test_an_error_of_one_ends_the_others_before_their_limit():
    (waits, raises), seconds = run("two_raise", 40.0)
    assert seconds < 30
    said = "because rank 1 failed in phase 'scores' of step 3: KeyError: 'colour'"
    assert waits.returncode == 1 and said in last_line(waits)
    assert raises.returncode != 0


def watching(known: set[threading.Thread]) -> set[threading.Thread]:
    """Watchdogs' threads that are not among ``known``: what earlier tests and libraries left comes and goes."""
    return {thread for thread in threading.enumerate() if thread.name == "mmft-watchdog"} - known


def all_ended(known: set[threading.Thread]) -> bool:
    """Whether every new thread ends once it is told to; a busy machine may take a while to let it."""
    for thread in watching(known):
        thread.join(10)
    return not watching(known)


def test_nothing_is_left_of_it():
    """A thread per trainer, or an armed timer, would outlive a run in a notebook."""
    watched, known = Watchdog(60.0), set(threading.enumerate())
    for _ in range(3):
        with watched.phase("step", 1), watched.phase("reward"):
            assert len(watching(known)) == 1
        assert all_ended(known)
    with pytest.raises(KeyError), watched.phase("step", 2):
        raise KeyError
    assert all_ended(known) and watched._open == []
    faulthandler.cancel_dump_traceback_later()  # nothing to cancel, and no error either


def test_no_limit_and_no_others_cost_no_thread():
    known = set(threading.enumerate())
    with Watchdog(None).phase("step", 1):
        assert not watching(known)
